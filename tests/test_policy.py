"""The losses of reinforcement learning, against numbers worked by hand from the papers' formulas."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from math import exp, log, sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import DENSE, MOE

from configs.alignment import RLConfig
from configs.run import LossConfig
from model.forward import Batch, forward
from model.transformer import Transformer
from train.losses import no_parts, totals
from train.policy import k3, policy_loss, sequence_ratios, surrogate, token_ratios, truncated_weights
from train.rl.advantages import advantages, is_equal
from train.rl.rows import lay_out, make_rows, of_samples, row_counts
from train.rl.samples import Sample

EVERYONE = np.ones((1, 4), bool)


@cache
def make_tiny(experts: int) -> Transformer:
    """A random model, with experts or without."""
    return Transformer(MOE if experts else DENSE, jax.random.key(0))


# ---- advantages ----------------------------------------------------------------
def test_group_advantages_are_rewards_less_their_mean_over_their_deviation() -> None:
    """Rewards 1, 0, 0, 1: mean 1/2, deviation 1/2."""
    found = advantages(np.array([[1.0, 0, 0, 1]]), EVERYONE, RLConfig())
    np.testing.assert_allclose(found, [[1, -1, -1, 1]], atol=1e-5)


def test_without_normalising_deviations_stay() -> None:
    found = advantages(np.array([[3.0, 0, 0, 1]]), EVERYONE, RLConfig(normalize="none"))
    np.testing.assert_allclose(found, [[2, -1, -1, 0]], atol=1e-6)


def test_the_baseline_of_others_leaves_a_reply_out() -> None:
    """Reward 3 against the mean of 0, 0, 1; and so on."""
    found = advantages(np.array([[3.0, 0, 0, 1]]), EVERYONE, RLConfig(baseline="others", normalize="none"))
    np.testing.assert_allclose(found, [[3 - 1 / 3, -4 / 3, -4 / 3, 1 - 1]], atol=1e-6)


def test_batch_normalising_takes_all_groups_together() -> None:
    rewards = np.array([[1.0, 0], [4, 0]])
    found = advantages(rewards, np.ones((2, 2), bool), RLConfig(normalize="batch", samples=2))
    np.testing.assert_allclose(found, np.array([[0.5, -0.5], [2, -2]]) / sqrt((0.25 + 4) / 2), atol=1e-5)


@pytest.mark.parametrize("normalize", ["group", "batch", "none"])
def test_equal_rewards_teach_nothing(normalize: str) -> None:
    found = advantages(np.full((2, 3), 0.7), np.ones((2, 3), bool), RLConfig(normalize=normalize))  # pyright: ignore[reportArgumentType]
    np.testing.assert_allclose(found, 0, atol=1e-6)
    assert is_equal(np.full(3, 0.7)) and not is_equal(np.array([0.7, 0.8])) and is_equal(np.zeros(0))


def test_a_reply_without_a_reward_counts_for_nothing() -> None:
    there = np.array([[True, True, False, True]])
    found = advantages(np.array([[1.0, 0, 9, 2]]), there, RLConfig(normalize="none"))
    np.testing.assert_allclose(found, [[0, -1, 0, 1]], atol=1e-6)


# ---- ratios and losses ---------------------------------------------------------
def test_a_token_s_ratio_is_clipped_on_the_side_that_it_gains_from() -> None:
    """Ratios 1.5 and 0.5 within [0.8, 1.28]: gains are cut, losses are not."""
    difference = jnp.log(jnp.array([[1.5, 1.5, 0.5, 0.5]]))
    losses = surrogate(token_ratios(difference, 0.2, 0.28), jnp.array([[1.0, -1, 1, -1]]))
    np.testing.assert_allclose(losses, [[-1.28, 1.5, -0.5, 0.8]], rtol=1e-6)


def test_a_sequence_s_ratio_is_the_geometric_mean_of_its_tokens() -> None:
    """Two replies in a row: ratios 2 and 8 give 4; 0.5 alone stays; what was not drawn has no say."""
    difference = jnp.log(jnp.array([[7.0, 2, 8, 0.5, 9]]))
    drawn, segments = jnp.array([[0.0, 1, 1, 1, 0]]), jnp.array([[1, 1, 1, 2, 0]])
    found = sequence_ratios(difference, drawn, segments, 0.1, 0.1)
    np.testing.assert_allclose(found.ratio_BT[0, 1:4], [4, 4, 0.5], rtol=1e-6)
    np.testing.assert_allclose(found.clipped_BT[0, 1:4], [1.1, 1.1, 0.9], rtol=1e-6)


def test_the_gradient_of_a_sequence_s_ratio_goes_to_its_tokens_alike() -> None:
    """d/dx_t of exp((x_1 + x_2 + x_3) / 3), each token weighed by 1/3 and all added: ratio / 3."""
    segments, drawn = jnp.ones((1, 3), jnp.int32), jnp.ones((1, 3))

    def mean(x: jax.Array) -> jax.Array:
        return sequence_ratios(x, drawn, segments, 10, 10).ratio_BT.mean()

    x = jnp.log(jnp.array([[2.0, 4.0, 1.0]]))
    np.testing.assert_allclose(jax.grad(mean)(x), np.full((1, 3), 2 / 3), rtol=1e-6)


def test_k3_is_schulman_s_estimator() -> None:
    """log p = -1, log reference = -1.5: exp(-0.5) + 0.5 - 1; equal ones give 0."""
    found = k3(jnp.array([[-1.0, -2.0]]), jnp.array([[-1.5, -2.0]]))
    np.testing.assert_allclose(found, [[exp(-0.5) + 0.5 - 1, 0]], atol=1e-7)


def test_truncated_weights_are_cut_from_above_alone() -> None:
    found = truncated_weights(jnp.log(jnp.array([0.6, 0.1])), jnp.log(jnp.array([0.2, 0.4])), 2.0)
    np.testing.assert_allclose(found, [2.0, 0.25], rtol=1e-6)


# ---- rows ------------------------------------------------------------------------
def reply(prompt: int, drawn: int, *, cut: bool = False, seed: int = 0, **more: object) -> Sample:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, 60, prompt + drawn).tolist()
    marks = np.arange(prompt + drawn) >= prompt
    logprobs = np.where(marks, -rng.random(prompt + drawn), 0).astype(np.float32)
    return Sample(0, prompt, tokens, marks, logprobs, None, "", cut, **more)  # pyright: ignore[reportArgumentType]


SAMPLES = [reply(3, 4, seed=1), reply(2, 2, seed=2), reply(5, 6, seed=3, cut=True)]


@pytest.mark.parametrize(
    ("mean", "weights", "total"),
    [("token", (1, 1, 1), 12), ("sequence", (1 / 4, 1 / 2, 1 / 6), 3), ("fixed", (1 / 8,) * 3, 3)],
)
def test_means_are_taken_as_the_config_says(mean: str, weights: tuple[float, ...], total: float) -> None:
    config = RLConfig(mean=mean, max_new_tokens=8)  # pyright: ignore[reportArgumentType]
    layout = lay_out(SAMPLES, 12, row_counts(3, 1))
    rows = make_rows(SAMPLES, [1, 2, 3], layout, 12, config)
    assert rows["total"].sum() == total and layout.rows == 2
    for sample, found, weight in zip(SAMPLES, of_samples(rows["weights"], SAMPLES, layout), weights, strict=True):
        np.testing.assert_allclose(found, sample.drawn * weight, rtol=1e-6)


def test_what_is_written_of_a_reply_is_found_again() -> None:
    layout = lay_out(SAMPLES, 12, row_counts(3, 1))
    rows = make_rows(SAMPLES, [1, 2, 3], layout, 12, RLConfig())
    for name, wanted in (("sampler", [s.logprobs for s in SAMPLES]), ("targets", [s.tokens for s in SAMPLES])):
        for found, own in zip(of_samples(rows[name], SAMPLES, layout), wanted, strict=True):
            np.testing.assert_allclose(found[1:], own[1:])
    assert sorted(rows["segments"].max(axis=1)) == [1, 2]


def test_cut_replies_are_left_out_where_the_config_says_so() -> None:
    layout = lay_out(SAMPLES, 12, row_counts(3, 1))
    rows = make_rows(SAMPLES, [1, 2, 3], layout, 12, RLConfig(drop_cut=True))
    assert [own.sum() for own in of_samples(rows["weights"], SAMPLES, layout)] == [4, 2, 0]
    assert rows["total"].sum() == 6


def test_there_are_few_numbers_of_rows_and_the_last_has_room_for_all() -> None:
    assert row_counts(16, 1) == [4, 8, 12, 16] and row_counts(3, 1) == [1, 2, 3] and row_counts(5, 4) == [4, 8]


# ---- the loss of a model ------------------------------------------------------------
def batch_of(config: RLConfig, values: tuple[float, ...]) -> dict[str, jax.Array]:
    layout = lay_out(SAMPLES, 12, row_counts(3, 1))
    return jax.tree.map(jnp.asarray, make_rows(SAMPLES, values, layout, 12, config))


def loss_of(
    config: RLConfig, rows: dict[str, jax.Array], *, experts: int = 0
) -> tuple[jax.Array, dict[str, jax.Array]]:
    model = make_tiny(experts=experts)
    loss, parts = policy_loss(
        model, rows, totals(rows), no_parts(model), config, LossConfig(balance=0, router_z_loss=0)
    )
    return loss, {**parts.more, **parts.peaks}


def logprobs_by_hand(rows: dict[str, jax.Array]) -> jax.Array:
    model = make_tiny(experts=0)
    hidden = forward(model, Batch(rows["tokens"], rows["positions"], rows["segments"])).hidden_BTD
    logits = jax.nn.log_softmax(hidden.astype(jnp.float32) @ model.head().astype(jnp.float32))
    return jnp.take_along_axis(logits, rows["targets"][..., None], axis=-1)[..., 0]


def test_on_policy_the_loss_is_minus_the_mean_advantage_and_its_gradient_that_of_reinforce() -> None:
    config = RLConfig()
    rows = batch_of(config, (1.0, -2.0, 0.5))
    loss, more = loss_of(config, rows)
    np.testing.assert_allclose(loss, -(4 * 1 - 2 * 2 + 6 * 0.5) / 12, rtol=1e-5)
    np.testing.assert_allclose([more["ratio"], more["clip_fraction"]], [1, 0], atol=1e-6)
    gap = jnp.abs(logprobs_by_hand(rows) - rows["sampler"]) * rows["drawn"]
    np.testing.assert_allclose([more["logprob_gap"], more["logprob_gap_max"]], [gap.sum() / 12, gap.max()], rtol=1e-4)


def test_old_log_probabilities_the_reference_and_truncation_enter_as_the_formulas_say() -> None:
    config = RLConfig(kl=0.3, truncate=1.1, clip_low=0.1, clip_high=0.2)
    rows = batch_of(config, (1.0, -2.0, 0.5))
    own = logprobs_by_hand(rows)
    noise = jax.random.uniform(jax.random.key(0), own.shape, minval=-0.3, maxval=0.3)
    rows |= {"old": own + noise, "reference": own - 2 * noise, "sampler": own + 2 * noise}
    loss, more = loss_of(config, rows)
    ratio, advantage = np.exp(-noise), np.asarray(rows["advantages"])
    each = -np.minimum(ratio * advantage, np.clip(ratio, 0.9, 1.2) * advantage) * np.minimum(np.exp(-noise), 1.1)
    divergence = np.exp(-2 * noise) + 2 * noise - 1
    drawn = np.asarray(rows["drawn"])
    np.testing.assert_allclose(loss, ((each + 0.3 * divergence) * drawn).sum() / 12, rtol=1e-4)
    np.testing.assert_allclose(more["kl"], (divergence * drawn).sum() / 12, rtol=1e-4)
    assert "logprob_gap" not in more and 0 < more["clip_fraction"] < 1


def test_a_temperature_is_of_the_log_probabilities_that_are_learnt_from() -> None:
    config = RLConfig(temperature=0.5)
    rows = batch_of(config, (1.0, 1.0, 1.0))
    rows["old"] = logprobs_by_hand(rows)
    _, more = loss_of(replace(config, clip_high=100.0), rows)
    assert not np.isclose(more["ratio"], 1, atol=1e-3) and np.isfinite(more["entropy"]) and more["entropy"] < log(64)


def test_replayed_experts_change_the_loss_and_recorded_ones_do_not() -> None:
    config = RLConfig()
    rows = batch_of(config, (1.0, -2.0, 0.5))
    model = make_tiny(experts=8)
    chosen = forward(model, Batch(rows["tokens"], rows["positions"], rows["segments"])).experts_LBTC
    assert chosen is not None
    own = {**rows, "experts": jnp.moveaxis(jnp.minimum(chosen, 7), 0, 2).astype(jnp.int16)}
    other = {**rows, "experts": (own["experts"] + 1) % 8}
    plain, recorded, changed = (loss_of(config, one, experts=8)[1]["logprob_gap"] for one in (rows, own, other))
    np.testing.assert_array_equal(plain, recorded)
    assert abs(changed - plain) > 1e-4
