"""`python -m bench.rl`: a step of reinforcement learning beside what its parts cost alone, in one process.

Drawing is compared with the engine that is given the same prompts and nothing else; the update with a step of plain
training on the very same rows; the hand-over of weights with the whole step. The sides take turns.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import numpy as np

from bench.shapes import SHAPES
from bench.table import markdown
from bench.timing import median
from configs.alignment import RLConfig
from configs.run import DataConfig, Run
from serve.sampling_params import SamplingParams
from sharding.runtime import configure_jax
from terminal import write_json
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


def make_job(name: str, replay: bool, out: Path) -> Job:
    """A run of 16 prompts and 8 replies of up to 64 tokens to each, on a model that nobody trained."""
    words = np.random.default_rng(0).choice(["cat", "dog", "sat", "mat", "the", "sun"], (256, PROMPT_WORDS))
    rows = [{"prompt": " ".join(row), "answer": " ".join(row[::-1])} for row in words]
    task = out / "words.jsonl"
    task.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(
        model=SHAPES[name].model,
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
    found |= {"step": whole, "alone": alone, "sft": sft, "prompt": float(np.mean([len(p) for p in prompts]))}
    found["draws"] = drawn / found["rollout"]
    found["rollout ratio"] = found["draws"] / (sum(len(reply.tokens) for reply in replies) / alone)
    found["update ratio"] = sft / found["update"]
    found["handover share"] = found["handover"] / whole
    return state, found


def main() -> None:
    """Measures, prints a table, and writes what was found."""
    parser = argparse.ArgumentParser(prog="python -m bench.rl", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="T")
    parser.add_argument("--turns", type=int, default=7, help="after one that is not counted (default: %(default)s)")
    parser.add_argument("--replay", action="store_true", help="record experts and replay them")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all turns there")
    args = parser.parse_args()
    configure_jax()
    with TemporaryDirectory(prefix="qmax-bench-") as directory:
        job = make_job(args.shape, args.replay, Path(directory))
        with jax.set_mesh(job.mesh):
            state = job.start()
            learner, plain = Learner(job, state), Plain(job)
            found: list[dict[str, float]] = []
            for number in range(1, args.turns + 2):
                state, one = turn(learner, plain, state, number)
                found += [one] if number > 1 else []
        job.checkpoints.close()
    middle = {name: median([one[name] for one in found]) for name in found[0]}
    marks = {"rollout ratio": "at least 0.8", "update ratio": "at least 0.8", "handover share": "under 0.05"}
    rows = [[name, f"{value:.4g}", marks.get(name, "")] for name, value in middle.items()]
    print(markdown(["median", args.shape, "mark"], rows))
    if args.json:
        write_json(args.json, found)


if __name__ == "__main__":
    main()
