"""`qmax doctor`: what is on this machine, and what will be slow and why."""

from __future__ import annotations

import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from terminal import Parser, human_bytes, print_table, write_json

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "sentencepiece", "tokenizers")
LOW_DISK = 5 * 2**30
LOW_MEMORY = 4 * 2**30
LARGE_CACHE = 20 * 2**30


def doctor_main(argv: list[str]) -> int:
    """Prints the machine and what will be slow on it; `--json FILE` for programs."""
    parser = Parser(
        "doctor",
        "Shows what is on this machine (Python, jax, devices, memory) and what will be slow, and why.",
        ["qmax doctor", "qmax doctor --json machine.json"],
    )
    parser.add_json()
    args = parser.parse_args(argv)
    facts = examine()
    rows = [("python", facts["python"])]
    rows += [(name, number or "missing") for name, number in facts["packages"].items()]
    rows += [
        ("machine", facts["machine"]),
        ("cores", f"{facts['cores']} (busy: {facts['load']:.1f})"),
        ("memory", f"{human_bytes(facts['memory_free'])} free of {human_bytes(facts['memory_total'])}"),
        ("disk here", f"{human_bytes(facts['disk_free'])} free"),
        ("compile cache", _cache_line(facts)),
    ]
    rows += [(f"device {device['id']}", _device_line(device)) for device in facts["devices"]]
    rows.append(("default dtype", facts["dtype"] or "none"))
    print_table(rows)
    print()
    for line in facts["warnings"] or ["nothing here will be slow that could be fast"]:
        print(f"- {line}")
    if args.json:
        write_json(args.json, facts)
    return 0 if facts["devices"] else 1


def examine() -> dict[str, Any]:
    """Everything that the doctor looks at, as JSON types; sizes in bytes.

    A jax that cannot start is a finding (`devices` is empty and a warning quotes it), not an error.
    """
    from sharding.runtime import configure_jax, default_dtype

    total, free = _memory()
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}",
        "cores": _cores(),
        "load": os.getloadavg()[0],
        "memory_total": total,
        "memory_free": free,
        "disk_free": shutil.disk_usage(Path.cwd()).free,
        "cache": None,
        "cache_bytes": 0,
        "cache_files": 0,
        "devices": [],
        "dtype": None,
    }
    broken = ""
    try:
        cache = configure_jax()
        facts["cache"] = str(cache) if cache else None
        if cache and "://" not in str(cache):
            sizes = [entry.stat().st_size for entry in cache.glob("*-cache")]
            facts["cache_bytes"], facts["cache_files"] = sum(sizes), len(sizes)
        import jax

        devices = jax.devices()
        facts["devices"] = [_device(device) for device in devices]
        facts["dtype"] = default_dtype(devices[0])
    except Exception as exc:  # whatever a broken driver or plugin raises is what the doctor is asked to find
        broken = f"jax does not start: {' '.join(str(exc).split())[:300]}"
    facts["warnings"] = ([broken] if broken else []) + diagnose(facts)
    return facts


def diagnose(facts: dict[str, Any]) -> list[str]:
    """Sentences on what will be slow or fail with these facts, the gravest first."""
    found = [f"{name} is missing: ./run.sh installs it" for name, number in facts["packages"].items() if not number]
    kinds = {device["platform"] for device in facts["devices"]}
    if kinds == {"cpu"}:
        found.append(
            "only a CPU: the demo and tiny models are fine, a model of 100 M parameters takes days; "
            + _why_no_accelerator()
        )
        found.append("no bfloat16 arithmetic on a CPU: float32 is used, which needs twice the memory")
    elif facts["dtype"] == "float32":
        found.append("this GPU has no bfloat16 (compute capability below 8): float32 is used, about half as fast")
    emulated = sum(device["platform"] == "cpu" for device in facts["devices"])
    if emulated > 1:
        found.append(
            f"{emulated} emulated CPU devices share {facts['cores']} cores: for tests of meshes, not for speed"
        )
    if facts["cores"] == 1:
        found.append("a single core: compiling and reading data stand in each other's way")
    elif facts["load"] > 0.5 * facts["cores"]:
        found.append(f"other programs keep {facts['load']:.1f} of {facts['cores']} cores busy: timings will not repeat")
    if facts["devices"] and not facts["cache"]:
        found.append(
            "no compilation cache can be written: every run compiles afresh; set JAX_COMPILATION_CACHE_DIR to a folder"
        )
    elif facts["cache"] and not facts["cache_files"]:
        found.append("the compilation cache is empty: the first run of each model compiles for a minute or so")
    if facts["cache_bytes"] > LARGE_CACHE:
        size = human_bytes(facts["cache_bytes"])
        found.append(f"the compilation cache holds {size}; {facts['cache']} can be deleted at any time")
    if facts["memory_free"] < LOW_MEMORY:
        found.append(f"{human_bytes(facts['memory_free'])} of free memory is little: compiling alone takes 1 to 2 GiB")
    if facts["disk_free"] < LOW_DISK:
        found.append(
            f"{human_bytes(facts['disk_free'])} of free disk is little: a checkpoint takes 12 bytes a parameter"
        )
    return found


def _why_no_accelerator() -> str:
    platforms = os.environ.get("JAX_PLATFORMS")
    if platforms:
        return f"JAX_PLATFORMS={platforms} asks for it"
    if shutil.which("nvidia-smi"):
        return "there is an NVIDIA driver here: QMAX_EXTRA=cuda ./run.sh doctor installs jax for it"
    if os.path.exists("/dev/accel0"):
        return "there is a TPU here: QMAX_EXTRA=tpu ./run.sh doctor installs jax for it"
    return "no GPU or TPU was found"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device(device: Any) -> dict[str, Any]:
    try:
        memory = device.memory_stats() or {}
    except Exception:  # not every backend counts
        memory = {}
    return {
        "id": device.id,
        "platform": device.platform,
        "kind": device.device_kind,
        "process": device.process_index,
        "memory_limit": memory.get("bytes_limit"),
        "memory_used": memory.get("bytes_in_use"),
    }


def _device_line(device: dict[str, Any]) -> str:
    limit = device["memory_limit"]
    memory = f", {human_bytes(limit)} for jax" if limit else ", main memory" if device["platform"] == "cpu" else ""
    return f"{device['platform']} ({device['kind']}){memory}"


def _cache_line(facts: dict[str, Any]) -> str:
    if not facts["cache"]:
        return "none"
    return f"{facts['cache']} ({facts['cache_files']} programs, {human_bytes(facts['cache_bytes'])})"


def _cores() -> int:
    """Cores that this process may use, which a container can make fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> tuple[int, int]:
    """Bytes of main memory: all, and what a new program could have."""
    import psutil

    memory = psutil.virtual_memory()
    return memory.total, memory.available


def _processor() -> str:
    """The processor's name as the kernel tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
            return next(names, "unknown processor")
    except OSError:
        return platform.processor() or "unknown processor"
