"""From a config to everything the loop needs, refusing what cannot work before anything compiles."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from configs.override import to_dict
from configs.run import Run
from errors import UserError
from model.checkpoint.checkpoints import Checkpoints
from model.load import run_directory
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from model.tree import Skeleton
from sharding.mesh import make_mesh
from sharding.rules import batch_sharding
from train.data.loader import DataSets, open_data
from train.data.sources import expand
from train.data.system import explain_disk
from train.losses import Parts, Totals, next_token
from train.optimizer import make_optimizer
from train.state import (
    TrainState,
    abstract_state,
    create_state,
    flatten,
    make_skeleton,
    unflatten,
    with_weights,
)
from train.step import make_train_step, make_validation_step

VOCABULARY_MULTIPLE = 64
"""A vocabulary taken from the tokenizer is rounded up to this, so that it divides over a mesh."""


def say(sentence: str) -> None:
    """One line to the person at the terminal; from the first process alone."""
    if jax.process_index() == 0:
        print(sentence, file=sys.stderr, flush=True)


def resolve(run: Run, tokenizer: Tokenizer) -> Run:
    """`run` with the sizes that its tokenizer decides.

    Raises:
        UserError: the tokenizer has more tokens than the model.
    """
    if run.model.vocab_size == 0:
        vocab = -(-tokenizer.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        run = replace(run, model=replace(run.model, vocab_size=vocab))
    if tokenizer.vocab_size > run.model.vocab_size:
        raise UserError(
            f"the tokenizer {run.data.tokenizer} has {tokenizer.vocab_size} tokens and model.vocab_size is "
            f"{run.model.vocab_size}; make the model's at least as large, or 0 to take the tokenizer's"
        )
    if run.model.vocab_size % run.mesh.tensor:
        raise UserError(
            f"{run.model.vocab_size} rows of the vocabulary do not divide over mesh.tensor={run.mesh.tensor}"
        )
    return run


def open_tokenizer(run: Run, out: Path, start: int | None) -> Tokenizer:
    """The tokenizer that the config names, else that of `init_from`, else the one kept in the run.

    Raises:
        UserError: there is none; it is not the one that the run was trained with, which stands at step `start`; or
            its tokens are not those of `init_from`.
    """
    kept = out / "tokenizer"
    origin = os.path.join(run.init_from, "tokenizer") if run.init_from and start is None else ""
    source = run.data.tokenizer or origin
    if not source and not kept.is_dir():
        raise UserError("data.tokenizer names no tokenizer; make one with `qmax tokenizer FILES... --out DIR`")
    tokenizer = Tokenizer.load(source or kept)
    if source and start is not None and kept.is_dir() and Tokenizer.load(kept).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{out} was trained with another tokenizer than {source}; name the one in {kept}, or another --out"
        )
    if origin and source != origin:
        before = Tokenizer.load(origin)
        if any(before.token_bytes(i) != tokenizer.token_bytes(i) for i in range(before.vocab_size)):
            raise UserError(
                f"the tokens of {source} are not those that init_from={run.init_from} was trained with; leave "
                "data.tokenizer empty to take its tokenizer"
            )
    return tokenizer


@dataclass
class Job:
    """A run, ready to go: what stays the same from step to step."""

    run: Run
    out: Path
    tokenizer: Tokenizer
    data: DataSets
    mesh: jax.sharding.Mesh
    skeleton: Skeleton
    optimizer: optax.GradientTransformation
    abstract: TrainState
    """Shapes and shardings of the state."""
    checkpoints: Checkpoints
    resume_from: int | None
    """Step of the checkpoint to go on from; None to begin."""
    origin: Origin | None
    """Where the first weights come from; None for random ones."""

    def place(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This host's rows as part of the global batch, on the devices."""
        sharding = batch_sharding(self.mesh)
        return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in rows.items()}

    def loss(
        self, model: Transformer, rows: dict[str, jax.Array], sums: Totals, before: Parts
    ) -> tuple[jax.Array, Parts]:
        """The loss of one micro-batch, with this run's weights of its parts."""
        return next_token(model, rows, sums, before, self.run.loss)

    def compiled_step(self) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        """The train step, compiled at its first call; the state that it is given is used up."""
        step = make_train_step(self.run, self.skeleton, self.loss, self.optimizer)
        layout = jax.tree.map(lambda a: a.sharding, self.abstract)
        return jax.jit(step, donate_argnums=0, out_shardings=(layout, None))

    def compiled_validation(self) -> Callable[..., jax.Array]:
        """The validation step, compiled at its first call."""
        return jax.jit(make_validation_step(self.skeleton, self.loss))

    def restore(self, step: int) -> TrainState:
        """The state of a checkpoint, laid out on this run's mesh."""
        return unflatten(self.abstract, self.checkpoints.restore(step, flatten(self.abstract)))

    def start(self) -> TrainState:
        """The state before the first step, from scratch or from `init_from`."""
        state = create_state(self.run, self.skeleton, self.optimizer, self.mesh)
        if self.origin is None:
            return state
        return with_weights(state, self.origin.weights(state), self.run.init_from)


@dataclass
class Origin:
    """The checkpoint of another run whose weights a run starts from."""

    checkpoints: Checkpoints
    step: int

    @classmethod
    def find(cls, source: str) -> Origin:
        """The newest good checkpoint of the run `source`. Raises UserError where there is none."""
        checkpoints = Checkpoints(run_directory(source) / "checkpoints", keep=1)
        step = checkpoints.latest_good(say)
        if step is None:
            raise UserError(f"init_from={source} has no complete checkpoint")
        return cls(checkpoints, step)

    def weights(self, state: TrainState) -> dict[str, Any]:
        """Its weights, laid out as those of `state`."""
        asked = {
            f"params.{name}": jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)
            for name, a in state.params.items()
        }
        found = self.checkpoints.restore(self.step, asked, part=True)
        return {name.removeprefix("params."): leaf for name, leaf in found.items()}


def find_start(run: Run, out: Path, *, resume: bool) -> tuple[Checkpoints, int | None]:
    """The checkpoints of the run in `out`, and the step of the newest good one if it is to be resumed.

    Raises:
        UserError: the directory holds a run already and `resume` is not asked for.
    """
    checkpoints = Checkpoints(out / "checkpoints", keep=run.checkpoint.keep, tokenizer=out / "tokenizer")
    if resume:
        return checkpoints, checkpoints.latest_good(say)
    if checkpoints.steps():
        raise UserError(
            f"{out} already holds a run at step {checkpoints.steps()[-1]}; add --resume to go on with it, or "
            "choose another directory with --out"
        )
    return checkpoints, None


def prepare_job(run: Run, out: Path, checkpoints: Checkpoints, start: int | None) -> Job:
    """Opens tokenizer, data and mesh, and writes the run directory once all of them are as they should be.

    Args:
        checkpoints, start: as `find_start` gives them.

    Raises:
        UserError: anything that the parts refuse; nothing is compiled before, and no run directory left behind.
    """
    cache = Path(run.data.cache) if run.data.cache else out / "data"
    check_place(out, "--out")
    check_place(cache, "data.cache")
    origin = Origin.find(run.init_from) if run.init_from and start is None else None
    tokenizer = open_tokenizer(run, out, start)
    run = resolve(run, tokenizer)
    mesh = make_mesh(run.mesh)
    skeleton = make_skeleton(run)
    optimizer = make_optimizer(run.optimizer, run.steps, skeleton)
    abstract = abstract_state(run, skeleton, optimizer, mesh)
    if start is not None:
        check_same(flatten(abstract), checkpoints.leaves(start), f"the run in {out}")
    if origin is not None:
        stored = origin.checkpoints.leaves(origin.step)
        weights = {f"params.{name}": leaf for name, leaf in abstract.params.items()}
        check_same(weights, {n: leaf for n, leaf in stored.items() if n.startswith("params.")}, run.init_from)
    with nothing_left(out):
        expand([*run.data.sources, *run.data.validation])
        data = open_data(run, tokenizer, cache)
        if jax.process_index() == 0:
            with explain_disk(out, "free some and run again"):
                write_run(run, out, tokenizer)
    return Job(run, out, tokenizer, data, mesh, skeleton, optimizer, abstract, checkpoints, start, origin)


def check_place(path: Path, option: str) -> None:
    """Refuses a directory that cannot be made or written to."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"{there} is a file; choose another directory with {option}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"may not write to {there}; choose another directory with {option}")


def check_same(asked: Mapping[str, Any], stored: Mapping[str, Any], what: str) -> None:
    """Refuses arrays of other names, shapes or types than those that `what` has."""

    def words(leaf: Any) -> str:
        return "missing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"

    names = [n for n in sorted(asked.keys() | stored.keys()) if words(asked.get(n)) != words(stored.get(n))]
    if names:
        raise UserError(
            f"{what} is of another architecture or optimizer than the config: {len(names)} arrays differ, the first "
            f"is {names[0]}, {words(stored.get(names[0]))} there and {words(asked.get(names[0]))} here"
        )


@contextmanager
def nothing_left(out: Path) -> Iterator[None]:
    """Where the block refuses, removes the directories that it made; prepared text in them stays for the next time."""
    made = not out.exists()
    try:
        yield
    except UserError:
        if made:
            for place, _, _ in os.walk(out, topdown=False):
                with suppress(OSError):
                    os.rmdir(place)
        raise


def write_run(run: Run, out: Path, tokenizer: Tokenizer) -> None:
    """Creates the run directory: `config.json`, `tokenizer/`, `checkpoints/`."""
    (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    tokenizer.save(out / "tokenizer")
    record = {
        "run": to_dict(run),
        "parameters_total": run.model.parameters_total,
        "parameters_active": run.model.parameters_active,
    }
    partial = out / ".config.json.tmp"
    partial.write_text(json.dumps(record, indent=1) + "\n")
    partial.replace(out / "config.json")
