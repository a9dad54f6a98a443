"""The disk under a run: one writer at a time, and what the system says when it refuses."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import IO
from weakref import WeakValueDictionary

SPARE_BYTES = 1 << 18
"""What a checkpoint may need beyond its arrays: manifest, tokenizer, the storage layer's own tables."""

_HERE: WeakValueDictionary[Path, Lock] = WeakValueDictionary()
"""Locks of this process: the system's record locks never refuse the process that holds them."""


class Lock:
    """One writer in a directory; the system lets it go when the writer dies.

    A record lock, not flock: forked data workers do not inherit it.
    """

    def __init__(self, path: Path, file: IO[str]) -> None:
        self._path, self._file = path, file
        _HERE[path] = self

    @classmethod
    def try_for(cls, path: Path) -> Lock | None:
        """The lock on `path` (made if missing), or None where somebody has it. OSError: it cannot be made."""
        path = path.absolute()
        if path in _HERE:
            return None
        file = open(path, "a")  # noqa: SIM115 - open for as long as the lock is held
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            return None
        return cls(path, file)

    @classmethod
    def wait_for(cls, path: Path, seconds: float) -> Lock | None:
        """`try_for`, again and again for `seconds`: a process that was killed may need a moment to die."""
        deadline = time.monotonic() + seconds
        while (lock := cls.try_for(path)) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return lock

    def release(self) -> None:
        """Lets it go."""
        _HERE.pop(self._path, None)
        self._file.close()

    def __del__(self) -> None:
        self._file.close()


def demand_space(directory: Path, size: int) -> None:
    """Raises OSError (disk full) now if arrays of `size` bytes do not fit, rather than half-way through writing."""
    if shutil.disk_usage(directory).free < size + size // 20 + SPARE_BYTES:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def reason(exc: BaseException) -> tuple[str, str]:
    """What went wrong, and what to do about it. The storage layer wraps the system's words in its own types."""
    text = "".join(traceback.format_exception(exc))
    for code, words, remedy in (
        (errno.ENOSPC, "the disk is full", "free some space and resume"),
        (errno.EDQUOT, "the disk quota is used up", "free some space and resume"),
        (errno.EACCES, "permission denied", "make the directory writable and resume"),
        (errno.EROFS, "the file system is read-only", "name another directory"),
    ):
        if os.strerror(code) in text:
            return words, remedy
    first = " ".join(str(exc).split())
    return f"{type(exc).__name__}: {first[:200]}", "mend the cause and resume"


def quieten() -> None:
    """Keeps the storage layer's own words off the terminal: a failed write is pages there, and one sentence here.

    Safe to call again and again.
    """
    logging.getLogger("absl").addFilter(_of_orbax)
    logging.getLogger("asyncio").addFilter(_of_others)
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)
    # Parts of an array that nobody waits for any more, since another part of it failed.
    warnings.filterwarnings("ignore", message="coroutine '.*async_serialize_from_host.* was never awaited")


def _of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or record.levelno < logging.INFO


def _of_others(record: logging.LogRecord) -> bool:
    """Drops what asyncio says of writes that failed after the first one had; that one is raised."""
    trace = record.exc_info[2] if isinstance(record.exc_info, tuple) else None
    return not any("orbax" in frame.filename for frame in traceback.extract_tb(trace))


class _Hook:
    """An unraisablehook without what tensorstore tells, from its own threads, of writes that end after their loop."""

    def __init__(self, inner: Callable[[sys.UnraisableHookArgs], object]) -> None:
        self._inner = inner

    def __call__(self, told: sys.UnraisableHookArgs) -> None:
        outermost = told.exc_traceback.tb_frame.f_code.co_filename if told.exc_traceback else ""
        if str(told.exc_value) != "Event loop is closed" or "asyncio" not in outermost:
            self._inner(told)
