"""Replies side by side in the rows of a batch, with all that the loss needs of them. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from configs.alignment import RLConfig
from train.data.packing import pack
from train.rl.samples import Sample

Rows = dict[str, Any]


def row_counts(samples: int, least: int) -> list[int]:
    """How many rows a batch may have: a few numbers, so that few programs are compiled; the last is enough for all.

    Args:
        samples: replies in a batch. least: what each number has to be a multiple of.
    """
    most = -(-samples // least) * least
    return sorted({max(least, -(-most * part // 4 // least) * least) for part in (1, 2, 3, 4)})


@dataclass(frozen=True)
class Layout:
    """Where replies lie: of each its row and first column; and how many rows there are, as few as have room."""

    places: tuple[tuple[int, int], ...]
    rows: int


def lay_out(samples: Sequence[Sample], length: int, counts: Sequence[int]) -> Layout:
    """Replies side by side in rows of `length` columns; a reply of n tokens takes n - 1.

    counts: numbers of rows, see `row_counts`.
    """
    pieces = pack(np.array([len(sample.tokens) for sample in samples], np.int64), length, "whole")
    places = [(0, 0)] * len(samples)
    for row in range(pieces.rows):
        at = 0
        for piece in range(*pieces.row_offsets[row : row + 2]):
            places[int(pieces.doc[piece])] = row, at
            at += int(pieces.length[piece])
    return Layout(tuple(places), next(count for count in counts if count >= pieces.rows))


def make_rows(
    samples: Sequence[Sample], advantages: Sequence[float], layout: Layout, length: int, config: RLConfig
) -> Rows:
    """Arrays `[B, T]` of these replies with their advantages; see `train.policy.policy_loss`."""
    shape = layout.rows, length
    made: Rows = {name: np.zeros(shape, np.int32) for name in ("tokens", "targets", "positions", "segments")}
    made |= {name: np.zeros(shape, np.float32) for name in ("weights", "drawn", "advantages", "sampler", "total")}
    made |= {
        name: np.zeros(shape, np.float32) for name in ("old", "reference") if getattr(samples[0], name) is not None
    }
    if (experts := samples[0].experts) is not None:
        made["experts"] = np.zeros((*shape, *experts.shape[1:]), np.int16)
    segments = np.zeros(layout.rows, np.int32)
    # By column, so that segments count from the left.
    for index in sorted(range(len(samples)), key=lambda index: layout.places[index]):
        row, at = layout.places[index]
        segments[row] += 1
        put(made, row, at, int(segments[row]), samples[index], advantages[index], config)
    return made


def put(made: Rows, row: int, at: int, segment: int, sample: Sample, advantage: float, config: RLConfig) -> None:
    """Writes a reply into a row from column `at` on."""
    tokens = np.asarray(sample.tokens, np.int32)
    count = len(tokens) - 1
    here = row, slice(at, at + count)
    drawn = sample.drawn[1:].astype(np.float32)
    learnt = not sample.skipped and not (config.drop_cut and sample.cut)
    values = {"tokens": tokens[:-1], "targets": tokens[1:], "positions": np.arange(count), "segments": segment}
    values |= {"drawn": drawn, "sampler": sample.logprobs[1:], "advantages": advantage * drawn}
    values |= {"weights": drawn * (token_weight(sample, config) if learnt else 0.0)}
    for name in ("old", "reference"):
        if name in made:
            values[name] = getattr(sample, name)[1:]
    if sample.experts is not None:
        values["experts"] = sample.experts[:count]
    for name, value in values.items():
        made[name][here] = value
    # Replies that are left out count in a mean over a fixed number, and in no other.
    made["total"][row, at] = share(sample, config) if learnt or config.mean == "fixed" else 0.0


def of_samples(values_BT: np.ndarray, samples: Sequence[Sample], layout: Layout) -> list[np.ndarray]:
    """What an array says of each token of each reply; 0 for the first, before which there is nothing."""
    found: list[np.ndarray] = []
    for sample, (row, at) in zip(samples, layout.places, strict=True):
        own = np.zeros(len(sample.tokens), np.float32)
        own[1:] = values_BT[row, at : at + len(own) - 1]
        found.append(own)
    return found


def token_weight(sample: Sample, config: RLConfig) -> float:
    """What a drawn token of a reply counts, see `RLConfig.mean`."""
    return {"token": 1.0, "sequence": 1 / max(sample.length, 1), "fixed": 1 / config.max_new_tokens}[config.mean]


def share(sample: Sample, config: RLConfig) -> float:
    """What a reply adds to the number that the loss is divided by."""
    return float(sample.length) if config.mean == "token" else 1.0
