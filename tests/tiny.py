"""Tiny models and batches that several test files share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from configs.run import DataConfig, LossConfig, Run
from model.config import ModelConfig, MoEConfig
from train.losses import next_token
from train.optimizer import make_optimizer
from train.state import TrainState, create_state, make_skeleton, state_shardings
from train.step import make_train_step

DENSE = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=48,
    max_positions=64,
)
MOE = replace(
    DENSE,
    num_layers=3,
    moe=MoEConfig(
        num_experts=8,
        experts_per_token=2,
        intermediate_size=16,
        shared_intermediate_size=16,
        selection_bias=True,
        dense_layers=(0,),
    ),
)


def make_run(model: ModelConfig, **changes: Any) -> Run:
    """A run of `model` on 8 rows of 16 tokens."""
    data = DataConfig(sources=("none",), sequence_length=16, batch_size=8)
    return Run(**{"model": model, "data": data, "loss": LossConfig(balance=0.01, router_z_loss=0.001), **changes})


def make_rows(run: Run, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of two documents per row and a padded tail."""
    draw = np.random.default_rng(seed)
    shape = (run.data.batch_size, run.data.sequence_length)
    tokens = draw.integers(0, run.model.vocab_size, (shape[0], shape[1] + 1)).astype(np.int32)
    segments = np.ones(shape, np.int32)
    positions = np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1))
    for row in range(shape[0]):
        cut, end = 3 + row % 5, shape[1] - row % 3
        segments[row, cut:] = 2
        positions[row, cut:] -= cut
        segments[row, end:] = 0
    weights = (segments > 0).astype(np.float32) * draw.uniform(0.5, 1.0, shape).astype(np.float32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": weights,
        "positions": positions,
        "segments": segments,
    }


class Trainer:
    """State (a given one, or a new one) and compiled step of a run on a mesh."""

    def __init__(self, run: Run, mesh: jax.sharding.Mesh, state: TrainState | None = None) -> None:
        self.run, self.mesh = run, mesh
        self.skeleton = make_skeleton(run)
        self.optimizer = make_optimizer(run.optimizer, run.steps, self.skeleton)
        if state is None:
            self.state = create_state(run, self.skeleton, self.optimizer, mesh)
        else:
            self.state = jax.device_put(state, state_shardings(state, self.skeleton, mesh, run))
        self.step = jax.jit(make_train_step(run, self.skeleton, self.loss, self.optimizer))

    def loss(self, model: Any, rows: Any, sums: Any, before: Any) -> Any:
        """The run's loss."""
        return next_token(model, rows, sums, before, self.run.loss)

    def __call__(self, rows: Any) -> dict[str, np.ndarray]:
        """One step; returns its metrics."""
        with jax.set_mesh(self.mesh):
            self.state, metrics = self.step(self.state, rows)
        return jax.tree.map(np.asarray, metrics)
