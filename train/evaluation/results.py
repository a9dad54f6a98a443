"""Results: `results.json` of one model, tables and a plot of several."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError
from terminal import write_json
from train.report_plots import bar_chart
from train.report_style import save_page, whole_page

if TYPE_CHECKING:
    from train.evaluation.measuring import Result

NAME = "results.json"


def write_results(out: Path, model: str, fingerprint: str, results: Sequence[Result]) -> dict[str, Any]:
    """Adds results to those that `out` has of the same model, and gives all of them."""
    path = out / NAME
    known = read_results(out) if path.exists() else {}
    tasks = known["tasks"] if known.get("fingerprint") == fingerprint else {}
    record = {
        "model": model,
        "fingerprint": fingerprint,
        "tasks": tasks | {result.task: result.record for result in results},
    }
    write_json(path, record)
    return record


def read_results(place: Path) -> dict[str, Any]:
    """The results of a directory or a file. Raises UserError where there are none."""
    path = place / NAME if place.is_dir() else place
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found["tasks"], dict) and isinstance(found["model"], str):
            return found
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} holds no results ({error}); `qmax eval` writes them") from error
    raise UserError(f"{path} holds no results; `qmax eval` writes them")


def rows_of_table(tasks: Mapping[str, Mapping[str, Any]]) -> list[list[Any]]:
    """task, metric, value, standard error, n: a row for each metric."""
    return [
        [name if first else "", metric, one["value"], one["stderr"], task["n"] if first else ""]
        for name, task in tasks.items()
        for first, (metric, one) in zip([True] + [False] * 99, task["metrics"].items(), strict=False)
    ]


def compare(records: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of a table with a line for each task and a column for each model: score ± standard error."""
    tasks = dict.fromkeys(name for record in records for name in record["tasks"])
    rows = []
    for name in tasks:
        cells = []
        for record in records:
            task = record["tasks"].get(name)
            cells.append("-" if task is None else shown(task["score"], task["stderr"]))
        rows.append([name, *cells])
    return ["task", *labels(records)], rows


def shown(value: float | None, stderr: float | None) -> str:
    """`0.512 ± 0.013`."""
    if value is None:
        return "-"
    return f"{value:.4g}" if stderr is None or math.isnan(stderr) else f"{value:.4g} ± {stderr:.2g}"


def labels(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """The models' names, numbered where two are called the same."""
    names = [record["model"] for record in records]
    return [
        f"{name} ({names[: place + 1].count(name)})" if names.count(name) > 1 else name
        for place, name in enumerate(names)
    ]


def comparison_charts(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """One chart for each task: a bar with its 95 % interval for each model."""
    tasks = dict.fromkeys(name for record in records for name in record["tasks"])
    charts = []
    for name in tasks:
        having = [
            (label, record["tasks"][name])
            for label, record in zip(labels(records), records, strict=True)
            if name in record["tasks"]
        ]
        metric = next(iter(having[0][1]["metrics"]))
        bars = [(label, task["score"] or 0.0, 1.96 * (task["stderr"] or 0.0)) for label, task in having]
        share = all(0 <= value <= 1 for _, value, _ in bars)
        charts.append(bar_chart(f"{name}: {metric}", bars, end=1.0 if share else None))
    return charts


def evaluation_charts(record: Mapping[str, Any]) -> list[str]:
    """What one model scored: a bar for each task whose score is a share, a table of everything."""
    shares = [
        (name, task["score"], 1.96 * (task["stderr"] or 0.0))
        for name, task in record["tasks"].items()
        if task["score"] is not None and 0 <= task["score"] <= 1
    ]
    rows = [
        [f"{task}, {metric}" if task else metric, f"{shown(value, stderr)}{f', n = {n:,}' if n else ''}"]
        for task, metric, value, stderr, n in rows_of_table(record["tasks"])
    ]
    cells = "".join(f"<tr><th>{escape(name)}</th><td>{escape(words)}</td></tr>" for name, words in rows)
    table = f"<table><thead><tr><th colspan=2>Evaluation</th></tr></thead><tbody>{cells}</tbody></table>"
    return [bar_chart("Evaluation, with 95 % intervals", shares, end=1.0), table] if rows else []


def write_page(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """One page with the table and the charts, readable anywhere. Raises UserError where it cannot be written."""
    header, rows = compare(records)
    cells = "".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    head = "".join(f"<th>{escape(word)}</th>" for word in header)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{cells}</tbody></table>"
    body = f"<header><h1>Evaluation</h1></header>{table}<main>{''.join(comparison_charts(records))}</main>"
    save_page(path, whole_page("Evaluation", body))
