"""A GGUF file as a MODEL: its sizes from the metadata, its weights tensor by tensor, its tokenizer."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError, did_you_mean
from model.config import ModelConfig, MoEConfig, RopeConfig
from model.gguf_format import GGUFFile
from model.gguf_tensors import model_rules
from model.gguf_tokenizer import read_tokenizer
from model.hf.placing import Reading, TensorFiles, compare, expected_tensors
from model.hf.rules import Shapes
from model.layers import rope_frequencies
from model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Architecture:
    """What an architecture of llama.cpp does not say in metadata.

    layout: the family of transformers that it is. interleaved: rotary pairs lie side by side.
    """

    layout: str
    interleaved: bool = False
    qk_norm: bool = False


ARCHITECTURES = {
    "llama": Architecture("llama", interleaved=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", qk_norm=True),
    "qwen3moe": Architecture("qwen3_moe", qk_norm=True),
}

ROPE_FACTORS = "rope_freqs.weight"
"""What each rotary frequency is divided by; Llama 3's scaling comes in this form."""

IGNORED = re.compile(r"blk\.\d+\.attn_rot_embd|blk\.\d+\.rope_freqs\.weight|rope\.freqs")
"""Tensors of old files that hold nothing a model needs."""


class GGUFSource(TensorFiles):
    """A GGUF file of a known architecture."""

    def __init__(self, path: Path):
        self.path = path
        self.file = GGUFFile(path)
        name = self.file.metadata.get("general.architecture")
        if name not in ARCHITECTURES:
            hint = did_you_mean(name, ARCHITECTURES) if isinstance(name, str) else ""
            raise UserError(
                f"{path} holds a model of the architecture {name!r}{hint}; known are {', '.join(ARCHITECTURES)}"
            )
        self.architecture = ARCHITECTURES[name]
        try:
            self.config = read_config(self.file, name)
        except UserError as exc:
            raise UserError(str(exc) if str(path) in str(exc) else f"{path}: {exc}") from exc

    def tokenizer(self) -> Tokenizer:
        """The tokenizer in the file."""
        return read_tokenizer(self.file.metadata, self.path)

    def rules(self, shapes: Shapes) -> list[Reading]:
        """As `TensorFiles.rules`."""
        rules = model_rules(self.config, interleaved=self.architecture.interleaved)
        found = {name: tensor.shape for name, tensor in self.file.tensors.items()}
        ignored = [name for name in found if IGNORED.fullmatch(name)]
        ignored += [ROPE_FACTORS] if self.architecture.interleaved else []
        compare(expected_tensors(rules, shapes), found, str(self.path), ignored=ignored)
        return rules

    def read(self, name: str) -> np.ndarray:
        """A tensor, dequantised where it has to be."""
        return self.file.read(name)


# ---- sizes --------------------------------------------------------------------
class Keys:
    """Metadata under the name of an architecture; every value is checked to be a number or a word."""

    def __init__(self, file: GGUFFile, architecture: str):
        self.file, self.architecture = file, architecture

    def number(self, name: str, default: float | None = None) -> Any:
        """A number; UserError if it is missing without a default, no number, or not the same in all layers."""
        key = f"{self.architecture}.{name}"
        value = self.file.metadata.get(key, default)
        if isinstance(value, np.ndarray):
            each = np.unique(value)
            if each.size > 1:
                raise UserError(f"{self.file.path} gives {key} for each layer; one for all layers is supported")
            value = each[0].item() if each.size else default
        if value is None:
            raise UserError(f"{self.file.path} lacks {key}")
        if isinstance(value, (str, list)) or not math.isfinite(value):
            raise UserError(f"{self.file.path} has {key}={value!r}, which is no number")
        return value

    def whole(self, name: str, default: int | None = None) -> int:
        """A whole number."""
        value = self.number(name, default)
        if value != int(value):
            raise UserError(f"{self.file.path} has {self.architecture}.{name}={value}, which is no whole number")
        return int(value)

    def word(self, name: str, default: str) -> str:
        """A word."""
        return str(self.file.metadata.get(f"{self.architecture}.{name}", default))


def read_config(file: GGUFFile, name: str) -> ModelConfig:
    """The sizes of the model in a file of the architecture `name`. UserError where they are none."""
    keys, architecture = Keys(file, name), ARCHITECTURES[name]
    width, layers, heads = (keys.whole(n) for n in ("embedding_length", "block_count", "attention.head_count"))
    if not 0 < layers <= len(file.tensors) or heads <= 0:
        raise UserError(f"{file.path} is damaged: {layers} layers of {heads} heads in {len(file.tensors)} tensors")
    head_dim = keys.whole("attention.key_length", width // heads)
    for other in ("attention.value_length", "rope.dimension_count"):
        if keys.whole(other, head_dim) != head_dim:
            raise UserError(
                f"{file.path} has {name}.{other}={keys.whole(other)} where heads are {head_dim} wide; only heads that "
                "are rotated whole and as wide as their values are supported"
            )
    experts = keys.whole("expert_count", 0)
    moe = _experts(keys) if experts else MoEConfig()
    embedding = file.tensors.get("token_embd.weight")
    config = ModelConfig(
        vocab_size=embedding.shape[0] if embedding else 0,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=keys.whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=keys.whole("feed_forward_length", moe.intermediate_size or None),
        moe=moe,
        qk_norm=architecture.qk_norm,
        qkv_bias=any(tensor.endswith(("attn_q.bias", "attn_k.bias", "attn_v.bias")) for tensor in file.tensors),
        output_bias=any(tensor.endswith("attn_output.bias") for tensor in file.tensors),
        tie_embeddings="output.weight" not in file.tensors,
        # float32 in the file: 1e-6 is meant where 9.99999997e-7 stands.
        norm_eps=_decimal(keys.number("attention.layer_norm_rms_epsilon")),
        max_positions=keys.whole("context_length"),
        layout=architecture.layout,
    )
    return replace(config, rope=read_rope(file, keys, config, architecture.interleaved))


def _experts(keys: Keys) -> MoEConfig:
    if keys.whole("expert_gating_func", 1) not in (0, 1):
        raise UserError(f"{keys.file.path} scores experts by other than softmax, which {keys.architecture} does not do")
    return MoEConfig(
        num_experts=keys.whole("expert_count"),
        experts_per_token=keys.whole("expert_used_count"),
        intermediate_size=keys.whole("expert_feed_forward_length", keys.whole("feed_forward_length", 0) or None),
        normalize=bool(keys.number("expert_weights_norm", 1)),
        scale=float(keys.number("expert_weights_scale", 0.0)) or 1.0,
    )


def _decimal(value: float) -> float:
    """The shortest decimal number that a float32 stands for."""
    return float(str(np.float32(value)))


# ---- rotary positions -----------------------------------------------------------
def read_rope(file: GGUFFile, keys: Keys, config: ModelConfig, factors: bool) -> RopeConfig:
    """Rotary positions, from metadata and (`factors`) from the tensor that divides frequencies."""
    plain = RopeConfig(theta=_decimal(keys.number("rope.freq_base", 10_000.0)))
    kind = keys.word("rope.scaling.type", "none")
    factor = _decimal(keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 1.0))) or 1.0
    if kind not in ("none", "linear", "yarn") or (kind == "linear" and factor != 1):
        raise UserError(f"{file.path} scales rotary positions by {kind!r}; known are yarn and Llama 3's factors")
    rope = plain
    if kind == "yarn" and factor != 1:
        rope = _yarn(keys, plain, factor, config.max_positions)
    tensor = file.tensors.get(ROPE_FACTORS) if factors else None
    if tensor is None:
        return rope
    if tensor.shape != (config.head_dim // 2,) or rope.scaling != "none":
        raise UserError(f"{file.path} holds {ROPE_FACTORS} {tensor.shape} beside heads of {config.head_dim} channels")
    return llama3_rope(file.read(ROPE_FACTORS).astype(np.float64), plain, config.head_dim, str(file.path))


def _yarn(keys: Keys, plain: RopeConfig, factor: float, positions: int) -> RopeConfig:
    if keys.number("rope.scaling.yarn_log_multiplier", 0.0):
        raise UserError(f"{keys.file.path} has rope.scaling.yarn_log_multiplier, which {keys.architecture} does not")
    scale = _decimal(keys.number("rope.scaling.attn_factor", 1.0))
    return replace(
        plain,
        scaling="yarn",
        factor=factor,
        original_max_positions=keys.whole("rope.scaling.original_context_length", positions),
        beta_fast=_decimal(keys.number("rope.scaling.yarn_beta_fast", 32.0)),
        beta_slow=_decimal(keys.number("rope.scaling.yarn_beta_slow", 1.0)),
        attention_factor=0.0 if scale == 1 else scale * (0.1 * math.log(factor) + 1.0),
    )


def llama3_rope(factors: np.ndarray, plain: RopeConfig, head_dim: int, where: str) -> RopeConfig:
    """The Llama 3 scaling that divides frequencies by `factors` `[H/2]`.

    The file holds its result alone. Between its corners, the share of a frequency that is left alone is linear in
    the frequency; the line gives the corners, up to a common scale that changes nothing.

    Raises:
        UserError: it is no scaling of this kind.
    """
    frequencies = rope_frequencies(plain, head_dim)[0].astype(np.float64)
    largest = _decimal(factors.max())

    def fits(rope: RopeConfig) -> bool:
        return np.allclose(rope_frequencies(rope, head_dim)[0] * factors, frequencies, rtol=1e-4, atol=0)

    if fits(plain):
        return plain
    if (factors > 0).all() and largest > 1:
        meta = replace(plain, scaling="llama3", factor=largest, original_max_positions=8192)
        others = (replace(meta, original_max_positions=1 << bits) for bits in range(9, 21))
        found = next((rope for rope in (meta, *others) if fits(rope)), None)
        found = found or _llama3_line(factors, frequencies, meta)
        if found is not None and fits(found):
            return found
    raise UserError(f"{where} scales rotary frequencies by {ROPE_FACTORS} in another way than Llama 3 does")


def _llama3_line(factors: np.ndarray, frequencies: np.ndarray, meta: RopeConfig) -> RopeConfig | None:
    """The corners of the line through the frequencies that are partly stretched; None where there is no such line."""
    shares = (1 / factors - 1 / meta.factor) / (1 - 1 / meta.factor)
    between = (shares > 1e-4) & (shares < 1 - 1e-4)
    if between.sum() < 2:
        return None
    slope, offset = np.polyfit(frequencies[between], shares[between], 1)
    if slope <= 0 or offset >= 0:
        return None
    high = 1 - 1 / offset
    original = round(slope * 2 * math.pi * (high - 1))
    if original <= 0:
        return None
    return replace(meta, original_max_positions=original, low_freq_factor=1.0, high_freq_factor=_round(high))


def _round(value: float) -> float:
    """`value`, or a number of three decimals that is as good."""
    return round(value, 3) if math.isclose(value, round(value, 3), rel_tol=1e-4) else value
