"""What the page shows of runs that learn from preferences or rewards, and the replies that any run has written down."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from train.report_plots import line_chart, short, time_heat_map
from train.report_records import Record, held_out, marks_of, points, series

STEPS_SHOWN = 40
"""Of replies: as many of the latest steps."""
LONGEST = 1500
"""Characters of a prompt or reply that are shown."""
LEAST_SECONDS = 1e-3
"""What never took as long is no line of its own."""
BINS = 10


def alignment_charts(run: Mapping[str, Any], records: Sequence[Record]) -> list[str]:
    """Charts of preferences and rewards; an empty string for what was not measured. run: the config."""
    rl = run.get("rl", {})
    longest = rl.get("max_new_tokens", 0) * (rl.get("turns", 1) if rl.get("tools") else 1)
    return [
        *_preference_charts(records),
        *_reward_charts(records),
        *_histograms(records, longest),
        *_sampler_charts(records),
    ]


def percent(value: float) -> str:
    """A share as a reader wants it."""
    return f"{value:.3g}%"


def _preference_charts(records: Sequence[Record]) -> list[str]:
    marks = marks_of(records)
    rewards = [
        series(records, "chosen_reward", "chosen", smooth=True),
        series(records, "rejected_reward", "rejected", 2, smooth=True),
        held_out(records, "validation_chosen_reward", "chosen, held out", 3),
        held_out(records, "validation_rejected_reward", "rejected, held out", 4),
    ]
    margins = [
        series(records, "reward_margin", "train", smooth=True),
        held_out(records, "validation_reward_margin"),
    ]
    right = [
        series(records, "accuracy", "train", factor=100, smooth=True),
        held_out(records, "validation_accuracy", factor=100),
    ]
    nll = [series(records, "chosen_nll", "train", smooth=True), held_out(records, "validation_chosen_nll")]
    return [
        line_chart("Preferred rightly", right, marks=marks, show=percent),
        line_chart("Reward of chosen and rejected replies", rewards, marks=marks),
        line_chart("Margin between rewards", margins, marks=marks),
        line_chart("Chosen replies, nats per token", nll, marks=marks),
        line_chart("Divergence that kto estimates", [series(records, "divergence", "divergence")], zero=True),
    ]


def _reward_charts(records: Sequence[Record]) -> list[str]:
    """How good and how long replies are."""
    marks = marks_of(records)
    rewards = [
        series(records, "reward", "drawn", smooth=True),
        held_out(records, "validation_reward"),
        series(records, "reward_deviation", "deviation", 3),
    ]
    names = {name for record in records for name in record if name.startswith("reward_")}
    known = {"reward_deviation", "reward_margin"}
    parts = [name for name in sorted(names - known) if points(records, name)]
    each = [
        series(records, name, name.removeprefix("reward_"), 1 + index % 4, smooth=True)
        for index, name in enumerate(parts)
    ]
    lengths = [
        series(records, "reply_tokens", "drawn", smooth=True),
        held_out(records, "validation_reply_tokens"),
    ]
    shares = [
        series(records, "equal_groups", "groups whose rewards are all equal", factor=100),
        series(records, "cut_replies", "replies cut at their longest", 2, factor=100),
        series(records, "skipped_replies", "replies without a reward", 3, factor=100),
    ]
    return [
        line_chart("Reward", rewards, marks=marks),
        line_chart(
            "What the task itself says of held-out replies", [held_out(records, "validation_grade")], marks=marks
        ),
        line_chart("Reward by its parts", each, marks=marks),
        line_chart("Tokens of a reply", lengths, zero=True),
        line_chart("Replies that teach little", shares, zero=True, show=percent),
        line_chart("Calls of tools in a reply", [series(records, "tool_calls", "calls", smooth=True)], zero=True),
    ]


def _sampler_charts(records: Sequence[Record]) -> list[str]:
    """How far the model moves, how far trainer and sampler are apart, and what takes time."""
    gaps = [series(records, "logprob_gap", "mean"), series(records, "logprob_gap_max", "largest", 2)]
    seconds = [
        series(records, f"seconds_{name}", name, color)
        for color, name in enumerate(("rollout", "scoring", "update", "handover"), 1)
    ]
    seconds = [one for one in seconds if any(y >= LEAST_SECONDS for _, y in one.points)]
    clipped = [series(records, "clip_fraction", "clipped", factor=100, smooth=True)]
    return [
        line_chart("Entropy of the next token, nats", [series(records, "entropy", "entropy", smooth=True)], zero=True),
        line_chart("Tokens whose ratio is clipped", clipped, zero=True, show=percent),
        line_chart("Largest ratio of probabilities", [series(records, "ratio_max", "largest")]),
        line_chart("Divergence from the reference", [series(records, "kl", "k3", smooth=True)], zero=True),
        line_chart("Trainer and sampler: gap of log-probabilities", gaps, log=True),
        line_chart("Seconds of a step", seconds, log=True, show=lambda value: f"{short(value)} s"),
    ]


# ---- histograms -----------------------------------------------------------------
def _histograms(records: Sequence[Record], longest: int) -> list[str]:
    rewards = [
        (record["step"], record["reward_histogram"], record["reward_range"])
        for record in records
        if _counts(record.get("reward_histogram")) and _range(record.get("reward_range"))
    ]
    lengths = [(r["step"], r["length_histogram"]) for r in records if _counts(r.get("length_histogram"))]
    figures: list[str] = []
    if rewards:
        low, high = min(ends[0] for _, _, ends in rewards), max(ends[1] for _, _, ends in rewards)
        columns = [rebinned(counts, ends, (low, high)) for _, counts, ends in rewards]
        starts = [low + (high - low) * bin / BINS for bin in range(BINS)] if high > low else [low]
        figures.append(_share_map("Rewards", [step for step, _, _ in rewards], columns, starts))
    if lengths:
        count = len(lengths[-1][1])
        kept = [(step, counts) for step, counts in lengths if len(counts) == count]
        starts = [longest * bin / count for bin in range(count)]
        columns = [[one / (sum(counts) or 1) for one in counts] for _, counts in kept]
        figures.append(_share_map("Tokens of replies", [step for step, _ in kept], columns, starts))
    return figures


def rebinned(counts: Sequence[float], ends: Sequence[float], span: tuple[float, float]) -> list[float]:
    """Shares of a histogram between `ends` in bins over a wider `span`; one bin where the span has no width.

    What a bin counted goes to where its middle lies; the middle of all where all values were equal.
    """
    (low, high), (first, last), total = span, ends, sum(counts) or 1
    shares = [0.0] * (BINS if high > low else 1)
    for index, count in enumerate(counts):
        middle = first + (last - first) * (index + 0.5) / len(counts)
        place = int((middle - low) / (high - low) * BINS) if high > low else 0
        shares[min(max(place, 0), len(shares) - 1)] += count / total
    return shares


def _share_map(title: str, steps: Sequence[float], columns: Sequence[Sequence[float]], starts: Sequence[float]) -> str:
    """A heat map of shares `[steps, bins]`, the largest bin on top; starts: where each begins."""
    labels = [f"≥ {short(start)}" for start in starts]
    rows = [list(row) for row in zip(*columns, strict=True)]
    return time_heat_map(title, steps, rows[::-1], labels[::-1], share_of="replies")


def _counts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, (int, float)) for one in value)


def _range(value: Any) -> bool:
    return _counts(value) and len(value) == 2 and all(map(math.isfinite, value))


# ---- replies --------------------------------------------------------------------
def sample_cards(samples: Sequence[Mapping[str, Any]]) -> str:
    """The replies that were written down, the latest step's in sight and earlier ones folded; empty without any."""
    steps = sorted({one["step"] for one in samples}, reverse=True)
    if not steps:
        return ""
    parts = ["<h2>Replies to held-out prompts</h2>"]
    for index, step in enumerate(steps[:STEPS_SHOWN]):
        cards = "".join(_card(one) for one in samples if one["step"] == step)
        opened = " open" if index == 0 else ""
        parts.append(f"<details{opened}><summary>step {step:,}</summary><div>{cards}</div></details>")
    if len(steps) > STEPS_SHOWN:
        parts.append(f"<em>{len(steps) - STEPS_SHOWN:,} earlier steps are in samples.jsonl</em>")
    return f'<div class="samples">{"".join(parts)}</div>'


def _card(one: Mapping[str, Any]) -> str:
    reward = one.get("reward")
    there = isinstance(reward, (int, float)) and math.isfinite(reward)
    worth = f"<b>{short(float(reward))}</b>" if there and reward is not None else ""
    prompt, reply = _cut(_words(one.get("prompt"))), _cut(_words(one.get("reply")))
    said = f"<p>{escape(reply)}</p>" if reply.strip() else "<p><em>nothing</em></p>"
    return f'<article>{worth}<p class="prompt">{escape(prompt)}</p>{said}</article>'


def _words(value: Any) -> str:
    """A prompt as text: of several messages each behind its role."""
    if isinstance(value, str) or value is None:
        return value or ""
    if isinstance(value, list) and all(isinstance(turn, dict) for turn in value):
        said = [(str(turn.get("role", "")), _content(turn)) for turn in value]
        return said[0][1] if len(said) == 1 else "\n".join(f"{role}: {words}" for role, words in said)
    return json.dumps(value, ensure_ascii=False)


def _content(turn: Mapping[str, Any]) -> str:
    content = turn.get("content")
    words = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False) if content else ""
    return words + (json.dumps(turn["tool_calls"], ensure_ascii=False) if turn.get("tool_calls") else "")


def _cut(words: str) -> str:
    return words if len(words) <= LONGEST else f"{words[:LONGEST]} ..."
