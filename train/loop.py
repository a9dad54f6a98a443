"""Load, next batch, step, log, validate, save."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from configs.override import to_dict
from configs.run import PREFERENCES, Run
from errors import UserError
from sharding.rules import batch_share
from train.data.loader import REFERENCE, VALIDATION
from train.device import device_peak_flops, memory_in_use
from train.maintenance import heed_maintenance
from train.metrics import MetricsLog, Throughput
from train.optimizer import schedule
from train.progress import TrainProgress
from train.reference import Reference, score_rows
from train.sampler import Sampler
from train.setup import Job, say
from train.signals import StopRequest, stop_on_signal
from train.state import TrainState, compute_dtype, flatten


@dataclass
class Pending:
    """A step whose metrics are still on the device."""

    step: int
    metrics: dict[str, jax.Array]
    more: dict[str, Any]


class Recorder:
    """Writes each step's record once, a step late, so that the devices never wait for the log."""

    def __init__(self, job: Job, log: MetricsLog | None, bar: TrainProgress | None, clock: Throughput) -> None:
        self.job, self.log, self.bar, self.clock = job, log, bar, clock
        run = job.run
        self.rate = schedule(run.optimizer, run.optimizer_steps, run.optimizer.learning_rate)
        self.updates = run.optimizer_steps // run.steps
        self.flops_per_token = 3 * run.model.flops_per_token(run.data.sequence_length / 2)
        peak = device_peak_flops(job.mesh.devices.flat[0], compute_dtype(run).name)
        self.peak = peak and peak * job.mesh.size
        self.pending: Pending | None = None
        self.first: dict[str, Any] = {}
        self.last: dict[str, Any] = {}

    def push(self, pending: Pending) -> None:
        """Takes a new step; reads and writes the one before."""
        self.flush()
        self.pending = pending

    def begin(self, values: dict[str, float]) -> None:
        """What is known before the first step."""
        if self.log:
            self.log.log(0, values)

    def flush(self) -> None:
        """Writes the step that is still pending. Raises UserError after too many bad steps in a row."""
        pending, self.pending = self.pending, None
        if pending is None:
            return
        values = {name: np.asarray(value) for name, value in jax.device_get(pending.metrics).items()}
        seconds = self.clock.step(int(values["tokens"]))
        rate = self.clock.rate
        record: dict[str, Any] = {name: value.tolist() for name, value in values.items()}
        bad = record.pop("bad_steps")
        record |= {
            "learning_rate": float(np.asarray(self.rate(pending.step * self.updates - 1))),
            "seconds": seconds,
            "tokens_per_second": rate,
            "mfu": rate * self.flops_per_token / self.peak if rate and self.peak else None,
            "memory_bytes": memory_in_use(),
            **pending.more,
        }
        record = {name: value for name, value in record.items() if value is not None}
        self.first = self.first or record
        self.last = record
        if self.log and (pending.step % self.job.run.log_every == 0 or pending.more):
            self.log.log(pending.step, record)
        if self.bar:
            self.bar.update(pending.step, loss=record["loss"], tokens_per_second=rate)
        if bad >= self.job.run.max_bad_steps:
            raise UserError(
                f"{bad} steps in a row had a loss or gradient that is not finite or a spike and were skipped; "
                f"the run stopped at step {pending.step} with its weights as they were before them: lower "
                "optimizer.learning_rate, or look at the data"
            )


def place(
    job: Job, reference: Reference | None, state: TrainState, rows: dict[str, np.ndarray]
) -> dict[str, jax.Array]:
    """A batch with what teacher and reference say of it, where that is not kept beside the rows."""
    batch = job.place(job.teacher.tell(rows) if job.teacher is not None else rows)
    return batch if reference is None else {**batch, "reference": reference(state, batch)}


def validate(job: Job, step: Any, state: TrainState, reference: Reference | None = None) -> dict[str, float]:
    """Mean loss (nats per token) and bits per byte of the held-out text, and of the reference; empty without any."""
    return {
        **held_out_loss(job, step, state, reference, VALIDATION, ""),
        **held_out_loss(job, step, state, reference, REFERENCE, "reference_"),
    }


def held_out_loss(
    job: Job, step: Any, state: TrainState, reference: Reference | None, which: str, prefix: str
) -> dict[str, float]:
    """What one set of held-out rows gives, its bits per byte under a name with `prefix`."""
    count, sums = job.run.validation_batches, dict[str, float]()
    for rows in job.data.validation_batches(count, *batch_share(job.mesh), which):
        batch = place(job, reference, state, rows)
        for name, value in jax.device_get(step(state, batch)).items():
            sums[name] = sums.get(name, 0.0) + float(value)
    weight = sums.pop("weight", 0.0)
    if not weight:
        return {}
    found = {f"{which}_{name}": value / weight for name, value in sums.items()}
    if source_bytes := job.data.validation_bytes(count, which):
        found[f"{prefix}bits_per_byte"] = sums.get("nll", sums["loss"]) / math.log(2) / source_bytes
    return found


def train(job: Job, *, resume: bool) -> dict[str, Any]:
    """Runs `job` to its last step, or until it is asked to stop; returns what the last record says."""
    run, start, first = job.run, job.resume_from, jax.process_index() == 0
    if resume:
        say(
            f"nothing to resume in {job.out}: starting afresh"
            if start is None
            else f"resuming {job.out} at step {start}"
        )
    with jax.set_mesh(job.mesh), stop_on_signal() as stop, heed_maintenance(stop):
        state = job.start() if start is None else job.restore(start)
        clock = Throughput()
        with (
            MetricsLog(job.out, resume_step=start) if first else nullcontext() as log,
            TrainProgress(run.steps, start or 0, run.objective) if first else nullcontext() as bar,
        ):
            recorder = Recorder(job, log, bar, clock)
            try:
                done = steps_of(run)(job, state, start or 0, recorder, stop)
            finally:
                job.data.close()
                job.checkpoints.close()
    if stop.reason:
        saved = "it is saved: go on with --resume" if done else "there is nothing to save yet"
        say(f"stopped by {stop.reason} at step {done} of {run.steps}; {saved}")
    return {"step": done, "first": recorder.first, "last": recorder.last, "stopped": stop.reason}


def steps_of(run: Run) -> Callable[[Job, TrainState, int, Recorder, StopRequest], int]:
    """What makes the steps of a run."""
    if not run.draws:
        return run_steps
    from train.rl import loop

    return loop.run_steps


def run_steps(job: Job, state: TrainState, start: int, recorder: Recorder, stop: StopRequest) -> int:
    """The steps from `start` on; returns the number of steps done."""
    run = job.run
    reference = score_rows(job, state, job.cache)
    if job.teacher is not None:
        job.teacher.prepare(job)
    step_function, validation = job.compiled_step(), job.compiled_validation()
    if not start and run.validate_every and run.objective in PREFERENCES:
        recorder.begin(validate(job, validation, state, reference))
    sampler = Sampler(job) if run.samples else None
    batches = job.data.train_batches(start, *batch_share(job.mesh))
    done, asked = start, stop.agreed(start)
    while done < run.steps and not asked:
        done += 1
        rows = next(batches)
        batch = place(job, reference, state, rows)
        with jax.transfer_guard("disallow"):
            state, metrics = step_function(state, batch)
        recorder.push(Pending(done, metrics, {}))
        last = done == run.steps
        more: dict[str, float] = {}
        if last or (run.validate_every and done % run.validate_every == 0):
            with recorder.clock.pause():
                more = validate(job, validation, state, reference)
                if sampler is not None:
                    sampler.show(state, done)
            assert recorder.pending is not None
            recorder.pending.more |= more
        asked = stop.agreed(done)  # looked at once: who asks after this is heard after the next step
        if last or asked or done % run.checkpoint.every == 0:
            recorder.flush()
            with recorder.clock.pause():
                save(job, state, done, more.get("validation_loss"))
        job.checkpoints.check()
    return done


def save(job: Job, state: TrainState, step: int, validation_loss: float | None) -> None:
    """Starts a checkpoint; the step's record is in the log already."""
    job.checkpoints.save(step, flatten(state), meta={"run": to_dict(job.run)}, validation_loss=validation_loss)
