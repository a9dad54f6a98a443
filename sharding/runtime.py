"""How this process meets the machine: emulated devices, compilation cache, GPU memory, quiet logs."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import os
import re
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from errors import UserError

DEVICE_FLAG = "--xla_force_host_platform_device_count"
MIN_COMPILE_SECONDS = 0.5
"""Programs that compile faster than this are not worth a file in the cache."""
HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""The C library's setting that asks the system for pages of 2 MiB; it is read when a process starts."""
GPU_SHARE = 0.9
"""Part of a GPU's memory taken at once when nobody else is on it; jax's own default is three quarters."""


def emulate_devices(count: int) -> None:
    """Makes jax see at least `count` devices where it will run on the CPU; does nothing on an accelerator.

    Call it before jax is imported: XLA reads its flags once.

    Raises:
        UserError: jax was imported already and has fewer devices.
    """
    if count <= 1 or runs_on_accelerator():
        return
    flags = os.environ.get("XLA_FLAGS", "")
    found = re.findall(rf"{DEVICE_FLAG}=(\d+)", flags)
    if found and int(found[-1]) >= count:
        return
    if "jax" in sys.modules:
        raise UserError(f"{count} devices are asked for after jax has started; set XLA_FLAGS={DEVICE_FLAG}={count}")
    kept = re.sub(rf"{DEVICE_FLAG}=\d+\s*", "", flags).strip()
    os.environ["XLA_FLAGS"] = f"{kept} {DEVICE_FLAG}={count}".strip()


def runs_on_accelerator() -> bool:
    """Whether jax will find a GPU or TPU, told from plugins and device files without importing jax."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms:
        return platforms.split(",")[0] != "cpu"
    gpu = any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    if gpu and any(os.path.exists(path) for path in ("/dev/nvidia0", "/dev/nvidiactl", "/dev/dxg")):
        return True
    tpu = importlib.util.find_spec("libtpu") is not None
    return tpu and (os.path.exists("/dev/accel0") or os.path.exists("/dev/vfio/vfio"))


def with_huge_pages() -> str:
    """The value of GLIBC_TUNABLES under which memory comes in huge pages; what the user set stands.

    XLA's buffers are megabytes: with pages of 4 KiB a fifth of a CPU's time goes to finding them.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return tunables if "hugetlb" in tunables else ":".join(filter(None, (tunables, HUGE_PAGES)))


def restart_with_huge_pages() -> None:
    """Starts this process over, once, with huge pages where it runs on a Linux CPU; keeps its id and arguments."""
    wanted = with_huge_pages()
    if sys.platform != "linux" or os.environ.get("GLIBC_TUNABLES", "") == wanted or runs_on_accelerator():
        return
    os.environ["GLIBC_TUNABLES"] = wanted
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def configure_jax(cache_dir: str | Path | None = None, *, train: bool = False) -> Path | None:
    """Sets what every verb wants of jax; call it once, before the first compilation.

    The persistent compilation cache goes to `cache_dir`, or where JAX_COMPILATION_CACHE_DIR says, or to
    ~/.cache/qmax/jax; a place that cannot be written is passed over. Settings that the user made in the
    environment always stand.

    Args:
        train: the process trains. A CPU's programs of one device then run in the thread that calls them, not beside it.
            Their memory, hundreds of megabytes a step, comes from where the C library can keep it (of a block that
            large, asked for by another thread, it always gives back the pages), and a step has nothing to run ahead
            of. An engine has: it plans a step while the last one runs.

    Returns:
        The cache directory, or None when nothing could be written.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    _set_gpu_memory()
    if not runs_on_accelerator():
        _keep_freed_memory()
    import jax

    directory = writable_cache(cache_dir)
    jax.config.update("jax_compilation_cache_dir", str(directory) if directory else None)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    if train and "JAX_CPU_ENABLE_ASYNC_DISPATCH" not in os.environ:
        jax.config.update("jax_cpu_enable_async_dispatch", False)
    # "float32" means float32 everywhere: not TF32 on a GPU, not bfloat16 passes on a TPU.
    jax.config.update("jax_default_matmul_precision", "highest")
    # A process that was killed while it wrote leaves a torn entry: jax compiles afresh, and nobody needs to know.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation cache")
    # "Unable to initialize backend 'tpu'" and the like say nothing to somebody who has no TPU.
    logging.getLogger("jax._src.xla_bridge").setLevel(logging.ERROR)
    return directory


def writable_cache(cache_dir: str | Path | None = None) -> Path | None:
    """The first of the places for compiled programs that can be written, made if need be."""
    candidates = [cache_dir, os.environ.get("JAX_COMPILATION_CACHE_DIR")]
    if not any(candidates):
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        candidates = [os.path.join(base, "qmax", "jax")]
    for candidate in filter(None, candidates):
        if "://" in str(candidate):  # a bucket: jax writes there itself
            return Path(candidate)
        path = Path(candidate).expanduser()
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                return path.absolute()
        except OSError:
            continue
    return None


def _keep_freed_memory() -> None:
    """Has the C library keep what XLA's CPU programs free, for their next call.

    By default large blocks go back to the system after every step and are faulted in again, page by page, at the
    next: a fifth of a training step's time. Only glibc knows these settings; a user's MALLOC_* variables stand.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mmap_max, trim_threshold = -4, -1  # M_MMAP_MAX, M_TRIM_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def _set_gpu_memory() -> None:
    """Takes most of an idle GPU at once (no fragmentation); grows by need on one that others use too."""
    names = ("XLA_PYTHON_CLIENT_PREALLOCATE", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")
    if "jax" in sys.modules or any(name in os.environ for name in names) or not os.path.exists("/dev/nvidiactl"):
        return
    query = ["nvidia-smi", "--query-gpu=memory.used,memory.total", "--format=csv,noheader,nounits"]
    try:
        lines = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
        shares = [float(used) / float(total) for used, total in (line.split(",") for line in lines)]
    except (OSError, subprocess.SubprocessError, ValueError, ZeroDivisionError):
        return
    if shares and max(shares) < 1 - GPU_SHARE:
        os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(GPU_SHARE)
    else:
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"


def default_dtype(device: Any) -> str:
    """The type of activations on a jax device: float32 on a CPU and on GPUs without bfloat16, else bfloat16."""
    if device.platform == "cpu":
        return "float32"
    capability = getattr(device, "compute_capability", None)
    if device.platform == "gpu" and capability is not None and float(capability) < 8.0:
        return "float32"
    return "bfloat16"
