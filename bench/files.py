"""Loading and converting a model directory, beside a plain read and a copy of the same bytes."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from io import StringIO
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from model.convert_verb import convert
from model.hf.safetensors import sync
from model.hf.writing import write_checkpoint
from model.load import open_model, read_model
from model.sizes import named
from model.tree import make_skeleton
from sharding.mesh import MeshConfig, make_mesh
from sharding.runtime import configure_jax

CONFIG = replace(named("Qwen3-0.6B"), num_layers=22)
"""2.0 GB in float32."""


def load(repeats: int) -> dict[str, Any]:
    """Bytes per second of loading and converting, each beside who does the same with the same bytes, by turns.

    Every measurement has a process of its own, as a load has in life: most of its time goes to memory that is touched
    for the first time. The files are in the page cache.
    """
    shapes = make_skeleton(CONFIG, stacked=False).shapes
    size = 4 * sum(map(prod, shapes.values()))
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    begin = time.monotonic()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        write_checkpoint(path, CONFIG, shapes, weights, {}, dtype="float32")
        del weights
        for turn in range(repeats + 1):
            for side, taken in seconds.items():
                words = [sys.executable, "-m", "bench.files", side, str(path)]
                done = subprocess.run(words, check=True, capture_output=True, text=True)
                if turn:
                    taken.append(float(done.stdout))
    rates = {side: [size / one for one in taken] for side, taken in seconds.items()}
    return {
        "load": {"rates": rates["load"], "plain_rates": rates["read"]},
        "convert": {"rates": rates["convert"], "plain_rates": rates["copy"]},
        "spans": [(begin, time.monotonic())],
        "bytes": size,
    }


def loaded(path: Path) -> Any:
    """Our model, in float32."""
    return jax.block_until_ready(read_model(open_model(path), make_mesh(MeshConfig()), dtype="float32"))


def read(path: Path) -> Any:
    """Safetensors' own reading into numpy."""
    return [safetensors.numpy.load_file(file) for file in sorted(path.glob("*.safetensors"))]


def converted(path: Path) -> None:
    """Into a directory beside it, until the disk has it."""
    with redirect_stderr(StringIO()):  # it says that there is no tokenizer
        convert(open_model(path), path.parent / "written")


def copied(path: Path) -> None:
    """A copy beside it, until the disk has it."""
    target = path.parent / "written"
    shutil.copytree(path, target)
    sync([*target.iterdir(), target])


SIDES: dict[str, Callable[[Path], Any]] = {"load": loaded, "read": read, "convert": converted, "copy": copied}


def main() -> None:
    """Does what the first argument names with the directory in the second, and prints the seconds."""
    configure_jax()
    path = Path(sys.argv[2])
    start = time.perf_counter()
    kept = SIDES[sys.argv[1]](path)
    print(time.perf_counter() - start)
    del kept
    shutil.rmtree(path.parent / "written", ignore_errors=True)


if __name__ == "__main__":
    main()
