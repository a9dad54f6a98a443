"""Law: every way of computing the experts is the reference, gradients included, whatever the routing.

And the router: what is chosen, what it weighs, what is counted; and what must not matter (the order of experts,
padding, how layers are held, what is recomputed).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from zlib import crc32

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from parity import carry

from model import experts
from model.config import ModelConfig, MoEConfig
from model.experts import Experts
from model.forward import Batch, Output, forward
from model.layers import Keys
from model.moe import MoE, route
from model.transformer import Transformer
from model.tree import Skeleton


def assert_same(one, two, tolerance: float) -> None:
    """Every leaf agrees to a share of its largest magnitude; 0 means bit for bit."""
    for (path, a), b in zip(jax.tree.leaves_with_path(one), jax.tree.leaves(two), strict=True):
        assert np.abs(a - b).max() <= tolerance * np.abs(a).max(), jax.tree_util.keystr(path)


# ---- experts --------------------------------------------------------------
SHAPES = [(24, 2, 6), (1, 2, 6), (259, 3, 4)]
"""Tokens, choices, experts; compiled once each."""
WIDTH, HIDDEN = 8, 12


def joined(params: Experts) -> Experts:
    """The same with gate and up side by side."""
    assert params.up_EDF is not None
    return params._replace(gate_EDF=jnp.concatenate([params.gate_EDF, params.up_EDF], -1), up_EDF=None)


BACKENDS: dict[str, Callable] = {
    "ragged": lambda *inputs: experts.ragged(*inputs, inputs[1].size),
    "ragged in rounds": lambda *inputs: experts.ragged(*inputs, 8),
    "ragged and joined": lambda *inputs: experts.ragged(*inputs[:3], joined(inputs[3]), 64),
    "per_pair": experts.per_pair,
    "grouped_blocks_only": lambda *inputs: experts.grouped(*inputs, 0, 4),
    "grouped_overflowing": lambda *inputs: experts.grouped(*inputs, 3, 2),
    "grouped_buffers_only": lambda *inputs: experts.grouped(*inputs, 64, 8),
}
CLAMPED: dict[str, Callable] = {
    "reference": lambda *inputs: experts.reference(*inputs, activation="clamped"),
    "ragged": lambda *inputs: experts.ragged(*inputs, inputs[1].size, "clamped"),
    "ragged in rounds": lambda *inputs: experts.ragged(*inputs, 16, "clamped"),
    "ragged and joined": lambda *inputs: experts.ragged(*inputs[:3], joined(inputs[3]), 16, "clamped"),
    "per_pair": lambda *inputs: experts.per_pair(*inputs, activation="clamped"),
    "grouped_blocks_only": lambda *inputs: experts.grouped(*inputs, 0, 4, "clamped"),
    "grouped_overflowing": lambda *inputs: experts.grouped(*inputs, 3, 2, "clamped"),
    "grouped_buffers_only": lambda *inputs: experts.grouped(*inputs, 64, 8, "clamped"),
}


@cache
def with_gradients(function: Callable) -> Callable:
    """`(ids, x, weights, params, dy) -> y, gradients of all that has one`."""

    def run(ids_MC, x_MD, weights_MC, params, dy_MD):
        y_MD, pull = jax.vjp(lambda x, w, p: function(x, ids_MC, w, p), x_MD, weights_MC, params)
        return y_MD, pull(dy_MD)

    return jax.jit(run)


@cache
def values(tokens: int, choices: int, count: int) -> tuple:
    """x, weights, experts and the gradient of the output."""
    rng = np.random.RandomState(tokens)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = Experts(normal(count, WIDTH, HIDDEN), normal(count, WIDTH, HIDDEN), normal(count, WIDTH, HIDDEN))
    return normal(tokens, WIDTH), normal(tokens, choices), params, normal(tokens, WIDTH)


@pytest.mark.parametrize("backend", BACKENDS)
def test_biases_and_the_clamped_activation(backend: str):
    """Every backend is the reference with them too, gradients included; inputs are large enough to be clamped."""
    shape, rng = (24, 2, 6), np.random.RandomState(3)
    x, weights, params, dy = values(*shape)
    biases = [jnp.asarray(rng.normal(size=(6, size)), jnp.float32) for size in (HIDDEN, HIDDEN, WIDTH)]
    inputs = (5 * x, weights, Experts(*params[:3], *biases), dy)
    own, truth = (with_gradients(CLAMPED[name]) for name in (backend, "reference"))
    for ids_MC in routings(*shape).values():
        ours, expected = (f(jnp.asarray(ids_MC, jnp.int32), *inputs) for f in (own, truth))
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
            assert np.abs(a - b).max() <= 1e-5 * max(np.abs(b).max(), 1.0)


def test_the_clamped_activation_by_hand():
    gate, up = jnp.asarray([9.0, 1.0, -9.0]), jnp.asarray([-8.0, 2.0, 8.0])
    expected = [
        (-7 + 1) * 7 / (1 + np.exp(-1.702 * 7)),
        (2 + 1) * 1 / (1 + np.exp(-1.702)),
        (7 + 1) * -9 / (1 + np.exp(1.702 * 9)),
    ]
    np.testing.assert_allclose(experts.activate(gate, up, "clamped"), expected, rtol=1e-6)


def assert_is_reference(function: Callable, ids_MC: np.ndarray, count: int) -> None:
    inputs = (jnp.asarray(ids_MC, jnp.int32), *values(*ids_MC.shape, count))
    ours = with_gradients(function)(*inputs)
    truth = with_gradients(experts.reference)(*inputs)
    for (path, a), b in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(truth), strict=True):
        assert np.abs(a - b).max() <= 1e-5 * max(np.abs(b).max(), 1.0), jax.tree_util.keystr(path)


def routings(tokens: int, choices: int, count: int) -> dict[str, np.ndarray]:
    """The routings that have a shape of their own."""
    rng = np.random.RandomState(0)
    uniform = np.stack([rng.permutation(count)[:choices] for _ in range(tokens)])
    even = (np.arange(tokens * choices) % count).reshape(tokens, choices)
    hot = uniform.copy()
    hot[:, 0] = 3
    padded = uniform.copy()
    padded[tokens // 2 :] = count
    return {
        "uniform": uniform,
        "even": even,
        "one expert": np.full((tokens, choices), 3),
        "one hot expert": hot,
        "the last expert alone": np.full((tokens, choices), count - 1),
        "empty experts": uniform % 2 * 2,
        "padding behind": padded,
        "padding between": np.where(rng.rand(tokens, 1) < 0.5, count, uniform),
        "padding alone": np.full((tokens, choices), count),
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_is_the_reference(backend: str):
    for shape in SHAPES:
        for name, ids_MC in routings(*shape).items():
            try:
                assert_is_reference(BACKENDS[backend], ids_MC, shape[2])
            except AssertionError as error:
                raise AssertionError(f"{name}, {shape}: {error}") from error


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=40)
@given(data=st.data(), shape=st.sampled_from(SHAPES))
def test_every_backend_is_the_reference_for_any_routing(backend: str, data: st.DataObject, shape: tuple):
    tokens, choices, count = shape
    ids = data.draw(st.lists(st.integers(0, count), min_size=tokens * choices, max_size=tokens * choices))
    assert_is_reference(BACKENDS[backend], np.array(ids).reshape(tokens, choices), count)


@settings(deadline=None, max_examples=5)
@given(shape=st.sampled_from(SHAPES), capacity=st.integers(0, 12), block=st.integers(1, 9), seed=st.integers(0, 99))
def test_buffers_and_blocks_of_any_size(shape: tuple, capacity: int, block: int, seed: int):
    tokens, choices, count = shape
    ids_MC = np.random.RandomState(seed).randint(0, count + 1, (tokens, choices))
    assert_is_reference(lambda *inputs: experts.grouped(*inputs, capacity, block), ids_MC, count)


@pytest.mark.parametrize("training", [True, False])
def test_whichever_backend_is_chosen_is_the_reference(training: bool):
    chosen = jax.jit(lambda *inputs: experts.run_experts(*inputs, training=training))
    for shape in SHAPES:
        x_MD, weights_MC, params, _ = values(*shape)
        for name, ids_MC in routings(*shape).items():
            difference = chosen(x_MD, ids_MC, weights_MC, params) - experts.reference(
                x_MD, jnp.asarray(ids_MC), weights_MC, params
            )
            assert np.abs(difference).max() <= 1e-4, (name, shape)


def test_a_decoded_tokens_bits_do_not_depend_on_its_company():
    """Nor on its place among them: neither what the others hold nor where they are sent matters."""
    chosen = jax.jit(lambda *inputs: experts.run_experts(*inputs, training=False))
    x_MD, weights_MC, params, other_MD = values(*SHAPES[0])
    kinds = routings(*SHAPES[0])
    ids_MC = kinds["uniform"]
    alone = np.asarray(chosen(x_MD, ids_MC, weights_MC, params))[0]
    for name, ids in kinds.items():
        company = np.concatenate([ids_MC[:1], ids[1:]])
        x = jnp.concatenate([x_MD[:1], other_MD[1:]])
        shift = len(name) % 5
        y_MD = chosen(*(jnp.roll(a, shift, axis=0) for a in (x, company, weights_MC)), params)
        assert (y_MD[shift] == alone).all(), name


def test_the_reference_by_hand():
    x_MD, weights_MC, params, _ = values(9, 3, 4)
    ids_MC = routings(9, 3, 4)["padding between"]
    expected = np.zeros((9, WIDTH))
    for token, ids in enumerate(ids_MC):
        for choice, expert in enumerate(ids):
            if expert < 4:
                gate, up, down = (np.asarray(w[expert], np.float64) for w in params[:3])
                gated = x_MD[token] @ gate
                hidden = gated / (1 + np.exp(-gated)) * (x_MD[token] @ up)
                expected[token] += weights_MC[token, choice] * (down @ hidden)
    assert np.abs(experts.reference(x_MD, jnp.asarray(ids_MC), weights_MC, params) - expected).max() < 1e-4


# ---- router ---------------------------------------------------------------
EXPERTS, TOKENS = 8, 20
LOGITS = jnp.asarray(np.random.RandomState(1).normal(size=(TOKENS, EXPERTS)), jnp.float32)
VALID = jnp.arange(TOKENS) % 5 != 4
REAL = np.asarray(VALID)
ROUTER = MoEConfig(num_experts=EXPERTS, experts_per_token=2, intermediate_size=4)


def scores(moe: MoEConfig) -> np.ndarray:
    x = np.asarray(LOGITS, np.float64)
    if moe.score == "sigmoid":
        return 1 / (1 + np.exp(-x))
    return np.exp(x) / np.exp(x).sum(-1, keepdims=True)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_best_are_chosen_and_weighed(score, normalize):
    moe = replace(ROUTER, score=score, normalize=normalize, scale=2.5)
    ids_MC, weights_MC, _ = route(LOGITS, VALID, moe)
    expected_ids = np.argsort(-scores(moe), axis=-1)[:, :2]
    assert (ids_MC[REAL] == expected_ids[REAL]).all()
    expected = np.take_along_axis(scores(moe), expected_ids, -1)
    expected = expected / expected.sum(-1, keepdims=True) if normalize else expected
    assert np.abs(weights_MC - 2.5 * expected)[REAL].max() < 1e-6


def test_padding_goes_nowhere_and_weighs_nothing():
    ids_MC, weights_MC, _ = route(LOGITS, VALID, ROUTER)
    assert (ids_MC[~REAL] == EXPERTS).all()
    assert (weights_MC[~REAL] == 0).all()


@pytest.mark.parametrize("bias", [False, True])
def test_only_experts_of_the_best_groups_are_chosen(bias):
    """A group is as good as the sum of its two best experts."""
    moe = replace(ROUTER, score="sigmoid", num_groups=4, groups_per_token=2, experts_per_token=3)
    bias_E = jnp.asarray(np.random.RandomState(2).normal(size=EXPERTS), jnp.float32) if bias else None
    ids_MC, _, _ = route(LOGITS, VALID, moe, bias_E)
    choice = scores(moe) + (0 if bias_E is None else np.asarray(bias_E))
    free, _, _ = route(LOGITS, VALID, replace(moe, num_groups=1, groups_per_token=1), bias_E)
    assert not (ids_MC == free).all()
    for token in np.flatnonzero(REAL):
        groups = choice[token].reshape(4, 2)
        kept = np.argsort(-groups.sum(-1))[:2]
        allowed = [e for e in np.argsort(-choice[token]) if e // 2 in kept]
        assert list(ids_MC[token]) == allowed[:3]


def test_the_selection_bias_changes_the_choice_but_not_the_weights():
    bias_E = jnp.zeros(EXPERTS).at[5].set(10.0)
    moe = replace(ROUTER, normalize=False)
    ids_MC, weights_MC, stats = route(LOGITS, VALID, moe, bias_E)
    assert (ids_MC[REAL][:, 0] == 5).all()
    assert np.abs(weights_MC - np.take_along_axis(scores(moe), np.minimum(ids_MC, 7), -1))[REAL].max() < 1e-6
    assert stats.counts_E[5] == REAL.sum()
    gradient = jax.grad(lambda bias: route(LOGITS, VALID, moe, bias)[1].sum())(bias_E)
    assert (gradient == 0).all()


def test_statistics_are_of_the_tokens_alone():
    for moe in (ROUTER, replace(ROUTER, score="sigmoid", experts_per_token=3)):
        ids_MC, _, stats = route(LOGITS, VALID, moe)
        assert stats.counts_E.sum() == moe.experts_per_token * REAL.sum()
        assert (stats.counts_E == np.bincount(np.asarray(ids_MC)[REAL].ravel(), minlength=EXPERTS)).all()
        assert float(stats.scores_E.sum()) == pytest.approx(REAL.sum(), rel=1e-6)
        share = scores(moe) / scores(moe).sum(-1, keepdims=True)
        assert np.abs(stats.scores_E - share[REAL].sum(0)).max() < 1e-5
        z = np.square(np.log(np.exp(np.asarray(LOGITS, np.float64)).sum(-1)))[REAL].sum()
        assert float(stats.z) == pytest.approx(z, rel=1e-6)
        other = jnp.where(VALID[:, None], LOGITS, 99.0)
        assert_same(stats, route(other, VALID, moe)[2], 0)


def test_a_replayed_choice_keeps_its_weights_and_counts():
    free = route(LOGITS, VALID, ROUTER)
    again = route(LOGITS, VALID, ROUTER, replay_MC=free[0])
    assert_same(free, again, 0)
    given = jnp.stack([jnp.full(TOKENS, 6), jnp.full(TOKENS, 1)], axis=1)
    ids_MC, weights_MC, _ = route(LOGITS, VALID, replace(ROUTER, normalize=False), replay_MC=given)
    assert (ids_MC[REAL] == given[REAL]).all()
    assert np.abs(weights_MC - scores(ROUTER)[:, [6, 1]])[REAL].max() < 1e-6


# ---- layer and model ------------------------------------------------------
# A dense layer, then twice a dense and a routed one: stacked, it has a stack of each kind.
CONFIG = ModelConfig(
    vocab_size=64,
    hidden_size=16,
    num_layers=5,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=24,
    moe=MoEConfig(
        num_experts=6,
        experts_per_token=2,
        intermediate_size=8,
        shared_intermediate_size=12,
        score="sigmoid",
        selection_bias=True,
        dense_layers=(0, 1, 3),
    ),
)


def drawn(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Weights that depend on the name alone."""
    return np.random.RandomState(crc32(name.encode())).normal(0, 0.3, shape).astype(np.float32)


def moe_layer() -> MoE:
    """A routed layer."""
    module = nnx.eval_shape(lambda: MoE(CONFIG, Keys(jax.random.key(0))))
    for path, leaf in nnx.to_flat_state(state := nnx.state(module)):
        leaf.set_value(jnp.asarray(drawn(".".join(map(str, path)), leaf.shape)))
    nnx.update(module, state)
    return module


def output_of(module: MoE, x_BTD: jax.Array) -> np.ndarray:
    return np.asarray(module(x_BTD, jnp.ones(x_BTD.shape[:2], bool), training=True)[0])


def test_the_order_of_experts_does_not_matter():
    module = moe_layer()
    x_BTD = jnp.asarray(np.random.RandomState(3).normal(size=(2, 7, 16)), jnp.float32)
    before = output_of(module, x_BTD)
    order = jnp.asarray([3, 0, 5, 1, 4, 2])
    for leaf in (module.gate_EDF, module.up_EDF, module.down_EDF):
        leaf.set_value(leaf[...][order])
    assert np.abs(output_of(module, x_BTD) - before).max() > 1e-2
    assert module.bias_E is not None
    module.router_DE.set_value(module.router_DE[...][:, order])
    module.bias_E.set_value(module.bias_E[...][order])
    assert np.abs(output_of(module, x_BTD) - before).max() <= 1e-6


def test_the_shared_expert_is_added_through_its_gate_or_without():
    x_BTD = jnp.asarray(np.random.RandomState(3).normal(size=(2, 7, 16)), jnp.float32)
    gated = moe_layer()
    assert gated.shared is not None
    assert gated.shared_gate_D is not None
    shared = np.asarray(gated.shared(x_BTD))
    gate = 1 / (1 + np.exp(-np.asarray(x_BTD @ gated.shared_gate_D[...])))[..., None]
    whole = output_of(gated, x_BTD)
    gated.shared_gate_D = None
    ungated = output_of(gated, x_BTD)
    gated.shared = None
    alone = output_of(gated, x_BTD)
    assert np.abs(ungated - alone - shared).max() <= 1e-6
    assert np.abs(whole - alone - gate * shared).max() <= 1e-6


def batch() -> Batch:
    """Two rows; the second holds two documents and padding."""
    tokens_BT = jnp.asarray(np.random.RandomState(4).randint(0, 64, (2, 10)))
    segments = [[1] * 10, [1, 1, 1, 1, 2, 2, 2, 0, 0, 0]]
    positions = [[*range(10)], [0, 1, 2, 3, 0, 1, 2, 0, 0, 0]]
    return Batch(tokens_BT, jnp.asarray(positions), jnp.asarray(segments))


@cache
def made(stacked: bool, remat: carry.Remat = "none") -> Transformer:
    """A model whose arrays, selection biases too, are drawn layer by layer, so that each form has the same."""
    empty = jax.eval_shape(lambda key: Transformer(CONFIG, key, stacked=stacked, remat=remat), jax.random.key(0))
    skeleton, arrays = Skeleton(empty), {}
    for path, shape in skeleton.shapes.items():
        own = carry.flat_names(path, CONFIG, stacked)
        part = shape[1:] if len(own) > 1 else shape
        arrays[path] = jnp.asarray(np.reshape([drawn(flat, part) for flat in own], shape))
    return skeleton.merge(arrays, arrays)


@cache
def run(stacked: bool, remat: carry.Remat = "none") -> tuple[Output, carry.Weights]:
    """What forward gives, and the gradients of a sum that all of it enters, by layer."""
    skeleton = Skeleton(made(stacked, remat))
    params, extra = skeleton.split(made(stacked, remat))

    def function(params):
        output = forward(skeleton.merge(params, extra), batch())
        assert output.stats is not None
        stats = jnp.square(output.stats.scores_E).sum() + output.stats.z.sum()
        return jnp.square(output.hidden_BTD).sum() + stats, output

    gradients, output = jax.jit(jax.grad(function, has_aux=True))(params)
    return output, carry.flatten(gradients, CONFIG, stacked)


FORWARD = jax.jit(forward)


def test_both_forms_start_from_the_same_weights():
    config = replace(CONFIG, num_layers=3, moe=MoEConfig())
    listed, stacked = (
        carry.flatten(Skeleton(model).split(model)[0], config, model.stacked)
        for model in (Transformer(config, jax.random.key(7), stacked=form) for form in (False, True))
    )
    assert_same(listed, stacked, 1e-6)
    assert not (listed["layers.1.feed_forward.up_DF"] == listed["layers.2.feed_forward.up_DF"]).any()


def test_stacked_layers_are_the_listed_ones():
    assert_same(run(stacked=False), run(stacked=True), 1e-5)


def test_recomputing_changes_nothing():
    """But for rounding: the compiler fuses the two programs differently."""
    assert_same(run(stacked=True), run(stacked=True, remat="dots"), 1e-6)


@pytest.mark.parametrize("stacked", [False, True])
def test_replaying_a_models_own_choices_changes_no_bit(stacked: bool):
    free = FORWARD(made(stacked), batch())
    assert_same(free, FORWARD(made(stacked), batch(), replay=free.experts_LBTC), 0)
    other = FORWARD(made(stacked), batch(), replay=(free.experts_LBTC + 1) % 6)
    assert np.abs(other.hidden_BTD - free.hidden_BTD)[np.asarray(batch().segments_BT) > 0].max() > 1e-3


def test_what_padding_holds_does_not_matter():
    real_BT = np.asarray(batch().segments_BT) > 0
    other = replace(batch(), tokens_BT=jnp.where(real_BT, batch().tokens_BT, 63))
    one, two = FORWARD(made(False), batch()), FORWARD(made(False), other)
    assert (one.hidden_BTD == two.hidden_BTD)[real_BT].all()
    assert_same((one.stats, one.experts_LBTC), (two.stats, two.experts_LBTC), 0)
    assert one.stats is not None
    assert (one.stats.counts_E.sum(-1) == 2 * real_BT.sum()).all()
