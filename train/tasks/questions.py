"""Tasks whose replies are compared with an answer: mathematics, translation, and any file with prompts and answers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from errors import UserError, did_you_mean
from train.sandbox import check_sandbox
from train.tasks.answers import to_number
from train.tasks.graders import GRADERS, chrf, math, number
from train.tasks.rows import FileTask, messages_of, take
from train.tasks.task import Grade, Problem, ask, spoken

BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
LANGUAGES = {"en": "English", "zh": "Chinese", "fr": "French", "de": "German", "es": "Spanish", "ja": "Japanese"}
BLEU_WORDS = {"zh": "zh", "ja": "char", "ko": "char", "th": "char"}
"""How sacrebleu cuts a language into words, where that is not at spaces."""


@dataclass(frozen=True)
class Gsm8k(FileTask):
    """Grade-school mathematics; rows {"question", "answer"}, the number after "#### "."""

    name: ClassVar[str] = "gsm8k"

    def problem(self, row: dict[str, Any], where: str) -> Problem:
        """As `FileTask` has it."""
        _, mark, gold = take(row, where, "answer").rpartition("####")
        if not mark or to_number(gold) is None:
            raise UserError(f"{where}: 'answer' does not end with #### and a number")
        return Problem(where, ask(f"{take(row, where, 'question')}\n{BOXED}"), gold.strip())

    def grade(self, problem: Problem, reply: str) -> Grade:
        """The reply's last number is the answer."""
        return number(problem.answer, reply)


@dataclass(frozen=True)
class Math(FileTask):
    """Competition mathematics; rows {"problem" or "prompt", "answer"}, or "solution" with a \\boxed{} answer."""

    name: ClassVar[str] = "math"

    def problem(self, row: dict[str, Any], where: str) -> Problem:
        """As `FileTask` has it."""
        text = take(row, where, "prompt" if "prompt" in row else "problem")
        answer = str(take(row, where, "answer", (str, int)))
        return Problem(where, ask(text if "\\boxed" in text else f"{text}\n{BOXED}"), answer)

    def grade(self, problem: Problem, reply: str) -> Grade:
        """The answers mean the same."""
        return math(problem.answer, reply)


@dataclass(frozen=True)
class Aime(Math):
    """The American Invitational Mathematics Examination; answers are whole numbers from 0 to 999."""

    name: ClassVar[str] = "aime"

    def problem(self, row: dict[str, Any], where: str) -> Problem:
        """As `FileTask` has it."""
        problem = super().problem(row, where)
        if not re.fullmatch(r"\d{1,3}", problem.answer):
            raise UserError(f"{where}: 'answer' is {problem.answer}, no whole number from 0 to 999")
        return problem

    def grade(self, problem: Problem, reply: str) -> Grade:
        """The reply's last number, in \\boxed{} if there is one."""
        return number(problem.answer, reply)


@dataclass(frozen=True)
class Translation(FileTask):
    """Sentences to translate, graded by chrF; rows {"source", "target"}, or two languages' codes, as {"en", "zh"}.

    `corpus` scores all replies at once, as papers report them.

    Attributes:
        source, target: codes of the languages, which are the fields of the rows where these have no "source".
    """

    source: str = "en"
    target: str = "zh"

    name: ClassVar[str] = "translation"

    def problem(self, row: dict[str, Any], where: str) -> Problem:
        """As `FileTask` has it."""
        keys = ("source", "target") if "source" in row else (self.source, self.target)
        text, gold = (take(row, where, key) for key in keys)
        language = LANGUAGES.get(self.target, self.target)
        prompt = f"Translate into {language}. Answer with the translation alone.\n\n{text}"
        return Problem(where, ask(prompt), gold)

    def grade(self, problem: Problem, reply: str) -> Grade:
        """chrF, 0 to 1."""
        return chrf(problem.answer, reply)

    def corpus(self, problems: Sequence[Problem], replies: Sequence[str]) -> dict[str, float]:
        """BLEU and chrF of all replies together, from 0 to 100, as sacrebleu has them by default.

        BLEU's words are those of sacrebleu's 13a; of Chinese its zh; of Japanese and Korean (whose segmenters want
        dictionaries) and Thai single characters, so that these compare with no BLEU of words. Raises ValueError where
        there is none, or not one reply to each.
        """
        import sacrebleu  # a tenth of a second

        if not problems or len(problems) != len(replies):
            raise ValueError(f"{len(replies)} replies to {len(problems)} problems")
        said = [" ".join(spoken(reply).split()) for reply in replies]
        wanted = [[str(problem.answer) for problem in problems]]
        words = BLEU_WORDS.get(self.target.split("-")[0].split("_")[0], "13a")
        return {
            "bleu": float(sacrebleu.corpus_bleu(said, wanted, tokenize=words).score),
            "chrf": float(sacrebleu.corpus_chrf(said, wanted).score),
        }


@dataclass(frozen=True)
class Jsonl(FileTask):
    """Any rows {"prompt", "answer"} under a named grader; {"question", "choices", "answer"} become a choice of letters.

    Attributes:
        grader: one of `graders.GRADERS`.
    """

    grader: str = "exact"

    name: ClassVar[str] = "jsonl"

    def __post_init__(self) -> None:
        if self.grader not in GRADERS:
            near = did_you_mean(self.grader, GRADERS)
            raise UserError(f"there is no grader {self.grader!r}{near}; there is {', '.join(GRADERS)}")
        super().__post_init__()
        if self.grader == "regex":
            check_sandbox()

    def problem(self, row: dict[str, Any], where: str) -> Problem:
        """As `FileTask` has it."""
        answer = take(row, where, "answer", (str, int, float, list))
        if self.grader == "number" and to_number(str(answer)) is None:
            raise UserError(f"{where}: 'answer' is {answer!r}, no number")
        if "choices" not in row:
            return Problem(str(row.get("id", where)), messages_of(row, where), answer)
        choices = take(row, where, "choices", list)
        lines = [f"{letter}. {choice}" for letter, choice in zip("ABCDEFGHIJ", choices, strict=False)]
        question = "\n".join([take(row, where, "question"), *lines, "End with: The answer is LETTER."])
        return Problem(str(row.get("id", where)), ask(question), answer)

    def grade(self, problem: Problem, reply: str) -> Grade:
        """By the grader that was named."""
        return GRADERS[self.grader](problem.answer, reply)
