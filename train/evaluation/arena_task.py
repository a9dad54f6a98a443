"""Arena-Hard as a task: answers drawn like those of any other, judged against a baseline's at an endpoint."""

from __future__ import annotations

import functools
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

from errors import UserError
from terminal import Progress
from train.asking import Endpoint
from train.evaluation.answerer import Answerer, Ask, Settings
from train.evaluation.arena import (
    Answer,
    ArenaQuestion,
    arena_table,
    judge_arena,
    read_answers,
    read_baseline,
    read_questions,
    write_answer,
)
from train.evaluation.measuring import Result, key_of
from train.tasks.likelihood import Estimate
from train.tasks.task import Problem, ask

NORMAL_95 = 1.96
"""Standard errors on either side of a 95 % interval's middle."""


@dataclass(frozen=True)
class ArenaHard:
    """Arena-Hard v2 (arXiv 2406.11939).

    Attributes:
        path: its question.jsonl. baseline: files of baselines' answers, separated by semicolons.
    """

    path: str
    baseline: str = ""

    name: ClassVar[str] = "arena_hard"

    def __post_init__(self) -> None:
        if not self.path or not self.baseline:
            raise UserError(
                "task 'arena_hard' takes questions and a baseline's answers: name it as "
                "arena_hard:question.jsonl?baseline=o3-mini-2025-01-31.jsonl"
            )
        _ = self._all_pairs  # what is missing is found before a model is loaded

    @functools.cached_property
    def _all_pairs(self) -> tuple[list[ArenaQuestion], dict[str, Answer]]:
        questions = read_questions(self.path)
        return questions, read_baseline(questions, self.baseline.split(";"))

    def pairs(self, limit: int | None = None) -> tuple[list[ArenaQuestion], dict[str, Answer]]:
        """The first questions, and the baseline's answers."""
        questions, baseline = self._all_pairs
        return questions[:limit], baseline


@dataclass(frozen=True)
class Judge:
    """Who judges: an endpoint, the model's name there, and how many questions are judged at once."""

    url: str
    model: str
    workers: int


def measure_arena(
    name: str,
    task: ArenaHard,
    who: Answerer,
    settings: Settings,
    judge: Judge,
    limit: int | None,
    out: Path,
    bar: Progress,
) -> Result:
    """Answers, judgments and the win rate, in the official files under `out`, which the official scripts read too."""
    from train.evaluation.arena import JUDGE_SECONDS

    questions, baseline = task.pairs(limit)
    started = time.monotonic()
    drawing = {key: value for key, value in asdict(settings).items() if key != "samples"}
    model = f"{Path(who.name).name}-{key_of(who.fingerprint, drawing)[:8]}"
    path = out / "model_answer" / f"{model}.jsonl"
    cut = _answer(questions, who, settings, model, path, bar)
    answers = read_answers(path)
    endpoint = Endpoint(judge.url, "judge", judge.model, seconds=JUDGE_SECONDS)
    told = 0

    def tell(done: int, _: int) -> None:
        nonlocal told
        bar.advance(done - told)
        told = done

    judged = out / "model_judgment" / key_of(judge.url, judge.model)[:8] / f"{model}.jsonl"
    judgments = judge_arena(questions, answers, baseline, endpoint, judged, workers=judge.workers, progress=tell)
    metrics: dict[str, Estimate] = {}
    counted = unread = 0
    plain = arena_table(judgments, answers, baseline)
    styled = arena_table(judgments, answers, baseline, style_control=True)
    for category, row in plain.items():
        metrics[category] = _estimate(row, "score", "low", "high")
        styles = styled[category]
        metrics[f"{category}, style controlled"] = _estimate(styles, "score", "low", "high")
        metrics[f"{category}, equal style"] = _estimate(styles, "equal_style", "equal_style_low", "equal_style_high")
        counted, unread = counted + int(row["n"] or 0), unread + int(row["unread"] or 0)
    seconds = time.monotonic() - started
    return Result(name, metrics, counted, failed=unread, cut=cut, seconds=seconds, settings=asdict(settings))


def _answer(
    questions: list[ArenaQuestion], who: Answerer, settings: Settings, model: str, path: Path, bar: Progress
) -> int:
    """Draws the answers that the file does not have; how many of these came to no end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = read_answers(path) if path.exists() else {}
    todo = [question for question in questions if question.uid not in known]
    bar.advance(len(questions) - len(todo))
    asked = [Ask(Problem(question.uid, ask(question.prompt), None), settings.seed) for question in todo]
    cut = 0
    for index, reply in who.replies(asked, settings) if asked else ():
        write_answer(path, todo[index], model, reply.text)
        cut += reply.cut
        bar.advance(1)
    return cut


def _estimate(row: dict[str, float | None], *names: str) -> Estimate:
    value, low, high = (row[name] for name in names)
    if value is None or low is None or high is None:
        return Estimate(float("nan"), float("nan"))
    return Estimate(value, (high - low) / 2 / NORMAL_95)
