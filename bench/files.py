"""Loading a model directory, beside a plain read of the same bytes: `load`."""

from __future__ import annotations

import time
from dataclasses import replace
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from bench.timing import Timings
from model.hf.writing import write_checkpoint
from model.load import open_model, read_model
from model.sizes import named
from model.tree import make_skeleton
from sharding.mesh import MeshConfig, make_mesh

CONFIG = replace(named("Qwen3-0.6B"), num_layers=22)
"""2.0 GB in float32."""


def load(repeats: int) -> dict[str, Any]:
    """Bytes per second of our loading into float32 and of safetensors' own reading into numpy, each in turn; and of
    writing the directory. All of it comes from the page cache."""
    shapes = make_skeleton(CONFIG, stacked=False).shapes
    size = 4 * sum(map(prod, shapes.values()))
    rng = np.random.default_rng(0)
    weights = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        start = time.perf_counter()
        write_checkpoint(path, CONFIG, shapes, weights, {}, dtype="float32")
        written = size / (time.perf_counter() - start)
        del weights

        def ours() -> None:
            jax.block_until_ready(jax.tree.leaves(read_model(open_model(path), mesh, dtype="float32")))

        def plain() -> None:
            for file in sorted(path.glob("*.safetensors")):
                safetensors.numpy.load_file(file)

        seconds: list[list[float]] = [[], []]
        begin = time.monotonic()
        for turn in range(repeats + 1):
            for side, taken in zip((ours, plain), seconds, strict=True):
                start = time.perf_counter()
                side()
                if turn:
                    taken.append(time.perf_counter() - start)
    timings = Timings(seconds[0], [(begin, time.monotonic())])
    return {
        "rates": [size / taken for taken in timings.seconds],
        "spans": timings.spans,
        "plain_rates": [size / taken for taken in seconds[1]],
        "write_rate": written,
        "bytes": size,
    }
