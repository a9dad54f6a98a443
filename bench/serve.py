"""`python -m bench.serve`: what serving costs and gains, as ratios that are taken within one run.

Each measurement is of two sides that take turns, in one process where that can be and otherwise in processes one
right after the other, so that what else goes on in the machine hurts both. A ratio is that of two neighbours; shown
are the medians of all turns, with the range of their middle four fifths. `--quick` is for a look: minutes, and little
to rely on.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from bench import table
from bench.__main__ import say, words
from bench.processes import MeasurementError, run_hugging_face, run_job, run_ours
from bench.shapes import SHAPES
from bench.timing import NOISY, median, spread
from errors import UserError
from sharding.runtime import with_huge_pages
from terminal import human_bytes, write_json

WHAT = ("scheduling", "arrivals", "prefix", "start", "http", "int8")
GAPS = {"toy": 0.01, "T": 0.03, "S": 0.2}
"""Seconds between two requests that come at random, on average: about what half of the engine's rate can do."""
COMING, PROMPT, REPLY = 16, 64, 64
"""Requests that come at random, and their tokens."""
FIRST_TOKEN = 4
SEED = 0


@dataclass
class Row:
    """One comparison: figures of both sides, turn by turn. less: whether less is better."""

    what: str
    shape: str
    unit: str
    ours: list[float]
    beside: str = ""
    theirs: list[float] = field(default_factory=list)
    less: bool = False
    other_cpu: float | None = None

    @property
    def ratios(self) -> list[float]:
        """How many times better ours is, in each turn."""
        pairs = zip(self.ours, self.theirs, strict=False)
        return [theirs / ours if self.less else ours / theirs for ours, theirs in pairs]


class Bench:
    """One run: options, a folder for model files and compiled programs, and the rows so far."""

    def __init__(self, options: argparse.Namespace, folder: str):
        self.options, self.folder = options, folder
        self.cache = f"{folder}/cache"
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.versions: dict[str, str] = {}
        self.machine: dict[str, Any] = {}
        if not options.peer_python:
            self.notes.append("transformers: no interpreter was given (--peer-python or QMAX_PEER_PYTHON)")

    def run(self) -> None:
        """All that was asked for; the report is written after each."""
        say("limits of the machine")
        self.machine = run_ours({"what": "limits"}, self.cache)
        for shape in self.options.shape:
            for what in self.options.what:
                say(f"{what}, {shape}")
                getattr(self, what)(shape)
                self.write()

    # ---- measurements -------------------------------------------------------
    def ours(self, job: str, **more: Any) -> dict[str, Any]:
        """One job of `bench.serving`, in a process of its own."""
        return run_ours({"what": "serving", "job": {"what": job, **more}}, self.cache)

    def rounds(self, job: str, **more: Any) -> tuple[dict[str, list[float]], float | None]:
        """The samples of all rounds, and the noisiest round's share of other processes."""
        found = [self.ours(job, repeats=self.options.repeats, **more) for _ in range(self.options.rounds)]
        samples = {name: [x for one in found for x in one["samples"][name]] for name in found[0]["samples"]}
        return samples, table.other_cpu(found)

    def scheduling(self, shape: str) -> None:
        """The engine beside its own compiled steps without it; the host's time for a step."""
        rows = self.options.rows
        found, noise = self.rounds("scheduling", shape=shape, tokens=self.options.tokens, rows=rows)
        for count in rows:
            ours, bare = found[f"engine {count}"], found[f"bare {count}"]
            self.add(f"decode {count}", shape, "tokens/s", ours, "its steps alone", bare, other_cpu=noise)
        host = [seconds * 1e3 for seconds in found["host"]]
        self.add(f"scheduler, a step of {max(rows)}", shape, "ms of the host", host, less=True, other_cpu=noise)

    def arrivals(self, shape: str) -> None:
        """Requests at random times, beside batches of transformers."""
        rng = np.random.default_rng(SEED)
        prompts = rng.integers(FIRST_TOKEN, SHAPES[shape].model.vocab_size, (COMING, PROMPT)).tolist()
        times = np.cumsum(rng.exponential(GAPS[shape], COMING)).tolist()
        new = min(REPLY, self.options.tokens)
        job = {"model": self.model(shape), "prompts": prompts, "times": times, "new": new}
        job["repeats"] = self.options.repeats
        ours, theirs = [], []
        for _ in range(self.options.rounds):
            ours.append(self.ours("arrivals", **job))
            if self.options.peer_python:
                theirs += self.peer({"what": "arrivals", "experts": "grouped_mm", **job})
        for what, unit, less in (("rate", "completed tokens/s", False), ("latency", "s on average", True)):
            own = [x for one in ours for x in one["samples"][what]]
            name, peer = self.best_policy(what, theirs, less)
            label = f"{COMING} at random times"
            self.add(label, shape, unit, own, name, peer, less=less, other_cpu=table.other_cpu([*ours, *theirs]))
        if theirs:
            pairs = zip(ours[0]["replies"], theirs[0]["replies"], strict=True)
            same = sum(a == b for a, b in pairs)
            self.notes.append(f"{same} of {COMING} replies of shape {shape} are the same as those of transformers")

    def best_policy(self, what: str, found: Sequence[dict[str, Any]], less: bool) -> tuple[str, list[float]]:
        """The better of the peer's ways to make batches, in this figure."""
        if not found:
            return "", []
        names = [name for name in found[0]["samples"] if name.startswith(what)]
        all_of = {name: [x for one in found for x in one["samples"][name]] for name in names}
        best = (min if less else max)(names, key=lambda name: median(all_of[name]))
        return f"transformers, a batch of {best.partition(', ')[2]}", all_of[best]

    def prefix(self, shape: str) -> None:
        """The first token of a prompt whose beginning was read before, beside that of the first such prompt."""
        for linear in (False, True):
            if linear and shape == "S":
                continue  # a small hybrid says it
            found, noise = self.rounds("prefix", shape=shape, shared=self.options.shared, linear=linear)
            label = f"first token, {self.options.shared:,} tokens shared" + (", Gated DeltaNet" if linear else "")
            second, first = ([seconds * 1e3 for seconds in found[side]] for side in ("second", "first"))
            self.add(label, shape, "ms", second, "read for the first time", first, less=True, other_cpu=noise)

    def start(self, shape: str) -> None:
        """A fresh process to its first token; the compiled programs are in the cache."""
        command = [sys.executable, "-m", "bench.first_token", self.model(shape)]
        environment = {"JAX_COMPILATION_CACHE_DIR": self.cache, "GLIBC_TUNABLES": with_huge_pages()}
        ours, theirs = [], []
        for turn in range(self.options.rounds * self.options.repeats + 1):
            one = run_job([*command, repr(time.monotonic()), "128"], {}, environment)
            if turn:  # the first compiles
                ours.append(one["samples"])
                if self.options.peer_python:
                    began = time.monotonic()
                    theirs += self.peer({"what": "start", "model": self.model(shape), "began": began, "prompt": 128})
        peer = [sum(part[0] for part in one["samples"].values()) for one in theirs]
        own = [sum(part[0] for part in one.values()) for one in ours]
        self.add("first token of a new process", shape, "s", own, "transformers" if peer else "", peer, less=True)
        for part in ours[0]:
            taken = [one[part][0] for one in ours]
            other = [one["samples"][part][0] for one in theirs if part in one["samples"]]
            self.add(f"- {part}", shape, "s", taken, "transformers" if other else "", other, less=True)

    def http(self, shape: str) -> None:
        """`qmax serve` beside its engine; what its process needs of the processor for a step."""
        rows = max(self.options.rows)
        job = {"model": self.model(shape), "tokens": self.options.tokens, "rows": rows, "prompt": PROMPT}
        found, _ = self.rounds("http", **job)
        self.add(f"{rows} streams", shape, "tokens/s", found["http"], "the engine alone", found["engine"])
        host = [seconds * 1e3 for seconds in found["server"]]
        self.add(f"scheduler and HTTP, a step of {rows}", shape, "ms of the host", host, less=True)

    def int8(self, shape: str) -> None:
        """Weights in 8 bits beside float32."""
        found, noise = self.rounds("int8", shape=shape, tokens=self.options.tokens)
        sizes = found["int8 bytes"][:1], found["same bytes"][:1]
        self.add("int8 weights", shape, "bytes", sizes[0], "float32", sizes[1], less=True)
        for count in (1, 16):
            sides = found[f"int8 {count}"], found[f"same {count}"]
            self.add(f"int8, decode {count}", shape, "tokens/s", sides[0], "float32", sides[1], other_cpu=noise)

    def peer(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        """A measurement of transformers; none where it fails, and it is said why."""
        try:
            found = run_hugging_face(self.options.peer_python, job)
        except MeasurementError as exc:
            self.notes.append(f"transformers, {job['what']}: {exc}")
            return []
        self.versions |= found["versions"]
        return [found]

    def model(self, shape: str) -> str:
        """The directory of a model of this shape, made when first asked for."""
        folder = Path(self.folder) / shape
        if not folder.exists():
            self.ours("write", shape=shape, folder=str(folder))
        return str(folder)

    # ---- report -------------------------------------------------------------
    def add(self, *args: Any, **more: Any) -> None:
        """A row, see there."""
        row = Row(*args, **more)
        self.rows.append(row)
        say("    " + " | ".join(cells(row)))

    def write(self) -> None:
        """Writes the files that were asked for."""
        if self.options.json:
            rows = [{**asdict(row), "ratios": row.ratios} for row in self.rows]
            machine = table.describe(self.machine, self.versions)
            write_json(self.options.json, {"machine": machine, "rows": rows, "notes": self.notes})


def cells(row: Row) -> list[str]:
    """A line of the table."""

    def shown(values: Sequence[float]) -> str:
        if not values:
            return ""
        if row.unit == "bytes":
            return human_bytes(int(values[0]))
        return table.cell([{"rates": values}])

    loud = "~ " if row.other_cpu is not None and row.other_cpu > NOISY else ""
    ratio = f"{median(row.ratios):.2f} ({spread(row.ratios):.0%})" if row.ratios else ""
    return [loud + row.what, row.shape, row.unit, shown(row.ours), row.beside, shown(row.theirs), ratio]


HEADER = ("what", "shape", "unit", "ours", "beside", "theirs", "times better")

NOTE = f"""Medians of all turns, in brackets the range of their middle four fifths as a share of the median. *times
better*: the median of the ratios of neighbours; below 1 ours is worse. `~`: other processes used more than {NOISY} of a
core meanwhile, which counts for little."""


def page(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """The report as Markdown."""
    lines = ["# Serving", NOTE, table.markdown(HEADER, [cells(row) for row in rows])]
    return "\n\n".join([*lines, *(["\n".join(f"- {note}" for note in notes)] if notes else [])]) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__, allow_abbrev=False)
    parser.add_argument("--shape", help=f"of {', '.join(SHAPES)}; default T,S, with --quick T")
    parser.add_argument("--what", default=",".join(WHAT), help=f"of {', '.join(WHAT)}; default all")
    parser.add_argument("--quick", action="store_true", help="one round on T with short replies")
    parser.add_argument("--rounds", type=int, help="processes of each measurement (default 3, with --quick 1)")
    parser.add_argument("--repeats", type=int, help="turns in each of them (default 3, with --quick 2)")
    parser.add_argument(
        "--peer-python",
        default=os.environ.get("QMAX_PEER_PYTHON", ""),
        help="interpreter with torch and transformers (default: QMAX_PEER_PYTHON; without one, no peer)",
    )
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    parser.add_argument("--markdown", metavar="FILE", help="write the report")
    options = parser.parse_args(argv)
    quick = options.quick
    options.shape = words(options.shape or ("T" if quick else "T,S"), tuple(SHAPES), "--shape")
    options.what = words(options.what, WHAT, "--what")
    options.rounds = (1 if quick else 3) if options.rounds is None else options.rounds
    options.repeats = (2 if quick else 3) if options.repeats is None else options.repeats
    options.tokens, options.rows, options.shared = (32, (1, 32), 1024) if quick else (64, (1, 16, 32), 1024)
    if options.rounds < 1 or options.repeats < 1:
        raise UserError("--rounds and --repeats must be at least 1")
    return options


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the report, and returns the exit code."""
    try:
        options = parse(argv)
        with TemporaryDirectory(prefix="qmax-bench-") as folder:
            bench = Bench(options, folder)
            bench.run()
            report = page(bench.rows, bench.notes)
            print(report)
            if options.markdown:
                Path(options.markdown).write_text(report, encoding="utf-8")
        return 0
    except UserError as exc:
        print(f"bench: {exc}", file=sys.stderr)
        return 2
    except MeasurementError as exc:
        print(f"bench: our own measurement failed: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
