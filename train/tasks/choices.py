"""Questions with choices, graded by which choice is the likeliest: the forms of MMLU, C-Eval, ARC and HellaSwag.

Prompts are those of lm-evaluation-harness, so that scores can be compared with what is published.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from errors import UserError
from train.tasks.likelihood import Continuation, Form, Item, Likelihood, LikelihoodFile, Part
from train.tasks.rows import take

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Choices(LikelihoodFile):
    """The likeliest choice is the answer.

    `acc` takes choices by their log-probability, `acc_norm` by that per character.
    """

    forms: ClassVar[dict[str, Form]] = {"acc": "mean", "acc_norm": "mean"}

    def measure(self, item: Item, found: Sequence[Likelihood]) -> dict[str, Part]:
        """Whether the right choice is the likeliest."""
        logprobs = np.array([one.logprob for one in found])
        lengths = np.array([max(len(text.removeprefix(" ")), 1) for _, text in item.asked])
        best, best_per_character = int(logprobs.argmax()), int((logprobs / lengths).argmax())
        return {"acc": Part(float(best == item.answer)), "acc_norm": Part(float(best_per_character == item.answer))}


@dataclass(frozen=True)
class LetteredChoices(Choices):
    """Choices that the question lists, of which the answer names the letter."""

    forms: ClassVar[dict[str, Form]] = {"acc": "mean"}
    cue: ClassVar[str] = "Answer:"

    def item(self, row: dict[str, Any], where: str) -> Item:
        """As `LikelihoodFile` has it."""
        choices = choices_of(row, where)
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        question = take(row, where, "question").strip()
        context = "\n".join([question, *lines, self.cue])
        letters = tuple(Continuation(context, f" {letter}") for letter in LETTERS[: len(choices)])
        return Item(str(row.get("id", where)), letters, answer_of(row, where, len(choices)))

    def measure(self, item: Item, found: Sequence[Likelihood]) -> dict[str, Part]:
        """Whether the right letter is the likeliest."""
        return {"acc": super().measure(item, found)["acc"]}


@dataclass(frozen=True)
class Mmlu(LetteredChoices):
    """Massive Multitask Language Understanding, MMLU-Pro too; rows {"question", "choices" or "options", "answer"}.

    Attributes:
        subject: of rows that have no "subject", "category" or "type"; with none there is no heading.
    """

    subject: str = ""

    name: ClassVar[str] = "mmlu"

    def heading(self, row: dict[str, Any]) -> str:
        """Names the subject, as the authors do."""
        named = next((row[key] for key in ("subject", "category", "type") if isinstance(row.get(key), str)), "")
        subject = (named or self.subject).replace("_", " ")
        about = f" about {subject}" if subject else ""
        return f"The following are multiple choice questions (with answers){about}.\n\n"


@dataclass(frozen=True)
class Ceval(LetteredChoices):
    """C-Eval and CMMLU: questions in Chinese; rows {"question", "A", "B", "C", "D", "answer"}."""

    name: ClassVar[str] = "ceval"
    cue: ClassVar[str] = "答案："


@dataclass(frozen=True)
class Arc(Choices):
    """AI2 Reasoning Challenge; rows {"question", "choices", "answer" or "answerKey"}; choices may be text and label."""

    name: ClassVar[str] = "arc"

    def item(self, row: dict[str, Any], where: str) -> Item:
        """As `LikelihoodFile` has it."""
        choices = choices_of(row, where)
        context = f"Question: {take(row, where, 'question')}\nAnswer:"
        asked = tuple(Continuation(context, f" {choice}") for choice in choices)
        return Item(str(row.get("id", where)), asked, answer_of(row, where, len(choices)))


@dataclass(frozen=True)
class HellaSwag(Choices):
    """Which ending goes on; rows {"ctx" or "ctx_a" and "ctx_b", "endings", "label", "activity_label"}."""

    name: ClassVar[str] = "hellaswag"

    def item(self, row: dict[str, Any], where: str) -> Item:
        """As `LikelihoodFile` has it."""
        context = row["ctx"] if "ctx_a" not in row else f"{row['ctx_a']} {str(row.get('ctx_b', '')).capitalize()}"
        label = f"{row['activity_label']}: " if row.get("activity_label") else ""
        endings = take(row, where, "endings", list)
        asked = tuple(Continuation(cleaned(label + context), f" {cleaned(ending)}") for ending in endings)
        return Item(str(row.get("ind", where)), asked, answer_of(row, where, len(endings)))


def choices_of(row: dict[str, Any], where: str) -> list[str]:
    """The choices of a row, whatever way it gives them. Raises UserError."""
    if "choices" not in row and "options" not in row and "A" in row:
        return [str(row[letter]) for letter in LETTERS if letter in row]
    found = take(row, where, "options" if "options" in row else "choices", (list, dict))
    found = found.get("text") if isinstance(found, dict) else found
    if not isinstance(found, list) or not 2 <= len(found) <= len(LETTERS):
        raise UserError(f"{where}: a question needs 2 to {len(LETTERS)} choices")
    return [str(choice) for choice in found]


def answer_of(row: dict[str, Any], where: str, count: int) -> int:
    """Which choice is right: a number from 0, a letter, or a label that stands beside the choices. Raises UserError."""
    key = next((key for key in ("answer", "answerKey", "label") if key in row), "answer")
    value = take(row, where, key, (int, str))
    choices = row.get("choices")
    if isinstance(choices, dict) and value in choices.get("label", []):
        return choices["label"].index(value)
    text = str(value).strip()
    found = int(text) if text.isdecimal() else LETTERS.find(text) if len(text) == 1 else -1
    if not 0 <= found < count:
        raise UserError(f"{where}: {key!r} is {value!r}, none of the {count} choices")
    return found


def cleaned(text: str) -> str:
    """WikiHow's marks taken out, as published results for HellaSwag have it."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
