"""Steps of learning from replies that the model draws, with what any training does besides: log, validate, save."""

from __future__ import annotations

from pathlib import Path

import jax

from train.loop import Pending, Recorder, save
from train.rl.distiller import Distiller
from train.rl.learner import Learner
from train.samples_file import write_samples
from train.setup import Job
from train.signals import StopRequest
from train.state import TrainState


def run_steps(job: Job, state: TrainState, start: int, recorder: Recorder, stop: StopRequest) -> int:
    """The steps from `start` on; returns the number of steps done."""
    run = job.run
    learner = Distiller(job, state) if run.objective == "distill" else Learner(job, state)
    if not start and run.validate_every:
        with recorder.clock.pause():
            validate(learner, state, 0, job.out, recorder)
    done, asked = start, stop.agreed(start)
    while done < run.steps and not asked:
        done += 1
        state, metrics = learner.step(state, done)
        recorder.push(Pending(done, metrics, {}))
        last = done == run.steps
        more: dict[str, float] = {}
        if last or (run.validate_every and done % run.validate_every == 0):
            with recorder.clock.pause():
                more = validate(learner, state, done, job.out, recorder)
        asked = stop.agreed(done)
        if last or asked or done % run.checkpoint.every == 0:
            recorder.flush()
            with recorder.clock.pause():
                # The best checkpoint is the one with the least of this.
                reward = more.get("validation_reward")
                save(job, state, done, more.get("validation_loss", None if reward is None else -reward))
        job.checkpoints.check()
    recorder.flush()
    return done


def validate(learner: Learner, state: TrainState, step: int, out: Path, recorder: Recorder) -> dict[str, float]:
    """Answers held-out problems; writes some of the answers down."""
    found, shown = learner.validate(state)
    if recorder.pending is not None:
        recorder.pending.more |= found
    elif found:
        recorder.begin(found)
    if jax.process_index() == 0:
        write_samples(out, step, shown)
    return found
