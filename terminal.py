"""What every verb says to a terminal: arguments in, progress and tables out. rich is imported when first drawn."""

from __future__ import annotations

import argparse
import errno
import json
import math
import os
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Protocol

from errors import UserError, did_you_mean

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

LINE_SECONDS = 10.0
"""Seconds between lines of progress where stderr is not a terminal."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence with the nearest spelling, raised as UserError.

    Options are never abbreviated, so that adding one cannot change what an existing script means.

    Args:
        verb: the verb whose arguments these are.
        description: what the verb does, in a sentence or two.
        examples: command lines that work as they stand, shown at the end of `--help`.
    """

    def __init__(self, verb: str, description: str, examples: Sequence[str] = ()) -> None:
        super().__init__(
            prog=f"qmax {verb}",
            description=description,
            epilog="\n".join(["examples:", *(f"  {line}" for line in examples)]) if examples else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def add_json(self) -> None:
        """Adds `--json FILE`, the same words in every verb."""
        self.add_argument("--json", metavar="FILE", help="write the result here, for programs")

    def error(self, message: str) -> NoReturn:
        """Raises UserError instead of printing the usage and leaving."""
        marker = "unrecognized arguments: "
        if message.startswith(marker):
            words = message.removeprefix(marker).split()
            word = next((word for word in words if word.startswith("-")), words[0])
            name = word.partition("=")[0]
            if name.startswith("-"):
                hint = did_you_mean(name, self._option_string_actions)
                raise UserError(f"{self.prog} has no option {name}{hint or f'; {self.prog} --help lists them'}")
            raise UserError(f"{self.prog} takes no further word {word!r}; {self.prog} --help shows its arguments")
        raise UserError(f"{message.removeprefix('argument ')}; {self.prog} --help shows the arguments")


class Progress(Protocol):
    """How far a piece of work has come."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Adds `count` to what is done; a `note` (such as the loss) replaces the last one."""
        ...

    def print(self, text: str) -> None:
        """Prints a line on stderr without tearing the bar."""
        ...


def console() -> Console:
    """A rich console on stderr, so that a verb's stdout stays clean for pipes."""
    from rich.console import Console

    return Console(stderr=True, highlight=False)


@contextmanager
def progress_bar(description: str, total: int | None, *, unit: str = "", done: int = 0) -> Iterator[Progress]:
    """A bar with rate and remaining time on stderr; where that is no terminal, a plain line every ten seconds.

    Args:
        description: what is going on, in a word or two.
        total: how many units there are; None when nobody knows.
        unit: what is counted, as a plural ("steps").
        done: units that were done before this run began; they do not count for the rate.
    """
    if not sys.stderr.isatty():
        lines = _Lines(description, total, unit, done)
        yield lines
        lines.finish()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn(unit + "{task.fields[rate]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=console()) as bar:
        task = bar.add_task(description, total=total, completed=done, note="", rate="")
        yield _Bar(bar, task)


class _Bar:
    """Progress on a terminal."""

    def __init__(self, bar: RichProgress, task: TaskID) -> None:
        self._bar, self._task, self._note = bar, task, ""
        self._rate = _Rate()

    def advance(self, count: int = 1, note: str = "") -> None:
        self._note = note or self._note
        rate = self._rate.after(count)
        self._bar.update(self._task, advance=count, note=self._note, rate=f" {rate:,.3g}/s" if rate else "")

    def print(self, text: str) -> None:
        self._bar.console.print(text, markup=False, soft_wrap=True)


class _Lines:
    """Progress in a log file: a line at times, and one at the end."""

    def __init__(self, description: str, total: int | None, unit: str, done: int) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._done, self._note, self._shown = done, "", time.monotonic()
        self._rate = _Rate()
        self._speed = 0.0

    def advance(self, count: int = 1, note: str = "") -> None:
        self._done += count
        self._note = note or self._note
        self._speed = self._rate.after(count)
        if time.monotonic() - self._shown >= LINE_SECONDS:
            self._show()

    def print(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def finish(self) -> None:
        self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        of = f"/{self._total}" if self._total is not None else ""
        parts = [f"{self._description}: {self._done}{of} {self._unit}".rstrip()]
        if self._speed:
            parts.append(f"{self._speed:,.3g}/s")
            if self._total is not None and self._total > self._done:
                parts.append(f"{_duration((self._total - self._done) / self._speed)} left")
        parts.extend([self._note] if self._note else [])
        self.print(" | ".join(parts))


class _Rate:
    """Units per second over about the last half minute, so that a slow first step (compiling) is forgotten."""

    def __init__(self, horizon: float = 30.0) -> None:
        self._horizon, self._last, self._units, self._seconds = horizon, time.monotonic(), 0.0, 0.0

    def after(self, count: int) -> float:
        """The rate when `count` more units are done now; 0 while there is nothing to divide by."""
        now = time.monotonic()
        keep = math.exp(-(now - self._last) / self._horizon)
        self._units = self._units * keep + count
        self._seconds = self._seconds * keep + (now - self._last)
        self._last = now
        return self._units / self._seconds if self._seconds > 0 else 0.0


def _duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def human_bytes(count: float) -> str:
    """`1.5 GiB`: bytes to two or three figures."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def print_table(rows: Sequence[Sequence[object]], header: Sequence[str] = ()) -> None:
    """Prints rows on stdout in aligned columns, numbers to the right, as plain text that pipes well."""
    if not rows and not header:
        return
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [
        bool(rows) and all(isinstance(row[i], (int, float)) or row[i] is None for row in rows if i < len(row))
        for i in range(max(map(len, [*rows, header])))
    ]
    lines = [[str(word) for word in header], *cells] if header else cells
    widths = [max(_width(line[i]) for line in lines if i < len(line)) for i in range(len(numeric))]
    if header:
        lines.insert(1, ["-" * width for width in widths])
    for line in lines:
        padded = [
            " " * (width - _width(text)) + text if right else text + " " * (width - _width(text))
            for text, width, right in zip(line, widths, numeric, strict=False)
        ]
        print("  ".join(padded).rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _width(text: str) -> int:
    """Columns that `text` takes on a terminal: Chinese and emoji take two, combining marks none."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def write_json(path: str | Path, value: Any) -> None:
    """Writes `value` so that a reader sees the old file or the new one, never half of one.

    Numbers that are not finite become null: JSON has no word for them.

    Raises:
        UserError: the place cannot be written (a full disk is left to the caller as OSError).
    """
    path = Path(path)
    text = json.dumps(_finite(value), indent=1, ensure_ascii=False) + "\n"
    temporary = ""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as exc:
        with suppress(OSError):
            os.unlink(temporary)
        if exc.errno == errno.ENOSPC:
            raise
        raise UserError(f"cannot write {path}: {exc.strerror}; name another place") from exc


def _umask() -> int:
    """The process's umask, which can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
