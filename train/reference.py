"""The model that a run must not go too far from, and what it says of every row: at once, or before training.

rows of data, in order --forward of the reference--> one .npy [rows, T] for each store, beside the tokens
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from configs.run import Run, check_divides
from errors import UserError
from model.load import Source, check_language_model, layout, open_model
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from model.tree import Arrays, Skeleton, make_skeleton
from sharding.rules import TRAIN
from train.beside import is_beside, paths_beside, write_beside
from train.data.order import derive
from train.handover import Rows, logprobs_of
from train.state import TrainState, compute_dtype

if TYPE_CHECKING:
    from train.setup import Job

FIELD = "preference.reference_model"


def needs_reference(run: Run) -> bool:
    """Whether the rows of a run need what a reference says of them."""
    return run.objective == "kto" or (run.objective == "dpo" and run.preference.loss != "simpo")


def check_reference(run: Run, tokenizer: Tokenizer) -> None:
    """Refuses a run whose reference is missing or cannot judge its rows; nothing is compiled.

    Raises:
        UserError: there is no reference, it writes no text, reads other tokens, or does not divide over the mesh.
    """
    if run.objective == "rl" and run.rl.kl > 0:
        path, field = run.rl.reference_model, "rl.reference_model"
    elif needs_reference(run):
        path, field = run.preference.reference_model, FIELD
    else:
        return
    if not path and run.lora.rank and run.objective == "rl":
        return  # the model without its adapters, whatever that began as
    name = reference_path(run, path, field)
    try:
        source = open_model(name)
        check_language_model(source)
    except UserError as error:
        raise UserError(f"{field}: {error}") from error
    try:
        own = source.tokenizer()
    except UserError:
        own = tokenizer  # it has none: its rows are all there is to compare
    if not reads_alike(own, tokenizer) or source.config.vocab_size < tokenizer.vocab_size:
        raise UserError(
            f"the reference {name} has other tokens than the model that is trained; name one of its kin with {field}"
        )
    check_divides(source.config, run.mesh)


def reads_alike(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether ids mean the same to both, whatever files they come from."""
    if one.fingerprint == other.fingerprint:
        return True
    if one.vocab_size != other.vocab_size or set(one.stop_ids) != set(other.stop_ids):
        return False
    return all(one.token_bytes(i) == other.token_bytes(i) for i in range(one.vocab_size))


class Reference:
    """The model that a run must not go too far from: its log-probabilities of the targets of a batch.

    Where adapters are trained it is the model without them, and takes no memory of its own.

    Raises:
        UserError: there is none.
    """

    def __init__(self, run: Run, skeleton: Skeleton, mesh: jax.sharding.Mesh, path: str, field: str):
        everywhere = NamedSharding(mesh, P())
        self._model: Transformer | None = None
        if run.lora.rank and not path:
            self._score: Callable[..., Any] = jax.jit(partial(_without_adapters, skeleton), out_shardings=everywhere)
            return
        name = reference_path(run, path, field)
        source = open_model(name)
        self._model = read_frozen(source, mesh, compute_dtype(run))
        self._score = jax.jit(lambda model, rows: logprobs_of(model, rows)[0], out_shardings=everywhere)

    def __call__(self, state: TrainState, rows: Rows) -> Array:
        """float32 `[B, T]`, on all devices."""
        rows = {name: rows[name] for name in ("tokens", "positions", "segments", "targets")}
        return self._score(self._model if self._model is not None else (state.params, state.extra), rows)


def read_frozen(source: Source, mesh: jax.sharding.Mesh, dtype: Any) -> Transformer:
    """A model that is not trained, laid out as the one that is, with weights of `dtype`."""
    form = make_skeleton(source.config, stacked=False, dtype=dtype)
    # Rows that do not divide over the mesh are whole.
    table = dict(TRAIN) | ({"vocab": None} if source.config.vocab_size % mesh.shape["tensor"] else {})
    found = source.weights(layout(form, mesh, table), dtype)
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
    """Changes when a MODEL does: a hash of the names, sizes and times of its weights, and of what config.json says."""
    path = Path(name)
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    weights = [
        file for file in files if file.suffix in (".safetensors", ".gguf", ".bin") or "checkpoints" in file.parts
    ]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in weights if file.exists()]
    config = path / "config.json"
    return f"{derive(repr(stats), config.read_text() if config.is_file() else ''):016x}"


def reference_key(run: Run) -> str:
    """Stands for all that changes what the reference says of a row."""
    name = reference_path(run, run.preference.reference_model, FIELD)
    own = run.lora.base if run.lora.rank and not run.preference.reference_model else "same"
    return f"{fingerprint(name)} {compute_dtype(run).name} {own}"


def score_rows(job: Job, state: TrainState, cache: Path) -> Reference | None:
    """Gives all rows of a run what the reference says of them; or, where that is to be live, gives the reference.

    The files stay, and are used again by the next run on the same rows with the same reference.
    """
    run, config = job.run, job.run.preference
    if not needs_reference(run):
        return None
    if config.reference == "live":
        return Reference(run, job.skeleton, job.mesh, config.reference_model, FIELD)
    key = reference_key(run)
    if not is_beside(job, cache, ("reference",), key):
        reference = Reference(run, job.skeleton, job.mesh, config.reference_model, FIELD)
        said = "log-probabilities of the reference"
        write_beside(job, cache, key, said, lambda batch: {"reference": reference(state, batch)})
    job.data.attach("reference", paths_beside(job, cache, "reference", key))
    return None
