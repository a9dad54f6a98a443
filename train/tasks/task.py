"""What a task is: problems, and a grade for a reply. The same task rewards in training and grades in evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol

Split = Literal["train", "test"]
Message = dict[str, Any]
END_THINK = "</think>"


@dataclass(frozen=True)
class Problem:
    """One thing to solve.

    Attributes:
        id: unique within the task. prompt: messages in OpenAI's form. answer: what the grader needs, never shown.
        tools: functions that may be called, in OpenAI's form; None where the problem is not about calls.
    """

    id: str
    prompt: list[Message]
    answer: Any
    tools: list[dict[str, Any]] | None = None


@dataclass(frozen=True)
class Grade:
    """A score from 0 to 1, and why."""

    score: float
    note: str = ""
    failed: bool = False
    """The grader could not tell."""


class Task(Protocol):
    """Problems and their grader."""

    @property
    def name(self) -> str:
        """As the catalogue has it."""
        ...

    def problems(self, split: Split) -> Sequence[Problem]:
        """All problems of a split, in an order that never changes."""
        ...

    def grade(self, problem: Problem, reply: str) -> Grade:
        """How good a reply is: the text that a model wrote, with its thoughts and calls."""
        ...


def right_or_wrong(right: bool, note: str = "") -> Grade:
    """1 or 0."""
    return Grade(1.0 if right else 0.0, note)


def spoken(reply: str) -> str:
    """A reply without its thoughts; one that never stops thinking says nothing."""
    _, mark, after = reply.rpartition(END_THINK)
    if mark:
        return after.strip("\n")
    return "" if reply.lstrip().startswith("<think>") else reply


def grade_safely(task: Task, problem: Problem, reply: str) -> Grade:
    """The task's grade; 0 with the exception in the note where the grader raises, or leaves 0 to 1."""
    try:
        grade = task.grade(problem, reply)
        if not 0.0 <= grade.score <= 1.0:
            return Grade(0.0, f"the grader gave {grade.score}", failed=True)
        return grade
    except Exception as error:  # one reply must not end a run of days
        return Grade(0.0, f"the grader failed: {type(error).__name__}: {error}", failed=True)


def grade_many(task: Task, problems: Sequence[Problem], replies: Sequence[str], workers: int = 4) -> list[Grade]:
    """Grades of replies, one to a problem, several at a time: some graders wait for programs."""
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda pair: grade_safely(task, *pair), zip(problems, replies, strict=True)))


def share(text: str) -> float:
    """A number from 0 to 1 that depends on `text` alone: the same everywhere and for ever."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest(), "big") / 2**64


def ask(text: str) -> list[Message]:
    """A prompt of one message."""
    return [{"role": "user", "content": text}]
