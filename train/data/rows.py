"""Rows of stores by number, and which of them make the batch of a step."""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError
from train.data.kinds import LABELLED
from train.data.order import derive, interleave, permute, shares
from train.data.packing import Index, empty_row, materialize
from train.data.pairs import Cut, materialize_pairs
from train.data.store import Store

Batch = dict[str, np.ndarray]
"""tokens, targets, positions, segments int32 and weights float32, each [B, T]; `labels` float32 where pairs or judged
replies are read, and what is attached."""

STEPS = 1 << 40
"""Length of an endless dataset, in steps."""


@dataclass(frozen=True)
class Part:
    """Packed rows of one store. `part[r]`: arrays [T]. Pickles as paths.

    `beside`: for each name a .npy of [rows, T, ...] whose rows become the arrays of that name.
    """

    store: Store
    index: Index
    beside: Mapping[str, Path] = field(default_factory=dict)

    def __reduce__(self) -> tuple[Any, ...]:
        return Part, (self.store, self.index, self.beside)

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, row: int) -> Batch:
        if self._cut is None:
            arrays = materialize(self.index[row], self._fetch, self.length)
        else:
            arrays = materialize_pairs(self.index[row], self._fetch, self._cut, len(self.store))
        return {**arrays, **{name: np.array(column[row]) for name, column in self._columns.items()}}

    @property
    def key(self) -> str:
        """The same in every run over the same rows."""
        return f"{self.store.fingerprint[:16]}-{self.index.path.name}"

    @property
    def length(self) -> int:
        """Tokens in a row (T)."""
        return self.index.meta["sequence_length"]

    def empty(self) -> Batch:
        """A row of padding with the arrays of the others."""
        row = empty_row(self.length, labels=self.store.objective in LABELLED)
        return {**row, **{name: np.zeros(each.shape[1:], each.dtype) for name, each in self._columns.items()}}

    @functools.cached_property
    def _cut(self) -> Cut | None:
        kind = self.store.objective
        return Cut(kind, self.length, self.index.meta["too_long"] == "cut_left") if kind in LABELLED else None

    @functools.cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        return {name: np.load(path, mmap_mode="r") for name, path in self.beside.items()}

    def _fetch(self, doc: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        document = self.store.read(doc, start, stop)
        return document.tokens, document.loss_mask


class Rows:
    """Rows of several parts, one after the other."""

    def __init__(self, parts: Sequence[Part]) -> None:
        self.parts = list(parts)
        self._ends = list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, row: int) -> Batch:
        number = bisect.bisect_right(self._ends, row)
        return self.parts[number][row - (self._ends[number - 1] if number else 0)]

    @property
    def pairs(self) -> int:
        """Targets in all rows, before any loss mask."""
        return sum(part.index.pairs for part in self.parts)

    def attach(self, name: str, paths: Mapping[str, Path]) -> Rows:
        """These rows with the array `name` of each part, by its key. UserError when one is missing or does not fit."""
        for part in self.parts:
            path = paths.get(part.key)
            if path is None or not path.is_file():
                raise UserError(f"no {name} for the rows {part.key} of {part.store.path}; compute it again")
            shape = np.load(path, mmap_mode="r").shape
            if shape[:2] != (len(part), part.length):
                raise UserError(f"{path} has shape {shape}, not {(len(part), part.length)}; delete it")
        return Rows([replace(part, beside={**part.beside, name: paths[part.key]}) for part in self.parts])


class TrainingBatches:
    """A grain data source: item s is one host's share of the batch of step s."""

    def __init__(
        self, streams: Sequence[Rows], weights: Sequence[float], seed: int, batch_size: int, rows: tuple[int, int]
    ) -> None:
        self.streams, self.seed, self.batch_size, self.rows = list(streams), seed, batch_size, rows
        self.shares = shares(weights)

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: Any) -> Batch:
        k = int(index) * self.batch_size + np.arange(*self.rows)
        source, item = interleave(k, self.shares) if len(self.streams) > 1 else (np.zeros_like(k), k)
        row = np.empty_like(k)
        for number in np.unique(source):
            mine = source == number
            row[mine] = self.rows_of(int(number), item[mine])
        return stack([self.streams[s][r] for s, r in zip(source.tolist(), row.tolist(), strict=True)])

    def rows_of(self, source: int, k: np.ndarray) -> np.ndarray:
        """Rows of a source that stand at positions `k` (int64 [n]) of its stream, which shuffles afresh each epoch."""
        count = len(self.streams[source])
        epoch = k // count
        row = np.empty_like(k)
        for e in np.unique(epoch):
            mine = epoch == e
            row[mine] = permute(k[mine] % count, count, derive(self.seed, "rows", source, int(e)))
        return row


class ValidationBatches:
    """A grain data source: every held-out row once, in a fixed order that mixes the sources; the rest is padding."""

    def __init__(self, held_out: Rows, batch_size: int, rows: tuple[int, int]) -> None:
        self.held_out, self.batch_size, self.rows = held_out, batch_size, rows

    def __len__(self) -> int:
        return -(-len(self.held_out) // self.batch_size)

    def __getitem__(self, index: Any) -> Batch:
        count = len(self.held_out)
        k = int(index) * self.batch_size + np.arange(*self.rows)
        there = permute(k[k < count], count, derive("validation"))
        padding = [self.held_out.parts[0].empty()] * int((k >= count).sum())
        return stack([*(self.held_out[row] for row in there.tolist()), *padding])


def stack(rows: Sequence[Batch]) -> Batch:
    """Rows of [T] as a batch of [rows, T]."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
