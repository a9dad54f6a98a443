"""The shapes that are measured, and what they cost at least: the work and the bytes of each measurement."""

from __future__ import annotations

from dataclasses import dataclass

from model.config import ModelConfig, MoEConfig

BYTES = 4
"""Everything is float32."""

ADAMW_BYTES = 28
"""Per parameter and update: weight, gradient and two moments are read; weight and moments are written."""


@dataclass(frozen=True)
class Limits:
    """What the machine can do: multiply (operations per second) and read memory (bytes per second)."""

    flops: float
    bandwidth: float


@dataclass(frozen=True)
class Shape:
    """A model, the batch that it trains on, and what it is asked for when it serves."""

    name: str
    model: ModelConfig
    batch: int
    """Rows of a training step."""
    seq: int
    """Tokens of a row."""
    prompt: int = 128
    """Tokens of a prompt before decoding."""
    new: int = 128
    """Tokens that are decoded."""
    prefill: int = 512
    """Tokens of the prompt whose reading is timed."""

    @property
    def tokens(self) -> int:
        """Tokens of a training step."""
        return self.batch * self.seq

    @property
    def head_parameters(self) -> int:
        """Weights of the output head."""
        return self.model.vocab_size * self.model.hidden_size

    @property
    def train_flops(self) -> float:
        """Operations of a training step: three forward passes, where a token sees half its row on average."""
        return 3 * self.tokens * self.model.flops_per_token(self.seq / 2)

    @property
    def prefill_flops(self) -> float:
        """Operations of reading a prompt; only the last token needs logits."""
        body = self.model.flops_per_token(self.prefill / 2) - 2 * self.head_parameters
        return self.prefill * body + 2 * self.head_parameters

    @property
    def decode_context(self) -> float:
        """Positions that a decoded token attends to, on average."""
        return self.prompt + self.new / 2

    def distinct_experts(self, tokens: int) -> float:
        """Experts of one layer that `tokens` evenly routed tokens touch, as expected."""
        moe = self.model.moe
        return moe.num_experts * (1 - (1 - moe.experts_per_token / moe.num_experts) ** tokens)

    def decode_bytes(self, rows: int) -> float:
        """Bytes that one decoding step of `rows` rows has to read: weights that are used, and the cache."""
        model, moe = self.model, self.model.moe
        expert = 3 * model.hidden_size * moe.intermediate_size
        matrices = 2 * model.hidden_size * model.head_dim * (model.num_heads + model.num_kv_heads)
        layer = matrices + moe.num_experts * model.hidden_size + self.distinct_experts(rows) * expert
        weights = (model.num_layers * layer + self.head_parameters) * BYTES
        return weights + rows * self.decode_context * model.kv_bytes_per_token(BYTES)

    # ---- the least time, by the machine's limits --------------------------
    def train_bound(self, limits: Limits) -> float:
        """Tokens per second at most: all products at full speed, then the optimizer at full bandwidth."""
        update = ADAMW_BYTES * self.model.parameters_total / limits.bandwidth
        return self.tokens / (self.train_flops / limits.flops + update)

    def decode_bound(self, rows: int, limits: Limits) -> float:
        """Tokens per second at most. A model that fits into the processor's cache may pass it."""
        work = rows * self.model.flops_per_token(self.decode_context) / limits.flops
        return rows / max(work, self.decode_bytes(rows) / limits.bandwidth)

    def prefill_bound(self, limits: Limits) -> float:
        """Tokens per second at most: the products, or reading every weight once."""
        weights = (self.model.parameters_total - self.head_parameters) * BYTES
        return self.prefill / max(self.prefill_flops / limits.flops, weights / limits.bandwidth)


def _qwen3_moe(
    vocab: int, hidden: int, layers: int, heads: int, head_dim: int, experts: int, chosen: int, width: int
) -> ModelConfig:
    moe = MoEConfig(num_experts=experts, experts_per_token=chosen, intermediate_size=width)
    return ModelConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=heads // 2,
        head_dim=head_dim,
        intermediate_size=chosen * width,
        moe=moe,
    )


TOY = Shape("toy", _qwen3_moe(512, 32, 1, 4, 8, 4, 2, 16), batch=2, seq=16, prompt=16, new=8, prefill=32)

SHAPES = {
    shape.name: shape
    for shape in (
        TOY,
        Shape("T", _qwen3_moe(4096, 256, 4, 8, 32, 8, 2, 256), batch=8, seq=256),
        Shape("S", _qwen3_moe(32000, 512, 8, 8, 64, 32, 4, 384), batch=4, seq=256),
    )
}
"""T fits into a cache, S does not; the toy shows that everything runs."""

LOSS_VOCABULARY, LOSS_TOKENS = 151_936, 2048
"""Where the memory of the loss is measured: the vocabulary of Qwen3."""
