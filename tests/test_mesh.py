"""Law: many devices give the losses and gradients of one."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest

from errors import UserError
from model.config import LatentAttentionConfig, LinearAttentionConfig, RopeConfig
from sharding.mesh import MeshConfig, make_mesh
from sharding.rules import ACTIVATIONS, DECODE, TRAIN, batch_sharding, spec
from tests.tiny import DENSE, MOE, Trainer, make_rows, make_run
from train.step import accumulate

LATENT = replace(
    MOE, latent=LatentAttentionConfig(kv_rank=12, query_rank=20, nope_dim=8, rope_dim=4, value_dim=10), num_kv_heads=4
)
HYBRID = replace(
    MOE,
    num_layers=4,
    attention_pattern=("linear", "full"),
    linear=LinearAttentionConfig(num_key_heads=2, num_value_heads=4, key_dim=8, value_dim=6),
    attention_gate=True,
    norm="zero_centred",
    rope=RopeConfig(share=0.5),
    mtp_layers=1,
)
WINDOWED = replace(DENSE, attention_pattern=("sliding", "full"), sliding_window=5, sinks=True, qkv_bias=True)
MODELS = {
    "dense": (DENSE, "list"),
    "windowed": (WINDOWED, "list"),
    "hybrid": (HYBRID, "list"),
    "moe": (MOE, "list"),
    "moe stacked": (MOE, "stacked"),
    "latent": (LATENT, "list"),
}
ALL = [
    (kind, MeshConfig(d, f, e, t, 8 // (d * f * e * t), exchange=exchange))
    for kind in MODELS
    for d in (1, 2, 4, 8)
    for f in (1, 2, 4, 8)
    for e in (1, 2, 4, 8)
    for t in (1, 2)
    if 8 % (d * f * e * t) == 0
    for exchange in (("auto",) if kind in ("dense", "windowed") else ("ring", "all_to_all"))
    if kind != "hybrid" or d * f * e * t > 1  # cut in eight, 16 tokens are fewer than a convolution looks back over
] + [
    (kind, MeshConfig(2, f, e, t, 4 // (f * e * t), cut_over_data=True))
    for kind in MODELS
    for f, e, t in ((4, 1, 1), (2, 2, 1), (1, 2, 2), (2, 1, 2), (2, 1, 1))
]
# Each pair of axes together at least once; every factorisation of 8 under `--full`.
COVER = [
    ("dense", MeshConfig(1, 4, 1, 2)),
    ("dense", MeshConfig(2, 1, 2, 2)),
    ("moe", MeshConfig(1, 2, 4, 1)),
    ("moe", MeshConfig(2, 1, 2, 2, exchange="all_to_all")),
    ("moe", MeshConfig(8, 1, 1, 1)),
    ("moe stacked", MeshConfig(2, 2, 1, 2, exchange="gspmd")),
    ("moe stacked", MeshConfig(1, 2, 2, 2)),
    ("moe stacked", MeshConfig(2, 2, 2, cut_over_data=True)),
    ("latent", MeshConfig(2, 1, 2, 2)),
    ("latent", MeshConfig(1, 2, 1, 2, 2)),
    ("moe stacked", MeshConfig(2, 1, 2, 1, 2, exchange="all_to_all")),
    ("windowed", MeshConfig(1, 1, 1, 2, 4)),
    ("windowed", MeshConfig(2, context=4, context_exchange="all_gather")),
    ("hybrid", MeshConfig(expert=2, tensor=2, context=2)),  # it compiles for half a minute
]
CASES = ALL if os.environ.get("QMAX_FULL") else COVER


@cache
def one_device(kind: str) -> Trainer:
    """A run on one device, before its first step."""
    model, layers = MODELS[kind]
    return Trainer(make_run(model, layers=layers), make_mesh(MeshConfig()))


def on_mesh(kind: str, mesh: MeshConfig) -> Trainer:
    """The same run on many devices, with the same weights."""
    one = one_device(kind)
    return Trainer(replace(one.run, mesh=mesh), make_mesh(mesh), one.state)


def gradients(trainer: Trainer) -> tuple[dict[str, np.ndarray], float]:
    """Gradients and loss of the first step of `run`."""

    def of(state, rows):
        return accumulate(trainer.run.accumulate, trainer.skeleton, trainer.loss, state, rows)

    with jax.set_mesh(trainer.mesh):
        rows = jax.device_put(make_rows(trainer.run), batch_sharding(trainer.mesh))
        found, parts = jax.jit(of)(trainer.state, rows)
    return jax.tree.map(np.asarray, found), float(parts.loss)


@cache
def expected(kind: str) -> tuple[dict[str, np.ndarray], float]:
    """Gradients and loss of one device."""
    return gradients(one_device(kind))


def words(case: object) -> str:
    return f"{case.shape} {case.exchange}" if isinstance(case, MeshConfig) else str(case)


@pytest.mark.parametrize(("kind", "mesh"), CASES, ids=words)
def test_gradients_equal_one_device(kind: str, mesh: MeshConfig) -> None:
    wanted, loss = expected(kind)
    found, sharded_loss = gradients(on_mesh(kind, mesh))
    assert abs(sharded_loss - loss) <= 1e-5 * abs(loss)
    for name, value in wanted.items():
        assert np.abs(found[name] - value).max() <= 1e-5 * np.abs(value).max(), name


@pytest.mark.full
def test_bfloat16_activations_on_emulated_devices() -> None:
    """XLA's compiler for CPUs cannot sum them over devices by hand; the compiler's own layout does."""
    mesh = MeshConfig(1, 2, 2, 2)
    one, many = (Trainer(make_run(MOE, mesh=m, dtype="bfloat16"), make_mesh(m)) for m in (MeshConfig(), mesh))
    rows = make_rows(one.run)
    wanted, found = one(rows)["loss"], many(jax.device_put(rows, batch_sharding(many.mesh)))["loss"]
    assert abs(found - wanted) <= 2e-2 * wanted


def test_losses_of_several_steps_equal_one_device() -> None:
    one, many = on_mesh("moe", MeshConfig()), on_mesh("moe", MeshConfig(1, 2, 2, 2))
    for step in range(4):
        rows = make_rows(one.run, step)
        a, b = one(rows), many(jax.device_put(rows, batch_sharding(many.mesh)))
        assert abs(a["loss"] - b["loss"]) <= 1e-5 * a["loss"], step
        np.testing.assert_array_equal(a["expert_load"], b["expert_load"])


def test_weights_lie_where_the_table_says() -> None:
    mesh = MeshConfig(1, 2, 2, 2)
    trainer = Trainer(make_run(MOE, mesh=mesh), make_mesh(mesh))
    alone = one_device("moe").state.params
    for name, value in trainer.state.params.items():
        np.testing.assert_array_equal(value, alone[name], err_msg=name)  # made in parts, the same numbers
    weight = trainer.state.params["stacks.0.blocks.1.feed_forward.gate_EDF"]
    assert weight.addressable_shards[0].data.shape == (4, 16, 8)
    moment = next(leaf for leaf in jax.tree.leaves(trainer.state.opt) if leaf.shape == weight.shape)
    assert moment.sharding.is_equivalent_to(weight.sharding, weight.ndim)


def test_parts_shorter_than_a_convolution_are_refused() -> None:
    with pytest.raises(UserError, match="leaves 2 tokens to a device"):
        make_run(HYBRID, mesh=MeshConfig(context=8))


def test_two_dimensions_on_one_axis_are_refused() -> None:
    with pytest.raises(ValueError, match="one mesh axis"):
        spec(("heads", "mlp"), TRAIN)
    for table in (TRAIN, DECODE):
        assert spec(("expert", "embed", "mlp"), table)
    assert spec(("batch", "length", "vocab"), ACTIVATIONS)


def test_too_few_devices_is_one_sentence() -> None:
    with pytest.raises(UserError, match="needs 16 devices and 8"):
        make_mesh(MeshConfig(data=16))
