"""The compiled programs of an engine: one for each shape of work, made when asked for or ahead, several at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any

Program = Callable[..., Any]


@dataclass(frozen=True)
class Shape:
    """Rows of all devices, and tokens that each reads; 0: each row's last token, which lies on the device.

    guessed: those after the first are guesses, see `serve.speculation`.
    """

    rows: int
    tokens: int = 0
    guessed: bool = False


class Programs:
    """Compiled programs by shape.

    Args:
        compile: makes one; called in several threads.
        shapes: all there are, the ones that are needed first before the others.
    """

    def __init__(self, compile: Callable[[Shape], Program], shapes: Sequence[Shape]):
        self._compile, self.shapes = compile, tuple(shapes)
        self._made: dict[Shape, Future[Program]] = {}
        self._lock = Lock()
        workers = min(4, os.cpu_count() or 1)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="compile")

    def __getitem__(self, shape: Shape) -> Program:
        """The program for a shape; waits until it is made."""
        assert shape in self.shapes, f"{shape} is none of {self.shapes}"
        return self._start(shape).result()

    def _start(self, shape: Shape) -> Future[Program]:
        with self._lock:
            if shape not in self._made:
                self._made[shape] = self._threads.submit(self._compile, shape)
            return self._made[shape]

    def prepare(self, shapes: Sequence[Shape] | None = None) -> list[Future[Program]]:
        """Has these, or all, made in the background."""
        return [self._start(shape) for shape in (self.shapes if shapes is None else shapes)]

    @property
    def ready(self) -> int:
        """How many are made."""
        with self._lock:
            return sum(future.done() for future in self._made.values())

    def close(self) -> None:
        """Starts no more; what is being made goes on."""
        self._threads.shutdown(wait=False, cancel_futures=True)
