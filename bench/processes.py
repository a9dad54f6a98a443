"""Children that measure: one process for each measurement, watched from outside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import peer_llama, peer_maxtext
from bench.shapes import Shape
from bench.timing import Observer
from sharding.runtime import with_huge_pages

ROOT = Path(__file__).resolve().parent.parent

MINUTES = 15
"""A child that takes longer is killed."""


class MeasurementError(Exception):
    """A child that gave no result; the message is the last thing that it said."""


def run_child(
    command: Sequence[str], environment: Mapping[str, str], folder: str | Path = ROOT
) -> tuple[list[tuple[float, str]], Observer]:
    """Runs `command` in `folder` to its end: its output, each line with the time it came at, and the observer.

    Raises:
        MeasurementError: it could not be started, failed, or took too long.
    """
    env = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
    try:
        child = subprocess.Popen(
            command, cwd=folder, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except OSError as exc:
        raise MeasurementError(f"{command[0]} does not run: {exc.strerror}") from exc
    with child:
        observer = Observer(child.pid)
        late = threading.Timer(MINUTES * 60, child.kill)
        late.start()
        try:
            assert child.stdout is not None
            lines = [(time.monotonic(), line.rstrip()) for line in child.stdout]
            code = child.wait()
        finally:
            late.cancel()
            child.kill()
            observer.close()
    if code:
        last = next((line for _, line in reversed(lines) if line.strip()), "it printed nothing")
        raise MeasurementError(f"it was killed by signal {-code}" if code < 0 else last[:300])
    return lines, observer


def run_job(command: Sequence[str], job: dict[str, Any], environment: Mapping[str, str]) -> dict[str, Any]:
    """Runs a measurement that prints its result as its last line.

    Raises:
        MeasurementError: it gave none.
    """
    lines, observer = run_child([*command, json.dumps(job)], environment)
    found = next((line for _, line in reversed(lines) if line.startswith("{")), None)
    if found is None:
        raise MeasurementError("it printed no result")
    return finish(json.loads(found), observer)


def finish(result: dict[str, Any], observer: Observer) -> dict[str, Any]:
    """`result` with what other processes used while it was measured in the place of its time spans."""
    spans = result.pop("spans", [])
    return {**result, "other_cpu": observer.other_cpu(spans)} if spans else result


def run_ours(job: dict[str, Any], cache: str, devices: int = 1) -> dict[str, Any]:
    """One of our measurements, in a process of its own, with compiled programs kept in `cache`.

    Raises:
        MeasurementError: it gave no result.
    """
    environment = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "GLIBC_TUNABLES": with_huge_pages(),  # as `qmax` starts itself
    }
    if devices > 1:
        environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
    return run_job([sys.executable, "-m", "bench.ours"], job, environment)


def run_hugging_face(python: str, job: dict[str, Any]) -> dict[str, Any]:
    """A measurement of transformers by the interpreter `python`.

    Raises:
        MeasurementError: it gave no result.
    """
    # The folder of the script stays off the path: its modules could be taken for somebody else's.
    return run_job([python, str(ROOT / "bench" / "peer_hf.py")], job, {"PYTHONSAFEPATH": "1"})


def run_llama(folder: Path, model: Path, shape: Shape, rows: int, repeats: int) -> dict[str, Any]:
    """llama.cpp decoding so many rows, or with 0 reading a prompt; each time in a process of its own.

    Raises:
        MeasurementError: it gave no result.
    """
    rates, noise, failed = [], [], 0
    while len(rates) < repeats:
        begin = time.monotonic()
        lines, observer = run_child(peer_llama.command(folder, model, shape, rows), {})
        try:
            rates.append(peer_llama.read(lines, rows))
        except ValueError as exc:
            failed += 1
            if failed == peer_llama.TRIES:
                raise MeasurementError(str(exc)) from exc
        else:
            noise.append(observer.other_cpu([(begin, time.monotonic())]))
    return {"rates": rates, "other_cpu": max((one for one in noise if one is not None), default=None)}


def run_maxtext(python: str, base: str, shape: Shape, capacity: str, repeats: int) -> dict[str, Any]:
    """A training run of MaxText by the interpreter `python`.

    Raises:
        MeasurementError: it gave no result.
    """
    with TemporaryDirectory() as folder:
        words = peer_maxtext.command(python, base, shape, capacity, repeats, folder)
        lines, observer = run_child(words, peer_maxtext.ENVIRONMENT, folder)
    try:
        return finish(peer_maxtext.read(shape, lines), observer)
    except ValueError as exc:
        raise MeasurementError(str(exc)) from exc
