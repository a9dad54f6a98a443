"""llama.cpp: its own llama-bench and llama-batched-bench, on models of our shapes with random weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from bench.shapes import Shape

PROGRAMS = ("llama-bench", "llama-batched-bench")

KINDS = {
    "llama.cpp F32": gguf.GGMLQuantizationType.F32,
    "llama.cpp Q8_0": gguf.GGMLQuantizationType.Q8_0,
}
"""Types of the matrices, by the peer's name; norms and routers are float32 as llama.cpp has them."""

THREADS = 2

TRIES = 8
"""The log with the result is written by a thread, before whose turn llama-batched-bench often ends."""


def find(folder: str) -> Path | None:
    """Where the programs are: in `folder`, or in the path if that is empty; None where one is missing."""
    found = [shutil.which(name, path=folder or None) for name in PROGRAMS]
    return Path(found[0]).parent if found[0] and all(found) else None


def tensors(shape: Shape, kind: gguf.GGMLQuantizationType) -> Iterator[tuple[str, np.ndarray, Any]]:
    """Name, stored array and type of each tensor of a Qwen3-MoE."""
    model, moe, draw = shape.model, shape.model.moe, np.random.default_rng(0)
    D, H, E, F = model.hidden_size, model.head_dim, moe.num_experts, moe.intermediate_size
    queries, pairs = model.num_heads * H, model.num_kv_heads * H

    def matrix(*sizes: int) -> tuple[np.ndarray, Any]:
        values = draw.standard_normal(sizes, np.float32) / np.float32(np.sqrt(sizes[-1]))
        return gguf.quantize(values, kind), kind

    def ones(size: int) -> tuple[np.ndarray, Any]:
        return np.ones(size, np.float32), None

    yield "token_embd.weight", *matrix(model.vocab_size, D)
    yield "output_norm.weight", *ones(D)
    yield "output.weight", *matrix(model.vocab_size, D)
    for layer in range(model.num_layers):
        at = f"blk.{layer}."
        for name, size in (("attn", D), ("ffn", D), ("attn_q", H), ("attn_k", H)):
            yield f"{at}{name}_norm.weight", *ones(size)
        for name, sizes in (("q", (queries, D)), ("k", (pairs, D)), ("v", (pairs, D)), ("output", (D, queries))):
            yield f"{at}attn_{name}.weight", *matrix(*sizes)
        yield f"{at}ffn_gate_inp.weight", draw.standard_normal((E, D), np.float32) / np.float32(np.sqrt(D)), None
        for name, sizes in (("gate", (E, F, D)), ("up", (E, F, D)), ("down", (E, D, F))):
            yield f"{at}ffn_{name}_exps.weight", *matrix(*sizes)


def write(shape: Shape, path: Path, peer: str) -> None:
    """A GGUF file for the peer of `KINDS`; it has no vocabulary, as none is needed for token ids."""
    model, moe = shape.model, shape.model.moe
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(model.num_layers)
    writer.add_context_length(model.max_positions)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_rope_freq_base(model.rope.theta)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_expert_count(moe.num_experts)
    writer.add_expert_used_count(moe.experts_per_token)
    writer.add_expert_feed_forward_length(moe.intermediate_size)
    writer.add_vocab_size(model.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    for name, array, kind in tensors(shape, KINDS[peer]):
        writer.add_tensor(name, array, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def command(folder: Path, model: Path, shape: Shape, rows: int) -> list[str]:
    """What measures the decoding of so many rows, or with 0 the reading of a prompt."""
    words = ["-m", model, "-t", THREADS]
    if rows < 2:
        asked = ["-p", 0, "-n", shape.new, "-d", shape.prompt] if rows else ["-p", shape.prefill, "-n", 0]
        words = [folder / PROGRAMS[0], *words, *asked, "-r", 1, "-o", "json"]
    else:
        room = rows * (shape.prompt + shape.new)
        words = [folder / PROGRAMS[1], *words, "-tb", THREADS, "-c", room, "-npp", shape.prompt, "-ntg", shape.new]
        words += ["-npl", rows, "--output-format", "jsonl"]
    return [str(word) for word in words]


def read(lines: Sequence[tuple[float, str]], rows: int) -> float:
    """Tokens per second, from the lines that a program printed.

    Raises:
        ValueError: they do not say.
    """
    text = "\n".join(line for _, line in lines)
    name = "avg_ts" if rows < 2 else "speed_tg"
    found = re.search(rf'"{name}": *([\d.]+)', text)
    if found is None:
        raise ValueError(f"no {name} in what it printed: {json.dumps(text[-200:])}")
    return float(found[1])
