"""Law: many devices give the losses and gradients of one."""

from __future__ import annotations

import os
from dataclasses import replace

import jax
import numpy as np
import pytest

from configs.run import Run
from errors import UserError
from model.config import ModelConfig
from sharding.mesh import MeshConfig, make_mesh
from sharding.rules import ACTIVATIONS, DECODE, TRAIN, batch_sharding, spec
from tests.tiny import DENSE, MOE, Trainer, make_rows, make_run
from train.step import accumulate

# A pairwise cover of the axes; every factorisation of 8 under `--full`.
COVER = [(1, 4, 1, 2), (2, 1, 2, 2), (1, 2, 4, 1), (8, 1, 1, 1), (2, 2, 1, 2)]
ALL = [
    (d, f, e, 8 // (d * f * e))
    for d in (1, 2, 4, 8)
    for f in (1, 2, 4, 8)
    for e in (1, 2, 4, 8)
    if 8 % (d * f * e) == 0
]
SHAPES = [shape for shape in ALL if shape[3] <= 2] if os.environ.get("QMAX_FULL") else COVER


def gradients(run: Run) -> tuple[dict[str, np.ndarray], float]:
    """Gradients and loss of the first step of `run`."""
    trainer = Trainer(run, make_mesh(run.mesh))

    def of(state, rows):
        return accumulate(run.accumulate, trainer.skeleton, trainer.loss, state, rows)

    with jax.set_mesh(trainer.mesh):
        rows = jax.device_put(make_rows(run), batch_sharding(trainer.mesh))
        found, parts = jax.jit(of)(trainer.state, rows)
    return jax.tree.map(np.asarray, found), float(parts.loss)


@pytest.fixture(scope="module", params=["dense", "moe", "moe stacked"])
def one_device(request: pytest.FixtureRequest) -> tuple[Run, dict[str, np.ndarray], float]:
    """A run and its gradients on one device."""
    model: ModelConfig = DENSE if request.param == "dense" else MOE
    run = make_run(model, layers="stacked" if "stacked" in request.param else "list")
    return (run, *gradients(run))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_equal_one_device(
    one_device: tuple[Run, dict[str, np.ndarray], float], shape: tuple[int, ...]
) -> None:
    run, expected, loss = one_device
    found, sharded_loss = gradients(replace(run, mesh=MeshConfig(*shape)))
    assert abs(sharded_loss - loss) <= 1e-5 * abs(loss)
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 1e-5 * np.abs(value).max(), name


def test_losses_of_several_steps_equal_one_device() -> None:
    one = Trainer(make_run(MOE), make_mesh(MeshConfig()))
    many = Trainer(make_run(MOE, mesh=MeshConfig(1, 2, 2, 2)), make_mesh(MeshConfig(1, 2, 2, 2)))
    for step in range(4):
        rows = make_rows(one.run, step)
        a, b = one(rows), many(jax.device_put(rows, batch_sharding(many.mesh)))
        assert abs(a["loss"] - b["loss"]) <= 1e-5 * a["loss"], step
        np.testing.assert_array_equal(a["expert_load"], b["expert_load"])


def test_weights_lie_where_the_table_says() -> None:
    trainer = Trainer(make_run(MOE, mesh=MeshConfig(1, 2, 2, 2)), make_mesh(MeshConfig(1, 2, 2, 2)))
    weight = trainer.state.params["stacks.0.blocks.1.feed_forward.gate_EDF"]
    assert weight.addressable_shards[0].data.shape == (4, 16, 8)
    moment = next(leaf for leaf in jax.tree.leaves(trainer.state.opt) if leaf.shape == weight.shape)
    assert moment.sharding == weight.sharding


def test_two_dimensions_on_one_axis_are_refused() -> None:
    with pytest.raises(ValueError, match="one mesh axis"):
        spec(("heads", "mlp"), TRAIN)
    for table in (TRAIN, DECODE):
        assert spec(("expert", "embed", "mlp"), table)
    assert spec(("batch", "length", "vocab"), ACTIVATIONS)


def test_too_few_devices_is_one_sentence() -> None:
    with pytest.raises(UserError, match="needs 16 devices and 8"):
        make_mesh(MeshConfig(data=16))
