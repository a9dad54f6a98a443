"""Law: tokens meet their experts on other devices as they do on one, for any routing, gradients included."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from model.experts import Activation, Experts, on_received_rows, reference, run_experts
from sharding.data_parallel import divides, gather, on_own_tokens
from sharding.expert_parallel import chosen, left_out, send_rows, spread_experts
from sharding.mesh import MeshConfig, make_mesh
from sharding.rules import DECODE, TRAIN, spec

TOKENS, CHOICES, EXPERTS, WIDTH, HIDDEN = 64, 2, 8, 16, 8
AXES = {
    "gate_EDF": ("expert", "embed", "mlp"),
    "up_EDF": ("expert", "embed", "mlp"),
    "down_EDF": ("expert", "embed", "mlp"),
    "gate_bias_EF": ("expert", "mlp"),
    "up_bias_EF": ("expert", "mlp"),
    "down_bias_ED": ("expert", "embed"),
}
SIZES = {"expert": EXPERTS, "embed": WIDTH, "mlp": HIDDEN}
MESHES = [(1, 1, 8, 1), (1, 2, 2, 2), (2, 1, 4, 1), (1, 4, 1, 2), (2, 2, 2, 1)]


def inputs(routing: str, biased: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
    """Tokens, choices, weights and parameters."""
    rng = np.random.default_rng(0)
    x_MD = rng.standard_normal((TOKENS, WIDTH), np.float32)
    ids_MC = np.stack([rng.permutation(EXPERTS)[:CHOICES] for _ in range(TOKENS)]).astype(np.int32)
    if routing == "one hot expert":
        ids_MC = np.broadcast_to(np.array([3, 5], np.int32), ids_MC.shape).copy()
    elif routing == "padding and empty experts":
        ids_MC = ids_MC % 3
        ids_MC[ids_MC[:, 0] == ids_MC[:, 1], 1] = 7
        ids_MC[TOKENS // 3 :: 2] = EXPERTS
    elif routing == "nothing":
        ids_MC[:] = EXPERTS
    weights_MC = rng.random((TOKENS, CHOICES), np.float32) * (ids_MC < EXPERTS)
    names = AXES if biased else list(AXES)[:3]
    params = {n: rng.standard_normal([SIZES[a] for a in AXES[n]], np.float32) * 0.3 for n in names}
    return x_MD, ids_MC, weights_MC, params


def exchanged(exchange, x_MD, ids_MC, weights_MC, params, kind: Activation = "swiglu", training=True):
    """The experts of `params` on the mesh in force; while training on each device's own tokens."""
    names = list(params)

    def run(x_MD, ids_MC, weights_MC, params):
        return spread_experts(
            x_MD,
            ids_MC,
            weights_MC,
            params,
            axes={name: AXES[name] for name in names},
            table=TRAIN if training else DECODE,
            exchange=exchange,
            compute=lambda x, i, w, p, shards: run_experts(
                x, i, w, Experts(**p), training=training, activation=kind, shards=shards
            ),
            apply=lambda rows, share, counts, p: on_received_rows(rows, share, counts, Experts(**p), kind),
        )

    def local(leaves, tokens):
        whole = [gather(leaf, AXES[name], leaf.dtype) for name, leaf in zip(names, leaves, strict=True)]
        x, ids, shares = (a[:, 0] for a in tokens)
        return run(x, ids, shares, dict(zip(names, whole, strict=True)))[:, None], ()

    tokens = (x_MD, jnp.asarray(ids_MC), weights_MC)
    if not training or not divides((len(x_MD), 1), x_MD.dtype):
        return run(*tokens, params)
    return on_own_tokens(local, list(params.values()), [AXES[name] for name in names], [a[:, None] for a in tokens])[0][
        :, 0
    ]


def loss(function, dy_MD, x_MD, weights_MC, params):
    return jnp.sum(function(x_MD, weights_MC, params) * dy_MD)


@pytest.mark.parametrize("routing", ["even", "one hot expert", "padding and empty experts", "nothing"])
@pytest.mark.parametrize("shape", MESHES, ids=str)
@pytest.mark.parametrize("exchange", ["ring", "all_to_all", "gspmd"])
def test_any_routing(exchange, shape: tuple[int, int, int, int], routing: str) -> None:
    biased = shape[3] == 2
    x_MD, ids_MC, weights_MC, params = inputs(routing, biased)
    kind: Activation = "clamped" if biased else "swiglu"
    dy_MD = np.random.default_rng(1).standard_normal(x_MD.shape, np.float32)

    def plain(x_MD, weights_MC, params):
        return reference(x_MD, jnp.asarray(ids_MC), weights_MC, Experts(**params), kind)

    def spread(x_MD, weights_MC, params):
        return exchanged(exchange, x_MD, ids_MC, weights_MC, params, kind)

    def both(function, x_MD, weights_MC, params):
        gradient = jax.grad(partial(loss, function, dy_MD), argnums=(0, 1, 2))
        return function(x_MD, weights_MC, params), *gradient(x_MD, weights_MC, params)

    expected = jax.jit(partial(both, plain))(x_MD, weights_MC, params)
    mesh = make_mesh(MeshConfig(*shape))
    placed = {n: jax.device_put(p, NamedSharding(mesh, spec(AXES[n], TRAIN))) for n, p in params.items()}
    with jax.set_mesh(mesh):
        found = jax.jit(partial(both, spread))(x_MD, weights_MC, placed)
    for value, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert np.abs(value - wanted).max() <= 1e-5 * max(np.abs(wanted).max(), 1e-6)


def test_dropping_leaves_out_what_has_no_room_and_counts_it() -> None:
    """Per device and expert the first pairs stay, as many as its buffer has rows; the others count nothing."""
    x_MD, ids_MC, weights_MC, params = inputs("one hot expert", biased=False)
    shards, own = 4, TOKENS // 4
    room = send_rows((own, CHOICES), EXPERTS)
    kept, dropped = np.array(weights_MC), 0
    for shard in range(shards):
        seen = np.zeros(EXPERTS + 1, int)
        for token in range(shard * own, (shard + 1) * own):
            for choice in range(CHOICES):
                expert = ids_MC[token, choice]
                if expert < EXPERTS and seen[expert] >= room:
                    kept[token, choice], dropped = 0, dropped + 1
                seen[expert] += 1
    assert dropped > 0
    expected = reference(jnp.asarray(x_MD), jnp.asarray(ids_MC), jnp.asarray(kept), Experts(**params))
    counts = np.stack([np.bincount(part.reshape(-1), minlength=EXPERTS + 1) for part in np.split(ids_MC, shards)])

    def counted(_: list, tokens: jax.Array):
        counts_E = jnp.bincount(tokens.reshape(-1), length=EXPERTS).astype(jnp.float32)
        return tokens, left_out("dropping", counts_E, (own, CHOICES))

    with jax.set_mesh(make_mesh(MeshConfig(fsdp=2, expert=2))):
        found = jax.jit(partial(exchanged, "dropping"))(x_MD, ids_MC, weights_MC, params)
        _, total = jax.jit(lambda ids: on_own_tokens(counted, [], [], ids))(jnp.asarray(ids_MC)[:, None])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert int(total) == dropped == np.maximum(counts[:, :EXPERTS] - room, 0).sum()


@pytest.mark.parametrize("exchange", ["ring", "all_to_all"])
def test_collectives_are_those_of_the_exchange(exchange) -> None:
    """Weights are gathered over fsdp and their gradients scattered; nothing is reduced over all devices."""
    x_MD, ids_MC, weights_MC, params = inputs("even", biased=False)
    mesh = make_mesh(MeshConfig(fsdp=2, expert=4))

    def function(x_MD, weights_MC, params):
        return jnp.sum(exchanged(exchange, x_MD, ids_MC, weights_MC, params) ** 2)

    placed = {n: jax.device_put(p, NamedSharding(mesh, spec(AXES[n], TRAIN))) for n, p in params.items()}
    with jax.set_mesh(mesh):
        text = jax.jit(jax.grad(function, argnums=2)).lower(x_MD, weights_MC, placed).as_text()
    assert text.count("all_to_all") == 0 if exchange == "ring" else text.count("all_to_all") > 0
    assert "all_gather" in text and "reduce_scatter" in text


def test_the_exchange_that_moves_less_is_chosen() -> None:
    assert chosen("auto", 8, 8) == "ring" and chosen("auto", 64, 8) == "all_to_all"
    assert chosen("ring", 64, 8) == "ring"


def test_tokens_that_do_not_divide_are_left_to_the_compiler() -> None:
    x_MD, ids_MC, weights_MC, params = inputs("even", biased=False)
    x_MD, ids_MC, weights_MC = x_MD[:3], ids_MC[:3], weights_MC[:3]
    expected = reference(jnp.asarray(x_MD), jnp.asarray(ids_MC), jnp.asarray(weights_MC), Experts(**params))
    with jax.set_mesh(make_mesh(MeshConfig(expert=8))):
        function = partial(exchanged, "all_to_all", training=False)
        found = jax.jit(function)(x_MD, ids_MC, weights_MC, params)
    np.testing.assert_allclose(found, expected, atol=1e-5)
