"""Training, decoding, reading prompts, single layers and files, beside the peers, by turns, each in its own process."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench import layers, peer_llama, peer_maxtext, table
from bench.context import TRANSFORMERS, Bench, hugging_face_config, say
from bench.processes import MeasurementError, run_llama, run_maxtext
from bench.shapes import SHAPES, Shape

WHAT = ("train", "decode", "prefill", "loss", "experts", "attention", "delta", "load")
ROWS = (1, 16)
"""Rows that are decoded together."""

REQUIRED = {
    ("train", "T"): 1.1,
    ("train", "S"): 1.0,
    ("decode 1", "T"): 3.0,
    ("decode 1", "S"): 1.6,
    ("decode 16", "T"): 1.2,
    ("decode 16", "S"): 1.2,
    ("prefill", "T"): 0.8,
    ("prefill", "S"): 0.8,
}
"""Our rate divided by that of transformers: what must be reached."""

REQUIRED_MAXTEXT = {"MaxText": 3.0}
LOSS_WIDTHS = (256, 512)
EXPERT_PATHS = ("grouped_mm", "eager")
"""How transformers may compute experts; the first is its default, the best of them trains."""

Rounds = list[dict[str, Any]]


class Speed:
    """The measurements of tokens and bytes per second, and what they found so far."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.options = bench, bench.options
        self.measured: list[dict[str, Any]] = []
        self.parts: dict[str, dict[str, Any]] = {}
        self.loss: Rounds = []
        self.layers: Rounds = []
        self.llama = peer_llama.find(self.options.llama_bin)
        if self.llama is None and {"decode", "prefill"}.intersection(self.options.what):
            bench.notes.append(f"llama.cpp: no {' and '.join(peer_llama.PROGRAMS)} (--llama-bin, or in the path)")
        self.maxtext, self.maxtext_base = self.options.maxtext_python, ""
        if self.maxtext and "train" in self.options.what:
            try:
                self.maxtext_base, versions = peer_maxtext.find(self.maxtext)
                bench.versions |= versions
            except (OSError, ValueError, peer_maxtext.subprocess.SubprocessError) as exc:
                bench.notes.append(f"MaxText: {self.maxtext} does not have it ({exc})")
                self.maxtext = ""
        elif "train" in self.options.what:
            bench.notes.append("MaxText: no interpreter was given (--maxtext-python)")

    def jobs(self) -> list[Callable[[], None]]:
        """The measurements that were asked for, in order."""
        wanted, found = self.options.what, list[Callable[[], None]]()
        for name in self.options.shape:
            shape = SHAPES[name]
            if "train" in wanted:
                found += [partial(self.train, shape), partial(self.take_apart, shape)]
            if "decode" in wanted:
                found += [partial(self.decode, shape, rows, n) for n in self.options.devices for rows in ROWS]
            if "prefill" in wanted:
                found.append(partial(self.prefill, shape))
            found += [partial(self.layer, part, shape) for part in ("experts", "attention") if part in wanted]
        found += [partial(self.head, width) for width in LOSS_WIDTHS if "loss" in wanted]
        found += [function for name, function in (("delta", self.delta), ("load", self.load)) if name in wanted]
        return found

    def train(self, shape: Shape) -> None:
        """The training step, beside transformers and MaxText."""
        repeats = self.options.repeats
        paths: list[str] = list(EXPERT_PATHS)

        def hugging_face() -> dict[str, Any]:
            nonlocal paths
            job = {"what": "train", "experts": paths, "batch": shape.batch, "seq": shape.seq}
            found = self.transformers(shape, job)
            paths = [found["experts"]]
            return found

        peers: dict[str, tuple[Callable[[], dict[str, Any]], float | None]] = {}
        if self.options.peer_python:
            peers[TRANSFORMERS] = (hugging_face, REQUIRED.get(("train", shape.name)))
        if self.maxtext:
            for name, capacity in peer_maxtext.PATHS.items():
                call = partial(run_maxtext, self.maxtext, self.maxtext_base, shape, capacity, repeats)
                peers[name] = (call, REQUIRED_MAXTEXT.get(name))
        ours = {"what": "train", "shape": shape.name, "repeats": repeats}
        self.by_turns("train", shape, ours, peers, shape.train_bound(self.bench.bounds))

    def take_apart(self, shape: Shape) -> None:
        """The parts of a training step."""
        say(f"parts of a training step, {shape.name}")
        job = {"what": "parts", "shape": shape.name, "repeats": self.options.repeats}
        self.parts[shape.name] = self.bench.ours(job)

    def decode(self, shape: Shape, rows: int, devices: int) -> None:
        """Greedy decoding, by the generator that `qmax generate` uses."""
        ours = {"what": "decode", "shape": shape.name, "repeats": self.options.repeats, "rows": rows}
        ours["devices"] = devices
        job = {"what": "decode", "experts": EXPERT_PATHS, "rows": rows, "prompt": shape.prompt, "new": shape.new}
        name = f"decode {rows}"
        peers = self.peer(name, shape, job, rows)
        label = name + (f", tensor={devices}" if devices > 1 else "")
        self.by_turns(label, shape, ours, peers, shape.decode_bound(rows, self.bench.bounds), devices)

    def prefill(self, shape: Shape) -> None:
        """Reading a prompt up to the first token."""
        ours = {"what": "prefill", "shape": shape.name, "repeats": self.options.repeats}
        job = {"what": "prefill", "experts": EXPERT_PATHS, "tokens": shape.prefill}
        bound = shape.prefill_bound(self.bench.bounds)
        self.by_turns("prefill", shape, ours, self.peer("prefill", shape, job, 0), bound)

    def head(self, width: int) -> None:
        """The loss at a large vocabulary, beside one that has all logits at once."""
        say(f"loss, width {width}")
        self.loss.append(self.bench.ours({"what": "loss", "repeats": self.options.repeats, "width": width}))

    def layer(self, part: str, shape: Shape) -> None:
        """A layer's experts or attention, forward and backward, beside those of transformers."""
        repeats = self.options.repeats
        job = {"what": "layer", "part": part, "config": hugging_face_config(shape), "experts": EXPERT_PATHS}
        job |= {"batch": shape.batch, "seq": shape.seq, "repeats": repeats}
        ours = {"what": "layer", "part": part, "shape": shape.name, "repeats": repeats}
        self.beside(f"{part} of a layer of {shape.name}", ours, job, None)

    def delta(self) -> None:
        """A Gated DeltaNet layer, forward and backward, beside that of transformers."""
        repeats = self.options.repeats
        job = {"what": "delta", "config": layers.peer_config(), "tokens": layers.TOKENS, "repeats": repeats}
        self.beside(f"Gated DeltaNet, {layers.TOKENS:,} tokens", {"what": "delta", "repeats": repeats}, job, 1.0)

    def beside(self, name: str, job: dict[str, Any], peer: dict[str, Any], required: float | None) -> None:
        """Rounds of a layer of ours and that of transformers, tokens per second."""
        ours: Rounds = []
        theirs: Rounds = []
        for number in range(1, self.options.rounds + 1):
            say(f"{name}, round {number} of {self.options.rounds}")
            ours.append(self.bench.ours(job))
            theirs += self.bench.transformers_if_there(peer)
        self.layers.append(
            {"name": name, "unit": "tokens/s", "scale": 1.0, "ours": ours}
            | {"peer": TRANSFORMERS, "theirs": theirs, "required": required}
        )

    def load(self) -> None:
        """Reading a checkpoint and converting it."""
        say("load")
        found = self.bench.ours({"what": "load", "repeats": self.options.repeats})
        for what, peer, required in (("load", "safetensors to numpy", 1 / 1.5), ("convert", "a copy", None)):
            theirs = [{"rates": found[what]["plain_rates"]}]
            self.layers.append(
                {"name": f"{what} 2 GB, float32", "unit": "GB/s", "scale": 1e9, "ours": [found[what]]}
                | {"peer": peer, "theirs": theirs, "required": required}
            )

    def peer(self, what: str, shape: Shape, job: dict[str, Any], rows: int) -> dict[str, Any]:
        """Transformers and llama.cpp, as far as they are here; `rows` that are decoded, or 0."""
        call = partial(self.transformers, shape, job)
        found: dict[str, Any] = {}
        if self.options.peer_python:
            found[TRANSFORMERS] = (call, REQUIRED.get((what, shape.name)))
        for name in peer_llama.KINDS if self.llama else ():
            found[name] = (partial(self.with_llama, name, shape, rows), None)
        return found

    def with_llama(self, name: str, shape: Shape, rows: int) -> dict[str, Any]:
        """One measurement of llama.cpp, with matrices of one type."""
        assert self.llama is not None
        path = Path(self.bench.folder) / f"{shape.name}-{name.rpartition(' ')[2]}.gguf"
        if not path.exists():
            peer_llama.write(shape, path, name)
        return run_llama(self.llama, path, shape, rows, self.options.repeats)

    def transformers(self, shape: Shape, job: dict[str, Any]) -> dict[str, Any]:
        """One measurement of transformers."""
        return self.bench.transformers({**job, "config": hugging_face_config(shape), "repeats": self.options.repeats})

    def by_turns(
        self,
        what: str,
        shape: Shape,
        job: dict[str, Any],
        peers: dict[str, tuple[Callable[[], dict[str, Any]], float | None]],
        bound: float,
        devices: int = 1,
    ) -> None:
        """Rounds of ours and then each peer. A peer that fails is left out from then on, and it is said why."""
        ours: Rounds = []
        theirs: dict[str, Rounds] = {name: [] for name in peers}
        for number in range(1, self.options.rounds + 1):
            say(f"{what} {shape.name}, round {number} of {self.options.rounds}: ours")
            ours.append(self.bench.ours(job, devices))
            say(f"    {table.cell(ours[-1:])} tokens/s, other CPU {ours[-1].get('other_cpu')}")
            for name in list(peers):
                say(f"{what} {shape.name}, round {number} of {self.options.rounds}: {name}")
                try:
                    theirs[name].append(peers[name][0]())
                    say(f"    {table.cell(theirs[name][-1:])} tokens/s, other CPU {theirs[name][-1].get('other_cpu')}")
                except MeasurementError as exc:
                    say(f"{name} failed: {exc}")
                    self.bench.notes.append(f"{name}, {what} {shape.name}: {exc}")
                    peers.pop(name)
        shown = [{"name": name, "rounds": theirs[name], "required": required} for name, (_, required) in peers.items()]
        self.measured.append({"what": what, "shape": shape.name, "ours": ours, "peers": shown, "bound": bound})

    @property
    def report(self) -> dict[str, Any]:
        """What was found so far."""
        return {"measured": self.measured, "parts": self.parts, "loss": self.loss, "layers": self.layers}
