"""What a device can do at best, and how much memory the run takes."""

from __future__ import annotations

import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

_TERA = 1e12

PEAK_TERAFLOPS: tuple[tuple[str, float, float], ...] = (
    # Start of `device_kind`, peak in bfloat16, peak in float32; dense, per jax device. Longer starts come first.
    # TPU: Google Cloud's pages of each generation. Float32 runs on the same matrix unit (one bfloat16 pass by
    # default), so it has the same peak. A v4 or v5p chip is one device, a tpu7x chip is two.
    ("TPU v4 lite", 138.0, 138.0),
    ("TPU v4", 275.0, 275.0),
    ("TPU v5 lite", 197.0, 197.0),
    ("TPU v5e", 197.0, 197.0),
    ("TPU v5p", 459.0, 459.0),
    ("TPU v5", 459.0, 459.0),
    ("TPU v6 lite", 918.0, 918.0),
    ("TPU v6e", 918.0, 918.0),
    ("TPU7x", 1153.5, 1153.5),
    ("TPU v7x", 1153.5, 1153.5),
    # NVIDIA: the data sheet of each card, without sparsity. Float32 at highest precision does not use TF32.
    ("NVIDIA A100", 312.0, 19.5),
    ("NVIDIA H100 PCIe", 756.0, 51.0),
    ("NVIDIA H100 NVL", 835.0, 60.0),
    ("NVIDIA H100", 989.0, 67.0),
    ("NVIDIA GH200", 989.0, 67.0),
    ("NVIDIA H200", 989.0, 67.0),
    ("NVIDIA B200", 2250.0, 75.0),
    ("NVIDIA L4", 121.0, 30.3),
    # A T4 has no bfloat16: its matrix units take float16.
    ("Tesla T4", 65.0, 8.1),
    ("NVIDIA T4", 65.0, 8.1),
)


def device_peak_flops(device: Any, dtype: str = "bfloat16") -> float | None:
    """Floating-point operations per second that `device` (a jax.Device) can do at best; None where nobody knows.

    A CPU is measured, once per process (0.3 s): the fastest float32 matrix product, divided among the devices
    that it emulates.

    Args:
        dtype: "float32" or "bfloat16" (which stands for float16 too).
    """
    if device.platform == "cpu":
        import jax

        return _cpu_flops() / max(1, len(jax.local_devices(backend="cpu")))
    kind = device.device_kind
    for start, half, single in PEAK_TERAFLOPS:
        # The next letter matters: an L40S is no L4.
        if kind.startswith(start) and not kind[len(start) :][:1].isalnum():
            return (single if dtype == "float32" else half) * _TERA
    return None


@cache
def _cpu_flops(size: int = 1024, seconds: float = 0.3) -> float:
    import jax
    import jax.numpy as jnp

    device = jax.local_devices(backend="cpu")[0]
    with jax.default_device(device):
        matrix = jnp.full((size, size), 0.5, jnp.float32)
        product = jax.jit(lambda a, b: a @ b)
        product(matrix, matrix).block_until_ready()
        best, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            product(matrix, matrix).block_until_ready()
            best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def memory_in_use() -> int | None:
    """Bytes at the peak so far of the fullest local device; on a CPU, bytes that the process holds now."""
    import jax

    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return _resident_bytes()
    found = [stats for device in devices if (stats := device.memory_stats())]
    return max((stats.get("peak_bytes_in_use", stats.get("bytes_in_use", 0)) for stats in found), default=None)


def _resident_bytes() -> int:
    import resource

    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # no /proc: the peak, in bytes on macOS and in KiB elsewhere
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
