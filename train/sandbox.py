"""Python that a model wrote, run as a process that can do little harm (Linux).

What holds it, each where the machine has it:

- **Namespaces** (user, PID, mount, network, IPC): no network but sockets in the file system; all processes die with the
  first one, and others are not seen; everything is read-only but an own folder of limited size in memory; no devices.
- **Landlock** (Linux 5.13): no writing outside the folder, though modes, owners and times of files are not its matter;
  no TCP from Linux 6.7.
- **seccomp** (x86-64 and 64-bit ARM): no sockets, no memory of other processes, no new namespaces. Without namespaces
  also: no leaving of the process group, no signals to others, no changes of modes, owners and times.
- **Resource limits**, always: memory, processor time, size of a file, number of processes and of open files.

Containers often allow no namespaces: then Landlock and seccomp together do. A machine where either the network or
writing to files cannot be stopped is refused. Without namespaces the folder lies on the disk, with a limit for each
file only, and the kernel's limit of processes counts what the user has at the start. Memory of all processes and their
number are also looked at every 50 ms. The kernel limits no processes of root, who becomes `nobody` first; a root who
cannot is refused. Files may be read as far as the user may. A hole in the kernel is a hole here: this is no virtual
machine.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from errors import UserError

MIB = 1 << 20
LAYERS = ("namespaces", "landlock", "seccomp")
JAIL = Path(__file__).with_name("jail.py")
START_SECONDS = 20.0
"""Beyond the program's own time: a machine under load is slow to start two interpreters."""
KEEPER_SECONDS = 2.0
"""For the keeper to end all, where the caller gives up."""
TAIL = 4096
"""Bytes of the end of stderr that are kept, whatever the limit, as the error stands there."""

Reason = Literal["finished", "failed", "timeout", "memory", "processes", "killed"]


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    Attributes:
        ok: it ended by itself with exit code 0.
        stdout, stderr: what it wrote, cut to a limit; broken UTF-8 is replaced.
        reason: "finished" is ok; "failed" another exit code, as after an exception; "timeout" too much time, of the
            clock or of the processor; "memory" and "processes" too much of them; "killed" died of a signal.
        layers: what held it.
    """

    ok: bool
    stdout: str
    stderr: str
    reason: Reason
    layers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Settings:
    """What `jail.py` is told; sizes in bytes."""

    program: str
    folder: str
    report: int
    seconds: float
    memory_bytes: int
    file_bytes: int
    processes: int
    layers: tuple[str, ...]
    unprotected: bool


def run_python(
    code: str,
    *,
    stdin: str = "",
    seconds: float = 5,
    memory_bytes: int = 512 * MIB,
    file_bytes: int = 64 * MIB,
    processes: int = 32,
    output_bytes: int = 64 << 10,
    layers: Sequence[str] = LAYERS,
    unprotected: bool = False,
) -> Outcome:
    """Runs `code` in a new interpreter with the standard library alone, none of the caller's environment variables,
    and a temporary folder as working directory that is removed afterwards.

    Args:
        seconds: by the clock, from the program's start. memory_bytes: address space of a process, and memory of all.
        file_bytes: of one file, and of the folder. processes: processes and threads, the first included.
        output_bytes: kept of each of stdout and stderr; the rest is read and dropped.
        layers: those of `LAYERS` that are tried. unprotected: run it even where nothing stops network or writing.

    Raises UserError where the machine cannot hold a program, and for code with a NUL or half a surrogate pair.
    """
    if not sys.platform.startswith("linux"):
        raise UserError(f"programs are shut in by Linux only, and this is {sys.platform}; run on Linux")
    with tempfile.TemporaryDirectory(prefix="qmax-run-", dir=_place(), ignore_cleanup_errors=True) as name:
        root = Path(name)
        folder, program, given = root / "work", root / "code.py", root / "stdin"
        folder.mkdir()
        program.write_bytes(code.encode("utf-8", "replace"))
        given.write_bytes(stdin.encode("utf-8", "replace"))
        if os.getuid() == 0:
            root.chmod(0o755)  # nobody has to reach them
            program.chmod(0o644)
        reading, report = os.pipe()
        settings = Settings(
            str(program), str(folder), report, seconds, memory_bytes, file_bytes, processes, tuple(layers), unprotected
        )
        try:
            with given.open("rb") as file, _started(settings, file.fileno()) as process:
                os.close(report)
                report = -1
                written = _listen(process, seconds + START_SECONDS, output_bytes)
                told = _told(reading)
        finally:
            os.close(reading)
            if report >= 0:
                os.close(report)
    return _outcome(told, *written, unprotected=unprotected)


def _place() -> str | None:
    """Where temporary folders are made; for root one that `nobody` can reach."""
    if os.getuid() == 0:
        for place in (tempfile.gettempdir(), "/tmp", "/var/tmp"):
            path = Path(place).resolve()
            if all(folder.stat().st_mode & 0o001 for folder in (path, *path.parents)):
                return place
    return None


@functools.cache
def check_sandbox() -> None:
    """Raises UserError where this machine cannot hold a program; asked once, before work that depends on it."""
    run_python("")


def run_many(codes: Sequence[str], workers: int | None = None, **options: Any) -> list[Outcome]:
    """`run_python` of each, `workers` at a time (None: as many as there are processors), in the order of `codes`."""
    with ThreadPoolExecutor(workers or os.cpu_count() or 1) as pool:
        return list(pool.map(lambda code: run_python(code, **options), codes))


@contextlib.contextmanager
def _started(settings: Settings, stdin: int) -> Any:
    """The keeper's process; killed with all that it keeps when left."""
    places = {"HOME": settings.folder, "TMPDIR": settings.folder, "PATH": "/usr/local/bin:/usr/bin:/bin"}
    process = subprocess.Popen(
        [sys.executable, "-S", "-P", "-s", "-B", str(JAIL), json.dumps(asdict(settings))],
        stdin=stdin,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=places | {"LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
        cwd="/",
        pass_fds=(settings.report,),
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()  # without namespaces the keeper has to end what it keeps
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(KEEPER_SECONDS)
            process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


def _listen(process: subprocess.Popen[bytes], seconds: float, limit: int) -> tuple[bytes, bytes]:
    """Beginnings of stdout and stderr (of stderr the end too), read until all writers are gone or time is up."""
    kept: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
    tail = bytearray()
    deadline = time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        for name in kept:
            selector.register(getattr(process, name), selectors.EVENT_READ, name)
        while selector.get_map() and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                piece = os.read(key.fd, 1 << 16)
                if not piece:
                    selector.unregister(key.fileobj)
                room = max(0, limit - len(kept[key.data]))
                kept[key.data] += piece[:room]
                if key.data == "stderr":
                    tail = (tail + piece[room:])[-TAIL:]
        if not selector.get_map():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
    return bytes(kept["stdout"]), bytes(kept["stderr"] + tail)


def _told(reading: int) -> dict[str, Any]:
    """What the jail reported: lines of JSON, put together."""
    os.set_blocking(reading, False)
    text = b""
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(reading, 1 << 16):
            text += piece
    found: dict[str, Any] = {}
    for line in text.splitlines():
        found |= json.loads(line)
    return found


def _outcome(told: dict[str, Any], stdout: bytes, stderr: bytes, *, unprotected: bool) -> Outcome:
    out, err = stdout.decode("utf-8", "replace"), stderr.decode("utf-8", "replace")
    if told.get("missing") and not unprotected:
        raise UserError(
            f"this machine cannot keep a program from {' and '.join(told['missing'])}: it needs user namespaces, or "
            "Landlock (Linux 5.13) and seccomp, and of root that it may become nobody; allow that in the container, or "
            "run elsewhere"
        )
    if "broken" in told:
        raise UserError(f"the sandbox did not start: {told['broken']}; check that {sys.executable} may run")
    layers = tuple(told.get("layers", ()))
    if not layers and "code" not in told and "reason" not in told:
        raise UserError(f"the sandbox did not start: {err.strip()[-300:] or 'it was killed'}")
    code = told.get("code")
    last = last_line(err)
    reason: Reason
    if "reason" in told:
        reason = told["reason"]
    elif code == 0:
        reason = "finished"
    elif code is None:
        reason = "killed"
    elif code in (-signal.SIGXCPU, 128 + signal.SIGXCPU):
        reason = "timeout"
    elif code < 0:
        reason = "killed"
    else:
        reason = "memory" if last.startswith("MemoryError") else "failed"
    return Outcome(code == 0, out, err, reason, layers)


def last_line(text: str) -> str:
    """The last line that is not empty, as of a traceback; empty where there is none."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
