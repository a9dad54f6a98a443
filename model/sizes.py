"""The published models that one `ModelConfig` describes exactly, by the names they are published under.

Sizes and rotary bases are those of each model's own configuration; a model that was released again for longer
contexts ("2507") has an entry of its own.
"""

from __future__ import annotations

from dataclasses import replace

from errors import UserError, did_you_mean
from model.config import LatentAttentionConfig, LinearAttentionConfig, ModelConfig, MoEConfig, RopeConfig, mscale


def _attention(hidden: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)


def _qwen2(shape: ModelConfig, intermediate: int, *, vocab: int, tie: bool, positions: int) -> ModelConfig:
    """Qwen2 and Qwen2.5: biases on query, key and value, no normalisation of heads."""
    return replace(
        shape,
        vocab_size=vocab,
        intermediate_size=intermediate,
        qk_norm=False,
        qkv_bias=True,
        tie_embeddings=tie,
        max_positions=positions,
    )


def _qwen2_moe(
    shape: ModelConfig, intermediate: int, experts: int, chosen: int, width: int, shared: int, *, positions: int
) -> ModelConfig:
    """Qwen1.5-MoE and Qwen2-MoE: a gated shared expert, and weights that are not rescaled."""
    moe = MoEConfig(
        num_experts=experts,
        experts_per_token=chosen,
        intermediate_size=width,
        shared_intermediate_size=shared,
        normalize=False,
    )
    return replace(_qwen2(shape, intermediate, vocab=151_936, tie=False, positions=positions), moe=moe)


def _qwen3(shape: ModelConfig, intermediate: int, *, tie: bool = False) -> ModelConfig:
    """Qwen3: heads normalised, no biases."""
    return replace(shape, vocab_size=151_936, intermediate_size=intermediate, tie_embeddings=tie, max_positions=40_960)


def _qwen3_moe(shape: ModelConfig, intermediate: int, experts: int, width: int) -> ModelConfig:
    """Qwen3-MoE: eight experts of many, weights rescaled, none shared."""
    moe = MoEConfig(num_experts=experts, experts_per_token=8, intermediate_size=width)
    return replace(_qwen3(shape, intermediate), moe=moe)


def _long(config: ModelConfig, theta: float) -> ModelConfig:
    """The same sizes, trained for 262,144 positions."""
    return replace(config, rope=RopeConfig(theta=theta), max_positions=262_144)


_SMALL, _LARGE = 151_936, 152_064  # rows of Qwen2.5's embedding up to 3B, and from 7B

_QWEN2 = {
    "Qwen2.5-0.5B": _qwen2(_attention(896, 24, 14, 2, 64), 4864, vocab=_SMALL, tie=True, positions=32_768),
    "Qwen2.5-1.5B": _qwen2(_attention(1536, 28, 12, 2, 128), 8960, vocab=_SMALL, tie=True, positions=32_768),
    "Qwen2.5-3B": _qwen2(_attention(2048, 36, 16, 2, 128), 11_008, vocab=_SMALL, tie=True, positions=32_768),
    "Qwen2.5-7B": _qwen2(_attention(3584, 28, 28, 4, 128), 18_944, vocab=_LARGE, tie=False, positions=131_072),
    "Qwen2.5-14B": _qwen2(_attention(5120, 48, 40, 8, 128), 13_824, vocab=_LARGE, tie=False, positions=131_072),
    "Qwen2.5-32B": _qwen2(_attention(5120, 64, 40, 8, 128), 27_648, vocab=_LARGE, tie=False, positions=131_072),
    "Qwen2.5-72B": _qwen2(_attention(8192, 80, 64, 8, 128), 29_568, vocab=_LARGE, tie=False, positions=131_072),
    "Qwen1.5-MoE-A2.7B": _qwen2_moe(_attention(2048, 24, 16, 16, 128), 5632, 60, 4, 1408, 5632, positions=8192),
    "Qwen2-57B-A14B": _qwen2_moe(_attention(3584, 28, 28, 4, 128), 18_944, 64, 8, 2560, 20_480, positions=131_072),
}

_QWEN3_4B = _qwen3(_attention(2560, 36, 32, 8, 128), 9728, tie=True)
_QWEN3_30B = _qwen3_moe(_attention(2048, 48, 32, 4, 128), 6144, 128, 768)
_QWEN3_235B = _qwen3_moe(_attention(4096, 94, 64, 4, 128), 12_288, 128, 1536)
_QWEN3_480B = _qwen3_moe(_attention(6144, 62, 96, 8, 128), 8192, 160, 2560)

_QWEN3 = {
    "Qwen3-0.6B": _qwen3(_attention(1024, 28, 16, 8, 128), 3072, tie=True),
    "Qwen3-1.7B": _qwen3(_attention(2048, 28, 16, 8, 128), 6144, tie=True),
    "Qwen3-4B": _QWEN3_4B,
    "Qwen3-4B-2507": _long(_QWEN3_4B, 5e6),
    "Qwen3-8B": _qwen3(_attention(4096, 36, 32, 8, 128), 12_288),
    "Qwen3-14B": _qwen3(_attention(5120, 40, 40, 8, 128), 17_408),
    "Qwen3-32B": _qwen3(_attention(5120, 64, 64, 8, 128), 25_600),
    "Qwen3-30B-A3B": _QWEN3_30B,
    "Qwen3-30B-A3B-2507": _long(_QWEN3_30B, 1e7),
    "Qwen3-235B-A22B": _QWEN3_235B,
    "Qwen3-235B-A22B-2507": _long(_QWEN3_235B, 5e6),
    "Qwen3-Coder-30B-A3B": _long(replace(_QWEN3_30B, intermediate_size=5472), 1e7),
    "Qwen3-Coder-480B-A35B": _long(_QWEN3_480B, 1e7),
}

_LLAMA = {
    "Llama-3.1-405B": ModelConfig(
        vocab_size=128_256,
        hidden_size=16_384,
        num_layers=126,
        num_heads=128,
        num_kv_heads=8,
        head_dim=128,
        intermediate_size=53_248,
        rope=RopeConfig(theta=500_000.0, scaling="llama3", factor=8.0, original_max_positions=8192),
        qk_norm=False,
        norm_eps=1e-5,
        max_positions=131_072,
    ),
}


def _hybrid(shape: ModelConfig, linear_heads: int, *, vocab: int = 248_320) -> ModelConfig:
    """Qwen3-Next, Qwen3.5, 3.6 and 3.8: three layers of Gated DeltaNet, then one of gated attention."""
    return replace(
        shape,
        vocab_size=vocab,
        attention_pattern=("linear", "linear", "linear", "full"),
        attention_gate=True,
        norm="zero_centred",
        linear=LinearAttentionConfig(num_key_heads=16, num_value_heads=linear_heads),
        rope=RopeConfig(theta=1e7, share=0.25),
        max_positions=262_144,
    )


def _hybrid_dense(shape: ModelConfig, intermediate: int, linear_heads: int, *, tie: bool = False) -> ModelConfig:
    return replace(_hybrid(shape, linear_heads), intermediate_size=intermediate, tie_embeddings=tie)


def _hybrid_moe(config: ModelConfig, experts: int, chosen: int, width: int) -> ModelConfig:
    """With experts in every layer, one of them shared and gated."""
    moe = MoEConfig(
        num_experts=experts, experts_per_token=chosen, intermediate_size=width, shared_intermediate_size=width
    )
    return replace(config, moe=moe, intermediate_size=width)


_QWEN35_27B = _hybrid_dense(_attention(5120, 64, 24, 4, 256), 17_408, 48)
_QWEN35_35B = _hybrid_moe(_hybrid(_attention(2048, 40, 16, 2, 256), 32), 256, 8, 512)

_HYBRID = {
    "Qwen3-Next-80B-A3B": replace(
        _hybrid_moe(_hybrid(_attention(2048, 48, 16, 2, 256), 32, vocab=151_936), 512, 10, 512),
        intermediate_size=5120,
        layout="qwen3_next",
    ),
    "Qwen3.5-0.8B": _hybrid_dense(_attention(1024, 24, 8, 2, 256), 3584, 16, tie=True),
    "Qwen3.5-2B": _hybrid_dense(_attention(2048, 24, 8, 2, 256), 6144, 16, tie=True),
    "Qwen3.5-4B": _hybrid_dense(_attention(2560, 32, 16, 4, 256), 9216, 32, tie=True),
    "Qwen3.5-9B": _hybrid_dense(_attention(4096, 32, 16, 4, 256), 12_288, 32),
    "Qwen3.5-27B": _QWEN35_27B,
    "Qwen3.6-27B": _QWEN35_27B,
    "Qwen3.8-27B": _QWEN35_27B,
    "Qwen3.5-35B-A3B": _QWEN35_35B,
    "Qwen3.6-35B-A3B": _QWEN35_35B,
    "Qwen3.5-122B-A10B": _hybrid_moe(_hybrid(_attention(3072, 48, 32, 2, 256), 64), 256, 8, 1024),
    "Qwen3.5-397B-A17B": _hybrid_moe(_hybrid(_attention(4096, 60, 32, 2, 256), 64), 512, 10, 1024),
    "Qwen3.8-2.4T-A95B": replace(
        _hybrid_moe(_hybrid(_attention(8192, 92, 64, 4, 256), 128), 512, 10, 2048), mtp_layers=1
    ),
}


def _gpt_oss(layers: int, experts: int) -> ModelConfig:
    """gpt-oss: sinks, a window in every other layer, biases everywhere."""
    return replace(
        _attention(2880, layers, 64, 8, 64),
        vocab_size=201_088,
        intermediate_size=2880,
        attention_pattern=("sliding", "full"),
        sliding_window=128,
        sinks=True,
        qk_norm=False,
        qkv_bias=True,
        output_bias=True,
        norm="float32",
        norm_eps=1e-5,
        rope=RopeConfig(theta=150_000.0, scaling="yarn", factor=32.0, original_max_positions=4096, truncate=False),
        moe=MoEConfig(
            num_experts=experts, experts_per_token=4, intermediate_size=2880, bias=True, activation="clamped"
        ),
        max_positions=131_072,
    )


_RIVALS = {
    "DeepSeek-V3": ModelConfig(
        vocab_size=129_280,
        hidden_size=7168,
        num_layers=61,
        num_heads=128,
        num_kv_heads=128,
        head_dim=64,
        intermediate_size=18_432,
        qk_norm=False,
        latent=LatentAttentionConfig(kv_rank=512, query_rank=1536, nope_dim=128, rope_dim=64, value_dim=128),
        rope=RopeConfig(theta=10_000.0, scaling="yarn", factor=40.0, original_max_positions=4096, attention_factor=1.0),
        attention_multiplier=mscale(40.0, 1.0) ** 2,
        moe=MoEConfig(
            num_experts=256,
            experts_per_token=8,
            intermediate_size=2048,
            shared_intermediate_size=2048,
            shared_gate=False,
            score="sigmoid",
            scale=2.5,
            num_groups=8,
            groups_per_token=4,
            selection_bias=True,
            dense_layers=(0, 1, 2),
        ),
        mtp_layers=1,
        max_positions=163_840,
    ),
    "gpt-oss-20b": _gpt_oss(24, 32),
    "gpt-oss-120b": _gpt_oss(36, 128),
    "OLMoE-1B-7B": replace(
        _attention(2048, 16, 16, 16, 128),
        vocab_size=50_304,
        intermediate_size=1024,
        qk_norm_whole=True,
        norm_eps=1e-5,
        rope=RopeConfig(theta=10_000.0),
        moe=MoEConfig(num_experts=64, experts_per_token=8, intermediate_size=1024, normalize=False),
        max_positions=4096,
    ),
}

NAMED: dict[str, ModelConfig] = {**_QWEN2, **_QWEN3, **_HYBRID, **_LLAMA, **_RIVALS}
"""Published name -> sizes."""


def named(name: str) -> ModelConfig:
    """The sizes of a published model; upper and lower case are one.

    Raises:
        UserError: no model of that name is known.
    """
    lower = {known.lower(): known for known in NAMED}
    if name.lower() not in lower:
        raise UserError(f"no published model is named {name!r}{did_you_mean(name, NAMED)}; known: {', '.join(NAMED)}")
    return NAMED[lower[name.lower()]]
