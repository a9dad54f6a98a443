"""Tasks that are graded by log-probabilities: a model says how likely texts are, and writes none."""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import numpy as np

from errors import UserError
from train.tasks.rows import rows_of
from train.tasks.task import Split

Form = Literal["mean", "exp", "bits"]
"""A measure of all items is the mean of their numbers, `e` to that, or that many bits for nats."""


class Continuation(NamedTuple):
    """`text` where `context` stands before it; without any it begins a document, and may be as long as it likes."""

    context: str
    text: str


class Likelihood(NamedTuple):
    """What a model says of a continuation.

    logprob: of all its tokens, in nats. greedy: each of them was the most likely one. cut: the context was too long
    for the model and lost its beginning.
    """

    logprob: float
    greedy: bool
    cut: bool = False


class Part(NamedTuple):
    """What an item adds to a measure: a sum, and over how many (items, words, bytes)."""

    total: float
    over: float = 1.0


@dataclass(frozen=True)
class Item:
    """Continuations to weigh, and what the task needs to know of them, such as which is the right one."""

    id: str
    asked: tuple[Continuation, ...]
    answer: Any


class LikelihoodTask(Protocol):
    """Items and their measures, the first of which is the score."""

    forms: ClassVar[dict[str, Form]]

    @property
    def name(self) -> str:
        """As the catalogue has it."""
        ...

    def items(self, split: Split) -> Sequence[Item]:
        """All of them, in an order that never changes."""
        ...

    def measure(self, item: Item, found: Sequence[Likelihood]) -> dict[str, Part]:
        """What an item adds to each measure."""
        ...


class Estimate(NamedTuple):
    """A measure and its standard error."""

    value: float
    stderr: float


def estimate(parts: Sequence[Part], form: Form = "mean") -> Estimate:
    """The measure of all items.

    A mean is a ratio of sums `r = sum(total) / sum(over)`; its standard error is that of a ratio estimator, which where
    each counts 1 is the standard deviation over the root of n (Cochran, Sampling Techniques, 6.4). The error of `e^-r`
    and of bits follows from the derivative.
    """
    totals, counts = np.array(parts, np.float64).reshape(-1, 2).T
    if not counts.sum():
        return Estimate(math.nan, math.nan)
    ratio, n = totals.sum() / counts.sum(), len(parts)
    stderr = math.nan
    if n > 1:
        rest = totals - ratio * counts
        stderr = math.sqrt((rest**2).sum() / (n - 1) / n) / counts.mean()
    if form == "mean":
        return Estimate(ratio, stderr)
    if form == "bits":
        return Estimate(ratio / math.log(2), stderr / math.log(2))
    value = math.exp(min(ratio, 700.0))
    return Estimate(value, value * stderr)


@dataclass(frozen=True)
class LikelihoodFile(ABC):
    """A task of log-probabilities whose items are the rows of a file.

    Attributes:
        path: the file. shots: solved rows that stand before each. shots_path: the file they are the first rows of.
    """

    path: str
    shots: int = 0
    shots_path: str = ""

    name: ClassVar[str] = ""
    forms: ClassVar[dict[str, Form]] = {"acc": "mean"}

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError(f"task {self.name!r} takes its rows from a file: name it as {self.name}:FILE.jsonl")
        if self.shots < 0 or bool(self.shots) != bool(self.shots_path):
            raise UserError(
                f"task {self.name!r} shows solved rows where both shots=N and shots_path=FILE are given; one is missing"
            )
        if not self.all_items:
            raise UserError(f"{self.path} has no row of task {self.name!r} in it")

    @abstractmethod
    def item(self, row: dict[str, Any], where: str) -> Item:
        """A row as an item, `where` as its id unless it brings one. UserError names the place."""

    def heading(self, row: dict[str, Any]) -> str:
        """What stands before a row and the solved ones."""
        return ""

    def example(self, row: dict[str, Any], where: str) -> str:
        """A solved row as text: its context and the right continuation."""
        item = self.item(row, where)
        context, text = item.asked[item.answer]
        return f"{context}{text}\n\n"

    @functools.cached_property
    def all_items(self) -> list[Item]:
        """Every row's, in the file's order, after the solved ones."""
        before = ""
        if self.shots:
            solved = rows_of(self.shots_path)
            if len(solved) < self.shots:
                raise UserError(f"{self.shots_path} has {len(solved)} rows; lower shots={self.shots}")
            before = "".join(self.example(row, where) for row, where in solved[: self.shots])
        found = []
        for row, where in rows_of(self.path):
            item, first = self.item(row, where), self.heading(row) + before
            found.append(replace(item, asked=tuple(Continuation(first + c, text) for c, text in item.asked)))
        return found

    def items(self, split: Split) -> Sequence[Item]:
        """As `LikelihoodTask` has it: a file is one split."""
        return self.all_items

    @abstractmethod
    def measure(self, item: Item, found: Sequence[Likelihood]) -> dict[str, Part]:
        """As `LikelihoodTask` has it."""
