"""What a run says of itself: `metrics.jsonl`, one JSON object a line and each step once, and TensorBoard events."""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError
from model.checkpoint.manifest import sync_directory
from train.device import device_peak_flops, memory_in_use

__all__ = ["MetricsLog", "Throughput", "device_peak_flops", "memory_in_use", "read_metrics"]

NAME = "metrics.jsonl"
ARRAY_NUMBERS = 512
"""Numbers of an array that a line holds on average; larger arrays are written every few steps."""
FLUSH_SECONDS = 10.0
"""How old what TensorBoard sees may be."""


class MetricsLog:
    """Appends to `metrics.jsonl` and to the TensorBoard events of a run.

    Args:
        run_dir: the run directory; made if missing.
        resume_step: what was logged after this step is forgotten; None begins afresh.
        tensorboard: also write event files, in `run_dir/tensorboard`.

    Raises:
        UserError: the files cannot be written.
    """

    def __init__(self, run_dir: str | Path, resume_step: int | None = None, *, tensorboard: bool = True) -> None:
        self._path = Path(run_dir) / NAME
        self._resume_step, self._first = resume_step, True
        self._last_step = -1 if resume_step is None else resume_step
        self._events: Any = None
        with _writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            kept = [] if resume_step is None else _lines_until(self._path, resume_step)
            _replace(self._path, "".join(kept))
            # Unbuffered: a line is one write, and a refused one does not come back when the file is closed.
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 - open as long as the run
            if tensorboard:
                self._events = Events(self._path.parent / "tensorboard", self._last_step + 1)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line, at once.

        Scalars are kept exactly. Arrays become nested lists of four significant digits, in the first line and then
        every few steps, the more seldom the larger they are. What is not finite becomes null, and its name is
        listed under `nonfinite`. `time` (seconds since 1970) and, after a resume, `resumed_from` are added.

        Args:
            step: larger than in every call before.
            values: name -> number or array.

        Raises:
            ValueError: `step` was logged already.
            UserError: the line cannot be written (a full disk, say).
        """
        if step <= self._last_step:
            raise ValueError(f"step {step} comes after step {self._last_step}; each is logged once")
        record: dict[str, Any] = {"step": step}
        if self._first and self._resume_step is not None:
            record["resumed_from"] = self._resume_step
        record |= {name: _plain(value) for name, value in values.items() if self._due(step, value)}
        record["time"] = round(time.time(), 3)
        missing = [name for name, value in record.items() if not _is_finite(value)]
        if missing:
            record = {name: _null_for_nonfinite(value) for name, value in record.items()} | {"nonfinite": missing}
        with _writing(self._path):
            self._append((json.dumps(record, allow_nan=False) + "\n").encode())
            if self._events is not None:
                self._events.add(step, record)
        self._last_step, self._first = step, False

    def close(self) -> None:
        """Flushes and closes the files."""
        with _writing(self._path):
            self._file.close()
            if self._events is not None:
                self._events.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, line: bytes) -> None:
        before = os.fstat(self._file.fileno()).st_size
        if self._file.write(line) != len(line):
            self._file.truncate(before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _due(self, step: int, value: Any) -> bool:
        every = math.ceil(np.size(value) / ARRAY_NUMBERS)
        return every <= 1 or self._first or step % every == 0


class Events:
    """TensorBoard events, written in the calling thread: the usual writer's own thread dies with a full disk, and the
    run would wait for it for ever.

    Args:
        directory: made if missing.
        first_step: what earlier files say of it and of later steps is forgotten.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        # Imported here: a run without events should not pay for protobuf.
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2
        from tensorboardX.summary import scalar

        self._messages: Any = event_pb2
        self._scalar = scalar
        directory.mkdir(parents=True, exist_ok=True)
        # Its own names count seconds: a run resumed within one would overwrite its past.
        self._writer = EventsWriter(str(directory / "events"), f".{time.time_ns()}")
        self._write(first_step, session_log=self._messages.SessionLog(status=self._messages.SessionLog.START))
        self._flushed = 0.0

    def add(self, step: int, record: Mapping[str, Any]) -> None:
        """Writes the numbers of a record. OSError: the disk refuses them."""
        for name, value in record.items():
            if isinstance(value, (int, float)) and name not in ("step", "time", "resumed_from"):
                self._write(step, summary=self._scalar(name, value))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._writer.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the file. OSError: the disk refuses what was left."""
        self._writer.close()

    def _write(self, step: int, **content: Any) -> None:
        self._writer.write_event(self._messages.Event(wall_time=time.time(), step=step, **content))


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first; a line torn by a crash is left out.

    Raises:
        UserError: the directory has no `metrics.jsonl`.
    """
    path = Path(run_dir) / NAME
    if not path.is_file():
        raise UserError(f"{run_dir} has no {NAME}; name the directory of a training run")
    with open(path, encoding="utf-8", errors="replace") as file:
        return [record for _, record in _records(file)]


def _records(lines: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if line.endswith("\n") and isinstance(record, dict) and isinstance(record.get("step"), int):
            yield line, record


def _lines_until(path: Path, step: int) -> list[str]:
    """Whole lines up to and including `step`, each step once."""
    if not path.exists():
        return []
    kept: dict[int, str] = {}
    with open(path, encoding="utf-8", errors="replace") as file:
        for line, record in _records(file):
            if record["step"] <= step:
                kept[record["step"]] = line
    return [kept[number] for number in sorted(kept)]


def _replace(path: Path, text: str) -> None:
    """Writes `path` so that a kill leaves the old contents or the new."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        raise UserError(f"{path} could not be written ({exc.strerror}); free some space or name another run") from exc


def _plain(value: Any) -> Any:
    """A number as JSON writes it: a float32 by its own shortest digits, arrays to four significant ones."""
    if isinstance(value, (bool, int, float)):
        return int(value) if isinstance(value, bool) else value
    array = np.asarray(value)
    if array.ndim:
        return _rounded(array.astype(np.float64).tolist())
    if np.issubdtype(array.dtype, np.integer) or array.dtype == bool:
        return int(array)
    return float(str(np.float32(array))) if array.dtype.itemsize <= 4 else float(array)


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if not math.isfinite(value):
        return value
    short = float(f"{value:.4g}")
    return int(short) if short.is_integer() and abs(short) < 1e15 else short


def _is_finite(value: Any) -> bool:
    if isinstance(value, list):
        return all(_is_finite(item) for item in value)
    return not isinstance(value, float) or math.isfinite(value)


def _null_for_nonfinite(value: Any) -> Any:
    if isinstance(value, list):
        return [_null_for_nonfinite(item) for item in value]
    return value if _is_finite(value) else None


class Throughput:
    """Tokens per second over the last steps, without the first (which compiles) and without pauses.

    Args:
        window: steps looked back upon.
        clock: seconds from some fixed moment.
    """

    def __init__(self, window: int = 20, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._steps: deque[tuple[float, int]] = deque(maxlen=window)
        self._mark: float | None = None
        self._paused = 0.0

    def step(self, tokens: int) -> float | None:
        """Ends a step of `tokens`. Returns its seconds; None for the first."""
        now, seconds = self._clock(), None
        if self._mark is not None:
            seconds = max(now - self._mark - self._paused, 1e-9)
            self._steps.append((seconds, tokens))
        self._mark, self._paused = now, 0.0
        return seconds

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What happens inside (validation, waiting for a save) belongs to no step."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused += self._clock() - start

    @property
    def rate(self) -> float | None:
        """Tokens per second; None before the second step has ended."""
        if not self._steps:
            return None
        return sum(tokens for _, tokens in self._steps) / sum(seconds for seconds, _ in self._steps)
