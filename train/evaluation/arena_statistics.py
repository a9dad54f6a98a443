"""From verdicts to win rates, with intervals, and with the share of the judge's liking that is due to style.

Q questions, R rounds of the bootstrap, K features of style and a constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from errors import UserError
from train.evaluation.arena_files import Answer, Judgment

STRONG = 3
"""Wins that a verdict such as A>>B counts for."""
SCORES = {
    "A>>B": [1.0] * STRONG,
    "A>B": [1.0],
    "A=B": [0.5],
    "B=A": [0.5],
    "A<B": [0.0],
    "B>A": [0.0],
    "A<<B": [0.0] * STRONG,
    "B>>A": [0.0] * STRONG,
    "B<A": [1.0],
    "B<<A": [1.0] * STRONG,
}
"""Of a verdict what A wins in each of the comparisons that it counts for."""
INTERVAL = (0.025, 0.975)
"""Quantiles of the bootstrap that the interval lies between: 95 %."""
RIDGE = 1e-5
"""Weight of the squared coefficients: far below what a single comparison moves, it keeps a model that wins or loses
every comparison from a coefficient without end."""
PLAIN = ("score", "low", "high")
ALIKE = ("equal_style", "equal_style_low", "equal_style_high")
STEPS, CLOSE = 300, 1e-7
"""Newton's steps at most, and the size of one that is none."""


def battles(judgment: Judgment) -> list[float] | None:
    """What the model wins (1, 0.5 or 0) in each comparison of both games; None where a verdict cannot be read.

    The second game, in which the model is A, comes first, as in the official show_result.py.
    """
    first, second = judgment.games
    if first is None or second is None or first.score not in SCORES or second.score not in SCORES:
        return None
    return SCORES[second.score] + [1.0 - won for won in SCORES[first.score]]


def arena_table(
    judgments: Sequence[Judgment],
    answers: Mapping[str, Answer],
    baseline: Mapping[str, Answer],
    *,
    style_control: bool = False,
    rounds: int = 1000,
    seed: int = 0,
) -> dict[str, dict[str, float | None]]:
    """Of each category the win rate against the baseline, 0 to 1, and its 95 % interval.

    `score` is the mean of what the model wins over all comparisons. `low` and `high` are quantiles of a bootstrap over
    questions: one strong verdict is three comparisons but a single observation. (The official interval is narrower:
    90 %, and it draws comparisons one by one.) `n` questions count; `unread` have a verdict that cannot be read.

    With `style_control` `score` is sigmoid(c) of the logistic regression  won ~ c + w z  over all comparisons, where z
    are features of style (`style_features`), standardised over the comparisons: the official definition (Bradley-Terry,
    the baseline anchored at 1/2) for one model, at the maximum, which the official minimiser does not quite reach. It
    stands for that model's own mean style, so a model that is always longer keeps what that brings. `equal_style`
    (`equal_style_low`, `_high`) is the same regression where both answers have the same style.

    Values are None where no question of a category counts.

    Args:
        judgments: of one model. answers, baseline: read with `style_control` only.
        rounds: of the bootstrap. seed: of its draws, which are the same in each category.

    Raises:
        UserError: judgments of several models or none, no rounds, an answer is missing.
    """
    models = sorted({one.model for one in judgments})
    if len(models) != 1:
        raise UserError(f"the judgments are of {', '.join(models) or 'no model'}; give those of one model")
    if rounds < 1:
        raise UserError(f"rounds={rounds}: the bootstrap needs 1 or more, such as 1000")
    table: dict[str, dict[str, float | None]] = {}
    for category in dict.fromkeys(one.category for one in judgments):
        played = [(one, battles(one)) for one in judgments if one.category == category]
        counted = [(one, won) for one, won in played if won is not None]
        values: dict[str, float | None] = dict.fromkeys(PLAIN + ALIKE * style_control)
        if counted:
            features_QK = style_features([one for one, _ in counted], answers, baseline) if style_control else None
            values |= _rates([won for _, won in counted], features_QK, rounds, seed)
        table[category] = {**values, "n": len(counted), "unread": len(played) - len(counted)}
    return table


def _rates(
    battles_Q: Sequence[Sequence[float]], features_QK: np.ndarray | None, rounds: int, seed: int
) -> dict[str, float]:
    """Win rates with their intervals; with features of style two of them."""
    total_Q = np.array([len(won) for won in battles_Q], np.float64)
    won_Q = np.array([sum(won) for won in battles_Q], np.float64)
    drawn_RQ = np.random.default_rng(seed).multinomial(len(total_Q), np.full(len(total_Q), 1 / len(total_Q)), rounds)
    drawn_RQ = np.concatenate((np.ones((1, len(total_Q))), drawn_RQ))  # the first is everything, once
    if features_QK is None:
        return _summary(PLAIN, (drawn_RQ @ won_Q) / (drawn_RQ @ total_Q))
    mean_K = total_Q @ features_QK / total_Q.sum()
    spread_K = np.sqrt(total_Q @ (features_QK - mean_K) ** 2 / max(total_Q.sum() - 1, 1))  # torch.std: one less
    varies_K = spread_K > 1e-9  # what is the same everywhere explains nothing
    scale_K = np.where(varies_K, spread_K, np.inf)
    x_QK = np.column_stack((np.ones_like(total_Q), (features_QK - mean_K) / scale_K))
    alike_K = np.concatenate(([1.0], -mean_K / scale_K))
    theta_RK = fit_logistic(x_QK, total_Q, won_Q, drawn_RQ)
    return _summary(PLAIN, _sigmoid(theta_RK[:, 0])) | _summary(ALIKE, _sigmoid(theta_RK @ alike_K))


def style_features(
    judgments: Sequence[Judgment], answers: Mapping[str, Answer], baseline: Mapping[str, Answer]
) -> np.ndarray:
    """[Q, 4]: how the model's style differs from the baseline's, as the official show_result.py has it.

    Of lengths a and b in tokens (a - b) / (a + b); of headers, list items and bold words, each a number per token (of
    a length with one token more), (a - b) / (a + b + 1). Lengths are those of the files where every answer has one of
    them, else quarters of the bytes of both answers, so that both are measured alike: what tokens an answer of ours
    has by the official tokenizer nobody knows here.

    Raises UserError for an answer that is missing.
    """
    sides: list[list[Answer]] = []
    for given, whose in ((answers, "the model"), (baseline, "the baseline")):
        missing = next((one for one in judgments if one.uid not in given), None)
        if missing:
            where = f"{missing.where}: " if missing.where else ""
            raise UserError(f"{where}{whose} has no answer to question {missing.uid}, whose style counts; add it")
        sides.append([given[one.uid] for one in judgments])
    stated = all(answer.style.tokens is not None for side in sides for answer in side)
    (length_Q, marks_Q3), (other_Q, others_Q3) = (_measures(side, stated) for side in sides)
    both_Q = length_Q + other_Q
    longer_Q = np.divide(length_Q - other_Q, both_Q, out=np.zeros_like(both_Q), where=both_Q > 0)
    dense_Q3, sparse_Q3 = marks_Q3 / (length_Q + 1)[:, None], others_Q3 / (other_Q + 1)[:, None]
    return np.column_stack((longer_Q, (dense_Q3 - sparse_Q3) / (dense_Q3 + sparse_Q3 + 1)))


def _measures(side: Sequence[Answer], stated: bool) -> tuple[np.ndarray, np.ndarray]:
    lengths = [float(one.style.tokens or 0) if stated else len(one.text.encode("utf-8", "replace")) / 4 for one in side]
    marks = [(one.style.headers, one.style.lists, one.style.bold) for one in side]
    return np.array(lengths), np.array(marks, np.float64)


def _summary(names: Sequence[str], rate_R: np.ndarray) -> dict[str, float]:
    """The first rate, and the interval of the others."""
    low, high = np.quantile(rate_R[1:], INTERVAL)
    return dict(zip(names, (float(rate_R[0]), float(low), float(high)), strict=True))


def fit_logistic(x_QK: np.ndarray, total_Q: np.ndarray, won_Q: np.ndarray, drawn_RQ: np.ndarray) -> np.ndarray:
    """[R, K]: of each round the most likely coefficients, question q counting `drawn_RQ[:, q]` times.

    Maximises  sum_q drawn (won log p + (total - won) log(1 - p)) - RIDGE/2 |theta|^2,  p = sigmoid(x theta), by damped
    Newton: a step d is cut to log(1 + r) / r of itself, r = max |x d|, which makes every step an ascent, as the
    logistic likelihood is generalised self-concordant (Sun and Tran-Dinh, arXiv 1703.04599).
    """
    rounds, width = len(drawn_RQ), x_QK.shape[1]
    theta_RK = np.zeros((rounds, width))
    outer_QKK = (x_QK[:, :, None] * x_QK[:, None, :]).reshape(len(x_QK), -1)
    for _ in range(STEPS):
        p_RQ = _sigmoid(theta_RK @ x_QK.T)
        slope_RK = (drawn_RQ * (won_Q - total_Q * p_RQ)) @ x_QK - RIDGE * theta_RK
        curve_RKK = ((drawn_RQ * total_Q * p_RQ * (1 - p_RQ)) @ outer_QKK).reshape(rounds, width, width)
        step_RK = np.linalg.solve(curve_RKK + RIDGE * np.eye(width), slope_RK[:, :, None])[:, :, 0]
        reach_R1 = np.abs(step_RK @ x_QK.T).max(axis=1, keepdims=True)
        theta_RK += step_RK * np.divide(np.log1p(reach_R1), reach_R1, out=np.ones_like(reach_R1), where=reach_R1 > 0)
        if reach_R1.max() < CLOSE:
            break
    return theta_RK


def _sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1.0 + np.tanh(0.5 * logits))
