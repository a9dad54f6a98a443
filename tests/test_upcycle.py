"""Law: a mixture of experts that was cut from a dense model begins as that model, but for the share that is fresh."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from model.config import ModelConfig, MoEConfig
from model.forward import Batch, forward, unembed
from model.tree import Arrays, make_skeleton
from train.upcycle import cut, upcycle

DENSE = tiny.DENSE
EXPERTS = MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=DENSE.intermediate_size)
PARTS = ("gate_EDF", "up_EDF", "down_EDF")


def weights_of(config: ModelConfig, seed: int) -> Arrays:
    """Random weights in list form, as large as initial ones; norms are random too."""
    draw = np.random.default_rng(seed)
    found: Arrays = {}
    for name, shape in make_skeleton(config, stacked=False).shapes.items():
        inputs = shape[-2] if len(shape) > 1 and not name.endswith("_VD") else 1
        found[name] = jnp.asarray(draw.normal(0, 1 / np.sqrt(inputs), shape).astype(np.float32))
    return found


def logits(config: ModelConfig, weights: Arrays) -> np.ndarray:
    """Of two rows of tokens."""
    skeleton = make_skeleton(config, stacked=False)
    extra = {name: weights[name] for name in skeleton.shapes.keys() - skeleton.weights}
    model = skeleton.merge({name: weights[name] for name in skeleton.weights}, extra)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 24)).astype(np.int32)
    positions = np.broadcast_to(np.arange(24, dtype=np.int32), tokens.shape)
    batch = Batch(jnp.asarray(tokens), jnp.asarray(positions), jnp.ones_like(tokens))
    return np.asarray(jax.jit(lambda m: unembed(m, forward(m, batch).hidden_BTD))(model))


@pytest.mark.parametrize(("chosen", "score"), [(1, "softmax"), (2, "sigmoid"), (4, "softmax")])
def test_whole_experts_compute_what_the_dense_model_does(chosen: int, score: str) -> None:
    """Nothing fresh, experts as wide as the dense layer, and weights that sum to one."""
    config = replace(DENSE, moe=replace(EXPERTS, experts_per_token=chosen, score=score))
    dense = weights_of(DENSE, 1)
    mixture = upcycle(dense, weights_of(config, 2), 0.0, seed=3)
    expected = logits(DENSE, dense)
    assert np.abs(expected).max() > 0.5
    assert np.abs(logits(config, mixture) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_all_parts_of_cut_experts_add_up_to_the_dense_model() -> None:
    """Every expert chosen with the same weight, scaled by how many pieces there are."""
    pieces = 3
    moe = replace(EXPERTS, num_experts=pieces, experts_per_token=pieces, intermediate_size=16, scale=float(pieces))
    config = replace(DENSE, moe=moe)
    dense = weights_of(DENSE, 1)
    mixture = upcycle(dense, weights_of(config, 2), 0.0, seed=3)
    mixture |= {name: jnp.zeros_like(a) for name, a in mixture.items() if name.endswith("router_DE")}
    expected = logits(DENSE, dense)
    assert np.abs(logits(config, mixture) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_shapes_are_those_of_the_mixture_and_all_else_is_the_dense_models() -> None:
    moe = replace(EXPERTS, num_experts=6, intermediate_size=20, shared_intermediate_size=60, selection_bias=True)
    config = replace(DENSE, moe=replace(moe, dense_layers=(0,)))
    dense, initial = weights_of(DENSE, 1), weights_of(config, 2)
    found = upcycle(dense, initial, 0.5, seed=3)
    assert {name: array.shape for name, array in found.items()} == make_skeleton(config, stacked=False).shapes
    for name, array in found.items():
        if name in dense:
            assert np.array_equal(array, dense[name]), name
        elif "router" in name or name.endswith(("shared_gate_D", "bias_E")):
            assert np.array_equal(array, initial[name]), name


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_share_of_fresh_channels_is_as_asked(share: float) -> None:
    """A channel is copied whole, gate, up and down, or begins as the model's own initial weights do."""
    config = replace(DENSE, moe=replace(EXPERTS, intermediate_size=20, shared_intermediate_size=40))
    dense, initial = weights_of(DENSE, 1), weights_of(config, 2)
    found = upcycle(dense, initial, share, seed=3)
    for layer in range(config.num_layers):
        prefix = f"stacks.0.blocks.{layer}.feed_forward."
        ours, random = ({p: np.asarray(w[prefix + p]) for p in PARTS} for w in (found, initial))
        theirs = {part: np.asarray(dense[prefix + part.replace("E", "")]) for part in PARTS[:2]}
        theirs["down_EDF"] = np.asarray(dense[prefix + "down_FD"]).T
        for expert in range(4):
            fresh = np.all(ours["gate_EDF"][expert] == random["gate_EDF"][expert], axis=0)
            assert fresh.sum() == round(share * 20)
            assert np.array_equal(ours["up_EDF"][expert][:, fresh], random["up_EDF"][expert][:, fresh])
            assert np.array_equal(ours["down_EDF"][expert][:, fresh], random["down_EDF"][expert][:, fresh])
            columns = {tuple(column): n for n, column in enumerate(theirs["gate_EDF"].T)}
            for channel in np.flatnonzero(~fresh):
                source = columns[tuple(ours["gate_EDF"][expert][:, channel])]
                assert np.array_equal(ours["up_EDF"][expert][:, channel], theirs["up_EDF"][:, source])
                assert np.array_equal(ours["down_EDF"][expert][:, channel], theirs["down_EDF"][:, source])
        shared = np.asarray(found[f"{prefix}shared.gate_DF"]) == np.asarray(initial[f"{prefix}shared.gate_DF"])
        assert np.all(shared, axis=0).sum() == round(share * 40)


def test_the_seed_decides() -> None:
    config = replace(DENSE, moe=replace(EXPERTS, intermediate_size=20))
    dense, initial = weights_of(DENSE, 1), weights_of(config, 2)
    one, same, other = (upcycle(dense, initial, 0.5, seed) for seed in (3, 3, 4))
    assert all(np.array_equal(one[name], same[name]) for name in one)
    name = "stacks.0.blocks.1.feed_forward.gate_EDF"
    assert not np.array_equal(one[name], other[name])
    assert not np.array_equal(one[name], one[name.replace("blocks.1", "blocks.0")])


@settings(deadline=None, max_examples=100)
@given(
    experts=st.integers(1, 40),
    width=st.integers(1, 60),
    dense=st.integers(1, 70),
    share=st.floats(0, 1),
    key=st.integers(),
)
def test_every_copy_is_used_up_before_the_next(experts: int, width: int, dense: int, share: float, key: int) -> None:
    """No dense channel is taken more than once oftener than another, and the share is exact in every expert."""
    plan = cut(experts, width, dense, share, key)
    times = np.bincount(plan.source_EF.reshape(-1), minlength=dense)
    assert times.size == dense
    assert times.max() - times.min() <= 1
    assert times.max() == -(-experts * width // dense)
    assert np.array_equal(plan.fresh_EF.sum(axis=1), np.full(experts, round(share * width)))
