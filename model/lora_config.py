"""Which weights get adapters, and of what rank. Imports no jax, as `model/config.py`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Literal

from errors import UserError

TARGETS = ("q", "k", "v", "o", "gate", "up", "down", "q_down", "kv_down")
"""Weights by the first part of their names: of attention, of feed-forward layers and experts alike (`gate` is that of
attention's output too), and of latent attention."""


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of low rank beside weights that stay as they are (LoRA, arXiv 2106.09685); rank 0 trains all weights."""

    rank: int = 0
    """Rank of what is added to each weight; 0 for none, and all weights are trained."""
    alpha: float = 16.0
    """What is added is multiplied by alpha / rank."""
    rank_stabilized: bool = False
    """Multiply by alpha / sqrt(rank) instead (arXiv 2312.03732)."""
    targets: tuple[str, ...] = ("q", "k", "v", "o", "gate", "up", "down")
    """Weights that get an adapter, experts' too."""
    base: Literal["same", "int8"] = "same"
    """int8 keeps the weights that are not trained in 8 bits, each output channel with its scale."""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise UserError(f"lora.rank={self.rank} must be 0 (none) or more")
        if not self.alpha > 0:
            raise UserError(f"lora.alpha={self.alpha} must be positive")
        for name in self.targets:
            if name not in TARGETS:
                near = difflib.get_close_matches(name, TARGETS, 1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(TARGETS)}"
                raise UserError(f"lora.targets has {name!r}; {hint}")
        if self.base != "same" and not self.rank:
            raise UserError(f"lora.base={self.base} is of weights beside adapters; set lora.rank, or lora.base same")
        if self.rank and not self.targets:
            raise UserError(f"lora.rank={self.rank} with no lora.targets trains nothing; name some, or set lora.rank 0")

    @property
    def scale(self) -> float:
        """What the product of both factors is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilized else self.rank) if self.rank else 0.0
