"""What all measurements of one run share: its options, the machine's limits, compiled programs, the peer."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from bench.processes import MeasurementError, run_hugging_face, run_ours
from bench.shapes import Limits, Shape
from errors import UserError

TRANSFORMERS = "transformers"


def say(text: str) -> None:
    """A line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def words(text: str, known: tuple[str, ...], option: str) -> list[str]:
    """The words of a comma-separated list, each one of `known`."""
    found = [word.strip() for word in text.split(",")]
    wrong = next((word for word in found if word not in known), None)
    if wrong is not None:
        raise UserError(f"{option} does not know {wrong!r}; it takes {', '.join(known)}")
    return found


class Bench:
    """One run.

    Args:
        options: those of `python -m bench`. folder: for compiled programs and the models that are written.
    """

    def __init__(self, options: argparse.Namespace, folder: str) -> None:
        self.options, self.folder, self.cache = options, folder, f"{folder}/cache"
        self.notes: list[str] = []
        self.versions: dict[str, str] = {}
        if not options.peer_python:
            self.notes.append("transformers: no interpreter was given (--peer-python or QMAX_PEER_PYTHON)")
        say("limits of the machine")
        self.limits = self.ours({"what": "limits"})
        self.bounds = Limits(self.limits["flops"], self.limits["bandwidth"])

    def ours(self, job: dict[str, Any], devices: int = 1) -> dict[str, Any]:
        """One of our measurements, in a process of its own."""
        return run_ours(job, self.cache, devices)

    def transformers(self, job: dict[str, Any]) -> dict[str, Any]:
        """One measurement of transformers. MeasurementError where it fails."""
        found = run_hugging_face(self.options.peer_python, job)
        self.versions |= found["versions"]
        return found

    def transformers_if_there(self, job: dict[str, Any]) -> list[dict[str, Any]]:
        """The same; none where it is not there, or fails, and it is said why."""
        if not self.options.peer_python:
            return []
        try:
            return [self.transformers(job)]
        except MeasurementError as exc:
            self.notes.append(f"transformers, {job['what']}: {exc}")
            return []

    def model(self, shape: str) -> str:
        """The directory of a model of this shape, made when first asked for."""
        folder = Path(self.folder) / shape
        if not folder.exists():
            self.ours({"what": "serving", "job": {"what": "write", "shape": shape, "folder": str(folder)}})
        return str(folder)


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
