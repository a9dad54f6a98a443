"""`python -m bench`: our speed and memory beside the peers', by turns, on the machine at hand."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench import linear, peer_maxtext, table
from bench.processes import MeasurementError, run_hugging_face, run_maxtext, run_ours
from bench.shapes import SHAPES, Limits, Shape
from errors import UserError
from terminal import write_json

WHAT = ("train", "decode", "prefill", "loss", "load", "delta")
ROWS = (1, 16)
"""Rows that are decoded together."""

REQUIRED = {
    ("train", "T"): 0.8,
    ("train", "S"): 0.75,
    ("decode 1", "T"): 3.0,
    ("decode 1", "S"): 1.25,
    ("decode 16", "T"): 1.2,
    ("decode 16", "S"): 1.0,
    ("prefill", "T"): 0.8,
    ("prefill", "S"): 0.8,
}
"""Our rate divided by that of transformers: what must be reached."""

REQUIRED_MAXTEXT = {"MaxText": 3.0}
LOSS_WIDTHS = (256, 512)
EXPERT_PATHS = ("grouped_mm", "eager")
"""How transformers may compute experts; the first is its default, the best of them trains."""

Rounds = list[dict[str, Any]]


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


class Bench:
    """One run: options, the peers that were found, and the report as far as it has come."""

    def __init__(self, options: argparse.Namespace, cache: str) -> None:
        self.options, self.cache = options, cache
        self.notes: list[str] = []
        self.versions: dict[str, str] = {}
        self.measured: list[dict[str, Any]] = []
        self.parts: dict[str, dict[str, Any]] = {}
        self.loss: Rounds = []
        self.layers: Rounds = []
        self.hugging_face = options.peer_python
        self.maxtext = options.maxtext_python
        self.maxtext_base = ""
        if not self.hugging_face:
            self.notes.append("transformers: no interpreter was given (--peer-python or QMAX_PEER_PYTHON)")
        if self.maxtext and "train" in options.what:
            try:
                self.maxtext_base, versions = peer_maxtext.find(self.maxtext)
                self.versions |= versions
            except (OSError, ValueError, peer_maxtext.subprocess.SubprocessError) as exc:
                self.notes.append(f"MaxText: {self.maxtext} does not have it ({exc})")
                self.maxtext = ""
        elif "train" in options.what:
            self.notes.append("MaxText: no interpreter was given (--maxtext-python)")
        say("limits of the machine")
        self.limits = run_ours({"what": "limits"}, cache)
        self.bounds = Limits(self.limits["flops"], self.limits["bandwidth"])

    def run(self) -> None:
        """All measurements that were asked for; the report is written after each."""
        wanted = self.options.what
        for shape in self.options.shape:
            if "train" in wanted:
                self.train(shape)
            if "decode" in wanted:
                for devices in self.options.devices:
                    for rows in ROWS:
                        self.decode(shape, rows, devices)
            if "prefill" in wanted:
                self.prefill(shape)
        if "loss" in wanted:
            for width in LOSS_WIDTHS:
                say(f"loss, width {width}")
                self.loss.append(
                    run_ours({"what": "loss", "repeats": self.options.repeats, "width": width}, self.cache)
                )
                self.write()

        if "delta" in wanted:
            self.delta()
        if "load" in wanted:
            say("load")
            found = run_ours({"what": "load", "repeats": self.options.repeats}, self.cache)
            for what, peer, required in (("load", "safetensors to numpy", 1 / 1.5), ("convert", "a copy", None)):
                theirs = [{"rates": found[what]["plain_rates"]}]
                self.layers.append(
                    {"name": f"{what} 2 GB, float32", "unit": "GB/s", "scale": 1e9, "ours": [found[what]]}
                    | {"peer": peer, "theirs": theirs, "required": required}
                )
            self.write()

    # ---- measurements -------------------------------------------------------
    def train(self, shape: Shape) -> None:
        """The training step, beside transformers and MaxText, and its parts."""
        repeats = self.options.repeats
        paths: list[str] = list(EXPERT_PATHS)

        def hugging_face() -> dict[str, Any]:
            nonlocal paths
            job = {"what": "train", "experts": paths, "batch": shape.batch, "seq": shape.seq}
            found = self.run_hugging_face(shape, job)
            paths = [found["experts"]]
            return found

        peers: dict[str, tuple[Callable[[], dict[str, Any]], float | None]] = {}
        if self.hugging_face:
            peers["transformers"] = (hugging_face, REQUIRED.get(("train", shape.name)))
        if self.maxtext:
            for name, capacity in peer_maxtext.PATHS.items():
                call = partial(run_maxtext, self.maxtext, self.maxtext_base, shape, capacity, repeats)
                peers[name] = (call, REQUIRED_MAXTEXT.get(name))
        ours = {"what": "train", "shape": shape.name, "repeats": repeats}
        self.by_turns("train", shape, ours, peers, shape.train_bound(self.bounds))
        say(f"parts of a training step, {shape.name}")
        self.parts[shape.name] = run_ours({**ours, "what": "parts"}, self.cache)
        self.write()

    def decode(self, shape: Shape, rows: int, devices: int) -> None:
        """Greedy decoding, by the generator that `qmax generate` uses."""
        ours = {
            "what": "decode",
            "shape": shape.name,
            "repeats": self.options.repeats,
            "rows": rows,
            "devices": devices,
        }
        job = {"what": "decode", "experts": EXPERT_PATHS, "rows": rows, "prompt": shape.prompt, "new": shape.new}
        name = f"decode {rows}"
        peers = self.peer(name, shape, job)
        label = name + (f", tensor={devices}" if devices > 1 else "")
        self.by_turns(label, shape, ours, peers, shape.decode_bound(rows, self.bounds), devices)

    def prefill(self, shape: Shape) -> None:
        """Reading a prompt up to the first token."""
        ours = {"what": "prefill", "shape": shape.name, "repeats": self.options.repeats}
        job = {"what": "prefill", "experts": EXPERT_PATHS, "tokens": shape.prefill}
        self.by_turns("prefill", shape, ours, self.peer("prefill", shape, job), shape.prefill_bound(self.bounds))

    def delta(self) -> None:
        """A Gated DeltaNet layer, forward and backward, beside that of transformers."""
        repeats = self.options.repeats
        job = {"what": "delta", "config": linear.peer_config(), "tokens": linear.TOKENS, "repeats": repeats}
        ours: Rounds = []
        theirs: Rounds = []
        for number in range(1, self.options.rounds + 1):
            say(f"Gated DeltaNet, round {number} of {self.options.rounds}")
            ours.append(run_ours({"what": "delta", "repeats": repeats}, self.cache))
            if self.hugging_face:
                theirs.append(run_hugging_face(self.hugging_face, job))
        self.layers.append(
            {"name": f"Gated DeltaNet, {linear.TOKENS:,} tokens", "unit": "tokens/s", "scale": 1.0, "ours": ours}
            | {"peer": "transformers", "theirs": theirs, "required": 1.0}
        )
        self.write()

    def peer(self, what: str, shape: Shape, job: dict[str, Any]) -> dict[str, Any]:
        """Transformers as the one peer, if it is here."""
        call = lambda: self.run_hugging_face(shape, job)  # noqa: E731
        return {"transformers": (call, REQUIRED.get((what, shape.name)))} if self.hugging_face else {}

    def run_hugging_face(self, shape: Shape, job: dict[str, Any]) -> dict[str, Any]:
        """One measurement of transformers."""
        config = hugging_face_config(shape)
        found = run_hugging_face(self.hugging_face, {**job, "config": config, "repeats": self.options.repeats})
        self.versions |= found["versions"]
        return found

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
            ours.append(run_ours(job, self.cache, devices))
            say(f"    {table.cell(ours[-1:])} tokens/s, other CPU {ours[-1].get('other_cpu')}")
            for name in list(peers):
                say(f"{what} {shape.name}, round {number} of {self.options.rounds}: {name}")
                try:
                    theirs[name].append(peers[name][0]())
                    say(f"    {table.cell(theirs[name][-1:])} tokens/s, other CPU {theirs[name][-1].get('other_cpu')}")
                except MeasurementError as exc:
                    say(f"{name} failed: {exc}")
                    self.notes.append(f"{name}, {what} {shape.name}: {exc}")
                    peers.pop(name)
        shown = [{"name": name, "rounds": theirs[name], "required": required} for name, (_, required) in peers.items()]
        self.measured.append({"what": what, "shape": shape.name, "ours": ours, "peers": shown, "bound": bound})
        self.write()

    # ---- report -------------------------------------------------------------
    @property
    def report(self) -> dict[str, Any]:
        """Everything so far."""
        return {
            "machine": table.describe(self.limits, self.versions),
            "measured": self.measured,
            "parts": self.parts,
            "loss": self.loss,
            "layers": self.layers,
            "notes": self.notes,
        }

    def write(self) -> None:
        """Writes the files that were asked for."""
        if self.options.json:
            write_json(self.options.json, self.report)
        if self.options.markdown:
            Path(self.options.markdown).write_text(table.page(self.report), encoding="utf-8")


def hugging_face_config(shape: Shape) -> dict[str, Any]:
    """`shape` as the arguments of transformers' Qwen3MoeConfig."""
    model, moe = shape.model, shape.model.moe
    return {
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.intermediate_size,
        "intermediate_size": model.intermediate_size,
        "norm_topk_prob": moe.normalize,
        "tie_word_embeddings": model.tie_embeddings,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope.theta,
        "decoder_sparse_step": moe.every,
        "mlp_only_layers": list(moe.dense_layers),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }


def words(text: str, known: tuple[str, ...], option: str) -> list[str]:
    """The words of a comma-separated list, each one of `known`."""
    found = [word.strip() for word in text.split(",")]
    wrong = next((word for word in found if word not in known), None)
    if wrong is not None:
        raise UserError(f"{option} does not know {wrong!r}; it takes {', '.join(known)}")
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options, checked."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--shape", default="T,S", help=f"of {', '.join(SHAPES)}; default T,S")
    parser.add_argument("--what", default=",".join(WHAT), help=f"of {', '.join(WHAT)}; default all")
    parser.add_argument("--rounds", type=int, default=3, help="turns of ours and each peer (default 3)")
    parser.add_argument("--repeats", type=int, default=3, help="timed calls in a round, at least (default 3)")
    parser.add_argument("--devices", default="1", help="1, 2 or 1,2: emulated devices that decoding is spread over")
    parser.add_argument(
        "--peer-python",
        default=os.environ.get("QMAX_PEER_PYTHON", ""),
        help="interpreter with torch and transformers (default: QMAX_PEER_PYTHON; without one, no peer)",
    )
    parser.add_argument("--maxtext-python", default="", help="interpreter with MaxText")
    parser.add_argument("--json", metavar="FILE", help="write everything that was measured")
    parser.add_argument("--markdown", metavar="FILE", help="write the report")
    options = parser.parse_args(argv)
    options.shape = [SHAPES[name] for name in words(options.shape, tuple(SHAPES), "--shape")]
    options.what = words(options.what, WHAT, "--what")
    options.devices = [int(word) for word in words(options.devices, ("1", "2", "4"), "--devices")]
    if options.rounds < 1 or options.repeats < 1:
        raise UserError("--rounds and --repeats must be at least 1")
    return options


def main(argv: list[str] | None = None) -> int:
    """Measures, prints the report, and returns the exit code."""
    try:
        options = parse(argv)
        with TemporaryDirectory(prefix="qmax-bench-") as cache:
            bench = Bench(options, cache)
            bench.run()
            print(table.page(bench.report))
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
