"""A step of reinforcement learning beside what its parts cost alone, in one process: `reward`.

Drawing is compared with the engine that is given the same prompts and nothing else; the update with a step of plain
training on the very same rows; the hand-over of weights with the whole step. The sides take turns.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from bench.ours import Result
from bench.shapes import Shape
from configs.alignment import RLConfig
from configs.run import DataConfig, Run
from serve.sampling_params import SamplingParams
from train.losses import next_token
from train.rl.learner import Learner
from train.rl.rows import make_rows
from train.setup import Job, find_start, prepare_job
from train.state import TrainState
from train.step import make_train_step

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "configs" / "demo_data" / "tiny_tokenizer"
PROMPT_WORDS = 12
"""With what the chat template adds, about 64 tokens."""
SECONDS = ("rollout", "scoring", "update", "handover")


def make_job(shape: Shape, replay: bool, out: Path) -> Job:
    """A run of 16 prompts and 8 replies of up to 64 tokens to each, on a model that nobody trained."""
    words = np.random.default_rng(0).choice(["cat", "dog", "sat", "mat", "the", "sun"], (256, PROMPT_WORDS))
    rows = [{"prompt": " ".join(row), "answer": " ".join(row[::-1])} for row in words]
    task = out / "words.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(
        model=shape.model,
        data=DataConfig(tokenizer=str(TOKENIZER), sequence_length=256),
        rl=RLConfig(tasks=(f"jsonl:{task}?grader=chrf",), max_new_tokens=64, slots=128, replay=replay),
        objective="rl",
        steps=1000,
        dtype="float32",
    )
    checkpoints, start = find_start(run, out / "run", resume=False)
    return prepare_job(run, out / "run", checkpoints, start)


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and what it gives."""
    start = time.perf_counter()
    found = function()
    return time.perf_counter() - start, found


class Plain:
    """A step of plain training on the rows of an update, with a state of its own."""

    def __init__(self, job: Job):
        run = replace(job.run, objective="pretrain", data=replace(job.run.data, sources=("none",)))
        step = make_train_step(
            run, job.skeleton, lambda m, rows, sums, before: next_token(m, rows, sums, before, run.loss), job.optimizer
        )
        self._step, self._state = jax.jit(step, donate_argnums=0), job.start()

    def __call__(self, rows: dict[str, jax.Array]) -> None:
        own = {name: rows[name] for name in ("tokens", "targets", "positions", "segments", "weights")}
        self._state, metrics = self._step(self._state, own)
        jax.block_until_ready(metrics)


def turn(learner: Learner, plain: Plain, state: TrainState, number: int) -> tuple[TrainState, dict[str, float]]:
    """One step, and its parts alone."""
    config = learner.config
    prompts = [learner.rollout.encode(one.problem) for one in learner.prompts(number, 0)]
    each = [prompt for prompt in prompts for _ in range(config.samples)]
    sampling = [SamplingParams(seed=index, max_tokens=config.max_new_tokens) for index in range(len(each))]
    alone, replies = timed(lambda: learner.engine.generate(each, sampling))
    learner.engine.forget()
    samples, _ = learner.draw(number)
    learner.engine.forget()
    rows = learner._place(make_rows(samples, [0.0] * len(samples), learner._layout(samples), learner.length, config))
    sft, _ = timed(lambda: plain(rows))
    whole, (state, metrics) = timed(lambda: learner.step(state, number))
    drawn = metrics["reply_tokens"] * len(samples)
    found = {name: metrics[f"seconds_{name}"] for name in SECONDS}
    found |= {"step": whole, "sft": sft}
    found["draws"] = drawn / found["rollout"]
    found["draws alone"] = sum(len(reply.tokens) for reply in replies) / alone
    found["handover share"] = found["handover"] / whole
    return state, found


def reward(shape: Shape, repeats: int, replay: bool) -> Result:
    """`repeats` steps after one that is not counted, each with its parts alone: figures by name."""
    with TemporaryDirectory(prefix="qmax-bench-") as directory:
        job = make_job(shape, replay, Path(directory))
        with jax.set_mesh(job.mesh):
            state = job.start()
            learner, plain = Learner(job, state), Plain(job)
            found: list[dict[str, float]] = []
            for number in range(1, repeats + 2):
                state, one = turn(learner, plain, state, number)
                found += [one] if number > 1 else []
        job.checkpoints.close()
    return {"samples": {name: [one[name] for one in found] for name in found[0]}}
