"""The records of a run as the page's charts take them: points, medians, marks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from errors import UserError
from train.metrics import NAME as METRICS
from train.metrics import read_metrics
from train.report_plots import Marks, Series

Record = Mapping[str, Any]


def load(run_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `config.json` says and the records, oldest first.

    Raises:
        UserError: the directory is not a run.
    """
    for name in ("config.json", METRICS):
        if not (run_dir / name).is_file():
            what = "is not a run" if run_dir.is_dir() else "does not exist or is no directory"
            raise UserError(f"{run_dir} {what} (no {name} in it); name the directory that qmax train wrote")
    try:
        config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    except ValueError as exc:
        raise UserError(f"{run_dir / 'config.json'} is not valid JSON ({exc}); restore it from a checkpoint") from exc
    if not isinstance(config, dict) or not isinstance(config.get("run"), dict):
        raise UserError(
            f"{run_dir} is not a run (its config.json has no 'run'); name the directory that qmax train wrote"
        )
    return config, read_metrics(run_dir)


def points(records: Iterable[Record], name: str, factor: float = 1.0) -> list[tuple[float, float]]:
    """(step, value) wherever the value was logged and is finite."""
    return [
        (record["step"], record[name] * factor)
        for record in records
        if isinstance(record.get(name), (int, float)) and math.isfinite(record[name])
    ]


def values(records: Iterable[Record], name: str) -> list[float]:
    """The finite values that were logged under a name."""
    return [y for _, y in points(records, name)]


def median_of(numbers: Sequence[float]) -> float | None:
    """Their median; None of none."""
    return median(numbers) if numbers else None


def marks_of(records: Sequence[Record]) -> Marks:
    """Steps that were skipped, and after which the run was resumed."""
    return Marks(
        skipped=[record["step"] for record in records if record.get("skipped")],
        resumed=[record["resumed_from"] for record in records if "resumed_from" in record],
    )


def series(
    records: Iterable[Record], name: str, label: str, color: int = 1, factor: float = 1.0, *, smooth: bool = False
) -> Series:
    """A line of what was logged under a name."""
    return Series(label, points(records, name, factor), color, smooth=smooth)


def held_out(
    records: Iterable[Record], name: str, label: str = "held out", color: int = 2, factor: float = 1.0
) -> Series:
    """A line of what was measured now and then."""
    return Series(label, points(records, name, factor), color, dots=True)
