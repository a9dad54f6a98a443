"""What serving costs, jobs of `bench.ours`: scheduling, requests at random times, shared beginnings, 8-bit weights.

A job gives `samples`: for each name what one side took, one figure a turn; the sides of a job take turns. Parts of a
run that are not compared, such as the reading of prompts before a decoding, are not timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bench.ours import FIRST_TOKEN, Result, Words
from bench.shapes import SHAPES, Shape
from model.config import LinearAttentionConfig, ModelConfig
from model.hf.writing import write_checkpoint
from model.load import open_model, read_model
from model.quantization import WeightType
from model.tokenizer import Tokenizer
from model.tokenizer_export import hugging_face_files
from model.transformer import Transformer
from model.tree import Skeleton
from serve.engine import Engine
from serve.programs import Shape as Program
from serve.request import Request
from serve.rows import ROW
from serve.sampling_params import SamplingParams
from sharding.mesh import MeshConfig, make_mesh

TOKENIZER = Path(__file__).resolve().parent.parent / "configs" / "demo_data" / "tiny_tokenizer"

PROMPT = 64
"""Tokens of a prompt, where the reply is what is timed."""

NEAR = 16
"""Tokens at the end of a prompt that are its own, where the ones before are shared."""

ROWS = (1, 16, 32)
"""Requests at the same time."""

COUNT = list(ROW.names or ()).index("count")
"""Which word of a row says how many tokens it reads; 0 for nobody's row."""


def hybrid(shape: Shape) -> ModelConfig:
    """The model of `shape` with Gated DeltaNet in all layers but every fourth, or every second of two."""
    model = shape.model
    heads, head = model.num_heads, model.head_dim
    linear = LinearAttentionConfig(num_key_heads=heads, num_value_heads=heads, key_dim=head, value_dim=head)
    layers = max(2, model.num_layers)
    pattern = ("linear", "linear", "linear", "full") if layers % 4 == 0 else ("linear", "full")
    return replace(model, num_layers=layers, attention_pattern=pattern, linear=linear, norm="zero_centred")


def random_model(config: ModelConfig) -> Transformer:
    """Seeded weights."""
    return jax.jit(lambda key: Transformer(config, key))(jax.random.key(0))


def write(shape: Shape, folder: str) -> Result:
    """Writes a model directory that we and transformers load, with seeded weights and the small tokenizer."""
    model = jax.jit(lambda key: Transformer(shape.model, key, stacked=False))(jax.random.key(0))
    skeleton = Skeleton(model)
    weights, state = skeleton.split(model)
    files = hugging_face_files(Tokenizer.load(TOKENIZER))
    write_checkpoint(Path(folder), shape.model, skeleton.shapes, {**weights, **state}, files, dtype="float32")
    return {"bytes": sum(array.nbytes for array in weights.values())}


# ---- decoding ---------------------------------------------------------------
class Decoding:
    """Replies that are decoded together, timed from when all prompts are read; the engine's steps are kept."""

    def __init__(self, engine: Engine, vocab: int, rows: int):
        self.engine = engine
        self.steps: list[tuple[Program, tuple[np.ndarray, ...]]] = []
        self._step = engine.device.step
        self.prompts = np.random.default_rng(0).integers(FIRST_TOKEN, vocab, (rows, PROMPT)).tolist()

    def start(self, tokens: int) -> list[Request]:
        """All prompts are read and the device is idle."""
        # Drawn at random: with the most likely tokens a random model's rows soon all say the same.
        sampling = SamplingParams(max_tokens=tokens, stop_ids=(), seed=0).variants(len(self.prompts))
        requests = [self.engine.request(*one) for one in zip(self.prompts, sampling, strict=True)]
        for request in requests:
            self.engine.submit(request)
        while not all(request.tokens for request in requests):
            self.engine.step()
        jax.block_until_ready(self.engine.device.state)
        return requests

    def run(self, tokens: int) -> float:
        """Seconds of the engine's steps to the end of all replies."""
        requests = self.start(tokens)
        self.steps.clear()
        self.engine.device.step = self._keep  # type: ignore[method-assign]
        start = time.perf_counter()
        self._finish(requests)
        seconds = time.perf_counter() - start
        self.engine.device.step = self._step  # type: ignore[method-assign]
        return seconds

    def _finish(self, requests: Sequence[Request]) -> None:
        while any(request.finish_reason is None for request in requests):
            self.engine.step()

    def _keep(self, shape: Program, *arrays: np.ndarray) -> Any:
        self.steps.append((shape, arrays))
        return self._step(shape, *arrays)

    @property
    def drawn(self) -> int:
        """Tokens that the steps of the last run drew."""
        return sum(int((words[:, COUNT] > 0).sum()) for _, (words, *_) in self.steps)

    def again(self) -> float:
        """Seconds of the same programs with the same rows, one after the other."""
        jax.block_until_ready(self.engine.device.state)
        before = None
        start = time.perf_counter()
        for shape, arrays in self.steps:
            output = self._step(shape, *arrays)
            if before is not None:
                jax.block_until_ready(before)
            before = output
        jax.block_until_ready(before)
        return time.perf_counter() - start

    def host(self, tokens: int) -> float:
        """Seconds of processor time that the engine's thread needs for a step, where the device takes none."""
        requests, steps = self.start(tokens), 0
        ready = {shape: (Ready(self._step(shape, *arrays)[0]), None) for shape, arrays in self.steps}

        def nothing(shape: Program, *arrays: np.ndarray) -> Any:
            nonlocal steps
            steps += 1
            return ready[shape]

        self.engine.device.step = nothing  # type: ignore[method-assign]
        start = time.thread_time()
        self._finish(requests)
        seconds = time.thread_time() - start
        self.engine.device.step = self._step  # type: ignore[method-assign]
        return seconds / steps


class Ready:
    """A step's output that is there already."""

    def __init__(self, output: Any):
        self._words = np.asarray(output)

    def copy_to_host_async(self) -> None:
        """It is there."""

    def __array__(self, *args: Any, **more: Any) -> np.ndarray:
        return self._words.copy()


def scheduling(shape: Shape, repeats: int, tokens: int, rows: Sequence[int] = ROWS) -> Result:
    """Tokens per second of the engine, and of its own programs called back to back; host time at the most rows."""
    vocab = shape.model.vocab_size
    engine = Engine(random_model(shape.model), Words(vocab), slots=max(rows))
    samples: dict[str, list[float]] = {}
    spans = []
    for count in rows:
        decoding = Decoding(engine, vocab, count)
        decoding.run(min(tokens, 8))
        begin = time.monotonic()
        for _ in range(repeats):
            seconds = decoding.run(tokens)
            samples.setdefault(f"engine {count}", []).append(decoding.drawn / seconds)
            samples.setdefault(f"bare {count}", []).append(decoding.drawn / decoding.again())
        spans.append((begin, time.monotonic()))
        if count == max(rows):
            samples["host"] = [decoding.host(tokens) for _ in range(repeats)]
    return {"samples": samples, "spans": spans}


def int8(shape: Shape, repeats: int, tokens: int, rows: Sequence[int] = (1, 16)) -> Result:
    """Bytes and tokens per second of the engine with weights in 8 bits, and in float32."""
    vocab, model = shape.model.vocab_size, random_model(shape.model)
    types: tuple[WeightType, ...] = ("int8", "same")
    engines = {name: Engine(model, Words(vocab), slots=max(rows), weight_type=name) for name in types}
    samples: dict[str, list[float]] = {
        f"{name} bytes": [float(sum(leaf.nbytes for leaf in one.device.leaves))] for name, one in engines.items()
    }
    spans = []
    for count in rows:
        runs = {name: Decoding(engine, vocab, count) for name, engine in engines.items()}
        for one in runs.values():
            one.run(min(tokens, 8))
        begin = time.monotonic()
        for _ in range(repeats):
            for name, one in runs.items():
                seconds = one.run(tokens)
                samples.setdefault(f"{name} {count}", []).append(one.drawn / seconds)
        spans.append((begin, time.monotonic()))
    return {"samples": samples, "spans": spans}


# ---- requests at random times -----------------------------------------------
def arrivals(model: str, prompts: list[list[int]], times: list[float], new: int, repeats: int) -> Result:
    """Completed tokens per second and mean latency of greedy replies to requests that come at these times."""
    weights = read_model(open_model(model), make_mesh(MeshConfig()))
    engine = Engine(weights, Words(weights.config.vocab_size), slots=len(prompts))
    engine.warm_up()
    sampling = SamplingParams(temperature=0.0, max_tokens=new, stop_ids=())
    samples: dict[str, list[float]] = {"rate": [], "latency": []}
    begin, replies = time.monotonic(), []
    for turn in range(repeats + 1):
        engine.forget()
        seconds, latency, replies = _serve(engine, prompts, times, sampling)
        if turn:
            samples["rate"].append(len(prompts) * new / seconds)
            samples["latency"].append(latency)
        else:
            begin = time.monotonic()
    return {"samples": samples, "replies": replies, "spans": [(begin, time.monotonic())]}


def _serve(
    engine: Engine, prompts: list[list[int]], times: list[float], sampling: SamplingParams
) -> tuple[float, float, list[list[int]]]:
    """Seconds from the first request to the end of the last, the mean of each one's own, and the replies."""
    start, ended = time.perf_counter(), [0.0] * len(prompts)

    def note(index: int) -> Callable[[Request, int, float], None]:
        def on_token(request: Request, _: int, __: float) -> None:
            if request.finish_reason is not None:
                ended[index] = time.perf_counter() - start

        return on_token

    requests = [engine.request(prompt, sampling, on_token=note(index)) for index, prompt in enumerate(prompts)]
    came = 0
    while not all(ended):
        while came < len(times) and times[came] <= time.perf_counter() - start:
            engine.submit(requests[came])
            came += 1
        if not engine.step() and came < len(times):
            time.sleep(max(0.0, start + times[came] - time.perf_counter()))
    latency = sum(end - time for end, time in zip(ended, times, strict=True)) / len(times)
    return max(ended) - times[0], latency, [request.tokens for request in requests]


# ---- shared beginnings ------------------------------------------------------
def prefix(shape: Shape, repeats: int, shared: int, linear: bool) -> Result:
    """Seconds to the first token of a prompt, and of one that ends otherwise; each turn has a beginning of its own."""
    config = hybrid(shape) if linear else shape.model
    engine = Engine(random_model(config), Words(config.vocab_size), slots=1)
    sampling = SamplingParams(temperature=0.0, max_tokens=1, stop_ids=())
    rng = np.random.default_rng(0)
    samples: dict[str, list[float]] = {"first": [], "second": []}
    begin = time.monotonic()
    for turn in range(repeats + 1):
        beginning = rng.integers(FIRST_TOKEN, config.vocab_size, shared).tolist()
        for side, taken in samples.items():
            prompt = beginning + rng.integers(FIRST_TOKEN, config.vocab_size, NEAR).tolist()
            start = time.perf_counter()
            (reply,) = engine.generate([prompt], sampling)
            seconds = time.perf_counter() - start
            assert reply.cached_tokens == (shared if side == "second" else 0), reply.cached_tokens
            if turn:
                taken.append(seconds)
        if not turn:
            begin = time.monotonic()
    return {"samples": samples, "spans": [(begin, time.monotonic())]}


def measure(job: dict[str, Any]) -> Result:
    """Runs one of these jobs."""
    if job["what"] == "http":
        from bench.serving_http import http

        jobs: dict[str, Callable[..., Result]] = {"http": http}
    else:
        jobs = {"write": write, "scheduling": scheduling, "int8": int8, "arrivals": arrivals, "prefix": prefix}
    job = {**job, "shape": SHAPES[job["shape"]]} if "shape" in job else dict(job)
    return jobs[job.pop("what")](**job)
