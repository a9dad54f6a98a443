"""What another model says of every row of a run, kept on disk beside the rows: computed once, read with them.

rows of data, in order --forward of the other model--> one .npy [rows, T, ...] for each array of each store
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array

from sharding.rules import batch_share
from terminal import progress_bar
from train.data.order import derive
from train.data.system import commit, explain_disk
from train.handover import Rows

if TYPE_CHECKING:
    from train.setup import Job


def paths_beside(job: Job, cache: Path, name: str, key: str) -> dict[str, Path]:
    """Where the array `name` of each part's rows is kept, in the version that `key` stands for."""
    return {part: cache / name / f"{derive(part, key):016x}.npy" for part in job.data.parts}


def is_beside(job: Job, cache: Path, names: Sequence[str], key: str) -> bool:
    """Whether all of these arrays are there."""
    there = all(path.exists() for name in names for path in paths_beside(job, cache, name, key).values())
    if (
        jax.process_count() > 1
    ):  # a disk may show one process what another does not see yet: the first one's word counts
        there = bool(multihost_utils.broadcast_one_to_all(np.array(there)))
    return there


def write_beside(job: Job, cache: Path, key: str, title: str, score: Callable[[Rows], dict[str, Array]]) -> None:
    """Files of what `score` says of all rows of a run, for each name one of `[rows, T, ...]`; whole or not at all.

    Args:
        key: which version of it, see `paths_beside`.
        score: of a batch the arrays `[B, T, ...]`, which are on all devices.
    """
    files: dict[Path, np.memmap[Any, Any]] = {}
    with explain_disk(cache, "free some and run again"):
        try:
            with progress_bar(title, sum(map(len, job.data.parts.values())), unit="rows") as bar:
                for part, first, batch in job.data.rows_in_order(job.run.data.batch_size, *batch_share(job.mesh)):
                    count = len(job.data.parts[part])
                    there = min(job.run.data.batch_size, count - first)
                    for name, array in score(job.place(batch)).items():
                        path, found = paths_beside(job, cache, name, key)[part], np.asarray(array)
                        if jax.process_index() == 0:
                            if path not in files:
                                files[path] = _open(path, (count, *found.shape[1:]), found.dtype)
                            files[path][first : first + there] = found[:there]
                    bar.advance(there)
            for path, file in files.items():
                file.flush()
                commit(_partial(path), path)
        finally:
            for path in files:
                _partial(path).unlink(missing_ok=True)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("beside")


def _open(path: Path, shape: tuple[int, ...], dtype: Any) -> np.memmap[Any, Any]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return np.lib.format.open_memmap(_partial(path), mode="w+", dtype=dtype, shape=shape)


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.stem}-{os.getpid()}.tmp")
