"""GGUF files of tiny random models, written as llama.cpp's converter writes them; and llama.cpp's model in numpy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import jax
import numpy as np
from conftest import ROOT

from model.config import ModelConfig, MoEConfig, RopeConfig
from model.load import Source
from model.tree import make_skeleton
from sharding.mesh import MeshConfig, make_mesh

BASE = ModelConfig(
    vocab_size=512,
    hidden_size=256,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=512,
    rope=RopeConfig(theta=10_000.0),
    qk_norm=False,
    norm_eps=1e-5,
    max_positions=128,
)
MODELS: dict[str, ModelConfig] = {
    "llama": replace(BASE, layout="llama"),
    "qwen2": replace(BASE, layout="qwen2", qkv_bias=True, tie_embeddings=True, norm_eps=1e-6),
    "qwen3": replace(BASE, layout="qwen3", qk_norm=True, rope=RopeConfig(theta=1e6)),
    "qwen3moe": replace(
        BASE,
        layout="qwen3_moe",
        qk_norm=True,
        moe=MoEConfig(num_experts=8, experts_per_token=3, intermediate_size=256),
    ),
}
"""One model of each architecture of llama.cpp."""


def random_weights(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Float32 arrays under our names, norms and biases no less random than the rest."""
    draw = np.random.default_rng(seed)
    found = {}
    for name, shape in make_skeleton(config, stacked=False).shapes.items():
        array = draw.standard_normal(shape, np.float32)
        if name.endswith("norm.weight"):
            array = 1 + 0.2 * array
        elif "bias" not in name and (name != "embedding_VD" or config.tie_embeddings):
            array /= np.float32(np.sqrt(config.hidden_size))
        found[name] = array
    return found


def side_by_side(rows: np.ndarray, heads: int) -> np.ndarray:
    """`LlamaModel.permute` of llama.cpp's convert_hf_to_gguf.py."""
    return rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def tensors_of(config: ModelConfig, weights: Mapping[str, np.ndarray], architecture: str) -> dict[str, np.ndarray]:
    """The weights as the tensors that llama.cpp's converter writes."""
    turn = side_by_side if architecture == "llama" else lambda rows, heads: rows
    N, K, D = config.num_heads, config.num_kv_heads, config.hidden_size
    found = {"token_embd.weight": weights["embedding_VD"], "output_norm.weight": weights["norm.weight"]}
    if not config.tie_embeddings:
        found["output.weight"] = weights["head_DV"].T
    for layer in range(config.num_layers):
        ours = {n.split(".", 4)[4]: w for n, w in weights.items() if n.startswith(f"stacks.0.blocks.{layer}.")}
        theirs: dict[str, np.ndarray] = {
            "attn_norm.weight": ours["attention_norm.weight"],
            "ffn_norm.weight": ours["feed_forward_norm.weight"],
            "attn_q.weight": turn(ours["attention.q_DNH"].reshape(D, -1).T, N),
            "attn_k.weight": turn(ours["attention.k_DKH"].reshape(D, -1).T, K),
            "attn_v.weight": ours["attention.v_DKH"].reshape(D, -1).T,
            "attn_output.weight": ours["attention.o_NHD"].reshape(-1, D).T,
        }
        if config.qkv_bias:
            theirs["attn_q.bias"] = turn(ours["attention.q_bias_NH"].reshape(-1), N)
            theirs["attn_k.bias"] = turn(ours["attention.k_bias_KH"].reshape(-1), K)
            theirs["attn_v.bias"] = ours["attention.v_bias_KH"].reshape(-1)
        if config.output_bias:
            theirs["attn_output.bias"] = ours["attention.o_bias_D"]
        if config.qk_norm:
            theirs["attn_q_norm.weight"] = ours["attention.q_norm.weight"]
            theirs["attn_k_norm.weight"] = ours["attention.k_norm.weight"]
        if config.moe.num_experts:
            theirs["ffn_gate_inp.weight"] = ours["feed_forward.router_DE"].T
            for name, own in (("gate", "gate_EDF"), ("up", "up_EDF"), ("down", "down_EDF")):
                array = ours[f"feed_forward.{own}"]
                theirs[f"ffn_{name}_exps.weight"] = array if name == "down" else array.transpose(0, 2, 1)
        else:
            for name, own in (("gate", "gate_DF"), ("up", "up_DF"), ("down", "down_FD")):
                theirs[f"ffn_{name}.weight"] = ours[f"feed_forward.{own}"].T
        found |= {f"blk.{layer}.{name}": array for name, array in theirs.items()}
    return {name: np.ascontiguousarray(array) for name, array in found.items()}


def write_gguf(
    path: Path,
    config: ModelConfig,
    architecture: str,
    tensors: Mapping[str, np.ndarray],
    kinds: Mapping[str, str] | None = None,
    *,
    sentencepiece: bool = False,
    more: Iterable[tuple[str, Any]] = (),
) -> Path:
    """Writes a file. kinds: types of the tensors that are there as bytes. more: other or further metadata."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_layers)
    writer.add_context_length(config.max_positions)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope.theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.moe.num_experts:
        writer.add_expert_count(config.moe.num_experts)
        writer.add_expert_used_count(config.moe.experts_per_token)
        writer.add_expert_feed_forward_length(config.moe.intermediate_size)
    if sentencepiece:
        add_sentencepiece(writer)
    for name, value in more:
        if name in writer.kv_data[0]:
            writer.kv_data[0][name].value = value
            continue
        kind = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string, bool: writer.add_bool}
        kind.get(type(value), writer.add_array)(name, value)
    for name, array in tensors.items():
        kind = (kinds or {}).get(name)
        writer.add_tensor(name, array, raw_dtype=None if kind is None else gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_sentencepiece(writer: gguf.GGUFWriter) -> None:
    """The vocabulary of tests/data/tok512.model."""
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(ROOT / "tests" / "data" / "tok512.model"))
    ids = range(model.get_piece_size())
    tests = ((model.is_unknown, 2), (model.is_control, 3), (model.is_byte, 6))
    writer.add_tokenizer_model("llama")
    writer.add_token_list([model.id_to_piece(i) for i in ids])
    writer.add_token_scores([model.get_score(i) for i in ids])
    writer.add_token_types([next((kind for test, kind in tests if test(i)), 1) for i in ids])
    writer.add_bos_token_id(model.bos_id())
    writer.add_eos_token_id(model.eos_id())


def weights_of(source: Source, dtype: str = "float32") -> dict[str, np.ndarray]:
    """What a source loads onto one device."""
    device = make_mesh(MeshConfig(), jax.devices()[:1])
    place = jax.sharding.NamedSharding(device, jax.sharding.PartitionSpec())
    names = make_skeleton(source.config, stacked=False).shapes
    return {name: np.asarray(array) for name, array in source.weights(dict.fromkeys(names, place), dtype).items()}


# ---- llama.cpp's model, in float64 ------------------------------------------------
def numpy_logits(path: Path, tokens: list[int], factor_of: Mapping[int, float] | None = None) -> np.ndarray:
    """Logits `[T, V]` of a file of unquantised tensors, read and computed by nothing of ours.

    factor_of: what the rotary frequency of a pair is divided by, where that is not 1.
    """
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    w = {tensor.name: np.asarray(tensor.data, np.float64) for tensor in reader.tensors}

    def key(name: str) -> Any:
        return reader.fields[f"{architecture}.{name}"].contents()

    H, eps = key("attention.key_length"), key("attention.layer_norm_rms_epsilon")
    frequencies = key("rope.freq_base") ** (-np.arange(0, H, 2) / H)
    frequencies /= [(factor_of or {}).get(i, 1.0) for i in range(H // 2)]
    turns = np.exp(1j * np.arange(len(tokens))[:, None, None] * frequencies)
    seen = np.tril(np.ones((len(tokens), len(tokens)), bool))

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * w[name]

    def rotate(x: np.ndarray) -> np.ndarray:
        if architecture == "llama":
            turned = (x[..., ::2] + 1j * x[..., 1::2]) * turns
            return np.stack([turned.real, turned.imag], -1).reshape(x.shape)
        turned = (x[..., : H // 2] + 1j * x[..., H // 2 :]) * turns
        return np.concatenate([turned.real, turned.imag], -1)

    def silu(x: np.ndarray) -> np.ndarray:
        return x / (1 + np.exp(-x))

    x = w["token_embd.weight"][tokens]
    for layer in range(key("block_count")):
        at = f"blk.{layer}."
        h = norm(x, f"{at}attn_norm.weight")
        q, k, v = (
            (h @ w[f"{at}attn_{n}.weight"].T + w.get(f"{at}attn_{n}.bias", 0)).reshape(len(tokens), -1, H)
            for n in "qkv"
        )
        if f"{at}attn_q_norm.weight" in w:
            q, k = norm(q, f"{at}attn_q_norm.weight"), norm(k, f"{at}attn_k_norm.weight")
        q, k, v = rotate(q), *(a.repeat(q.shape[1] // a.shape[1], 1) for a in (rotate(k), v))
        scores = np.where(seen, np.einsum("tnh,snh->nts", q, k) / np.sqrt(H), -np.inf)
        shares = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = np.einsum("nts,snh->tnh", shares / shares.sum(-1, keepdims=True), v).reshape(len(tokens), -1)
        x = x + mixed @ w[f"{at}attn_output.weight"].T + w.get(f"{at}attn_output.bias", 0)
        h = norm(x, f"{at}ffn_norm.weight")
        if f"{at}ffn_gate_inp.weight" not in w:
            gate, up, down = (w[f"{at}ffn_{n}.weight"].T for n in ("gate", "up", "down"))
            x = x + silu(h @ gate) * (h @ up) @ down
            continue
        scores = np.exp(h @ w[f"{at}ffn_gate_inp.weight"].T)
        gates, ups, downs = (w[f"{at}ffn_{n}_exps.weight"] for n in ("gate", "up", "down"))
        for t, row in enumerate(scores):
            best = np.argsort(-row)[: key("expert_used_count")]
            for e in best:
                y = downs[e] @ (silu(gates[e] @ h[t]) * (ups[e] @ h[t]))
                x[t] += row[e] / row[best].sum() * y
    return norm(x, "output_norm.weight") @ w.get("output.weight", w["token_embd.weight"]).T
