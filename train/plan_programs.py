"""The programs that `qmax plan` compiles: the very steps of training and generation, for devices that are not here."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from configs.run import Run
from model.cache import page_size
from model.quantization import WeightType
from sharding.mesh import BATCH_AXES, make_mesh
from sharding.rules import batch_sharding

Mode = Literal["train", "prefill", "decode"]

COMPILER = {"xla_tpu_enable_ragged_dot_kernel": "true"}
"""Without it some generations multiply every row with every expert."""


@dataclass(frozen=True)
class Lowered:
    """A step, lowered. held: bytes per device of what stays between steps, by kind."""

    lowered: Any
    mesh: jax.sharding.Mesh
    held: dict[str, int]


def lower(
    run: Run,
    devices: Sequence[Any],
    mode: Mode,
    rows: int = 0,
    context: int = 0,
    weight_type: WeightType = "same",
) -> Lowered:
    """The step of `run` that `mode` names.

    Args:
        rows, context, weight_type: while generating: rows at a time, positions of their cache, how weights are stored.
    """
    mesh = make_mesh(run.mesh, devices)
    # The program is made for the devices of this mesh, not for those that jax finds here.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return train(run, mesh) if mode == "train" else generate(run, mesh, mode, rows, context, weight_type)


def train(run: Run, mesh: jax.sharding.Mesh) -> Lowered:
    """The optimizer step."""
    from train.losses import next_token
    from train.optimizer import make_optimizer
    from train.state import abstract_state, make_skeleton
    from train.step import make_train_step

    skeleton = make_skeleton(run)
    optimizer = make_optimizer(run.optimizer, run.steps, skeleton)
    state = abstract_state(run, skeleton, optimizer, mesh)
    shape = (run.data.batch_size, run.data.sequence_length)
    kinds = dict.fromkeys(("tokens", "targets", "positions", "segments"), np.int32) | {"weights": np.float32}
    batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=batch_sharding(mesh)) for name, kind in kinds.items()}
    step = make_train_step(run, skeleton, lambda m, r, t, b: next_token(m, r, t, b, run.loss), optimizer)
    layout = jax.tree.map(lambda a: a.sharding, state)
    lowered = jax.jit(step, donate_argnums=0, out_shardings=(layout, None)).lower(state, batch)
    return Lowered(lowered, mesh, {"weights": bytes_of((state.params, state.extra)), "optimizer": bytes_of(state.opt)})


def generate(
    run: Run, mesh: jax.sharding.Mesh, mode: Mode, rows: int, context: int, weight_type: WeightType
) -> Lowered:
    """One more token of `rows` rows with room for `context` positions, or the reading of a piece of their prompts."""
    from serve.engine import CHUNKS
    from serve.rows import WORDS
    from serve.steps import abstract_state, step
    from serve.weights import abstract_weights

    config, dtype, page = run.model, jnp.dtype(run.dtype), page_size(context)
    width, shards = -(-context // page), prod(mesh.shape[axis] for axis in BATCH_AXES)
    model = abstract_weights(config, dtype, mesh, weight_type)
    state = abstract_state(config, rows, rows * width, page, dtype, mesh)
    everywhere = NamedSharding(mesh, PartitionSpec())
    args = [jax.ShapeDtypeStruct((rows, WORDS + width), jnp.int32, sharding=everywhere)]
    if mode == "prefill":
        tokens = min(context, max(tokens for _, tokens in CHUNKS["other"]))
        args.append(jax.ShapeDtypeStruct((rows, tokens), jnp.int32, sharding=everywhere))
    engine_step = partial(step, page=page, shards=shards, vocab_limit=config.vocab_size)
    lowered = jax.jit(engine_step, donate_argnums=1).lower(model, state, *args)
    return Lowered(lowered, mesh, {"weights": bytes_of(model), "cache": bytes_of(state)})


def bytes_of(tree: Any) -> int:
    """Bytes that a device holds of abstract arrays."""
    leaves = jax.tree.leaves(tree)
    return sum(prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a program. text: of the optimised program. peak: bytes per device, or None where it
    gave up before counting. temporary: of them, what only lives within a step. largest: places in memory, with the
    shapes that stand there one after the other. fits: whether the compiler took it.
    """

    text: str
    peak: int | None
    temporary: int | None
    largest: tuple[tuple[int, str], ...]
    fits: bool
    seconds: float


def compile_program(program: Lowered) -> Compiled:
    """Compiles it; a program that does not fit is an answer too."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="qmax-plan-") as directory:
        fits, peak, temporary = True, None, None
        try:
            compiled = program.lowered.compile(compiler_options={**COMPILER, "xla_dump_to": directory})
        except Exception as exc:
            if "RESOURCE_EXHAUSTED" not in str(exc) and "Oom" not in str(exc):
                raise
            fits, text = False, _dumped(directory, "after_optimizations.txt")
            # What the message calls temporaries holds arguments too, or not, depending on what was too much.
            temporary = heap(_dumped(directory, "memory-usage-report.txt"))
            peak = None if temporary is None else temporary + sum(program.held.values())
        else:
            memory, text = compiled.memory_analysis(), compiled.as_text()
            temporary = memory.temp_size_in_bytes
            peak = memory.argument_size_in_bytes + temporary
        largest = largest_places(_dumped(directory, "memory-usage-report.txt"))
    return Compiled(text, peak, temporary, largest, fits, time.perf_counter() - start)


UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def _dumped(directory: str, name: str) -> str:
    """A file that the compiler wrote of the largest program, by the end of its name; empty if it wrote none."""
    found = sorted(Path(directory).glob(f"*jit_*.{name}"), key=lambda path: path.stat().st_size)
    found = found or sorted(Path(directory).glob(f"*jit_*{name}"), key=lambda path: path.stat().st_size)
    return found[-1].read_text(errors="replace") if found else ""


PLACE = re.compile(r"\(\s*\d+%\);\s+([\d.]+)([KMGT]?)iB;\s+(\d+);\s+(\d+);\s+(.*)")
"""A place in memory in the compiler's report: how much, from which byte on, of how many arrays, and of which."""


def heap(report: str) -> int | None:
    """Bytes of what lives within a step, of a memory report: up to the end of the last place that arrays share."""
    main = report.partition("Memory Space:")[2].partition("Memory Space:")[0]
    sections = [[*PLACE.finditer(part)] for part in main.split("cumulative_size")[1:]]
    ends = [int(m[3]) + int(float(m[1]) * 2 ** UNITS[m[2]]) for rows in sections if len(rows) > 1 for m in rows]
    return max(ends, default=0) if sections else None


def largest_places(report: str) -> tuple[tuple[int, str], ...]:
    """The first places of a memory report, the largest of them first."""
    rows = [(int(float(m[1]) * 2 ** UNITS[m[2]]), m[5].strip()) for m in PLACE.finditer(report)]
    return tuple(sorted(rows, key=lambda row: -row[0])[:5])
