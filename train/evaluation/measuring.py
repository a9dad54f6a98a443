"""One task, measured: what was measured before is not asked again, and every row is kept as soon as it is there."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from errors import UserError
from terminal import Progress
from train.evaluation.answerer import Answerer, Ask, Reply, Settings
from train.evaluation.row_file import RowFile
from train.tasks.likelihood import Estimate, Item, Likelihood, LikelihoodTask, Part, estimate
from train.tasks.programs import pass_at_k
from train.tasks.task import Problem, Task, grade_safely

GRADERS = 4
"""Replies that are graded at the same time: some wait for programs."""
BATCH = 512
"""Items whose log-probabilities are asked for together, and kept together."""
PASS_AT = (1, 2, 4, 8, 16, 32, 64, 100)
"""The k of pass@k, as far as there are samples."""


@dataclass(frozen=True)
class Result:
    """What a task gave.

    metrics: the first is the score. n: problems. failed: graders that raised. cut: replies that came to no end, or
    contexts that lost their beginning. unfit: prompts that left no room for a reply. seconds: of this run alone.
    """

    task: str
    metrics: dict[str, Estimate]
    n: int
    failed: int = 0
    cut: int = 0
    unfit: int = 0
    tokens: int = 0
    seconds: float = 0.0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> Estimate:
        """The first metric."""
        return next(iter(self.metrics.values()))

    @property
    def record(self) -> dict[str, Any]:
        """What results.json holds of it."""
        values = {name: {"value": one.value, "stderr": one.stderr} for name, one in self.metrics.items()}
        rest = {key: value for key, value in asdict(self).items() if key not in ("task", "metrics")}
        return {"score": self.score.value, "stderr": self.score.stderr, "metrics": values, **rest}


def key_of(*parts: Any) -> str:
    """16 hexadecimal digits of all that decides a row."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:16]


def picked(all_of_them: Sequence[Any], limit: int | None, task: str) -> list[Any]:
    """The first `limit`. UserError where there is nothing to pick."""
    found = list(all_of_them[:limit])
    if not found:
        raise UserError(f"task {task!r} has no problem in its test split; give another file or options")
    return found


# ---- replies -----------------------------------------------------------------------
def measure_replies(
    name: str, task: Task, who: Answerer, settings: Settings, limit: int | None, rows: Path, bar: Progress
) -> Result:
    """Replies to each problem, graded by the task.

    Args:
        name: the task with its options. limit: most problems. rows: file of what each reply was and got.
    """
    problems: list[Problem] = picked(task.problems("test"), limit, name)
    asked = [Ask(p, settings.seed + s) for p in problems for s in range(settings.samples)]
    drawing = {key: value for key, value in asdict(settings).items() if key not in ("samples", "seed")}
    keys = [key_of(name, p.prompt, p.answer, p.tools, drawing, seed) for p, seed in asked]
    started = time.monotonic()
    with RowFile(rows, who.fingerprint, keys) as file, ThreadPoolExecutor(GRADERS) as pool:
        todo = [index for index, key in enumerate(keys) if key not in file.known]
        bar.advance(len(asked) - len(todo))
        graded = _graded(task, who, [asked[index] for index in todo], settings, pool)
        for position, row in graded:
            file.add(keys[todo[position]], row)
            bar.advance(1)
        found = [file.known[key] for key in keys]
    return _result(name, task, problems, found, settings, time.monotonic() - started)


def _graded(
    task: Task, who: Answerer, asked: Sequence[Ask], settings: Settings, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows as they are graded; the next replies are drawn meanwhile."""

    def grade(ask: Ask, reply: Reply) -> dict[str, Any]:
        got = grade_safely(task, ask.problem, reply.text)
        row = {"id": ask.problem.id, "seed": ask.seed, "prompt": ask.problem.prompt, "reply": reply.text}
        row |= {"score": got.score, "note": got.note, "failed": got.failed}
        return row | {"cut": reply.cut, "unfit": reply.unfit, "tokens": reply.tokens}

    waiting: dict[int, Future[dict[str, Any]]] = {}
    stopped: BaseException | None = None
    try:
        for index, reply in who.replies(asked, settings) if asked else ():
            waiting[index] = pool.submit(grade, asked[index], reply)
            for done in [i for i, future in waiting.items() if future.done()]:
                yield done, waiting.pop(done).result()
    except (Exception, KeyboardInterrupt) as error:  # what was said until then is graded and kept
        stopped = error
    for index, future in waiting.items():
        yield index, future.result()
    if stopped is not None:
        raise stopped


def _result(
    name: str,
    task: Task,
    problems: Sequence[Problem],
    rows: Sequence[dict[str, Any]],
    settings: Settings,
    seconds: float,
) -> Result:
    count = settings.samples
    by_problem = [rows[start : start + count] for start in range(0, len(rows), count)]
    means = [sum(row["score"] for row in group) / count for group in by_problem]
    metrics = {"score": estimate([Part(mean) for mean in means])}
    if count > 1:
        right = [sum(row["score"] >= 1 for row in group) for group in by_problem]
        for k in (k for k in PASS_AT if k <= count):
            metrics[f"pass@{k}"] = estimate([Part(pass_at_k(count, c, k)) for c in right])
    corpus = getattr(task, "corpus", None)
    if corpus is not None:
        repeated = [problem for problem in problems for _ in range(count)]
        values = corpus(repeated, [row["reply"] for row in rows])
        metrics |= {key: Estimate(value, math.nan) for key, value in values.items()}
    totals = {key: sum(row[key] for row in rows) for key in ("failed", "cut", "unfit", "tokens")}
    return Result(name, metrics, len(problems), seconds=seconds, settings=asdict(settings), **totals)


# ---- log-probabilities ---------------------------------------------------------------
def measure_likelihoods(
    name: str, task: LikelihoodTask, who: Answerer, limit: int | None, rows: Path, bar: Progress
) -> Result:
    """What the model says of each item's continuations, measured by the task."""
    items: list[Item] = picked(task.items("test"), limit, name)
    keys = [key_of(name, item.asked, item.answer) for item in items]
    started = time.monotonic()
    with RowFile(rows, who.fingerprint, keys) as file:
        todo = [index for index, key in enumerate(keys) if key not in file.known]
        bar.advance(sum(len(item.asked) for item in items) - sum(len(items[index].asked) for index in todo))
        for start in range(0, len(todo), BATCH):
            part = todo[start : start + BATCH]
            found = iter(who.likelihoods([one for index in part for one in items[index].asked], bar.advance))
            for index in part:
                said = [next(found) for _ in items[index].asked]
                file.add(keys[index], _item_row(task, items[index], said))
        kept = [file.known[key] for key in keys]
    metrics = {
        metric: estimate([Part(*row["measures"][metric]) for row in kept], form) for metric, form in task.forms.items()
    }
    cut = sum(row["cut"] for row in kept)
    return Result(name, metrics, len(items), cut=cut, seconds=time.monotonic() - started)


def _item_row(task: LikelihoodTask, item: Item, said: Sequence[Likelihood]) -> dict[str, Any]:
    measures = {metric: list(part) for metric, part in task.measure(item, said).items()}
    return {
        "id": item.id,
        "logprobs": [one.logprob for one in said],
        "greedy": [one.greedy for one in said],
        "measures": measures,
        "cut": any(one.cut for one in said),
    }
