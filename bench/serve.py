"""What serving and a step of reinforcement learning cost and gain, as ratios that are taken within one run.

Each measurement is of two sides that take turns, in one process where that can be and otherwise in processes one
right after the other, so that what else goes on in the machine hurts both. A ratio is that of two neighbours.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from bench import table
from bench.context import TRANSFORMERS, Bench, say
from bench.processes import run_job
from bench.shapes import SHAPES
from bench.table import Comparison
from bench.timing import median
from sharding.runtime import with_huge_pages

WHAT = ("scheduling", "arrivals", "prefix", "start", "http", "int8", "reward")
GAPS = {"toy": 0.01, "T": 0.03, "S": 0.2}
"""Seconds between two requests that come at random, on average: about what half of the engine's rate can do."""
COMING, PROMPT, REPLY = 16, 64, 64
"""Requests that come at random, and their tokens."""
TOKENS, SHARED, ROWS = 64, 1024, (1, 16, 32)
"""Tokens of a reply; of a beginning that prompts share; requests at the same time."""
MARKS = {
    "decode": "0.95 times",
    "scheduler": "under 1",
    f"{COMING} at random times": "1.5 times",
    f"first token, {SHARED:,}": "5 times",
    "first token of": "under 4",
    "int8 weights": "3.33 times",
    "int8, decode": "0.9 times",
    "reward: hand-over": "under 5",
    "reward": "0.8 times",
}
"""What must be reached, by the beginning of a row."""
FIRST_TOKEN = 4
SEED = 0


class Serving:
    """The measurements of serving and of reward, and their rows so far."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.options = bench, bench.options
        self.rows: list[Comparison] = []

    def jobs(self) -> list[Callable[[], None]]:
        """The measurements that were asked for, in order."""
        found = [what for what in WHAT if what in self.options.what]
        return [partial(self.run, what, shape) for shape in self.options.shape for what in found]

    def run(self, what: str, shape: str) -> None:
        """One of them."""
        say(f"{what}, {shape}")
        getattr(self, what)(shape)

    # ---- measurements -------------------------------------------------------
    def ours(self, job: str, **more: Any) -> dict[str, Any]:
        """One job of `bench.serving`, in a process of its own."""
        return self.bench.ours({"what": "serving", "job": {"what": job, **more}})

    def rounds(self, job: str, **more: Any) -> tuple[dict[str, list[float]], float | None]:
        """The samples of all rounds, and the noisiest round's share of other processes."""
        found = [self.ours(job, repeats=self.options.repeats, **more) for _ in range(self.options.rounds)]
        samples = {name: [x for one in found for x in one["samples"][name]] for name in found[0]["samples"]}
        return samples, table.other_cpu(found)

    def scheduling(self, shape: str) -> None:
        """The engine beside its own compiled steps without it; the host's time for a step."""
        found, noise = self.rounds("scheduling", shape=shape, tokens=TOKENS, rows=ROWS)
        for count in ROWS:
            ours, bare = found[f"engine {count}"], found[f"bare {count}"]
            self.add(f"decode {count}", shape, "tokens/s", ours, "its steps alone", bare, other_cpu=noise)
        host = [seconds * 1e3 for seconds in found["host"]]
        self.add(f"scheduler, a step of {max(ROWS)}", shape, "ms of the host", host, less=True, other_cpu=noise)

    def arrivals(self, shape: str) -> None:
        """Requests at random times, beside batches of transformers."""
        rng = np.random.default_rng(SEED)
        prompts = rng.integers(FIRST_TOKEN, SHAPES[shape].model.vocab_size, (COMING, PROMPT)).tolist()
        times = np.cumsum(rng.exponential(GAPS[shape], COMING)).tolist()
        new = min(REPLY, TOKENS)
        job = {"model": self.bench.model(shape), "prompts": prompts, "times": times, "new": new}
        job["repeats"] = self.options.repeats
        ours, theirs = [], []
        for _ in range(self.options.rounds):
            ours.append(self.ours("arrivals", **job))
            theirs += self.bench.transformers_if_there({"what": "arrivals", "experts": "grouped_mm", **job})
        for what, unit, less in (("rate", "completed tokens/s", False), ("latency", "s on average", True)):
            own = [x for one in ours for x in one["samples"][what]]
            name, peer = self.best_policy(what, theirs, less)
            label = f"{COMING} at random times"
            noise = table.other_cpu([*ours, *theirs])
            self.add(label, shape, unit, own, name, peer, less=less, other_cpu=noise)
        if theirs:
            pairs = zip(ours[0]["replies"], theirs[0]["replies"], strict=True)
            same = sum(a == b for a, b in pairs)
            self.bench.notes.append(f"{same} of {COMING} replies of shape {shape} are those of transformers too")

    def best_policy(self, what: str, found: Sequence[dict[str, Any]], less: bool) -> tuple[str, list[float]]:
        """The better of the peer's ways to make batches, in this figure."""
        if not found:
            return "", []
        names = [name for name in found[0]["samples"] if name.startswith(what)]
        all_of = {name: [x for one in found for x in one["samples"][name]] for name in names}
        best = (min if less else max)(names, key=lambda name: median(all_of[name]))
        return f"{TRANSFORMERS}, a batch of {best.partition(', ')[2]}", all_of[best]

    def prefix(self, shape: str) -> None:
        """The first token of a prompt whose beginning was read before, beside that of the first such prompt."""
        for linear in (False, True):
            if linear and shape == "S":
                continue  # a small hybrid says it
            found, noise = self.rounds("prefix", shape=shape, shared=SHARED, linear=linear)
            label = f"first token, {SHARED:,} tokens shared" + (", Gated DeltaNet" if linear else "")
            second, first = ([seconds * 1e3 for seconds in found[side]] for side in ("second", "first"))
            self.add(label, shape, "ms", second, "read for the first time", first, less=True, other_cpu=noise)

    def start(self, shape: str) -> None:
        """A fresh process to its first token; the compiled programs are in the cache."""
        command = [sys.executable, "-m", "bench.first_token", self.bench.model(shape)]
        environment = {"JAX_COMPILATION_CACHE_DIR": self.bench.cache, "GLIBC_TUNABLES": with_huge_pages()}
        ours, theirs = [], []
        for turn in range(self.options.rounds * self.options.repeats + 1):
            one = run_job([*command, repr(time.monotonic()), "128"], {}, environment)
            if turn:  # the first compiles
                ours.append(one["samples"])
                job = {"what": "start", "model": self.bench.model(shape), "began": time.monotonic(), "prompt": 128}
                theirs += self.bench.transformers_if_there(job)
        peer = [sum(part[0] for part in one["samples"].values()) for one in theirs]
        own = [sum(part[0] for part in one.values()) for one in ours]
        self.add("first token of a new process", shape, "s", own, TRANSFORMERS if peer else "", peer, less=True)
        for part in ours[0]:
            taken = [one[part][0] for one in ours]
            other = [one["samples"][part][0] for one in theirs if part in one["samples"]]
            self.add(f"- {part}", shape, "s", taken, TRANSFORMERS if other else "", other, less=True)

    def http(self, shape: str) -> None:
        """`qmax serve` beside its engine; what its process needs of the processor for a step."""
        rows = max(ROWS)
        job = {"model": self.bench.model(shape), "tokens": TOKENS, "rows": rows, "prompt": PROMPT}
        found, _ = self.rounds("http", **job)
        self.add(f"{rows} streams", shape, "tokens/s", found["http"], "the engine alone", found["engine"])
        added, host = ([seconds * 1e3 for seconds in found[name]] for name in ("added", "server"))
        self.add(f"scheduler and HTTP, added to a step of {rows}", shape, "ms", added, less=True)
        self.add(f"processor of scheduler and HTTP, a step of {rows}", shape, "ms of the host", host, less=True)

    def int8(self, shape: str) -> None:
        """Weights in 8 bits beside float32."""
        found, noise = self.rounds("int8", shape=shape, tokens=TOKENS)
        sizes = found["int8 bytes"][:1], found["same bytes"][:1]
        self.add("int8 weights", shape, "bytes", sizes[0], "float32", sizes[1], less=True)
        for count in (1, 16):
            sides = found[f"int8 {count}"], found[f"same {count}"]
            self.add(f"int8, decode {count}", shape, "tokens/s", sides[0], "float32", sides[1], other_cpu=noise)

    def reward(self, shape: str) -> None:
        """A step of reinforcement learning: drawing, update and the hand-over of weights."""
        job = {"what": "reward", "shape": shape, "repeats": self.options.repeats, "replay": False}
        found = self.bench.ours(job)["samples"]
        self.add("reward: drawing", shape, "tokens/s", found["draws"], "the engine alone", found["draws alone"])
        self.add("reward: update", shape, "s", found["update"], "plain training", found["sft"], less=True)
        share = [100 * one for one in found["handover share"]]
        self.add("reward: hand-over of weights", shape, "% of the step", share, less=True)

    def add(self, *args: Any, **more: Any) -> None:
        """A row, see there."""
        mark = next((mark for start, mark in MARKS.items() if args[0].startswith(start)), "")
        row = Comparison(*args, **more, mark=mark)
        self.rows.append(row)
        say("    " + " | ".join(row.cells))
