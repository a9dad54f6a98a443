"""Laws of the step: parts make the whole, bad steps change nothing, the optimizer is its formula."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs.run import LossConfig, OptimizerConfig
from model.forward import Batch, forward
from model.tree import unstack
from sharding.mesh import MeshConfig, make_mesh
from tests.tiny import DENSE, MOE, Trainer, make_rows, make_run
from train.optimizer import schedule

ONE = make_mesh(MeshConfig())


def test_micro_batches_sum_to_the_batch() -> None:
    loss = LossConfig(z_loss=1e-3, balance=0.0, router_z_loss=1e-3)
    whole, parts = (Trainer(make_run(MOE, loss=loss, accumulate=count), ONE) for count in (1, 4))
    rows = make_rows(whole.run)
    a, b = whole(rows), parts(rows)
    assert np.isclose(a["loss"], b["loss"], rtol=1e-6)
    assert np.isclose(a["router_z_loss"], b["router_z_loss"], rtol=1e-5)
    assert np.isclose(a["gradient_norm"], b["gradient_norm"], rtol=1e-5)
    np.testing.assert_array_equal(a["expert_load"], b["expert_load"])


def test_a_micro_batch_is_balanced_against_the_step_so_far() -> None:
    run = make_run(MOE, accumulate=2)
    rows, trainer = make_rows(run), Trainer(run, ONE)
    model = trainer.skeleton.merge(trainer.state.params, trainer.state.extra)
    expected, counts, seen = 0.0, 0.0, 0
    for first in range(2):
        tokens, positions, segments = (
            jnp.asarray(rows[name][first::2]) for name in ("tokens", "positions", "segments")
        )
        stats = jax.jit(forward)(model, Batch(tokens, positions, segments)).stats
        assert stats is not None
        own = int(jnp.count_nonzero(segments))
        counts, seen = counts + np.asarray(stats.counts_E), seen + own
        shares = counts / seen * np.asarray(stats.scores_E) / own
        expected += own * MOE.moe.num_experts * shares.sum(axis=-1).mean()
    assert np.isclose(trainer(rows)["balance_loss"], expected / seen, rtol=1e-5)


def test_loss_falls_on_a_repeated_batch() -> None:
    trainer = Trainer(make_run(MOE, optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2)), ONE)
    rows = make_rows(trainer.run)
    losses = [float(trainer(rows)["loss"]) for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.full
def test_muon_learns_and_leaves_norms_to_adamw() -> None:
    optimizer = OptimizerConfig(name="muon", learning_rate=1e-2, warmup_steps=2)
    for layers in ("list", "stacked"):
        trainer = Trainer(make_run(MOE, optimizer=optimizer, layers=layers), ONE)
        rows = make_rows(trainer.run)
        losses = [float(trainer(rows)["loss"]) for _ in range(30)]
        assert losses[-1] < 0.6 * losses[0], layers


@pytest.mark.parametrize("name", ["adamw", pytest.param("muon", marks=pytest.mark.full)])
def test_stacked_and_list_take_the_same_step(name: str) -> None:
    ends = []
    for layers in ("list", "stacked"):
        optimizer = OptimizerConfig(name=name)  # pyright: ignore[reportArgumentType]
        trainer = Trainer(
            make_run(MOE, optimizer=optimizer, layers=layers, loss=LossConfig(bias_update_rate=0.01)), ONE
        )
        for seed in range(2):
            trainer(make_rows(trainer.run, seed))
        arrays = {**trainer.state.params, **trainer.state.extra}
        ends.append(unstack(arrays, MOE) if layers == "stacked" else arrays)
    assert ends[0].keys() == ends[1].keys()
    for key, value in ends[0].items():
        assert np.abs(value - ends[1][key]).max() <= 2e-5, key


def test_adamw_is_its_formula() -> None:
    config = OptimizerConfig(learning_rate=1e-2, warmup_steps=1, weight_decay=0.1, clip_norm=0.0, schedule="constant")
    trainer = Trainer(make_run(DENSE, optimizer=config), ONE)
    before = jax.tree.map(np.asarray, trainer.state.params)
    trainer(make_rows(trainer.run))
    mu = next(s.mu for s in jax.tree.leaves(trainer.state.opt, is_leaf=lambda s: hasattr(s, "mu")) if hasattr(s, "mu"))
    for name in ("stacks.0.blocks.0.attention.q_DNH", "norm.weight"):
        gradient = np.asarray(mu[name]) / (1 - config.beta1)
        decay = config.weight_decay * before[name] if "norm" not in name else 0.0
        expected = before[name] - config.learning_rate * (gradient / (np.abs(gradient) + config.eps) + decay)
        np.testing.assert_allclose(trainer.state.params[name], expected, atol=2e-6)


def poisoned(trainer: Trainer) -> dict[str, np.ndarray]:
    """A batch whose loss is not a number."""
    rows = make_rows(trainer.run)
    return {**rows, "weights": rows["weights"] * np.float32("nan")}


def test_a_step_that_is_not_finite_changes_nothing_but_counters() -> None:
    trainer = Trainer(make_run(MOE, loss=LossConfig(bias_update_rate=0.01)), ONE)
    trainer(make_rows(trainer.run))
    before = jax.tree.map(np.asarray, trainer.state)
    metrics = trainer(poisoned(trainer))
    assert metrics["skipped"] == 1 and metrics["bad_steps"] == 1
    after = jax.tree.map(np.asarray, trainer.state)
    same = jax.tree.map(
        np.array_equal, (before.params, before.extra, before.opt), (after.params, after.extra, after.opt)
    )
    assert all(jax.tree.leaves(same))
    assert after.step == before.step + 1 and after.skipped == 1
    assert trainer(make_rows(trainer.run))["bad_steps"] == 0


def test_a_spike_is_skipped() -> None:
    trainer = Trainer(make_run(DENSE, spike_factor=0.5, steps=100), ONE)
    trainer.state = replace(trainer.state, step=trainer.state.step + 50, norm_mean=trainer.state.norm_mean + 1e-3)
    assert trainer(make_rows(trainer.run))["skipped"] == 1


def test_selection_bias_moves_towards_even_load() -> None:
    rate = 0.01
    trainer = Trainer(make_run(MOE, loss=LossConfig(bias_update_rate=rate)), ONE)
    load = trainer(make_rows(trainer.run))["expert_load"]
    name = "stacks.0.blocks.1.feed_forward.bias_E"
    np.testing.assert_allclose(trainer.state.extra[name], rate * np.sign(1 - load[0]), atol=1e-7)


def test_schedules() -> None:
    base = OptimizerConfig(warmup_steps=10, final_fraction=0.1, decay_fraction=0.2)
    cosine = schedule(replace(base, schedule="cosine"), 100, 1.0)
    assert np.isclose(cosine(0), 0.1) and np.isclose(cosine(9), 1.0) and np.isclose(cosine(100), 0.1)
    assert np.isclose(cosine(55), 0.55)
    wsd = schedule(replace(base, schedule="wsd"), 100, 1.0)
    assert np.isclose(wsd(79), 1.0) and np.isclose(wsd(90), 0.55) and np.isclose(wsd(100), 0.1)
    assert np.isclose(schedule(replace(base, schedule="constant"), 100, 1.0)(99), 1.0)
