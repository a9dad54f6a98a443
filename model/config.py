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

    def __post_init__(self) -> None:
        if self.theta <= 0:
            raise UserError(f"model.rope.theta={self.theta} must be positive")
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
    qk_norm: bool = True
    """RMSNorm on each query and key head before rotation (Qwen3)."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen2)."""
    attention_gate: bool = False
    """Sigmoid gate on each head's output before the output projection (arXiv 2505.06708)."""
    tie_embeddings: bool = False
    """Use the input embedding as the output head."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    max_positions: int = 4096
    """Longest sequence that the model accepts."""

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
        if self.num_moe_layers < self.num_layers and self.intermediate_size <= 0:
            raise UserError(f"model.intermediate_size={self.intermediate_size} must be positive for the dense layers")

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str) -> ModelConfig:
        """The config whose fields `values` names, as `dataclasses.asdict` (or JSON) gives them.

        Raises:
            UserError: an unknown field; `where` says which file it stands in.
        """
        parts = {"moe": MoEConfig, "rope": RopeConfig}

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

    @property
    def num_moe_layers(self) -> int:
        """Blocks whose feed-forward is routed."""
        return sum(self.is_moe(layer) for layer in range(self.num_layers))

    # ---- parameters -------------------------------------------------------
    @property
    def attention_parameters(self) -> int:
        """Parameters of one attention layer."""
        query, key_value = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        count = self.hidden_size * (query * (3 if self.attention_gate else 2) + 2 * key_value)
        count += (query + 2 * key_value) if self.qkv_bias else 0
        return count + (2 * self.head_dim if self.qk_norm else 0)

    def feed_forward_parameters(self, layer: int, *, active: bool = False) -> int:
        """Parameters of the feed-forward of block `layer`; with `active`, those that one token uses."""
        if not self.is_moe(layer):
            return 3 * self.hidden_size * self.intermediate_size
        moe = self.moe
        experts = moe.experts_per_token if active else moe.num_experts
        count = experts * 3 * self.hidden_size * moe.intermediate_size + moe.num_experts * self.hidden_size
        if moe.shared_intermediate_size:
            count += 3 * self.hidden_size * moe.shared_intermediate_size
            count += self.hidden_size if moe.shared_gate else 0
        return count

    def _count(self, *, active: bool) -> int:
        layers = range(self.num_layers)
        body = sum(self.feed_forward_parameters(layer, active=active) for layer in layers)
        body += self.num_layers * (self.attention_parameters + 2 * self.hidden_size) + self.hidden_size
        return body + self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)

    @property
    def parameters_total(self) -> int:
        """All parameters; a tied embedding is counted once. The selection bias is not a parameter."""
        return self._count(active=False)

    @property
    def parameters_active(self) -> int:
        """Parameters that one token uses: chosen and shared experts, and both embeddings."""
        return self._count(active=True)

    # ---- work -------------------------------------------------------------
    def flops_per_token(self, context: float) -> float:
        """Forward floating-point operations of one token that attends to `context` positions.

        Two per multiplied weight (the input embedding is a lookup) and four per head, channel and
        position for scores and values. Training costs three times this.
        """
        multiplied = self._count(active=True) - (0 if self.tie_embeddings else self.vocab_size * self.hidden_size)
        return 2.0 * multiplied + 4.0 * self.num_layers * self.num_heads * self.head_dim * context

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Cache bytes that one token occupies over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_value

    @property
    def attention_scale(self) -> float:
        """What query-key products are multiplied by."""
        return 1.0 / math.sqrt(self.head_dim)
