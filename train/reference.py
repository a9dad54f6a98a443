"""The model that a run must not go too far from, and what it says of every row: at once, or before training.

rows of data, in order --forward of the reference--> one .npy [rows, T] for each store, beside the tokens
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from configs.run import Run
from errors import UserError
from model.load import Source, layout, open_model
from model.transformer import Transformer
from model.tree import Arrays, Skeleton, make_skeleton
from sharding.rules import TRAIN, batch_share
from terminal import progress_bar
from train.data.order import derive
from train.handover import Rows, logprobs_of
from train.state import TrainState, compute_dtype

if TYPE_CHECKING:
    from train.setup import Job


def needs_reference(run: Run) -> bool:
    """Whether the rows of a run need what a reference says of them."""
    return run.objective == "kto" or (run.objective == "dpo" and run.preference.loss != "simpo")


class Reference:
    """The model that a run must not go too far from: its log-probabilities of the targets of a batch.

    Where adapters are trained it is the model without them, and takes no memory of its own.

    Raises:
        UserError: there is none, or it is of other sizes.
    """

    def __init__(self, run: Run, skeleton: Skeleton, mesh: jax.sharding.Mesh, path: str, field: str):
        everywhere = NamedSharding(mesh, P())
        self._model: Transformer | None = None
        if run.lora.rank and not path:
            self._score: Callable[..., Any] = jax.jit(partial(_without_adapters, skeleton), out_shardings=everywhere)
            return
        name = reference_path(run, path, field)
        source = open_model(name)
        if source.config.vocab_size > run.model.vocab_size:
            raise UserError(f"the reference {name} has more tokens than the model that is trained; use one of its kin")
        self._model = read_frozen(source, mesh, compute_dtype(run))
        self._score = jax.jit(lambda model, rows: logprobs_of(model, rows)[0], out_shardings=everywhere)

    def __call__(self, state: TrainState, rows: Rows) -> Array:
        """float32 `[B, T]`, on all devices."""
        rows = {name: rows[name] for name in ("tokens", "positions", "segments", "targets")}
        return self._score(self._model if self._model is not None else (state.params, state.extra), rows)


def read_frozen(source: Source, mesh: jax.sharding.Mesh, dtype: Any) -> Transformer:
    """A model that is not trained, laid out as the one that is, with weights of `dtype`."""
    form = make_skeleton(source.config, stacked=False, dtype=dtype)
    found = source.weights(layout(form, mesh, dict(TRAIN)), dtype)
    weights = {own: leaf for own, leaf in found.items() if own in form.weights}
    return form.merge(weights, {own: leaf for own, leaf in found.items() if own not in form.weights})


def _without_adapters(skeleton: Skeleton, arrays: tuple[Arrays, Arrays], rows: Rows) -> Array:
    params, extra = arrays
    silent = {name: leaf * 0 if name.endswith(".b") else leaf for name, leaf in params.items()}
    return logprobs_of(skeleton.merge(silent, extra), rows)[0]


def reference_path(run: Run, path: str, field: str) -> str:
    """The MODEL that is the reference."""
    name = path or run.init_from
    if not name:
        raise UserError(f"{field} names no model, and the run starts from none; name one, or set init_from")
    return name


def fingerprint(name: str) -> str:
    """Changes when the files of a MODEL do: a hash of their names, sizes and times."""
    path = Path(name)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    weights = [
        file for file in files if file.suffix in (".safetensors", ".gguf", ".bin") or "checkpoints" in file.parts
    ]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in weights if file.exists()]
    return f"{derive(repr(stats)):016x}"


def score_rows(job: Job, state: TrainState, cache: Path) -> Reference | None:
    """Gives all rows of a run what the reference says of them; or, where that is to be live, gives the reference.

    The files stay, and are used again by the next run on the same rows with the same reference.
    """
    run, config = job.run, job.run.preference
    if not needs_reference(run):
        return None
    field = "preference.reference_model"
    name = reference_path(run, config.reference_model, field)
    if config.reference == "live":
        return Reference(run, job.skeleton, job.mesh, config.reference_model, field)
    own = fingerprint(name)
    if not all(path.exists() for path in paths_beside(job, cache, "reference", own).values()):
        reference = Reference(run, job.skeleton, job.mesh, config.reference_model, field)
        said = "log-probabilities of the reference"
        write_beside(job, cache, own, said, lambda batch: {"reference": reference(state, batch)})
    job.data.attach("reference", paths_beside(job, cache, "reference", own))
    return None


def paths_beside(job: Job, cache: Path, name: str, key: str) -> dict[str, Path]:
    """Where the array `name` of each part's rows is kept, in the version that `key` stands for."""
    return {part: cache / name / f"{derive(part, key):016x}.npy" for part in job.data.parts}


def write_beside(job: Job, cache: Path, key: str, title: str, score: Callable[[Rows], dict[str, Array]]) -> None:
    """Files of what `score` says of all rows of a run, for each name one of `[rows, T, ...]`; whole or not at all.

    Args:
        key: which version of it, see `paths_beside`.
        score: of a batch the arrays `[B, T, ...]`, which are on all devices.
    """
    size, first_process = job.run.data.batch_size, jax.process_index() == 0
    files: dict[tuple[str, str], np.memmap[Any, Any]] = {}
    with progress_bar(title, sum(map(len, job.data.parts.values())), unit="rows") as bar:
        for part, first, batch in job.data.rows_in_order(size, *batch_share(job.mesh)):
            count = len(job.data.parts[part])
            there = min(size, count - first)
            for name, array in score(job.place(batch)).items():
                found = np.asarray(array)
                if first_process:
                    if first == 0:
                        path = _partial(paths_beside(job, cache, name, key)[part])
                        path.parent.mkdir(parents=True, exist_ok=True)
                        files[name, part] = np.lib.format.open_memmap(
                            path, mode="w+", dtype=found.dtype, shape=(count, *found.shape[1:])
                        )
                    files[name, part][first : first + there] = found[:there]
            bar.advance(there)
    for (name, part), file in files.items():
        file.flush()
        path = paths_beside(job, cache, name, key)[part]
        _partial(path).replace(path)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("beside")


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.stem}.tmp.npy")
