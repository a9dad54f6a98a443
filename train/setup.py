"""From a config to everything the loop needs, refusing what cannot work before anything compiles."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
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
from model.tree import Skeleton
from sharding.mesh import make_mesh
from sharding.rules import batch_sharding
from train.data.loader import DataSets, open_data
from train.losses import next_token
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


def open_tokenizer(run: Run, out: Path) -> Tokenizer:
    """The tokenizer that the config names, else that of `init_from`, else the one kept in the run."""
    kept = out / "tokenizer"
    source = run.data.tokenizer or (os.path.join(run.init_from, "tokenizer") if run.init_from else "")
    if not source and not kept.is_dir():
        raise UserError("data.tokenizer names no tokenizer; make one with `qmax tokenizer FILES... --out DIR`")
    return Tokenizer.load(source or kept)


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
    checkpoints: Checkpoints

    def place(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This host's rows as part of the global batch, on the devices."""
        sharding = batch_sharding(self.mesh)
        return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in rows.items()}

    def compiled_step(self) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        """The train step, compiled at its first call; the state that it is given is used up."""
        loss = lambda model, rows, sums, before: next_token(model, rows, sums, before, self.run.loss)  # noqa: E731
        step = make_train_step(self.run, self.skeleton, loss, self.optimizer)
        layout = jax.tree.map(lambda a: a.sharding, self.abstract)
        return jax.jit(step, donate_argnums=0, out_shardings=(layout, None))

    def compiled_validation(self) -> Callable[..., jax.Array]:
        """The validation step, compiled at its first call."""
        loss = lambda model, rows, sums, before: next_token(model, rows, sums, before, self.run.loss)  # noqa: E731
        return jax.jit(make_validation_step(self.skeleton, loss))

    @property
    def abstract(self) -> TrainState:
        """Shapes and shardings of the state."""
        return abstract_state(self.run, self.skeleton, self.optimizer, self.mesh)

    def restore(self, step: int) -> TrainState:
        """The state of a checkpoint, laid out on this run's mesh."""
        return unflatten(self.abstract, self.checkpoints.restore(step, flatten(self.abstract)))

    def start(self) -> TrainState:
        """The state before the first step, from scratch or from `init_from`."""
        state = create_state(self.run, self.skeleton, self.optimizer, self.mesh)
        if not self.run.init_from:
            return state
        return with_weights(state, weights_of(self.run.init_from, state), self.run.init_from)


def weights_of(source: str, state: TrainState) -> dict[str, Any]:
    """The weights of the newest good checkpoint of a run, laid out as those of `state`."""
    checkpoints = Checkpoints(run_directory(source) / "checkpoints", keep=1)
    step = checkpoints.latest_good(say)
    if step is None:
        raise UserError(f"init_from={source} has no complete checkpoint")
    names = {f"params.{name}": leaf for name, leaf in state.params.items()}
    asked = {name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding) for name, a in names.items()}
    found = checkpoints.restore(step, asked, part=True)
    return {name.removeprefix("params."): leaf for name, leaf in found.items()}


def prepare_job(run: Run, out: Path, *, resume: bool) -> Job:
    """Opens tokenizer, data, mesh and checkpoints, and writes the run directory.

    Raises:
        UserError: the directory holds a run already and `resume` is not asked for; or anything that the
            parts refuse.
    """
    checkpoints = Checkpoints(out / "checkpoints", keep=run.checkpoint.keep, tokenizer=out / "tokenizer")
    if checkpoints.steps() and not resume:
        raise UserError(
            f"{out} already holds a run at step {checkpoints.steps()[-1]}; add --resume to go on with it, or "
            "choose another directory with --out"
        )
    tokenizer = open_tokenizer(run, out)
    run = resolve(run, tokenizer)
    mesh = make_mesh(run.mesh)
    skeleton = make_skeleton(run)
    optimizer = make_optimizer(run.optimizer, run.steps, skeleton)
    if jax.process_index() == 0:
        write_run(run, out, tokenizer)
    data = open_data(run, tokenizer, Path(run.data.cache) if run.data.cache else out / "data")
    return Job(run, out, tokenizer, data, mesh, skeleton, optimizer, checkpoints)


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
