"""Tasks whose problems are the rows of a file (.jsonl, .jsonl.gz, .jsonl.zst, .csv)."""

from __future__ import annotations

import csv
import functools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from errors import UserError, did_you_mean
from train.data.sources import read_rows
from train.tasks.task import Grade, Problem, Split, share


@dataclass(frozen=True)
class FileTask(ABC):
    """A task from a file.

    Attributes:
        path: the file. held_out: share of the rows that are the test split, chosen by what they ask; with 0 the file
            is one split, and both `train` and `test` are all of it.
    """

    path: str
    held_out: float = 0.0

    name: ClassVar[str] = ""
    file: ClassVar[str] = "FILE.jsonl"
    """What the file may be called."""

    def __post_init__(self) -> None:
        if not self.path:
            raise UserError(f"task {self.name!r} takes its problems from a file: name it as {self.name}:{self.file}")
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out of task {self.name!r} is {self.held_out}; give a share from 0 to below 1")
        if not self.all_problems:
            raise UserError(f"{self.path} has no problem of task {self.name!r} in it")

    @abstractmethod
    def problem(self, row: dict[str, Any], where: str) -> Problem | None:
        """A row as a problem, `where` as its id unless it brings one; None leaves it out. UserError names the place."""

    @abstractmethod
    def grade(self, problem: Problem, reply: str) -> Grade:
        """As `Task` has it."""

    @functools.cached_property
    def all_problems(self) -> list[Problem]:
        """Every row's, in the file's order."""
        found = (self.problem(row, where) for row, where in rows_of(self.path))
        return [problem for problem in found if problem is not None]

    def problems(self, split: Split) -> Sequence[Problem]:
        """As `Task` has it."""
        if not self.held_out:
            return self.all_problems
        wanted = split == "test"
        return [p for p in self.all_problems if (share(repr(p.prompt)) < self.held_out) == wanted]


def rows_of(path: str) -> list[tuple[dict[str, Any], str]]:
    """Rows of a JSONL or CSV file and where each stands (`file:line`). Raises UserError, for a malformed row too."""
    file = Path(path).expanduser()
    if not file.is_file():
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(f"there is no file {path}{did_you_mean(file.name, siblings)}")
    if file.name.endswith(".csv"):
        return list(_csv_rows(file))
    if not file.name.endswith((".jsonl", ".jsonl.gz", ".jsonl.zst")):
        raise UserError(f"{path} is no .jsonl, .jsonl.gz, .jsonl.zst or .csv; convert it to one row of JSON a line")
    return [(row.value, row.where) for row in read_rows(file)]


def _csv_rows(file: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of a table whose first line names the columns, all of them texts; a quoted cell may have several lines."""
    with file.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        line = 2
        try:
            for row in reader:
                where = f"{file}:{line}"
                if None in row or None in row.values():
                    columns = len(reader.fieldnames or ())
                    raise UserError(f"{where}: the row has not {columns} cells, as the first line has; mend it")
                yield dict(row), where
                line = reader.line_num + 1
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{file}:{line}: no CSV in UTF-8 ({error}); mend it or export it again") from error


def take(row: dict[str, Any], where: str, key: str, kind: type | tuple[type, ...] = str) -> Any:
    """A field of a row. Raises UserError where it is missing or of another type."""
    if key not in row:
        raise UserError(
            f"{where}: the row has no {key!r}{did_you_mean(key, row)}; it has {', '.join(row) or 'nothing'}"
        )
    if not isinstance(row[key], kind):
        kinds = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise UserError(f"{where}: {key!r} is {type(row[key]).__name__}, not {kinds}")
    return row[key]


def messages_of(row: dict[str, Any], where: str, key: str = "prompt") -> list[dict[str, Any]]:
    """A field that is a text or messages, as messages. Raises UserError."""
    value = take(row, where, key, (str, list))
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    if not value or not all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in value):
        raise UserError(f"{where}: {key!r} is neither a text nor a list of messages with role and content")
    return value
