"""Examinations answered in words that end with a letter: MMLU-Pro, GPQA, C-Eval and CMMLU."""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from errors import UserError
from train.tasks.rows import FileTask, take
from train.tasks.task import Grade, Problem, ask, right_or_wrong, spoken

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Exam(FileTask):
    """A question, choices with letters, and where in a reply the chosen letter stands.

    The first of `SAID` that is found decides; a reply in which none is found is wrong (scripts that guess then have
    higher scores, by a tenth or a quarter of such replies).
    """

    SAID: ClassVar[Sequence[re.Pattern[str]]] = ()
    LAST: ClassVar[bool] = False
    """Of several places where one pattern is found the last counts, else the first."""

    @abstractmethod
    def introduction(self, row: dict[str, Any]) -> str:
        """What stands before the question, with how to end the answer."""

    def asked(self, row: dict[str, Any], where: str, question: str, choices: Sequence[str], gold: int) -> Problem:
        """The problem of a row; `gold` is the position of the right choice, from 0."""
        lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, choices, strict=False)]
        text = "\n".join([self.introduction(row), "", question, *lines])
        return Problem(where, ask(text), LETTERS[gold])

    def grade(self, problem: Problem, reply: str) -> Grade:
        """The letter that the reply says is the answer's."""
        text = spoken(reply).replace("**", "").strip()
        for pattern in self.SAID:
            if found := pattern.findall(text):
                letter = found[-1 if self.LAST else 0]
                return right_or_wrong(letter == problem.answer, f"chose {letter}, wanted {problem.answer}")
        return Grade(0.0, "no letter found")


@dataclass(frozen=True)
class MmluPro(Exam):
    """MMLU-Pro (Wang et al. 2024, arXiv 2406.01574), without its examples (the leaderboard gives five).

    Rows of the published data set (TIGER-Lab/MMLU-Pro): {"question", "options" (up to 10, "N/A" is none), "answer" (a
    letter) or "answer_index" (from 0), "category"}. The letter is looked for where the authors' evaluate_from_api.py
    does: after "answer is", after "answer:", or else the last one that stands alone.
    """

    name: ClassVar[str] = "mmlu_pro"
    SAID: ClassVar[Sequence[re.Pattern[str]]] = (
        re.compile(r"answer is \(?([A-J])"),
        re.compile(r"^.*[aA]nswer:\s*([A-J])", re.MULTILINE),
        re.compile(r"\A.*\b([A-J])\b", re.DOTALL),
    )

    def introduction(self, row: dict[str, Any]) -> str:
        """As `Exam` has it."""
        about = f" about {row['category']}" if row.get("category") else ""
        return (
            f"This is a multiple-choice question{about}. Think step by step, and end with "
            '"The answer is (X)", where X is the letter of the right choice.'
        )

    def problem(self, row: dict[str, Any], where: str) -> Problem:
        """As `FileTask` has it."""
        options = take(row, where, "options", list)
        gold = self._gold(row, where)
        if len(options) > len(LETTERS) or not all(isinstance(option, str) for option in options):
            raise UserError(f"{where}: 'options' must be up to {len(LETTERS)} texts")
        if gold >= len(options) or options[gold] == "N/A":
            raise UserError(f"{where}: the answer is choice {gold + 1} of {len(options)}, which is none")
        place = str(row.get("question_id", where))
        gold -= options[:gold].count("N/A")
        return self.asked(row, place, take(row, where, "question"), [o for o in options if o != "N/A"], gold)

    def _gold(self, row: dict[str, Any], where: str) -> int:
        index = row.get("answer_index")
        if "answer" not in row and index is not None:
            return take(row, where, "answer_index", int)
        letter = take(row, where, "answer").strip()
        if len(letter) != 1 or letter not in LETTERS:
            raise UserError(f"{where}: 'answer' is {letter!r}, no letter from A to J")
        if index is not None and index != LETTERS.index(letter):
            raise UserError(f"{where}: 'answer' is {letter} and 'answer_index' is {index}; they must agree")
        return LETTERS.index(letter)


@dataclass(frozen=True)
class Gpqa(Exam):
    """GPQA (Rein et al. 2023, arXiv 2311.12022): the authors' CSV file, such as gpqa_diamond.csv.

    Columns "Question", "Correct Answer", "Incorrect Answer 1" to "3", "Record ID". Choices are shuffled by the record's
    id: always the same for a record. The letter is looked for where the authors' run_baseline.py does (in parentheses,
    after "answer is" first), then after "answer:" without them. The authors ask that the questions be put nowhere in
    plain text.
    """

    name: ClassVar[str] = "gpqa"
    file: ClassVar[str] = "gpqa_diamond.csv"
    SAID: ClassVar[Sequence[re.Pattern[str]]] = (
        re.compile(r"answer is \(([A-D])\)"),
        re.compile(r"Answer: \(([A-D])\)"),
        re.compile(r"answer: \(([A-D])\)"),
        re.compile(r"answer \(([A-D])\)"),
        re.compile(r"\(([A-D])\)"),
        re.compile(r"(?i:answer)[ \t]*:[ \t]*\$?([A-D])\b"),
    )
    COLUMNS: ClassVar[Sequence[str]] = ("Correct Answer", *(f"Incorrect Answer {i}" for i in (1, 2, 3)))

    def introduction(self, row: dict[str, Any]) -> str:
        """As `Exam` has it."""
        return (
            "What is the correct answer to this question? Think step by step, and end with "
            '"The correct answer is (X)", where X is the letter of a choice.'
        )

    def problem(self, row: dict[str, Any], where: str) -> Problem:
        """As `FileTask` has it."""
        choices = [take(row, where, column).strip() for column in self.COLUMNS]
        record = take(row, where, "Record ID").strip()
        order = list(range(4))
        random.Random(f"gpqa {record}").shuffle(order)
        question = take(row, where, "Question").strip()
        return self.asked(row, record, question, [choices[i] for i in order], order.index(0))


@dataclass(frozen=True)
class CevalChat(Exam):
    """C-Eval (Huang et al. 2023, arXiv 2305.08322) and CMMLU (Li et al. 2023, 2306.09212), without examples.

    Files as published, a subject each: columns "question", "A" to "D", "answer" of C-Eval's val and dev splits (its
    test split has no answers), and "Question", "A" to "D", "Answer" of CMMLU; or rows of JSON with them. The letter is
    looked for by the wordings that the authors' chatgpt.py and mp_utils.py know. As thinking is asked for, a letter at
    the reply's beginning counts only where none of these is found.

    Attributes:
        subject: what the questions are about, in Chinese; named in the prompt.
    """

    subject: str = ""

    name: ClassVar[str] = "ceval_chat"
    file: ClassVar[str] = "FILE.csv"
    LAST: ClassVar[bool] = True
    SAID: ClassVar[Sequence[re.Pattern[str]]] = (
        re.compile(r"答案(?:选项)?(?:应该|应)?(?:是|为|选)?[:：]?\s?(?:选项|选|项)?\s?[（(]?([A-D])(?![A-Za-z])"),
        re.compile(r"正确的?(?:一项|选项)(?:是|为)[:：]?\s?[（(]?([A-D])(?![A-Za-z])"),
        re.compile(r"选项\s?([A-D])\s?(?:是|为)?正确"),
        re.compile(r"(?<![A-Za-z])([A-D])\s?选?项?(?:是|为)?(?:正确|符合题意)"),
        re.compile(r"选择?[:：]?\s?[（(]?([A-D])(?![A-Za-z])"),
        re.compile(r"\A[（(]?([A-D])(?![A-Za-z])"),
        re.compile(r"\A[^A-D]*([A-D])[^A-D]*\Z"),
    )

    def introduction(self, row: dict[str, Any]) -> str:
        """As `Exam` has it."""
        about = f"关于{self.subject}的" if self.subject else ""
        return f"以下是{about}单项选择题。请一步一步思考，最后写“答案是X。”，X为正确选项的字母。"

    def problem(self, row: dict[str, Any], where: str) -> Problem:
        """As `FileTask` has it."""
        question, answer = ("Question", "Answer") if "Question" in row else ("question", "answer")
        letter = take(row, where, answer).strip()
        if len(letter) != 1 or letter not in "ABCD":
            raise UserError(
                f"{where}: {answer!r} is {letter!r}, no letter from A to D; C-Eval's test split has none, take its val"
            )
        choices = [str(take(row, where, key, (str, int, float))) for key in "ABCD"]
        return self.asked(row, where, take(row, where, question), choices, "ABCD".index(letter))
