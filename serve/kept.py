"""Compiled programs on the disk, which a new process takes up without tracing them again.

jax keeps what its compiler made, but finds it by the text of the program, which has to be traced and lowered for that:
most of a warm start, and the more, the more layers a model has. Here a program is found by what its text follows from:
our source files, the sizes, the machine, and the settings of jax and XLA. Whoever can write the folder can have this
process run what he likes, as with jax's own cache.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import jax
from jax.experimental import serialize_executable

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("model", "serve", "sharding")
"""Folders whose files a program is traced from."""
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "numpy")
SETTINGS = ("JAX_", "XLA_", "LIBTPU_", "TF_XLA_", "CUDA_", "NVIDIA_")
"""Beginnings of the environment variables that may change what is compiled."""
DAYS = 30
"""A program that was not used for as long is removed when another is kept."""

Program = Callable[..., Any]


class Kept:
    """The programs of one folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @classmethod
    def beside_jax(cls) -> Kept | None:
        """Those in jax's own cache; None where that is none on a disk."""
        folder = jax.config.values.get("jax_compilation_cache_dir")
        return None if not folder or "://" in str(folder) else cls(Path(folder) / "programs")

    def get(self, names: tuple[Any, ...], devices: Sequence[Any], make: Callable[[str], Any]) -> Program:
        """The program for `devices` that `names` tell apart from all others of these sources.

        Args:
            make: compiles it as a function whose name ends so.
        """
        text = repr((self._surroundings(), [device.id for device in devices], names))
        path = self._folder / f"{hashlib.sha256(text.encode()).hexdigest()}.program"
        # What is there may be of any kind: half a file, or of a compiler that says that it is another one.
        with suppress(Exception):
            parts = pickle.loads(path.read_bytes())
            found = serialize_executable.deserialize_and_load(*parts, execution_devices=devices)
            os.utime(path)
            return found
        # A CPU's program that came out of jax's own cache cannot be kept: it has lost functions. So that jax does not
        # find it there, it has a name that nothing ever had.
        made = make(f"_{uuid4().hex}" if devices[0].platform == "cpu" else "")
        with suppress(OSError, ValueError, jax.errors.JaxRuntimeError):
            self._write(path, pickle.dumps(serialize_executable.serialize(made)))
        return made

    def _surroundings(self) -> tuple[Any, ...]:
        kinds = [(device.id, device.device_kind) for device in jax.devices()]
        settings = {name: str(value) for name, value in sorted(jax.config.values.items()) if "cache" not in name}
        return _machine(), kinds, jax.devices()[0].client.platform_version, settings

    def _write(self, path: Path, data: bytes) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=self._folder)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(temporary, path)
        except OSError:
            Path(temporary).unlink(missing_ok=True)
            raise
        old = time.time() - DAYS * 24 * 3600
        for other in self._folder.iterdir():
            if other.stat().st_mtime < old:
                other.unlink(missing_ok=True)


@cache
def _machine() -> tuple[Any, ...]:
    """Sources, packages, settings and processor."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    versions = []
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            versions.append((name, version(name)))
    settings = [(name, value) for name, value in sorted(os.environ.items()) if name.startswith(SETTINGS)]
    settings = [(name, value) for name, value in settings if "CACHE" not in name]
    flags = ""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return digest.hexdigest(), versions, settings, platform.python_version(), platform.machine(), flags
