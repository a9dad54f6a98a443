"""Losses over preferences: what papers write, by hand; the same in any number of micro-batches and on any mesh."""

from __future__ import annotations

from dataclasses import replace
from math import exp, log
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import DENSE, MOE, Trainer, make_run
from tiny import make_rows as tiny_rows

from configs.alignment import PreferenceConfig
from configs.run import LossConfig
from sharding.mesh import MeshConfig, make_mesh
from sharding.rules import batch_sharding
from train.losses import Totals
from train.preference import dpo_losses, dpo_parts, kto_losses, kto_parts, mean_of, preference_loss, sum_replies
from train.step import accumulate

Rows = dict[str, Any]


# ---- formulas --------------------------------------------------------------------
def losses_of(chosen: float, rejected: float, tokens: tuple[int, int] = (2, 4), **config: Any) -> tuple[float, ...]:
    """Loss and both rewards of one pair."""
    numbers = [jnp.array([float(number)]) for number in (chosen, rejected, *tokens)]
    found = dpo_losses(numbers[0], numbers[1], numbers[2], numbers[3], PreferenceConfig(**config))
    return tuple(float(one[0]) for one in found)


def test_sigmoid_is_the_paper_s_equation() -> None:
    """beta (2 - (-1)) = 0.5 * 3: log(1 + exp(-1.5)); rewards 0.5 * 2 and 0.5 * -1."""
    assert losses_of(2, -1, beta=0.5) == pytest.approx((log(1 + exp(-1.5)), 1.0, -0.5), rel=1e-6)
    assert losses_of(0, 0)[0] == pytest.approx(log(2), rel=1e-6)


def test_label_smoothing_takes_some_pairs_the_wrong_way_round() -> None:
    """0.9 log(1 + exp(-1.5)) + 0.1 log(1 + exp(1.5)) = 0.9 * 0.20141 + 0.1 * 1.70141 = 0.35141."""
    assert losses_of(2, -1, beta=0.5, label_smoothing=0.1)[0] == pytest.approx(0.35141, abs=1e-5)


def test_ipo_is_the_square_of_means_over_tokens() -> None:
    """2 / 2 - (-1) / 4 = 1.25 against 1 / (2 * 0.5) = 1: 0.25^2."""
    assert losses_of(2, -1, beta=0.5, loss="ipo") == pytest.approx((0.0625, 0.5, -0.125), rel=1e-6)


def test_simpo_has_means_over_tokens_and_a_margin() -> None:
    """2 * 1.25 - 0.5 = 2: log(1 + exp(-2))."""
    assert losses_of(2, -1, beta=2, loss="simpo", margin=0.5)[0] == pytest.approx(log(1 + exp(-2)), rel=1e-6)


def test_kto_weighs_good_and_bad_replies_against_the_divergence() -> None:
    """beta (3 - 1) = 1 of a good reply, weight 2; beta (1 - 3) = -1 of a bad one, weight 0.5."""
    config, ratio = PreferenceConfig(beta=0.5, good=2.0, bad=0.5), jnp.array([3.0, 3.0])
    found = kto_losses(ratio, jnp.array(1.0), jnp.array([True, False]), config)
    np.testing.assert_allclose(found, [2 * (1 - 1 / (1 + exp(-1))), 0.5 * (1 - 1 / (1 + exp(1)))], rtol=1e-6)


# ---- rows ---------------------------------------------------------------------------
SEGMENTS = [[1, 1, 1, 2, 2, 3, 3, 4, 0, 0], [1, 1, 2, 2, 2, 0, 0, 0, 0, 0]]
"""Two pairs and some padding; one pair and more of it."""
WEIGHTS = [[0, 1, 1, 0, 1, 0, 1, 1, 0, 0], [1, 1, 0, 1, 1, 0, 0, 0, 0, 0]]
LOGPROBS = [[-9, -1, -2, -9, -4, -9, -3, -1, -9, -9], [-1, -1, -9, -2, -2, -9, -9, -9, -9, -9]]
REFERENCE = [[-9, -2, -2, -9, -3, -9, -1, -1, -9, -9], [-2, -2, -9, -1, -1, -9, -9, -9, -9, -9]]
TOTALS = Totals(weight=jnp.array(3.0), tokens=jnp.array(13.0), drawn=jnp.array(0.0))


def hand_rows(label: float = 0.0) -> Rows:
    """The rows above; all labels are `label`."""
    rows = {"segments": jnp.array(SEGMENTS), "weights": jnp.array(WEIGHTS, jnp.float32)}
    rows |= {"reference": jnp.array(REFERENCE, jnp.float32)}
    return rows | {"labels": jnp.where(rows["segments"] > 0, label, 0.0)}


def test_sums_are_of_each_reply_and_padding_is_of_none() -> None:
    rows = hand_rows()
    found = sum_replies(jnp.array(LOGPROBS, jnp.float32) * rows["weights"], rows)
    assert found.first_BP.shape == found.second_BP.shape == (2, 5)
    np.testing.assert_array_equal(found.first_BP[:, :2], [[-3, -3], [-2, 0]])
    np.testing.assert_array_equal(found.second_BP[:, :2], [[-4, -1], [-4, 0]])
    assert not found.first_BP[:, 2:].any() and not found.second_BP[:, 2:].any()
    np.testing.assert_array_equal(found.there_BP, [[True, True] + [False] * 3, [True] + [False] * 4])


def test_a_row_that_is_full_has_its_last_reply_too() -> None:
    """Five tokens, each a reply or a half of one: pairs (1, 2) and (3, 4) and no third."""
    rows = {"segments": jnp.array([[1, 2, 3, 4]])}
    found = sum_replies(jnp.array([[1.0, 2, 3, 4]]), rows)
    np.testing.assert_array_equal(found.first_BP, [[1, 3]])
    np.testing.assert_array_equal(found.second_BP, [[2, 4]])
    assert found.there_BP.all()


def test_the_loss_of_packed_pairs_by_hand() -> None:
    """Less the reference: -3 + 4 = 1 and -4 + 3 = -1; -3 + 1 = -2 and 0; -2 + 4 = 2 and -4 + 2 = -2: differences of
    2, -2 and 4. The chosen replies' tokens have -3 / 2, -3 / 1 and -2 / 2: an sft weight of 0.2 adds 0.2 * 5.5 / 3."""
    config = PreferenceConfig(beta=0.5, sft=0.2)
    loss, more = dpo_parts(jnp.array(LOGPROBS, jnp.float32), hand_rows(), TOTALS, config)
    wanted = sum(log(1 + exp(-0.5 * difference)) for difference in (2, -2, 4)) / 3
    assert float(loss) == pytest.approx(wanted + 0.2 * 5.5 / 3, rel=1e-6)
    assert float(more["accuracy"]) == pytest.approx(2 / 3)
    assert float(more["reward_margin"]) == pytest.approx(0.5 * 4 / 3)
    assert float(more["chosen_nll"]) == pytest.approx(5.5 / 3)


def test_the_loss_of_judged_replies_by_hand() -> None:
    """Ratios of the replies 1, -2 and 2; of the mismatches -1, 0 and -2, whose mean is below 0, so that z is 0. Bad
    ones: 1 - sigmoid(-0.5 ratio)."""
    loss, more = kto_parts(jnp.array(LOGPROBS, jnp.float32), hand_rows(-1.0), TOTALS, PreferenceConfig(beta=0.5))
    assert float(loss) == pytest.approx(sum(1 / (1 + exp(-0.5 * ratio)) for ratio in (1, -2, 2)) / 3, rel=1e-6)
    assert float(more["divergence"]) == 0 and float(more["accuracy"]) == pytest.approx(1 / 3)


def test_no_gradient_goes_through_the_divergence_of_kto() -> None:
    """The other way round the mean ratio of mismatches is 1, and still nothing flows into their tokens."""
    rows = hand_rows(1.0)
    config, flipped = PreferenceConfig(beta=0.5), {**rows, "reference": jnp.array(LOGPROBS, jnp.float32)}

    def loss(logprobs_BT: jax.Array) -> tuple[jax.Array, Any]:
        return kto_parts(logprobs_BT, flipped, TOTALS, config)

    gradient, more = jax.grad(loss, has_aux=True)(jnp.array(REFERENCE, jnp.float32))
    assert float(more["divergence"]) == pytest.approx(1)
    second = np.array(SEGMENTS) % 2 == 0
    assert not np.asarray(gradient)[second].any()
    np.testing.assert_array_equal(np.asarray(gradient) != 0, ~second & (np.array(WEIGHTS) > 0))


def test_a_mean_is_over_the_pairs_of_the_whole_step() -> None:
    values, there = jnp.array([[1.0, 9.0]]), jnp.array([[True, False]])
    assert float(mean_of(values, there, TOTALS)) == pytest.approx(1 / 3)


# ---- the loss of a model --------------------------------------------------------------
class Learner(Trainer):
    """The gradients of a run that learns from preferences."""

    def loss(self, model: Any, rows: Any, sums: Any, before: Any) -> Any:
        return preference_loss(model, rows, sums, before, self.run.preference, self.run.loss, self.run.objective)


def gradients(kind: Any, mesh: MeshConfig | None = None, **changes: Any) -> tuple[dict[str, np.ndarray], float]:
    """Gradients and loss of rows of one pair each, whose reference says something else than the model."""
    run = make_run(kind, mesh=mesh or MeshConfig(), loss=LossConfig(balance=0.0, router_z_loss=0.001), **changes)
    learner = Learner(run, make_mesh(run.mesh))
    rows, draw = tiny_rows(run), np.random.default_rng(1)
    shape = rows["tokens"].shape
    rows |= {"weights": (rows["segments"] > 0).astype(np.float32), "labels": np.full(shape, 0.5, np.float32)}
    rows["reference"] = -draw.uniform(2, 6, shape).astype(np.float32)

    def of(state: Any, rows: Rows) -> Any:
        return accumulate(run.accumulate, learner.skeleton, learner.loss, state, rows)

    with jax.set_mesh(learner.mesh):
        found, parts = jax.jit(of)(learner.state, jax.device_put(rows, batch_sharding(learner.mesh)))
    return jax.tree.map(np.asarray, found), float(parts.loss)


def assert_alike(found: tuple[Any, float], wanted: tuple[Any, float], share: float) -> None:
    assert abs(found[1] - wanted[1]) <= share * abs(wanted[1])
    assert found[0].keys() == wanted[0].keys()
    for name, value in wanted[0].items():
        assert np.abs(found[0][name] - value).max() <= share * np.abs(value).max(), name
    assert any(value.any() for value in wanted[0].values())


SFT = PreferenceConfig(beta=0.3, sft=0.1)


def labelled(objective: str, kind: Any) -> Any:
    return replace(kind, num_labels=1) if objective == "reward" else kind


FULL = pytest.mark.full


@pytest.mark.parametrize("objective", ["dpo", pytest.param("reward", marks=FULL)])
def test_micro_batches_add_up(objective: str) -> None:
    kind, changes = labelled(objective, DENSE), {"objective": objective, "preference": SFT}
    assert_alike(gradients(kind, accumulate=2, **changes), gradients(kind, **changes), 1e-5)


@pytest.mark.parametrize("objective", ["dpo", pytest.param("kto", marks=FULL), pytest.param("reward", marks=FULL)])
def test_eight_devices_give_what_one_gives(objective: str) -> None:
    kind, changes = labelled(objective, MOE), {"objective": objective, "preference": SFT}
    mesh = MeshConfig(fsdp=2, expert=2, tensor=2)
    assert_alike(gradients(kind, mesh, **changes), gradients(kind, **changes), 1e-5)


def test_a_block_for_the_token_after_the_next_is_left_alone() -> None:
    kind = replace(DENSE, num_layers=1, mtp_layers=1, moe=replace(MOE.moe, dense_layers=()))
    found, loss = gradients(kind, objective="dpo")
    assert np.isfinite(loss)
    assert all(not value.any() for name, value in found.items() if name.startswith("mtp"))
    assert any(value.any() for name, value in found.items() if name.startswith("stacks"))
