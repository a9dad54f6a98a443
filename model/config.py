"""What a model is: sizes, not switches per family; and the arithmetic that follows from them.

Imports no jax, so that a bad argument is refused in milliseconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from errors import UserError


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding, in the half-split (NeoX) form that the Qwen and Llama families use."""

    theta: float = 1_000_000.0
    """Base of the geometric series of wavelengths."""
    scaling: Literal["none", "yarn", "llama3"] = "none"
    """How the wavelengths are stretched for positions beyond the original range."""
    factor: float = 1.0
    """How many times longer the context becomes under `scaling`."""
    original_max_positions: int = 0
    """Longest position that the model was trained on before `scaling`."""
    beta_fast: float = 32.0
    """YaRN: rotations over the original range above which a wavelength is left alone."""
    beta_slow: float = 1.0
    """YaRN: rotations over the original range below which a wavelength is fully stretched."""
    attention_factor: float = 0.0
    """YaRN: what cos and sin are multiplied by; 0 means `0.1 ln(factor) + 1`."""
    truncate: bool = True
    """YaRN: round the two corner dimensions outwards to whole numbers."""
    low_freq_factor: float = 1.0
    """Llama 3: wavelengths above `original_max_positions / low_freq_factor` are stretched fully."""
    high_freq_factor: float = 4.0
    """Llama 3: wavelengths below `original_max_positions / high_freq_factor` are left alone."""
    share: float = 1.0
    """Share of each head that is rotated; the rest carries no position (Qwen3-Next: 0.25)."""

    def __post_init__(self) -> None:
        if self.theta <= 0:
            raise UserError(f"model.rope.theta={self.theta} must be positive")
        if not 0 < self.share <= 1:
            raise UserError(f"model.rope.share={self.share} must lie between 0 and 1")
        if self.scaling != "none" and not (self.factor >= 1 and self.original_max_positions > 0):
            raise UserError(
                f"model.rope.scaling={self.scaling} needs factor >= 1 (is {self.factor}) and "
                f"original_max_positions > 0 (is {self.original_max_positions})"
            )


@dataclass(frozen=True)
class MoEConfig:
    """A routed feed-forward layer; `num_experts=0` means that the model is dense."""

    num_experts: int = 0
    """Experts per layer (E); 0 makes every layer dense."""
    experts_per_token: int = 2
    """Experts chosen for each token (C)."""
    intermediate_size: int = 0
    """Width of one expert (F)."""
    shared_intermediate_size: int = 0
    """Width of the expert that every token passes through; 0 for none."""
    shared_gate: bool = True
    """Multiply the shared expert's output by a learnt sigmoid of the token."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """What turns router logits into scores."""
    bias: bool = False
    """Biases on the router and on the experts' projections (gpt-oss)."""
    activation: Literal["swiglu", "clamped"] = "swiglu"
    """What joins gate and up: `silu(gate) * up`, or gpt-oss's clamped form of it."""
    normalize: bool = True
    """Rescale the chosen scores to sum to one."""
    scale: float = 1.0
    """Constant that multiplies the chosen weights."""
    num_groups: int = 1
    """Groups of experts; only those in the best `groups_per_token` groups can be chosen."""
    groups_per_token: int = 1
    """Groups kept for each token."""
    selection_bias: bool = False
    """Keep a bias, added to scores for choosing only, that evens out the load."""
    every: int = 1
    """A layer is routed when (index + 1) is a multiple of this ..."""
    dense_layers: tuple[int, ...] = ()
    """... and its index is not listed here."""

    def __post_init__(self) -> None:
        if not self.num_experts:
            return
        for name in ("num_experts", "intermediate_size", "num_groups", "every"):
            if getattr(self, name) <= 0:
                raise UserError(f"model.moe.{name}={getattr(self, name)} must be positive in a mixture of experts")
        if self.shared_intermediate_size < 0:
            raise UserError(f"model.moe.shared_intermediate_size={self.shared_intermediate_size} must not be negative")
        if not 0 < self.experts_per_token <= self.num_experts:
            raise UserError(
                f"model.moe.experts_per_token={self.experts_per_token} must lie between 1 and "
                f"model.moe.num_experts={self.num_experts}"
            )
        if self.num_experts % self.num_groups:
            raise UserError(f"{self.num_experts} experts do not divide into model.moe.num_groups={self.num_groups}")
        if not 0 < self.groups_per_token <= self.num_groups:
            raise UserError(
                f"model.moe.groups_per_token={self.groups_per_token} must lie between 1 and "
                f"model.moe.num_groups={self.num_groups}"
            )
        if self.experts_per_token > self.num_experts // self.num_groups * self.groups_per_token:
            raise UserError(
                f"model.moe.experts_per_token={self.experts_per_token} is more than the experts in "
                f"{self.groups_per_token} of {self.num_groups} groups"
            )


@dataclass(frozen=True)
class LinearAttentionConfig:
    """Gated DeltaNet (arXiv 2412.06464), for the layers that `model.attention_pattern` calls linear."""

    num_key_heads: int = 0
    """Query and key heads; each serves `num_value_heads / num_key_heads` value heads."""
    num_value_heads: int = 0
    """Value heads, each with a state of `key_dim` x `value_dim`."""
    key_dim: int = 128
    """Width of one query or key head."""
    value_dim: int = 128
    """Width of one value head."""
    conv_kernel: int = 4
    """Positions that the causal convolution over queries, keys and values sees."""

    def __post_init__(self) -> None:
        if self.num_key_heads and (self.num_value_heads <= 0 or self.num_value_heads % self.num_key_heads):
            raise UserError(
                f"model.linear.num_value_heads={self.num_value_heads} is not a multiple of "
                f"model.linear.num_key_heads={self.num_key_heads}"
            )
        for name in ("key_dim", "value_dim", "conv_kernel"):
            if getattr(self, name) <= 0:
                raise UserError(f"model.linear.{name}={getattr(self, name)} must be positive")

    @property
    def channels(self) -> int:
        """Channels of queries, keys and values together, which the convolution runs over."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    def parameters(self, width: int) -> int:
        """Parameters of one such layer in a residual stream of `width`."""
        values = self.num_value_heads * self.value_dim
        projections = width * (self.channels + 2 * values + 2 * self.num_value_heads)
        return projections + self.channels * self.conv_kernel + 2 * self.num_value_heads + self.value_dim


@dataclass(frozen=True)
class LatentAttentionConfig:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434); `kv_rank=0` means ordinary attention."""

    kv_rank: int = 0
    """Width of the latent that keys and values are made from; what the cache holds of them."""
    query_rank: int = 0
    """Width of the latent that queries are made from; 0 makes them from the residual stream."""
    nope_dim: int = 128
    """Channels of a query or key head without position."""
    rope_dim: int = 64
    """Channels of a query head that are rotated; their key is shared by all heads."""
    value_dim: int = 128
    """Width of a value head."""

    def parameters(self, width: int, heads: int) -> int:
        """Parameters of one such layer, its two norms included."""
        query = heads * (self.nope_dim + self.rope_dim)
        count = width * query if not self.query_rank else self.query_rank * (width + 1 + query)
        count += width * (self.kv_rank + self.rope_dim) + self.kv_rank
        return count + self.kv_rank * heads * (self.nope_dim + self.value_dim) + heads * self.value_dim * width


def mscale(factor: float, weight: float) -> float:
    """YaRN's factor on attention, `0.1 m ln(s) + 1` (arXiv 2309.00071, equation 22, with DeepSeek's weight m)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


AttentionKind = Literal["full", "sliding", "linear"]


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of one Transformer. The defaults are a small dense model."""

    vocab_size: int = 4096
    """Rows of the embedding (V); 0 takes the tokenizer's size."""
    hidden_size: int = 256
    """Width of the residual stream (D)."""
    num_layers: int = 4
    """Blocks."""
    num_heads: int = 8
    """Query heads (N)."""
    num_kv_heads: int = 4
    """Key/value heads (K); each serves N/K query heads."""
    head_dim: int = 32
    """Width of one head (H)."""
    intermediate_size: int = 768
    """Width of the feed-forward of dense layers (F)."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """The routed feed-forward."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """Rotary positions."""
    linear: LinearAttentionConfig = field(default_factory=LinearAttentionConfig)
    """Gated DeltaNet, in linear layers."""
    latent: LatentAttentionConfig = field(default_factory=LatentAttentionConfig)
    """Latent attention, in place of grouped-query attention."""
    attention_pattern: tuple[AttentionKind, ...] = ("full",)
    """Kind of attention of each layer, repeated over the layers."""
    sliding_window: int = 0
    """Positions that a token of a sliding layer sees, itself included."""
    attention_multiplier: float = 1.0
    """Constant on query-key products beside 1/sqrt(head width) (YaRN's mscale in DeepSeek)."""
    sinks: bool = False
    """A learnt logit per head that takes a share of every softmax (gpt-oss)."""
    qk_norm: bool = True
    """RMSNorm on each query and key head before rotation (Qwen3)."""
    qk_norm_whole: bool = False
    """Make that one norm over the channels of all heads together (OLMoE)."""
    qkv_clip: float = 0.0
    """Largest magnitude of queries, keys and values before rotation; 0 for no limit (OLMoE)."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    output_bias: bool = False
    """Bias on the attention's output projection (gpt-oss)."""
    attention_gate: bool = False
    """Sigmoid gate on each head's output before the output projection (arXiv 2505.06708)."""
    tie_embeddings: bool = False
    """Use the input embedding as the output head."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    norm: Literal["cast", "float32", "zero_centred"] = "cast"
    """RMSNorm weights: applied after the cast to the activation's type (Llama), before it (gpt-oss), or
    before it as `1 + weight` (Qwen3-Next)."""
    num_labels: int = 0
    """Outputs of a head for sequence classification in the place of the language model's head; 0: a language model."""
    mtp_layers: int = 0
    """Extra blocks that predict the token after the next (multi-token prediction); 0 or 1."""
    max_positions: int = 4096
    """Longest sequence that the model accepts."""
    layout: str = ""
    """Published family whose tensor layout an export has; empty takes the first that fits."""

    def __post_init__(self) -> None:
        for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_positions"):
            if getattr(self, name) <= 0:
                raise UserError(f"model.{name}={getattr(self, name)} must be positive")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"model.head_dim={self.head_dim} must be even for rotary positions")
        if self.vocab_size < 0:
            raise UserError(f"model.vocab_size={self.vocab_size} must not be negative")
        if self.num_labels < 0:
            raise UserError(f"model.num_labels={self.num_labels} must not be negative")
        if self.num_labels and self.mtp_layers:
            raise UserError(
                f"model.mtp_layers={self.mtp_layers} predicts tokens, which a model with model.num_labels="
                f"{self.num_labels} does not; set one of them to 0"
            )
        if self.num_moe_layers < self.num_layers and self.intermediate_size <= 0:
            raise UserError(f"model.intermediate_size={self.intermediate_size} must be positive for the dense layers")
        self._check_attention()

    def _check_attention(self) -> None:
        """Refuses a pattern of attention kinds whose sizes are missing."""
        pattern = self.attention_pattern
        if not pattern or self.num_layers % len(pattern):
            raise UserError(
                f"model.attention_pattern has {len(pattern)} entries; they must divide {self.num_layers} layers"
            )
        if "sliding" in pattern and self.sliding_window <= 0:
            raise UserError(f"model.sliding_window={self.sliding_window} must be positive for the sliding layers")
        if "linear" in pattern and self.linear.num_key_heads <= 0:
            raise UserError("model.linear.num_key_heads must be positive for the linear layers")
        if pattern.count("linear") == len(pattern):
            raise UserError("model.attention_pattern needs a layer that is not linear")
        if self.mtp_layers not in (0, 1):
            raise UserError(f"model.mtp_layers={self.mtp_layers} must be 0 or 1")
        if self.rotary_dim % 2:
            raise UserError(f"model.rope.share={self.rope.share} rotates {self.rotary_dim} channels; make them even")

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> ModelConfig:
        """The config whose fields `values` names, as `dataclasses.asdict` (or JSON) gives them.

        Raises:
            UserError: an unknown field; `where` says which file it stands in.
        """
        parts = {
            "moe": MoEConfig,
            "rope": RopeConfig,
            "linear": LinearAttentionConfig,
            "latent": LatentAttentionConfig,
        }

        def build(kind: type[Any], given: dict[str, Any]) -> Any:
            known = {f.name for f in fields(kind)}
            for name in given:
                if name not in known:
                    raise UserError(f"{where} has the unknown field {name!r} of {kind.__name__}")
            made = {name: build(parts[name], v) if name in parts else v for name, v in given.items()}
            return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in made.items()})

        return build(cls, values)

    # ---- layers -----------------------------------------------------------
    def is_moe(self, layer: int) -> bool:
        """Whether the feed-forward of block `layer` (from 0) is routed."""
        moe = self.moe
        return moe.num_experts > 0 and (layer + 1) % moe.every == 0 and layer not in moe.dense_layers

    def attention_kind(self, layer: int) -> AttentionKind:
        """The kind of attention of block `layer` (from 0)."""
        return self.attention_pattern[layer % len(self.attention_pattern)]

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated."""
        return self.latent.rope_dim if self.latent.kv_rank else int(self.head_dim * self.rope.share)

    @property
    def num_moe_layers(self) -> int:
        """Blocks whose feed-forward is routed."""
        return sum(self.is_moe(layer) for layer in range(self.num_layers))

    @property
    def num_routers(self) -> int:
        """Routed feed-forwards, that of the multi-token prediction block included."""
        return self.num_moe_layers + (self.mtp_layers if self.is_moe(self.mtp_layer) else 0)

    @property
    def head_outputs(self) -> int:
        """Outputs of the head: tokens, or the labels of a model for classification."""
        return self.num_labels or self.vocab_size

    @property
    def tied_head(self) -> bool:
        """Whether the head is the embedding; that of a model for classification never is."""
        return self.tie_embeddings and not self.num_labels

    # ---- parameters -------------------------------------------------------
    def attention_parameters(self, layer: int) -> int:
        """Parameters of the attention of block `layer`."""
        if self.attention_kind(layer) == "linear":
            return self.linear.parameters(self.hidden_size)
        if self.latent.kv_rank:
            return self.latent.parameters(self.hidden_size, self.num_heads)
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        count = self.hidden_size * (query * (3 if self.attention_gate else 2) + 2 * key_value)
        count += (query + 2 * key_value) if self.qkv_bias else 0
        count += self.hidden_size if self.output_bias else 0
        count += self.num_heads if self.sinks else 0
        if not self.qk_norm:
            return count
        return count + (query + key_value if self.qk_norm_whole else 2 * self.head_dim)

    def feed_forward_parameters(self, layer: int, *, active: bool = False) -> int:
        """Parameters of the feed-forward of block `layer`; with `active`, those that one token uses."""
        D, moe = self.hidden_size, self.moe
        if not self.is_moe(layer):
            return 3 * D * self.intermediate_size
        F, experts = moe.intermediate_size, moe.experts_per_token if active else moe.num_experts
        count = experts * (3 * D * F + (2 * F + D if moe.bias else 0))
        count += moe.num_experts * (D + 1 if moe.bias else D)
        if moe.shared_intermediate_size:
            count += 3 * D * moe.shared_intermediate_size + (D if moe.shared_gate else 0)
        return count

    def _block(self, layer: int, *, active: bool) -> int:
        return (
            self.attention_parameters(layer) + self.feed_forward_parameters(layer, active=active) + 2 * self.hidden_size
        )

    def _count(self, *, active: bool) -> int:
        body = sum(self._block(layer, active=active) for layer in range(self.num_layers)) + self.hidden_size
        return body + self.hidden_size * (self.vocab_size + self.head_outputs * (not self.tied_head))

    @property
    def parameters_total(self) -> int:
        """Parameters of the model; a tied embedding is counted once.

        Neither the selection bias, which is no parameter, nor the multi-token prediction block is counted.
        """
        return self._count(active=False)

    @property
    def parameters_active(self) -> int:
        """Parameters that one token uses: chosen and shared experts, and both embeddings."""
        return self._count(active=True)

    @property
    def mtp_parameters(self) -> int:
        """Parameters of the multi-token prediction block, 0 without one."""
        D = self.hidden_size
        block = self._block(self.mtp_layer, active=False)
        return self.mtp_layers * (block + 2 * D * D + 3 * D)

    @property
    def mtp_layer(self) -> int:
        """The layer that the multi-token prediction block is built like: the last one."""
        return self.num_layers - 1

    # ---- work -------------------------------------------------------------
    def flops_per_token(self, context: float) -> float:
        """Forward floating-point operations of one token that attends to `context` positions.

        Two per multiplied weight (the input embedding is a lookup); four per head, channel and position for
        scores and values, no more positions than the window in sliding layers; for a linear layer six per
        element of its state (decay, read and write).
        """
        multiplied = self._count(active=True) - (0 if self.tied_head else self.vocab_size * self.hidden_size)
        return 2.0 * multiplied + sum(self._mixing_flops(layer, context) for layer in range(self.num_layers))

    def _mixing_flops(self, layer: int, context: float) -> float:
        kind = self.attention_kind(layer)
        if kind == "linear":
            return 6.0 * self.linear.num_value_heads * self.linear.key_dim * self.linear.value_dim
        seen = min(context, self.sliding_window) if kind == "sliding" else context
        latent = self.latent
        channels = 2 * self.head_dim if not latent.kv_rank else latent.nope_dim + latent.rope_dim + latent.value_dim
        return 2.0 * self.num_heads * channels * seen

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Cache bytes that one token occupies over all layers; linear layers hold a state of fixed size instead."""
        layers = sum(self.attention_kind(layer) != "linear" for layer in range(self.num_layers))
        latent = self.latent
        each = latent.kv_rank + latent.rope_dim if latent.kv_rank else 2 * self.num_kv_heads * self.head_dim
        return layers * each * bytes_per_value

    @property
    def attention_scale(self) -> float:
        """What query-key products are multiplied by."""
        width = self.latent.nope_dim + self.latent.rope_dim if self.latent.kv_rank else self.head_dim
        return self.attention_multiplier / math.sqrt(width)
