"""Sums, differences and products, made up without end: the smallest task that can be learned by reward."""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from errors import UserError
from train.tasks.answers import final_number
from train.tasks.task import Grade, Problem, Split, ask, right_or_wrong, share, spoken

SIGNS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}


@dataclass(frozen=True)
class Arithmetic:
    """Two operands from 0 to 10**digits - 1.

    A pair of operands, in either order and under any operation, is in the test split if its hash falls below
    `TEST_SHARE`, else in the train split: the splits never share a pair, whatever the options.

    Attributes:
        digits: of the operands, at most. operations: some of + - *. form: "question" asks in words, "short" is
            `23+45=`, for models that know little else. size: problems of a split; fewer where there are no more.
    """

    digits: int = 2
    operations: str = "+-*"
    form: Literal["question", "short"] = "question"
    size: int = 2000

    name: ClassVar[str] = "arithmetic"
    TEST_SHARE: ClassVar[float] = 0.2

    def __post_init__(self) -> None:
        if not 1 <= self.digits <= 50 or self.size < 1:
            raise UserError(
                f"arithmetic has digits={self.digits}, size={self.size}; give 1 to 50 digits, a size from 1"
            )
        if not self.operations or set(self.operations) - SIGNS.keys():
            raise UserError(f"operations={self.operations} of task 'arithmetic' must be some of {''.join(SIGNS)}")

    @functools.cached_property
    def _made(self) -> dict[Split, list[Problem]]:
        return {"train": self._make("train"), "test": self._make("test")}

    def problems(self, split: Split) -> Sequence[Problem]:
        """As `Task` has it."""
        return self._made[split]

    def _make(self, split: Split) -> list[Problem]:
        draw = random.Random(f"arithmetic {split} {self.digits} {self.operations}")
        found: dict[str, Problem] = {}
        misses = 0
        while len(found) < self.size and misses < 1000:
            a, b = draw.randrange(10**self.digits), draw.randrange(10**self.digits)
            sign = draw.choice(self.operations)
            pair = f"{min(a, b)} {max(a, b)}"
            if (share(pair) < self.TEST_SHARE) != (split == "test") or f"{a}{sign}{b}" in found:
                misses += 1
                continue
            misses = 0
            text = f"{a}{sign}{b}=" if self.form == "short" else f"What is {a} {sign} {b}?"
            found[f"{a}{sign}{b}"] = Problem(f"{a}{sign}{b}", ask(text), SIGNS[sign](a, b))
        return list(found.values())

    def grade(self, problem: Problem, reply: str) -> Grade:
        """The last number of the reply (short form: the first of its first line) is the answer."""
        text = spoken(reply)
        if self.form == "short":
            line = next(iter(text.strip().splitlines()), "")
            found = re.search(r"-?\d+", line)
            value = found.group() if found else None
        else:
            number = final_number(text)
            value = None if number is None else str(number)
        return right_or_wrong(value == str(problem.answer), f"read {value}, wanted {problem.answer}")
