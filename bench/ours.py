"""Our side: training step, prefill, decoding and loss, each in a process of its own: `python -m bench.ours JOB`.

JOB is JSON: `what`, `shape`, and what the measurement takes. The last line on stdout is the result, JSON too.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bench.shapes import BYTES, LOSS_TOKENS, LOSS_VOCABULARY, SHAPES, Shape
from bench.timing import Timings, matrix_rate, median, read_bandwidth
from configs.run import DataConfig, Run
from model.transformer import Transformer
from serve.engine import Engine
from serve.sampling_params import SamplingParams
from sharding.mesh import MeshConfig, make_mesh
from sharding.rules import batch_sharding
from sharding.runtime import configure_jax
from train.losses import cross_entropy, next_token
from train.optimizer import make_optimizer
from train.state import TrainState, create_state, make_skeleton
from train.step import Loss, make_train_step

FIRST_TOKEN = 4
"""Smallest id of a synthetic prompt; a real vocabulary has its special tokens below."""

TRAINING = ("train", "parts", "reward")
"""Jobs that are measured in a process set up as one that trains."""

Result = dict[str, Any]


# ---- compilations -----------------------------------------------------------
@cache
def compilations() -> list[str]:
    """Names of the functions that this process has compiled; it grows with each. Counted by jax's own events."""
    names: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            names.append(str(kwargs.get("fun_name", "")))

    jax.monitoring.register_event_duration_secs_listener(listen)
    return names


# ---- training ---------------------------------------------------------------
class Training:
    """State and compiled step of a run, made as `qmax train` makes them; only the batch is made up."""

    def __init__(self, shape: Shape) -> None:
        data = DataConfig(sources=("synthetic",), sequence_length=shape.seq, batch_size=shape.batch)
        self.run = Run(model=shape.model, data=data, steps=1000, dtype="float32")
        self.mesh = make_mesh(self.run.mesh)
        self.skeleton = make_skeleton(self.run)
        self.optimizer = make_optimizer(self.run.optimizer, self.run.steps, self.skeleton)
        self.state = create_state(self.run, self.skeleton, self.optimizer, self.mesh)
        self.batch = jax.device_put(make_rows(shape), batch_sharding(self.mesh))
        self.metrics: dict[str, jax.Array] = {}
        self.step = self.compiled(lambda m, rows, sums, before: next_token(m, rows, sums, before, self.run.loss))

    def compiled(self, loss: Loss) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
        """The train step with another loss; the state that it is given is used up."""
        step = make_train_step(self.run, self.skeleton, loss, self.optimizer)
        layout = jax.tree.map(lambda a: a.sharding, self.state)
        return jax.jit(step, donate_argnums=0, out_shardings=(layout, None))

    def __call__(self) -> float:
        """One step; returns its loss, so that it has ended."""
        with jax.set_mesh(self.mesh):
            self.state, self.metrics = self.step(self.state, self.batch)
        return float(self.metrics["loss"])


def make_rows(shape: Shape, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch of one document per row, of random tokens."""
    size = (shape.batch, shape.seq + 1)
    tokens = np.random.default_rng(seed).integers(FIRST_TOKEN, shape.model.vocab_size, size, dtype=np.int32)
    ones = np.ones((shape.batch, shape.seq), np.int32)
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "weights": ones.astype(np.float32),
        "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
        "segments": ones,
    }


def train(shape: Shape, repeats: int) -> Result:
    """Tokens per second of the compiled training step, its state donated, as the loop calls it."""
    names = compilations()
    training, timings = Training(shape), Timings()
    before = len(names)
    first = training()
    compiled = names[before:]
    training()
    warm = len(names)
    timings.take(training, repeats)
    return result(
        shape.tokens,
        timings,
        step_compilations=compiled.count("jit(step)"),
        compilations_after_warmup=len(names) - warm,
        loss_first=first,
        loss_last=float(training.metrics["loss"]),
        expert_load_max_over_mean=float(training.metrics["expert_load_max_over_mean"]),
    )


# ---- serving ----------------------------------------------------------------
@dataclass(frozen=True)
class Words:
    """As much of a tokenizer as generation asks for."""

    vocab_size: int
    stop_ids: tuple[int, ...] = ()


class Server:
    """An engine with random weights, and prompts for it."""

    def __init__(self, shape: Shape, rows: int, length: int, devices: int = 1) -> None:
        model = jax.jit(lambda key: Transformer(shape.model, key))(jax.random.key(0))
        mesh = make_mesh(MeshConfig(tensor=devices)) if devices > 1 else None
        self.engine = Engine(model, Words(shape.model.vocab_size), mesh=mesh, slots=rows)
        draw = np.random.default_rng(0)
        self.prompts = draw.integers(FIRST_TOKEN, shape.model.vocab_size, (rows, length)).tolist()

    def generate(self, tokens: int) -> None:
        """Greedy replies of exactly `tokens` tokens to all prompts, which are read anew."""
        self.engine.forget()
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, stop_ids=())
        replies = self.engine.generate(self.prompts, sampling)
        assert all(len(reply.tokens) == tokens for reply in replies)


def decode(shape: Shape, repeats: int, rows: int, devices: int = 1) -> Result:
    """Tokens per second of greedy decoding: the time of a whole reply less that of its first token."""
    names = compilations()
    server = Server(shape, rows, shape.prompt, devices)
    for tokens in (shape.new, 1, shape.new):
        server.generate(tokens)
    warm = len(names)
    first, whole = Timings(), Timings()
    first.take(lambda: server.generate(1), repeats)
    whole.take(lambda: server.generate(shape.new), repeats)
    whole.seconds = [seconds - median(first.seconds) for seconds in whole.seconds]
    whole.spans += first.spans
    return result(
        rows * (shape.new - 1),
        whole,
        compilations_after_warmup=len(names) - warm,
        first_token_seconds=median(first.seconds),
    )


def prefill(shape: Shape, repeats: int) -> Result:
    """Prompt tokens per second up to the first token of the reply, sampled and read by the host."""
    names = compilations()
    server = Server(shape, 1, shape.prefill)
    for _ in range(2):
        server.generate(1)
    warm = len(names)
    timings = Timings()
    timings.take(lambda: server.generate(1), repeats)
    return result(shape.prefill, timings, compilations_after_warmup=len(names) - warm)


# ---- loss -------------------------------------------------------------------
def loss_at_once(hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array) -> jax.Array:
    """Cross-entropy with all logits in memory: what the chunked loss is compared with."""
    logits_BTV = hidden_BTD @ head_DV
    picked_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return jnp.sum(jax.nn.logsumexp(logits_BTV, axis=-1) - picked_BT)


def loss(repeats: int, width: int, vocab: int = LOSS_VOCABULARY, tokens: int = LOSS_TOKENS) -> Result:
    """Temporary memory of the loss and its gradients as a share of the logits, and its speed beside that of
    the loss with all logits at once, each timed in turn."""
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (8, tokens // 8, width))
    head = jax.random.normal(keys[1], (width, vocab)) * width**-0.5
    targets = jax.random.randint(keys[2], hidden.shape[:2], 0, vocab)
    weights = jnp.ones(targets.shape)

    def chunked(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return cross_entropy(hidden, head, targets, weights, 0.0)[0]

    def at_once(hidden: jax.Array, head: jax.Array) -> jax.Array:
        return loss_at_once(hidden, head, targets)

    sides = [jax.jit(jax.value_and_grad(f, (0, 1))).lower(hidden, head).compile() for f in (chunked, at_once)]
    memory = [int(getattr(side.memory_analysis(), "temp_size_in_bytes", 0)) for side in sides]
    seconds: list[list[float]] = [[], []]
    begin = time.monotonic()
    for turn in range(repeats + 1):
        for side, taken in zip(sides, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(side(hidden, head))
            if turn:
                taken.append(time.perf_counter() - start)
    ours = Timings(seconds[0], [(begin, time.monotonic())])
    return result(
        tokens,
        ours,
        width=width,
        temporary_bytes=memory[0],
        temporary_bytes_at_once=memory[1],
        temporary_share=memory[0] / (tokens * vocab * BYTES),
        at_once_rates=[tokens / taken for taken in seconds[1]],
    )


# ---- the process ------------------------------------------------------------
def result(units: float, timings: Timings, **more: Any) -> Result:
    """Rates in units per second, when they were taken, and what else is worth knowing."""
    return {"rates": [units / seconds for seconds in timings.seconds], "spans": timings.spans, **more}


def limits() -> Result:
    """What the machine can do, and what it is."""
    import importlib.metadata as metadata

    device = jax.devices()[0]
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "numpy")}
    return {
        "bandwidth": read_bandwidth(),
        "flops": matrix_rate(),
        "device": f"{device.platform} ({device.device_kind})",
        "versions": versions,
    }


def measure(job: dict[str, Any]) -> Result:
    """Runs one job."""
    job = dict(job)
    what = job.pop("what")
    if "shape" in job and what != "serving":
        job["shape"] = SHAPES[job["shape"]]
    if what == "parts":
        from bench.parts import parts

        return parts(**job)
    if what == "load":
        from bench.files import load

        return load(**job)
    if what in ("delta", "layer"):
        from bench import layers

        return getattr(layers, what)(**job)
    if what == "reward":
        from bench.reward import reward

        return reward(**job)
    if what == "serving":
        from bench import serving

        return serving.measure(job["job"])
    return {"train": train, "decode": decode, "prefill": prefill, "loss": loss, "limits": limits}[what](**job)


def main() -> None:
    """Measures the job in the first argument and prints the result."""
    job = json.loads(sys.argv[1])
    configure_jax(train=job["what"] in TRAINING)
    print(json.dumps(measure(job)), flush=True)


if __name__ == "__main__":
    main()
