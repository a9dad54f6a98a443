"""From a config to everything the loop needs, refusing what cannot work before anything compiles."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from configs.override import to_dict
from configs.run import PREFERENCES, Run
from errors import UserError
from model.checkpoint.checkpoints import Checkpoints
from model.config import ModelConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from model.tree import Skeleton
from sharding.mesh import make_mesh
from sharding.peers import first_alone
from sharding.rules import batch_sharding, batch_share
from train.data.loader import DataSets, open_data
from train.data.sources import expand
from train.data.system import explain_disk
from train.distillation import distill_loss
from train.losses import Parts, Totals, next_token
from train.optimizer import make_optimizer
from train.origin import NewRows, Origin
from train.policy import policy_loss
from train.preference import preference_loss
from train.reference import check_reference
from train.state import (
    TrainState,
    abstract_state,
    create_state,
    flatten,
    make_skeleton,
    unflatten,
)
from train.step import Loss, make_train_step, make_validation_step
from train.teacher import Teacher, open_teacher

SHARED_SECONDS = 60.0
"""How long a network disk may take to show one host what another wrote."""
VOCABULARY_MULTIPLE = 64
"""A vocabulary taken from the tokenizer is rounded up to this, so that it divides over a mesh."""


def say(sentence: str) -> None:
    """One line to the person at the terminal; from the first process alone."""
    if jax.process_index() == 0:
        print(sentence, file=sys.stderr, flush=True)


def resolve(run: Run, tokenizer: Tokenizer, base: ModelConfig | None = None) -> Run:
    """`run` with the sizes that its tokenizer and the model it starts from decide.

    Args:
        base: that model; where the run goes on, its own.

    Raises:
        UserError: the tokenizer has more tokens than the model, or the sizes do not go with the rest of the run.
    """
    if run.objective == "reward" and not run.model.num_labels:
        run = replace(run, model=replace(run.model, num_labels=1))
    rows = -(-tokenizer.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    least = base.vocab_size if base else 0
    if run.init_model == "source":
        assert base is not None
        model = replace(base, moe=run.model.moe, layout="") if run.init_how == "upcycle" else base
        if run.model.num_labels and not base.num_labels:
            model = replace(model, num_labels=run.model.num_labels, mtp_layers=0)
        # Many published models have more rows than tokens, so that a few more fit.
        model = replace(model, vocab_size=rows if tokenizer.vocab_size > least else least)
        run = replace(run, model=model, init_model="config")
    elif run.model.vocab_size == 0:
        run = replace(run, model=replace(run.model, vocab_size=max(rows, least)))
    labels = run.model.num_labels
    if run.objective == "reward" and labels != 1:
        raise UserError(
            f"objective=reward learns one score for a reply, and the model has num_labels={labels}; set "
            "model.num_labels 0 or 1, or start from another model"
        )
    if run.objective in ("dpo", "kto", "rl") and labels:
        raise UserError(
            f"objective={run.objective} trains a model that writes, and this one has num_labels={labels}: it scores a "
            "text; start from a language model, with model.num_labels 0"
        )
    if tokenizer.vocab_size > run.model.vocab_size:
        raise UserError(
            f"the tokenizer {tokenizer.source} has {tokenizer.vocab_size} tokens and model.vocab_size is "
            f"{run.model.vocab_size}; make the model's at least as large, or 0 to take the tokenizer's"
        )
    if run.model.vocab_size % run.mesh.tensor:
        raise UserError(
            f"{run.model.vocab_size} rows of the vocabulary do not divide over mesh.tensor={run.mesh.tensor}"
        )
    return run


def open_tokenizer(run: Run, out: Path, start: int | None, origin: Origin | None) -> Tokenizer:
    """The tokenizer that the config names, else that of `init_from`, else the one kept in the run.

    Raises:
        UserError: there is none, or it is not the one that the run was trained with, which stands at step `start`.
    """
    kept, source = out / "tokenizer", run.data.tokenizer
    if not source and origin is not None:
        if origin.tokenizer is None:
            raise UserError(f"data.tokenizer names no tokenizer and init_from has none: {origin.problem}")
        return origin.tokenizer
    if not source and not kept.is_dir():
        raise UserError("data.tokenizer names no tokenizer; make one with `qmax tokenizer FILES... --out DIR`")
    tokenizer = Tokenizer.load(source or kept)
    if source and start is not None and kept.is_dir() and Tokenizer.load(kept).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{out} was trained with another tokenizer than {source}; name the one in {kept}, or another --out"
        )
    return tokenizer


def starting_model(run: Run, checkpoints: Checkpoints, start: int | None, origin: Origin | None) -> ModelConfig | None:
    """Sizes of the model that `run` starts from; of the run's own where it goes on, so that the other is not needed."""
    if origin is not None:
        return origin.source.config
    if not run.init_from or start is None:
        return None
    return ModelConfig.from_dict(checkpoints.meta(start)["run"]["model"], str(checkpoints.path(start)))


@dataclass
class Job:
    """A run, ready to go: what stays the same from step to step."""

    run: Run
    out: Path
    tokenizer: Tokenizer
    data: DataSets
    mesh: jax.sharding.Mesh
    skeleton: Skeleton
    optimizer: optax.GradientTransformationExtraArgs
    abstract: TrainState
    """Shapes and shardings of the state."""
    checkpoints: Checkpoints
    resume_from: int | None
    """Step of the checkpoint to go on from; None to begin."""
    origin: Origin | None
    """Where the first weights come from; None for random ones."""
    cache: Path
    """Where what is made of the data is kept."""
    new_rows: NewRows
    """What the rows of tokens begin as that the origin has not."""
    teacher: Teacher | None = None
    """Who teaches, where the objective is to distill."""

    def place(self, rows: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """This host's rows as part of the global batch, on the devices, each of which takes its part of them."""
        sharding, (_, shares) = batch_sharding(self.mesh), batch_share(self.mesh)

        def one(value: np.ndarray) -> jax.Array:
            whole = (len(value) * shares, *value.shape[1:])
            return jax.make_array_from_process_local_data(sharding, value, whole)

        return {name: one(value) for name, value in rows.items()}

    def loss(
        self,
        model: Transformer,
        rows: dict[str, jax.Array],
        sums: Totals,
        before: Parts,
        teacher: Transformer | None = None,
    ) -> tuple[jax.Array, Parts]:
        """The loss of one micro-batch, with this run's weights of its parts."""
        run = self.run
        if run.objective == "distill":
            return distill_loss(model, rows, sums, before, run.distill, run.loss, teacher)
        if run.objective == "rl":
            return policy_loss(model, rows, sums, before, run.rl, run.loss)
        if run.objective in PREFERENCES:
            return preference_loss(model, rows, sums, before, run.preference, run.loss, run.objective)
        return next_token(model, rows, sums, before, self.run.loss)

    def compiled_step(self) -> Callable[[TrainState, Any], tuple[TrainState, dict[str, jax.Array]]]:
        """The train step, compiled at its first call; the state that it is given is used up."""
        layout = jax.tree.map(lambda a: a.sharding, self.abstract)
        # What is read on the host is whole on every process.
        shardings = layout, NamedSharding(self.mesh, P())
        return self._compiled(lambda loss: make_train_step(self.run, self.skeleton, loss, self.optimizer), shardings, 0)

    def compiled_validation(self) -> Callable[[TrainState, Any], dict[str, jax.Array]]:
        """The validation step, compiled at its first call."""
        everywhere = NamedSharding(self.mesh, P())
        return self._compiled(lambda loss: make_validation_step(self.run, self.skeleton, loss), everywhere)

    def _compiled(
        self, make: Callable[[Loss], Callable[..., Any]], shardings: Any, *donated: int
    ) -> Callable[..., Any]:
        """The step that `make` makes of the loss. The weights of a teacher in memory are an argument of the program."""
        teacher = self.teacher.live(self.mesh) if self.teacher is not None else None

        def step(state: TrainState, batch: Any, teacher: Transformer | None) -> Any:
            return make(partial(self.loss, teacher=teacher))(state, batch)

        compiled = jax.jit(step, donate_argnums=donated, out_shardings=shardings)
        return lambda state, batch: compiled(state, batch, teacher)

    def restore(self, step: int) -> TrainState:
        """The state of a checkpoint, laid out on this run's mesh."""
        return unflatten(self.abstract, self.checkpoints.restore(step, flatten(self.abstract)))

    def start(self) -> TrainState:
        """The state before the first step, from scratch or from `init_from`."""
        state = create_state(self.run, self.skeleton, self.optimizer, self.mesh)
        if self.origin is None:
            return state
        say(f"reading the weights of {self.origin.name}")
        origin, self.origin = self.origin, None
        return origin.begin(self.run, self.skeleton, state, self.mesh, self.new_rows)


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
    origin = Origin.open(run.init_from) if run.init_from and start is None else None
    tokenizer = open_tokenizer(run, out, start, origin)
    new_rows = origin.new_rows(tokenizer) if origin else {}
    run = resolve(run, tokenizer, starting_model(run, checkpoints, start, origin))
    different = origin.check(run) if origin else []
    check_reference(run, tokenizer)
    teacher = open_teacher(run, tokenizer)
    mesh = make_mesh(run.mesh)
    skeleton = make_skeleton(run)
    optimizer = make_optimizer(run.optimizer, run.optimizer_steps, skeleton)
    abstract = abstract_state(run, skeleton, optimizer, mesh)
    if start is not None:
        check_same(flatten(abstract), checkpoints.leaves(start), f"the run in {out}")
    if different:
        say(f"init_from={run.init_from} is used as the config says, not as it was trained: {'; '.join(different)}")
    with nothing_left(out):
        if named := [*run.data.sources, *run.data.validation, *run.data.reference]:
            expand(named)
        with first_alone("data"):
            data = open_data(run, tokenizer, cache)
        with first_alone("run directory"):
            if jax.process_index() == 0:
                with explain_disk(out, "free some and run again"):
                    write_run(run, out, tokenizer)
            else:
                check_shared(out)
    return Job(
        run,
        out,
        tokenizer,
        data,
        mesh,
        skeleton,
        optimizer,
        abstract,
        checkpoints,
        start,
        origin,
        cache,
        new_rows,
        teacher,
    )


def check_place(path: Path, option: str) -> None:
    """Refuses a directory that cannot be made or written to."""
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"{there} is a file; choose another directory with {option}")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"may not write to {there}; choose another directory with {option}")


def check_shared(out: Path) -> None:
    """Refuses a run directory that process 0 has written and this one does not see."""
    deadline = time.monotonic() + SHARED_SECONDS
    while not (out / "config.json").exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"process {jax.process_index()} does not see {out}, which process 0 has written; "
                "name a directory that all hosts share with --out"
            )
        time.sleep(0.2)


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
