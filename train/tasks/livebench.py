"""LiveBench: questions renewed over time, those of them that a plain function of the ground truth can grade."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from errors import UserError
from train.tasks import livebench_graders as graders
from train.tasks.contests import as_day
from train.tasks.rows import FileTask, take
from train.tasks.task import Grade, Problem, ask, spoken

BY_TASK: dict[str, Callable[[Any, str], float]] = {
    "aime": graders.aime,
    "imo": graders.rearrangement,
    "usamo": graders.rearrangement,
    "web_of_lies_v2": graders.yes_no,
    "web_of_lies_v3": graders.yes_no_shares,
    "house_traversal": graders.houses,
    "zebra_puzzle": graders.zebra,
    "spatial": graders.spatial,
    "theory_of_mind": graders.said_word,
    "logic_with_navigation": graders.position,
    "sudoku": graders.sudoku,
    "typos": graders.typos,
    "connections": graders.connections,
    "plot_unscrambling": graders.plot,
    "cta": graders.column_type,
    "tablejoin": graders.table_join,
    "consecutive_events": graders.events,
}
OLDER = {"zebra_puzzle": graders.zebra_old, "connections": graders.connections_old}
"""Graders of questions before `CHANGED`, which asked for words in bold."""
CHANGED = "2024-11-25"


@dataclass(frozen=True)
class LiveBench(FileTask):
    """LiveBench (White et al. 2024, arXiv 2406.19314).

    Rows of the published question.jsonl of its tasks, one file or several put together: {"question_id", "category",
    "task", "subtask" (of contests), "turns", "ground_truth", "livebench_release_date", "livebench_removal_date"}.
    Tasks whose graders need more than the ground truth (programs, pandas, computer algebra, languages) are left out:
    `left_out` counts them. Of a long reply the last 20,000 characters are graded.

    Attributes:
        release: a day, such as 2024-11-25: the questions of that release, without those that came later or were
            removed until then. Empty takes all.
    """

    release: str = ""

    name: ClassVar[str] = "livebench"

    def __post_init__(self) -> None:
        if self.release and as_day(self.release) is None:
            raise UserError(f"release={self.release} of task 'livebench' is no day; write it as 2024-11-25")
        if self.path and not self.all_problems and self.left_out:
            raise UserError(f"{self.path} has no question of a kind or release that is graded here, but {self._others}")
        super().__post_init__()

    @functools.cached_property
    def left_out(self) -> Counter[str]:
        """Tasks that have no grader here, "another release" and "several turns", with the number of rows of each."""
        return Counter()

    @property
    def _others(self) -> str:
        return ", ".join(f"{count} of {kind!r}" for kind, count in self.left_out.items())

    def problem(self, row: dict[str, Any], where: str) -> Problem | None:
        """As `FileTask` has it."""
        task = row.get("subtask") or take(row, where, "task")
        released = take(row, where, "livebench_release_date")[:10]
        removed = str(row.get("livebench_removal_date") or "")[:10]
        turns = take(row, where, "turns", list)
        if not turns or not all(isinstance(turn, str) for turn in turns):
            raise UserError(f"{where}: 'turns' is no list of texts")
        grader = grader_of(task, released)
        if row.get("category") == "instruction_following" or grader is None:
            self.left_out[task] += 1
        elif self.release and (released > self.release or (removed and removed <= self.release)):
            self.left_out["another release"] += 1
        elif len(turns) > 1:
            self.left_out["several turns"] += 1
        else:
            answer = {"task": task, "released": released, "question": turns[0], "truth": row.get("ground_truth")}
            try:
                score_of(answer, "")
            except (ValueError, TypeError, AttributeError, KeyError, SyntaxError, IndexError) as error:
                raise UserError(f"{where}: 'ground_truth' is none of task {task!r} ({error})") from error
            return Problem(str(take(row, where, "question_id")), ask(turns[0]), answer)
        return None

    def grade(self, problem: Problem, reply: str) -> Grade:
        """The task's own score."""
        answer = problem.answer
        score = score_of(answer, spoken(reply)[-graders.LONGEST :])
        return Grade(float(score), f"{answer['task']}: {score:.3g}, wanted {str(answer['truth'])[:100]}")


def grader_of(task: str, released: str) -> Callable[..., float] | None:
    """The grader of a task or subtask, such as amc_2023 or zebra_puzzle; None where there is none."""
    parts = task.split("_")
    if parts[0] in ("amc", "smc") or parts[1:2] == ["amc"]:
        return graders.contest_choice
    kind = next((name for name in (task, parts[0]) if name in BY_TASK), "")
    kind = "zebra_puzzle" if "zebra_puzzle" in task else kind
    return OLDER[kind] if kind in OLDER and released < CHANGED else BY_TASK.get(kind)


def score_of(answer: dict[str, Any], reply: str) -> float:
    """A reply's score. Raises what a ground truth of another form raises."""
    grader = grader_of(answer["task"], answer["released"])
    if grader is graders.contest_choice:
        return graders.contest_choice(answer["truth"], reply, answer["question"])
    if grader is None:
        raise ValueError("no grader")
    return grader(answer["truth"], reply)
