"""How far training has come: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import IO, Any

LINE_SECONDS = 10.0
"""Least seconds between two plain lines."""


class TrainProgress:
    """Step, loss, tokens per second and time left, on stderr.

    Args:
        total_steps: the step at which the run ends.
        start_step: steps done before this process began; they count as done, not for the time left.
        description: what is going on, in a word or two.
        stream: where to write; stderr by default.
        clock: seconds from some fixed moment.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        description: str = "training",
        *,
        stream: IO[str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._total, self._start, self._step = total_steps, start_step, start_step
        self._description, self._clock = description, clock
        self._stream = sys.stderr if stream is None else stream
        self._began = self._shown = clock()
        self._first_end: float | None = None
        self._note = ""
        self._bar: Any = None
        self._task: Any = None
        if self._stream.isatty():
            self._open_bar()

    def update(self, step: int, *, loss: float | None = None, tokens_per_second: float | None = None) -> None:
        """Shows that `step` steps are done."""
        now = self._clock()
        if self._first_end is None:
            # The first step compiles: it says nothing of the pace of the rest.
            self._first_end, self._start = now, step
        self._step = step
        parts = [] if loss is None else [f"loss {loss:.4g}"]
        parts += [] if tokens_per_second is None else [f"{_short(tokens_per_second)} tokens/s"]
        self._note = "  ".join(parts) or self._note
        if self._bar is not None:
            self._bar.update(self._task, completed=step, note=self._note, left=self._left(now))
        elif now - self._shown >= LINE_SECONDS and step < self._total:
            self._line(now)

    def print(self, text: str) -> None:
        """Prints a line without tearing the bar."""
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Shows the last state and leaves the terminal alone; a second call does nothing."""
        if self._stream.closed:
            return
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._shown = float("inf")
        elif self._shown != float("inf"):
            self._line(self._clock())
            self._shown = float("inf")

    def __enter__(self) -> TrainProgress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
            console=Console(file=self._stream, highlight=False),
            refresh_per_second=4,
        )
        self._task = self._bar.add_task(
            self._description, total=self._total, completed=self._step, note="compiling", left=""
        )
        self._bar.start()

    def _line(self, now: float) -> None:
        self._shown = now
        parts = [f"{self._description}: {self._step:,}/{self._total:,}", self._note, self._left(now)]
        print("  ".join(part for part in parts if part), file=self._stream, flush=True)

    def _left(self, now: float) -> str:
        done, remaining = self._step - self._start, self._total - self._step
        if remaining <= 0 or done <= 0 or self._first_end is None:
            return ""
        return f"{_duration((now - self._first_end) / done * remaining)} left"


def _short(value: float) -> str:
    """`987`, `12.3k`, `4.56M`."""
    for unit in ("", "k", "M"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


def _duration(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
