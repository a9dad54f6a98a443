"""Law: ratings are where the likelihood of the votes and the stated prior is at its top; intervals hold the truth."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from serve.feedback import Feedback
from serve.ranking import prior, rank, scores, strengths

PROMPT = [{"role": "user", "content": "Hello"}]


def points(wins: float, losses: float) -> float:
    """How far apart two models are, as the docstring of serve/ranking.py has it."""
    return 400 * math.log10((wins + 0.5) / (losses + 0.5))


@pytest.mark.parametrize(
    ("votes", "apart"),
    [
        ({("x", "y", "a"): 3, ("y", "x", "a"): 1}, points(3, 1)),
        ({("x", "y", "a"): 2, ("y", "x", "b"): 1, ("x", "y", "b"): 1}, points(3, 1)),
        ({("x", "y", "tie"): 2, ("y", "x", "both_bad"): 1, ("x", "y", "a"): 1}, points(2.5, 1.5)),
        ({("x", "y", "a"): 50, ("x", "x", "a"): 99}, points(50, 0)),
        ({("x", "y", "tie"): 7}, 0.0),
    ],
)
def test_two_models_by_hand(votes: dict[tuple[str, str, str], int], apart: float) -> None:
    found = {one.model: one for one in rank(votes)}
    assert found["x"].rating - found["y"].rating == pytest.approx(apart, abs=1e-6)
    assert found["x"].rating + found["y"].rating == pytest.approx(2000)
    assert found["x"].votes == sum(count for (a, b, _), count in votes.items() if a != b)
    assert (found["x"].wins, found["x"].losses) == (found["y"].losses, found["y"].wins)


def test_nobody_has_voted() -> None:
    assert rank({}) == rank({("x", "x", "a"): 3}) == []


def log_likelihood(theta: np.ndarray, wins: np.ndarray) -> float:
    """Written out, one pair at a time: wins of i over j, and one more tie of each model in equal parts."""
    models, total = len(theta), 0.0
    for i in range(models):
        for j in range(models):
            if i != j:
                count = wins[i, j] + 0.5 / (models - 1)
                total += count * -math.log1p(math.exp(theta[j] - theta[i]))
    return total


@pytest.mark.parametrize("models", [2, 3, 7])
def test_no_step_leads_further_up(models: int) -> None:
    rng = np.random.default_rng(models)
    wins = rng.integers(0, 30, (models, models)) * (rng.random((models, models)) < 0.5)
    ties = rng.integers(0, 10, (models, models))
    for one in (wins, ties):
        np.fill_diagonal(one, 0)
    total = scores(wins, ties)
    theta = strengths(total + prior(models))
    assert theta.mean() == pytest.approx(0, abs=1e-9)
    for direction in np.eye(models):
        up, down = (log_likelihood(theta + sign * 1e-4 * direction, total) for sign in (1, -1))
        assert abs(up - down) / 2e-4 < 1e-4 * (1 + total.sum()), "the gradient is zero"
        assert max(up, down) < log_likelihood(theta, total), "and it is a top"


def test_chains_of_models_that_never_lost_are_finite() -> None:
    votes = {(f"m{i}", f"m{i + 1}", "a"): 10**5 for i in range(5)}
    found = rank({**votes, ("far", "away", "tie"): 1}, draws=20)
    assert [one.model for one in found if one.model.startswith("m")] == [f"m{i}" for i in range(6)]
    assert all(math.isfinite(value) for one in found for value in (one.rating, one.low, one.high))


def test_intervals_hold_the_truth_and_shrink() -> None:
    """Of many arenas with known strengths about 95 % of the intervals hold them; the same votes give the same."""
    rng = np.random.default_rng(1)
    truth = np.array([150.0, 0.0, -150.0])
    held, arenas = 0, 60
    widths, votes = [], Counter[tuple[str, str, str]]()
    for _ in range(arenas):
        votes.clear()
        for _ in range(150):
            i, j = rng.choice(3, 2, replace=False)
            chance = 1 / (1 + 10 ** ((truth[j] - truth[i]) / 400))
            votes[str(i), str(j), "a" if rng.random() < chance else "b"] += 1
        found = rank(votes, draws=300)
        held += sum(one.low <= 1000 + truth[int(one.model)] <= one.high for one in found)
        widths.append(found[0].high - found[0].low)
    assert 0.9 <= held / (3 * arenas) <= 0.99
    assert rank(votes) == rank(votes)
    many = rank({verdict: 25 * count for verdict, count in votes.items()})
    assert many[0].high - many[0].low < np.mean(widths) / 4
    (first, last) = rank({("x", "y", "a"): 1})
    assert first.low < 1000 < first.high and last.low < 1000 < last.high, "one vote proves nothing"


def test_verdicts_are_counted_from_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    feedback, another = Feedback(path), Feedback(path)
    assert feedback.verdicts() == {}
    feedback.arena(("x", "y"), PROMPT, ("left", "right"), "b")
    another.arena(("y", "x"), PROMPT, ("left", "right"), "tie")
    feedback.vote("x", PROMPT, 'says "arena"', True)
    with path.open("a") as file:
        for row in ({"kind": "arena"}, {"kind": "arena", "models": {"a": 1, "b": "y"}, "winner": "a"}, ["arena"]):
            file.write(json.dumps(row) + "\n")
        file.write('{"kind": "arena", "cut off')
    counted = {("x", "y", "b"): 1, ("y", "x", "tie"): 1}
    assert feedback.verdicts() == counted == feedback.verdicts(), "no row is counted twice"
    assert Feedback(path).verdicts() == counted
    assert [one.model for one in rank(feedback.verdicts())] == ["y", "x"]
    path.write_text("")
    assert feedback.verdicts() == {}


def test_only_a_decided_vote_is_a_pair(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    feedback = Feedback(path)
    for winner in ("a", "b", "tie", "both_bad"):
        feedback.arena(("x", "y"), PROMPT, ("left", "right"), winner)
    a, b, *even = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    left, right = ([{"role": "assistant", "content": words}] for words in ("left", "right"))
    assert (a["chosen"], a["rejected"], b["chosen"], b["rejected"]) == (left, right, right, left)
    for row in even:
        assert not {"chosen", "rejected", "completion", "label"} & set(row), "nothing to train on by mistake"
        assert row["replies"] == {"a": left, "b": right}
    for row in (a, b, *even):
        assert row["prompt"] == PROMPT and row["kind"] == "arena" and row["models"] == {"a": "x", "b": "y"}
    assert [row["winner"] for row in (a, b, *even)] == ["a", "b", "tie", "both_bad"]
