"""What the data pipeline asks of the operating system: atomic files, one writer at a time, workers that end."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from errors import UserError

_QUIET = threading.Event()


def be_quiet() -> None:
    """Silences `say` in this process: another one of the same run says the same."""
    _QUIET.set()


def say(text: str) -> None:
    """A line for the person who waits, on stderr."""
    if not _QUIET.is_set():
        print(text, file=sys.stderr, flush=True)


def commit(temporary: Path, path: Path) -> None:
    """Makes the finished file `temporary` appear as `path`: whole or not at all, also after a power cut."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes) -> None:
    """Writes a whole small file atomically."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    commit(temporary, path)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Holds `directory` for one process; others wait. The lock ends with the process, however it ends."""
    import fcntl

    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that prepares {directory}")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def explain_disk(path: Path, then: str) -> Iterator[None]:
    """Turns the operating system's refusal to write under `path` into one sentence that ends with `then`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left on the disk of {path}; {then}") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UserError(f"may not write to {path} ({error.strerror}); choose another place") from error
        raise


def serve_parent() -> None:
    """Called first in a worker process: signals are the parent's business, and the worker ends when the parent does.

    A parent killed with -9 cannot tell its workers, so a thread looks whether it is still there.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # both may be sent to the whole process group
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def raise_open_files(wanted: int) -> None:
    """Lifts the soft limit of open files towards `wanted`, as far as the hard limit allows."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft != resource.RLIM_INFINITY and soft < limit:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
