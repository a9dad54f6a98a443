"""Clocks: repeated timings in a measured process, and from outside what the rest of the machine did meanwhile."""

from __future__ import annotations

import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

SAMPLE_SECONDS = 0.1
"""How often the observer looks at the clocks of the processors."""

LEAST_SECONDS = 1.0
"""Short calls are repeated until this has gone by, so that the observer sees them."""

NOISY = 0.1
"""Cores used by other processes, above which a row is marked."""


def median(values: Sequence[float]) -> float:
    """The median."""
    return statistics.median(values)


def spread(values: Sequence[float]) -> float:
    """Largest minus smallest of the middle four fifths of `values`, as a share of the median."""
    ordered = sorted(values)
    cut = len(ordered) // 10
    return (ordered[-1 - cut] - ordered[cut]) / median(values)


@dataclass
class Timings:
    """Seconds of repeated calls, and when they ran (`time.monotonic`, which all processes share)."""

    seconds: list[float] = field(default_factory=list)
    spans: list[tuple[float, float]] = field(default_factory=list)

    def take(self, function: Callable[[], Any], repeats: int) -> list[float]:
        """Calls `function` `repeats` times, or more until LEAST_SECONDS are spent, and adds each; returns these."""
        begin = time.monotonic()
        taken: list[float] = []
        while len(taken) < repeats or sum(taken) < LEAST_SECONDS:
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
        self.spans.append((begin, time.monotonic()))
        self.seconds += taken
        return taken


class Observer:
    """Samples, in a thread, the processor time of the whole machine and of one process with its children."""

    def __init__(self, pid: int) -> None:
        import psutil

        self._process = psutil.Process(pid)
        self._points: list[tuple[float, float, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        import psutil

        while True:
            try:
                own = self._process.cpu_times()
            except psutil.Error:  # it has ended
                return
            every = psutil.cpu_times()._asdict()
            # Time stolen by neighbours of a virtual machine counts too; a guest's is part of the user's.
            busy = sum(every.get(name, 0.0) for name in ("user", "nice", "system", "irq", "softirq", "steal"))
            mine = own.user + own.system + own.children_user + own.children_system
            self._points.append((time.monotonic(), busy, mine))
            if self._stop.wait(SAMPLE_SECONDS):
                return

    def close(self) -> None:
        """Ends the thread."""
        self._stop.set()
        self._thread.join()

    def other_cpu(self, spans: Sequence[tuple[float, float]]) -> float | None:
        """Cores that all other processes used during `spans`; None when they were too short to tell."""
        wall = others = 0.0
        for begin, end in spans:
            inside = [point for point in self._points if begin - SAMPLE_SECONDS <= point[0] <= end + SAMPLE_SECONDS]
            if len(inside) > 1:
                (t0, busy0, mine0), (t1, busy1, mine1) = inside[0], inside[-1]
                wall += t1 - t0
                others += max(0.0, (busy1 - busy0) - (mine1 - mine0))
        return others / wall if wall else None


# ---- limits of the machine --------------------------------------------------
def read_bandwidth(megabytes: int = 400, repeats: int = 9) -> float:
    """Bytes per second that all cores read together from an array larger than any cache; the best of `repeats`."""
    import numpy as np

    cores = os.cpu_count() or 1
    rows = np.ones((8 * cores, megabytes * 2**20 // 4 // (8 * cores)), np.float32)
    with ThreadPoolExecutor(cores) as threads:
        seconds = Timings().take(lambda: list(threads.map(np.max, rows)), repeats)
    return rows.nbytes / min(seconds)


def matrix_rate(size: int = 2048, repeats: int = 9) -> float:
    """Operations per second of a float32 matrix product in jax; the best of `repeats`."""
    import jax
    import jax.numpy as jnp

    matrix = jnp.full((size, size), 0.5, jnp.float32)
    product = jax.jit(lambda a: a @ a)
    product(matrix).block_until_ready()
    seconds = Timings().take(lambda: product(matrix).block_until_ready(), repeats)
    return 2 * size**3 / min(seconds)
