"""Countdown: reach a target with given numbers and + - * /."""

from __future__ import annotations

import ast
import functools
import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

from errors import UserError
from train.tasks.answers import boxed
from train.tasks.rows import rows_of, take
from train.tasks.task import Grade, Problem, Split, ask, right_or_wrong, share, spoken

LONGEST = 200
"""Characters of an expression."""
EXPRESSION = re.compile(r"[\d\s+\-*/().]*\d[\d\s+\-*/().]*")
SPELLINGS = (("×", "*"), ("÷", "/"), ("−", "-"), ("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("·", "*"))


@dataclass(frozen=True)
class Countdown:
    """Numbers and a target that they can reach; read from a file of rows {"nums", "target"}, or made up.

    The split of a problem is a hash of its numbers in order of size, so that no choice of numbers is in both.

    Attributes:
        path: a file; empty makes problems up. numbers: how many. largest: of the numbers; the target is at most
            10 times that. size: problems of a split. all_numbers: each must be used exactly once, else at most once.
    """

    path: str = ""
    numbers: int = 3
    largest: int = 25
    size: int = 2000
    all_numbers: bool = True

    name: ClassVar[str] = "countdown"
    TEST_SHARE: ClassVar[float] = 0.2

    def __post_init__(self) -> None:
        if not 2 <= self.numbers <= 8 or self.largest < 4 or self.size < 1:
            raise UserError(
                f"countdown has numbers={self.numbers}, largest={self.largest}, size={self.size}; give 2 to 8 numbers, "
                "a largest from 4 and a size from 1"
            )
        if self.path and not self._made["train"] + self._made["test"]:
            raise UserError(f"{self.path} has no problem of task 'countdown' in it")

    @functools.cached_property
    def _made(self) -> dict[Split, list[Problem]]:
        made: dict[Split, list[Problem]] = {"train": [], "test": []}
        seen: set[str] = set()
        for numbers, target in self._from_file() if self.path else self._invented():
            split: Split = "test" if share(f"countdown {sorted(numbers)}") < self.TEST_SHARE else "train"
            problem = self._problem(numbers, target)
            if problem.id not in seen and (self.path or len(made[split]) < self.size):
                seen.add(problem.id)
                made[split].append(problem)
            if not self.path and min(map(len, made.values())) >= self.size:
                break
        return made

    def problems(self, split: Split) -> Sequence[Problem]:
        """As `Task` has it."""
        return self._made[split]

    def _problem(self, numbers: list[int], target: int) -> Problem:
        use = "each number exactly once" if self.all_numbers else "each number at most once"
        text = (
            f"Using the numbers {', '.join(map(str, numbers))}, write an expression that equals {target}. "
            f"Use {use}, and only + - * / and parentheses. End with the expression within <answer> </answer>."
        )
        return Problem(f"{'-'.join(map(str, numbers))}={target}", ask(text), {"nums": numbers, "target": target})

    def _from_file(self) -> Iterator[tuple[list[int], int]]:
        for row, where in rows_of(self.path):
            numbers = take(row, where, "nums", list)
            if not numbers or not all(type(n) is int and n >= 0 for n in numbers):
                raise UserError(f"{where}: 'nums' is no list of whole numbers from 0")
            yield numbers, take(row, where, "target", int)

    def _invented(self) -> Iterator[tuple[list[int], int]]:
        draw = random.Random(f"countdown {self.numbers} {self.largest}")
        for _ in range(100 * self.size):
            numbers = [draw.randint(1, self.largest) for _ in range(self.numbers)]
            target = numbers[0]
            for number in numbers[1:]:
                target = draw.choice((target + number, target - number, target * number))
            if 0 < target <= 10 * self.largest:
                yield draw.sample(numbers, len(numbers)), target

    def grade(self, problem: Problem, reply: str) -> Grade:
        """The expression within <answer>, else \\boxed, else the reply's last one, has the target's value."""
        text = expression_of(spoken(reply))
        if text is None:
            return Grade(0.0, "no expression found")
        try:
            value, used = value_of(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
            return Grade(0.0, f"{text!r} is no expression: {error}")
        except ZeroDivisionError:
            return Grade(0.0, f"{text} divides by zero")
        given = Counter(problem.answer["nums"])
        if used - given or (self.all_numbers and used != given):
            return Grade(0.0, f"{text} uses {sorted(used.elements())} of {sorted(given.elements())}")
        return right_or_wrong(value == problem.answer["target"], f"{text} = {value}, wanted {problem.answer['target']}")


def expression_of(text: str) -> str | None:
    """The expression that a reply ends with, without what follows an equals sign; None where there is none."""
    answers = re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)
    candidate = answers[-1] if answers else boxed(text)
    for spelling, sign in SPELLINGS:
        text = text.replace(spelling, sign)
        candidate = candidate.replace(spelling, sign) if candidate else candidate
    if candidate is not None:
        return candidate.partition("=")[0].strip()
    for line in reversed(text.splitlines()):
        found = [m.group().strip(" .") for m in EXPRESSION.finditer(line.partition("=")[0])]
        found = [e for e in found if re.search(r"\d\s*\)*\s*[-+*/]", e)]
        if found:
            return found[-1]
    return None


def value_of(text: str) -> tuple[Fraction, Counter[int]]:
    """The exact value of an expression, and the numbers it uses. Raises ValueError, SyntaxError, ZeroDivisionError."""
    if len(text) > LONGEST or not EXPRESSION.fullmatch(text):
        raise ValueError("only numbers, + - * / and parentheses")
    used: Counter[int] = Counter()

    def walk(node: ast.expr) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            used[node.value] += 1
            return Fraction(node.value)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
            return -walk(node.operand)
        if isinstance(node, ast.BinOp):
            left, right = walk(node.left), walk(node.right)
            if isinstance(node.op, ast.Add):
                return left + right
            if isinstance(node.op, ast.Sub):
                return left - right
            if isinstance(node.op, ast.Mult):
                return left * right
            if isinstance(node.op, ast.Div):
                return left / right
        raise ValueError("only numbers, + - * / and parentheses")

    return walk(ast.parse(text.strip(), mode="eval").body), used
