"""A run's state on disk: written beside the training step, whole or not at all, and checked before it is trusted.

Local and network (NFS) directories. A bucket (`gs://`) is refused: there a directory cannot be renamed in one step.

    checkpoints/40/state/          arrays, as Orbax writes them (OCDBT)
    checkpoints/40/tokenizer/      the tokenizer that the run uses
    checkpoints/40/manifest.json   size and hash of every file, path, shape and dtype of every array, and `meta`
"""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from errors import UserError
from model.checkpoint import manifest
from model.checkpoint.leaves import describe, empty, filled, flatten, leaf_hashes, nest, own_copies, words
from model.checkpoint.storage import Lock, demand_space, quieten, reason

__all__ = ["CheckpointError", "Checkpoints", "leaf_hashes"]

LOCK_SECONDS = 10.0
"""How long a save waits for another process, perhaps one that is just dying, to let go of the directory."""
WRITE_SECONDS = 3600
"""How long processes of one run wait for each other's part of a checkpoint."""

_SAVES = itertools.count()
"""Numbers the saves of this process; all processes of a run save in the same order, so it names barriers."""


class CheckpointError(UserError):
    """A checkpoint that could not be written or read: one sentence."""


class Checkpoints:
    """The checkpoints of one run.

    One save at a time runs in the background. Where a run has several processes, each makes the same calls in the
    same order and writes its own shards; process 0 alone signs, renames and prunes.

    Args:
        directory: where the directories named by step lie, say `RUN/checkpoints`.
        keep: newest checkpoints kept; the one with the best validation loss is kept beside them.
        tokenizer: directory that is copied into every checkpoint.

    Raises:
        UserError: `keep` is below 1, or the directory is the address of a bucket.
    """

    def __init__(self, directory: str | Path, keep: int, *, tokenizer: str | Path | None = None) -> None:
        if keep < 1:
            raise UserError(f"checkpoint.keep={keep} must be at least 1")
        if re.match(r"[a-z0-9]+:/", str(directory)):
            raise UserError(f"checkpoints cannot be written to {directory}; name a local or network directory")
        self.directory = Path(directory).absolute()
        self.keep = keep
        self._tokenizer = Path(tokenizer) if tokenizer else None
        self._primary = jax.process_index() == 0
        self._thread: threading.Thread | None = None
        self._failure: CheckpointError | None = None
        self._writer: Any = None
        self._lock: Lock | None = None
        self._verified: set[int] = set()
        self._bad: set[int] = set()

    # ---- writing ------------------------------------------------------------
    def save(self, step: int, state: Any, *, meta: Mapping[str, Any], validation_loss: float | None = None) -> None:
        """Starts writing `state`; when it returns, the caller may donate or overwrite every array of it.

        Waits for the save before, if that is still under way. A checkpoint of the same step is replaced.

        Args:
            step: optimizer steps that the state has seen.
            state: nested dicts, lists or tuples of jax arrays (no typed keys).
            meta: what else the run needs to go on, as JSON can hold it (the resolved config, ...).
            validation_loss: decides which checkpoint is the best; None or not finite where it is not known.

        Raises:
            CheckpointError: this save could not begin, or an earlier one failed and nobody was told yet.
            TypeError, ValueError: a leaf is no array, or `meta` is not JSON.
        """
        self.wait()
        leaves = flatten(state)
        record = {
            "step": step,
            "meta": json.loads(json.dumps(dict(meta), allow_nan=False)),
            "validation_loss": _finite(validation_loss),
            "leaves": {"/".join(path): describe(leaf) for path, leaf in leaves.items()},
        }
        own = own_copies(leaves)
        temporary = self._beside(step, "tmp")
        try:
            if self._primary:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._take()
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir()
                # Where several processes write, one that stopped here alone would leave the others waiting.
                if jax.process_count() == 1:
                    demand_space(self.directory, sum(leaf.nbytes for leaf in leaves.values()))
            self._start_writing(temporary / "state", own)
        except CheckpointError:
            raise
        except Exception as exc:
            raise self._failed(step, temporary, exc) from exc
        # Not a daemon: a process that ends by itself finishes the save it began.
        self._thread = threading.Thread(target=self._finish, args=(temporary, record, next(_SAVES)), name="checkpoint")
        self._thread.start()

    def wait(self) -> None:
        """Returns when no save is under way. Raises CheckpointError if the last one failed, once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raises CheckpointError if a save has failed since the last call; never waits."""
        failure = self._failure
        if failure is not None:
            self._failure = None
            raise failure

    def close(self) -> None:
        """Waits, then lets another process save here. Raises CheckpointError if the last save failed."""
        try:
            self.wait()
        finally:
            if self._lock is not None:
                self._lock.release()
                self._lock = None

    def clear(self) -> None:
        """Removes every checkpoint: for a run that starts afresh in a directory where another one left some."""
        self.wait()
        if self._primary and self.directory.exists():
            self._take()
            for step in self.steps():
                self._remove(self.path(step))
        self._verified.clear()
        self._bad.clear()

    def _start_writing(self, place: Path, leaves: Mapping[tuple[str, ...], jax.Array]) -> None:
        import orbax.checkpoint as ocp

        if self._writer is None:
            quieten()
            # Weights are noise to zstd: it saves 7 % of the bytes and takes four times as long.
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=True, use_compression=False)
            self._writer = ocp.AsyncCheckpointer(handler, async_options=ocp.AsyncOptions(timeout_secs=WRITE_SECONDS))
        self._writer.save(place, args=ocp.args.PyTreeSave(nest(filled(leaves))))  # pyright: ignore[reportCallIssue]

    def _finish(self, temporary: Path, record: dict[str, Any], number: int) -> None:
        """The background half of a save. No exception leaves it: the next call of the owner raises what happened."""
        step = record["step"]
        try:
            self._writer.wait_until_finished()
            try:
                if self._primary:
                    self._commit(temporary, record)
            finally:
                _barrier(f"qmax_checkpoint_{number}")
            if not (self.path(step) / manifest.NAME).exists():
                raise OSError(errno.EIO, "process 0 could not complete it")
            self._verified.add(step)
            self._bad.discard(step)
        except BaseException as exc:
            self._failure = self._failed(step, temporary, exc)
            self._failure.__cause__ = exc

    def _commit(self, temporary: Path, record: dict[str, Any]) -> None:
        """Makes the checkpoint at `temporary` visible under its step, then removes those that are not kept."""
        if self._tokenizer is not None:
            shutil.copytree(self._tokenizer, temporary / "tokenizer")
        manifest.write(temporary, **record)
        final, aside = self.path(record["step"]), self._beside(record["step"], "old")
        if final.exists():
            final.rename(aside)
        temporary.rename(final)
        manifest.sync_directory(self.directory)
        shutil.rmtree(aside, ignore_errors=True)
        self._prune(record["step"])

    def _prune(self, newest: int) -> None:
        self._bad.discard(newest)
        steps = [step for step in self.steps() if step <= newest]
        losses: dict[int, float] = {}
        for step in steps:
            try:
                loss = manifest.read(self.path(step))["validation_loss"]
            except manifest.DamageError:
                self._bad.add(step)
                continue
            if loss is not None and step not in self._bad:
                losses[step] = loss
        kept = {step for step in steps if step not in self._bad}
        kept = set(sorted(kept)[-self.keep :])
        if losses:
            kept.add(min(losses, key=lambda step: (losses[step], -step)))
        for step in set(steps) - kept:
            self._remove(self.path(step))

    def _failed(self, step: int, temporary: Path, exc: BaseException) -> CheckpointError:
        """Clears away the torn checkpoint and says in a sentence what happened and what is left."""
        self._writer = None
        if self._primary:
            shutil.rmtree(temporary, ignore_errors=True)
        good = next((step for step in reversed(self.steps()) if self._readable(step)), None)
        left = f"the last good checkpoint is step {good}" if good is not None else "there is no earlier checkpoint"
        what, remedy = reason(exc)
        return CheckpointError(f"checkpoint {step} could not be written to {self.directory}: {what}; {left}; {remedy}")

    # ---- reading ------------------------------------------------------------
    def path(self, step: int) -> Path:
        """Directory of the checkpoint of `step`."""
        return self.directory / str(step)

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, ascending; nothing is verified."""
        try:
            names = os.listdir(self.directory)
        except OSError:
            return []
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]*", name))

    def latest_good(self, report: Callable[[str], None] | None = None) -> int | None:
        """Step of the newest checkpoint whose every byte is as it was written; None where there is none.

        Clears away what killed processes left half-written, unless another process is saving there now.

        Args:
            report: told in a sentence about each newer checkpoint that is damaged.
        """
        step = self._latest_good(report or (lambda sentence: None)) if self._primary else None
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            step = int(multihost_utils.broadcast_one_to_all(np.int32(-1 if step is None else step)))
        return None if step is None or step < 0 else step

    def _latest_good(self, report: Callable[[str], None]) -> int | None:
        self._sweep()
        for step in reversed(self.steps()):
            try:
                manifest.verify(self.path(step))
            except manifest.DamageError as exc:
                if self.path(step).exists():  # else its run pruned it just now
                    self._bad.add(step)
                    report(f"checkpoint {step} in {self.directory} is damaged and is passed over: {exc}")
                continue
            self._verified.add(step)
            return step
        return None

    def best(self) -> int | None:
        """Step of the checkpoint with the lowest validation loss; None where none has one."""
        losses = {step: self._manifest(step)["validation_loss"] for step in self.steps() if self._readable(step)}
        known = {step: loss for step, loss in losses.items() if loss is not None}
        return min(known, key=lambda step: (known[step], -step)) if known else None

    def meta(self, step: int) -> dict[str, Any]:
        """The `meta` that was handed over with the checkpoint of `step`."""
        return self._manifest(step)["meta"]

    def leaves(self, step: int) -> dict[str, jax.ShapeDtypeStruct]:
        """Path -> shape and dtype of every array of the checkpoint of `step`."""
        stored = self._manifest(step)["leaves"]
        return {path: jax.ShapeDtypeStruct(leaf["shape"], leaf["dtype"]) for path, leaf in stored.items()}

    def restore(self, step: int, abstract_state: Any, *, part: bool = False) -> Any:
        """The state of `step`, laid out as `abstract_state` says, whatever mesh it was saved from.

        Args:
            step: one of `steps()`.
            abstract_state: tree of jax.ShapeDtypeStruct; without a sharding, an array comes to the first device.
            part: let the checkpoint hold more than is asked for, and read only what is.

        Raises:
            CheckpointError: damaged, or its arrays have other names, shapes or dtypes.
        """
        import orbax.checkpoint as ocp

        if self._primary and step not in self._verified:
            self._manifest(step, verify=True)
            self._verified.add(step)
        wanted = flatten(abstract_state, arrays=False)
        self._check_fit(step, wanted, part)
        default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        stored = filled(wanted)
        arguments = {
            path: ocp.ArrayRestoreArgs(sharding=leaf.sharding or default, global_shape=leaf.shape, dtype=leaf.dtype)
            for path, leaf in stored.items()
        }
        request = ocp.args.PyTreeRestore(  # pyright: ignore[reportCallIssue]
            item=nest(stored), restore_args=nest(arguments), partial_restore=part
        )
        try:
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as reader:
                tree = reader.restore(self.path(step) / "state", args=request)
        except (OSError, ValueError, KeyError) as exc:
            raise CheckpointError(f"checkpoint {step} in {self.directory} could not be read: {reason(exc)[0]}") from exc
        found = {path: empty(leaf, default) for path, leaf in wanted.items() if path not in stored} | flatten(tree)
        return jax.tree.unflatten(jax.tree.structure(abstract_state), [found[path] for path in wanted])

    def _check_fit(self, step: int, wanted: Mapping[tuple[str, ...], Any], part: bool) -> None:
        stored = self._manifest(step)["leaves"]
        asked = {"/".join(path): describe(leaf) for path, leaf in wanted.items()}
        differences = [
            f"{path} is {words(stored.get(path))} there and {words(asked.get(path))} here"
            for path in sorted(asked if part else asked.keys() | stored.keys())
            if stored.get(path) != asked.get(path)
        ]
        if differences:
            more = "; ..." if len(differences) > 3 else ""
            raise CheckpointError(
                f"checkpoint {step} in {self.directory} is of another architecture or optimizer: {len(differences)} "
                f"arrays differ (it has {len(stored)}, this run asks for {len(asked)}): "
                f"{'; '.join(differences[:3])}{more}"
            )

    def _manifest(self, step: int, *, verify: bool = False) -> dict[str, Any]:
        try:
            return (manifest.verify if verify else manifest.read)(self.path(step))
        except manifest.DamageError as exc:
            raise CheckpointError(f"checkpoint {step} in {self.directory} is damaged: {exc}") from exc

    def _readable(self, step: int) -> bool:
        try:
            manifest.read(self.path(step))
        except manifest.DamageError:
            return False
        return step not in self._bad

    # ---- the directory ------------------------------------------------------
    def _beside(self, step: int, kind: str) -> Path:
        return self.directory / f".{kind}-{step}"

    def _remove(self, path: Path) -> None:
        """Removes a checkpoint so that a kill half-way leaves no torn one under its step."""
        gone = self._beside(int(path.name), "tmp-gone")
        shutil.rmtree(gone, ignore_errors=True)
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def _take(self) -> None:
        """Takes the directory for this object alone; `close`, or the end of the process, lets it go."""
        if self._lock is None:
            self._lock = Lock.wait_for(self.directory / ".lock", LOCK_SECONDS)
        if self._lock is None:
            raise CheckpointError(
                f"another process is saving checkpoints into {self.directory}; stop it, or name another directory"
            )

    def _sweep(self) -> None:
        """Clears away what killed processes left, unless somebody is at work there."""
        if self._thread is not None:
            return
        try:
            lock = self._lock or Lock.try_for(self.directory / ".lock")
        except OSError:  # nothing there, or read-only
            return
        if lock is None:
            return
        try:
            for path in self.directory.glob(".old-*"):
                final = self.path(int(path.name.removeprefix(".old-")))
                if not final.exists():  # killed between the two renames of a replacement
                    path.rename(final)
                else:
                    shutil.rmtree(path, ignore_errors=True)
            for path in self.directory.glob(".tmp-*"):
                shutil.rmtree(path, ignore_errors=True)
        finally:
            if lock is not self._lock:
                lock.release()


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _barrier(key: str) -> None:
    """Waits until every process of the run is here; safe beside the training step, for it uses no device."""
    if jax.process_count() > 1:
        from orbax.checkpoint import multihost

        multihost.get_barrier_sync_fn()(key=key, timeout_ms=WRITE_SECONDS * 1000)
