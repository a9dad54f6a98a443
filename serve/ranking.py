"""Which models people prefer: Bradley-Terry strengths from the votes of the arena. No jax here.

In a vote between models i and j, i is preferred with probability 1 / (1 + 10 ** ((rating_j - rating_i) / 400)). The
ratings are those under which the votes that were cast are the most likely ones; their mean is 1000. A vote that finds
both replies equal, good or bad, counts as half a win for each side.

The prior: each model has tied once more than it did, with all others in equal parts, which is 1 / (models - 1) of a tie
with each. So a model that never lost stays finite, models that never met can be compared, and of two models with w and
l wins the ratings are 400 * log10((w + 1/2) / (l + 1/2)) apart.

The intervals hold 95 % of what comes out when as many votes as were cast are drawn again (a bootstrap), from those that
were cast and the prior's together: without the prior's, a single vote would leave no doubt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

MEAN, SCALE = 1000.0, 400 / math.log(10)
"""Of the ratings: their mean, and how many points one unit of log-odds is."""

COVERED = (2.5, 97.5)
"""The ends of the intervals, in percent of what was drawn."""

MOST_STEPS, CLOSE, TINY = 500, 1e-7, 1e-300


@dataclass(frozen=True)
class Standing:
    """A model's rating with its interval, and its votes."""

    model: str
    rating: float
    low: float
    high: float
    votes: int
    wins: int
    losses: int
    ties: int


def rank(votes: Mapping[tuple[str, str, str], int], draws: int = 1000, seed: int = 0) -> list[Standing]:
    """The models that were voted on, the strongest first.

    Args:
        votes: how often model A and model B got this verdict: "a", "b", or anything else for neither. Votes between
            two replies of one model say nothing of its rank and are left out.
        draws: of the bootstrap.
        seed: of the bootstrap.
    """
    names = sorted({name for a, b, _ in votes if a != b for name in (a, b)})
    if not names:
        return []
    place = {name: index for index, name in enumerate(names)}
    wins_MM, ties_MM = np.zeros((2, len(names), len(names)), np.int64)
    for (a, b, verdict), count in votes.items():
        if a != b:
            i, j = (place[b], place[a]) if verdict == "b" else (place[a], place[b])
            (wins_MM if verdict in ("a", "b") else ties_MM)[i, j] += count
    prior_MM = prior(len(names))
    ratings_M = MEAN + SCALE * strengths(scores(wins_MM, ties_MM) + prior_MM)

    pool = np.stack([wins_MM + prior_MM, ties_MM]).ravel()
    drawn = np.random.default_rng(seed).multinomial(wins_MM.sum() + ties_MM.sum(), pool / pool.sum(), draws)
    wins_NMM, ties_NMM = np.moveaxis(drawn.reshape(draws, 2, *wins_MM.shape), 1, 0)
    drawn_NM = MEAN + SCALE * strengths(scores(wins_NMM, ties_NMM) + prior_MM)
    low_M, high_M = np.percentile(drawn_NM, COVERED, axis=0)

    won_M, lost_M, tied_M = wins_MM.sum(1), wins_MM.sum(0), ties_MM.sum(0) + ties_MM.sum(1)
    found = [
        Standing(
            model=name,
            rating=float(ratings_M[i]),
            low=float(low_M[i]),
            high=float(high_M[i]),
            votes=int(won_M[i] + lost_M[i] + tied_M[i]),
            wins=int(won_M[i]),
            losses=int(lost_M[i]),
            ties=int(tied_M[i]),
        )
        for i, name in enumerate(names)
    ]
    return sorted(found, key=lambda one: (-one.rating, one.model))


def prior(models: int) -> np.ndarray:
    """Wins of each model over each other that are counted beside those that were cast."""
    return (1 - np.eye(models)) / 2 / (models - 1)


def scores(wins: np.ndarray, ties: np.ndarray) -> np.ndarray:
    """Wins of row over column, with half of each tie for either side."""
    return wins + (ties + np.swapaxes(ties, -1, -2)) / 2


def strengths(scores: np.ndarray) -> np.ndarray:
    """The most likely log-strengths [..., M] for `scores` [..., M, M], wins of row over column; their mean is zero.

    Every model must have won against and lost to some other, directly or over others; the prior sees to it.
    """
    games = scores + np.swapaxes(scores, -1, -2)
    models = scores.shape[-1]
    found = np.zeros(scores.shape[:-1])
    for _ in range(MOST_STEPS):
        chance = 1 / (1 + np.exp(found[..., None, :] - found[..., :, None]))
        slope = (scores - games * chance).sum(-1)
        pulls = games * chance * (1 - chance)
        curvature = np.eye(models) * pulls.sum(-1)[..., None] - pulls
        # Only differences matter: the constant holds the mean where it is and changes nothing else.
        step = np.linalg.solve(curvature + 1 / models, slope[..., None])[..., 0]
        # Newton's step, shortened so that it never passes the top: along it the curvature of this likelihood changes
        # by at most a factor of exp(spread).
        spread = np.ptp(step, axis=-1, keepdims=True)
        found += step * np.log1p(spread) / np.maximum(spread, TINY)
        if spread.max() < CLOSE:  # the next step would be about the square of this one
            break
    return found
