"""Laws of the update of weights: in blocks as whole, nothing where a step does not count, clipped as optax clips."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs.run import OptimizerConfig
from sharding.mesh import MeshConfig, make_mesh
from tests.tiny import DENSE, Trainer, make_rows, make_run
from train import update
from train.optimizer import clipped
from train.state import flatten

ONE = make_mesh(MeshConfig())
CLIPPED = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, clip_norm=0.1)


def after(
    monkeypatch: pytest.MonkeyPatch, block: int | None, steps: int = 3, **changes: Any
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """State and metrics of a few steps with blocks of so many numbers, or with whole weights as on accelerators."""
    with monkeypatch.context() as patch:
        if block is None:
            patch.setattr(update, "platform", lambda: "gpu")
        else:
            patch.setattr(update, "BLOCK", block)
        run = make_run(DENSE, **{"optimizer": CLIPPED, **changes})
        trainer = Trainer(run, ONE)
        metrics = [trainer(make_rows(run, seed)) for seed in range(steps)]
    return jax.tree.map(np.asarray, flatten(trainer.state)), metrics


@pytest.mark.parametrize("changes", [{}, {"optimizer": replace(CLIPPED, moment_dtype="bfloat16")}])
def test_in_blocks_as_whole(monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    """With weights of several blocks and a rest, and with such as are smaller than a block."""
    found, metrics = after(monkeypatch, 100, **changes)
    expected, others = after(monkeypatch, None, **changes)
    assert found.keys() == expected.keys()
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype
        ours, theirs = (a.astype(np.float32) for a in (found[name], leaf))
        # Where sums differ in the last bit of float32, a few moments in bfloat16 fall to the other neighbour.
        assert np.mean(~np.isclose(ours, theirs, 2e-6, 2e-6)) <= (0.01 if changes else 0), name
        np.testing.assert_allclose(ours, theirs, 1e-2, 1e-4)
    for ours, theirs in zip(metrics, others, strict=True):
        for name in ("parameter_norm", "update_norm", "gradient_norm"):
            np.testing.assert_allclose(ours[name], theirs[name], 1e-5)
    assert metrics[0]["gradient_norm"] > CLIPPED.clip_norm


def test_weights_in_bfloat16_are_rounded_by_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bits belong to a weight and a step: all but a few that lie at the edge come out the same."""
    found, _ = after(monkeypatch, 100, steps=1, parameter_dtype="bfloat16")
    expected, _ = after(monkeypatch, None, steps=1, parameter_dtype="bfloat16")
    coarse = [name for name, leaf in expected.items() if name.startswith("params.") and leaf.dtype.itemsize == 2]
    assert coarse
    assert np.mean(np.concatenate([(found[name] != expected[name]).ravel() for name in coarse])) < 1e-3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_step_that_does_not_count_leaves_everything(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """In blocks, and where the optimizer takes whole matrices and keeps its state by kind of weight."""
    monkeypatch.setattr(update, "BLOCK", 100)
    run = make_run(DENSE, optimizer=replace(CLIPPED, name=name))
    trainer = Trainer(run, ONE)
    rows = make_rows(run)
    trainer(rows)
    before = jax.tree.map(np.asarray, (trainer.state.params, trainer.state.opt, trainer.state.extra))
    metrics = trainer({**rows, "weights": np.full_like(rows["weights"], np.nan)})
    assert metrics["skipped"] == 1
    assert metrics["update_norm"] == 0
    jax.tree.map(np.testing.assert_array_equal, (trainer.state.params, trainer.state.opt, trainer.state.extra), before)
    assert trainer(rows)["update_norm"] > 0


@pytest.mark.parametrize("limit", [0.5, 1e3])
def test_clipping_is_that_of_optax(limit: float) -> None:
    gradients = {"a": jnp.arange(5.0), "b": jnp.full((2, 3), -2.0)}
    expected, _ = optax.clip_by_global_norm(limit).update(gradients, optax.EmptyState())
    whole, _ = clipped(limit).update(gradients, optax.EmptyState())
    part, _ = clipped(limit).update({"b": gradients["b"]}, optax.EmptyState(), norm=optax.tree.norm(gradients))
    for found, wanted in ((whole, expected), (part["b"], expected["b"])):  # pyright: ignore
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-6), found, wanted)
