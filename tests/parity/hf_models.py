"""Tiny models of each family, described twice: for transformers and for us. Imports torch only when one is built."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from model.config import ModelConfig, MoEConfig, RopeConfig


@dataclass(frozen=True)
class Case:
    """One architecture: `{family}ForCausalLM({family}Config(**options))` and our `config`."""

    family: str
    options: dict[str, Any]
    config: ModelConfig


_HF = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}
_HF_MOE = {"moe_intermediate_size": 16, "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1}
_QWEN3 = ModelConfig(
    vocab_size=128,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=64,
    max_positions=4096,
)
_QWEN2 = replace(_QWEN3, head_dim=8, qk_norm=False, qkv_bias=True)
# Wavelengths short enough for a dozen positions to tell them apart, some on each side of either corner.
_YARN = RopeConfig(theta=1e3, scaling="yarn", factor=4.0, original_max_positions=1024)
_HF_YARN = {"rope_type": "yarn", "rope_theta": 1e3, "factor": 4.0, "original_max_position_embeddings": 1024}
_LLAMA3 = RopeConfig(theta=1e3, scaling="llama3", factor=8.0, original_max_positions=128)
_HF_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e3,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
_MOE = MoEConfig(num_experts=8, experts_per_token=2, intermediate_size=16)

CASES: dict[str, Case] = {
    "qwen2": Case("Qwen2", {**_HF, "tie_word_embeddings": True}, replace(_QWEN2, tie_embeddings=True)),
    "qwen2_yarn": Case("Qwen2", {**_HF, "rope_parameters": _HF_YARN}, replace(_QWEN2, rope=_YARN)),
    "qwen2_moe": Case(
        "Qwen2Moe",
        {
            **_HF,
            **_HF_MOE,
            "num_hidden_layers": 3,
            "shared_expert_intermediate_size": 48,
            "norm_topk_prob": False,
            "mlp_only_layers": [0],
            "qkv_bias": True,
        },
        replace(
            _QWEN2,
            num_layers=3,
            moe=replace(_MOE, shared_intermediate_size=48, normalize=False, dense_layers=(0,)),
        ),
    ),
    "qwen3": Case("Qwen3", {**_HF, "head_dim": 16}, _QWEN3),
    "qwen3_moe": Case(
        "Qwen3Moe",
        {**_HF, **_HF_MOE, "head_dim": 16, "norm_topk_prob": True, "mlp_only_layers": []},
        replace(_QWEN3, moe=_MOE),
    ),
    "qwen3_moe_alternating_yarn": Case(
        "Qwen3Moe",
        {
            **_HF,
            **_HF_MOE,
            "head_dim": 16,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "tie_word_embeddings": True,
            "rope_parameters": _HF_YARN,
        },
        replace(
            _QWEN3,
            num_layers=4,
            moe=replace(_MOE, every=2, experts_per_token=3, normalize=False),
            tie_embeddings=True,
            rope=_YARN,
        ),
    ),
    "llama": Case(
        "Llama",
        {**_HF, "rms_norm_eps": 1e-5, "rope_parameters": _HF_LLAMA3},
        replace(_QWEN2, qkv_bias=False, norm_eps=1e-5, rope=_LLAMA3),
    ),
}


def build(case: Case, weights: dict[str, np.ndarray]):
    """The transformers model in plain (eager) attention and experts, float32, with these weights."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    config = getattr(transformers, f"{case.family}Config")(**case.options)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = getattr(transformers, f"{case.family}ForCausalLM")(config).float().eval()
    parameters = dict(model.named_parameters())
    if {name: tuple(p.shape) for name, p in parameters.items()} != {name: w.shape for name, w in weights.items()}:
        raise ValueError(f"{case.family}: parameters are {sorted(parameters)}, weights {sorted(weights)}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.from_numpy(np.array(weights[name])))
    return model


def left_padded(tokens_BT: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    """What transformers takes for a batch of sequences that end together.

    The label of a row's first token is masked too: only padding comes before it.
    """
    import torch

    shift = tokens_BT.shape[1] - lengths
    ids = np.stack([np.roll(row, by) for row, by in zip(tokens_BT, shift, strict=True)])
    steps = np.arange(tokens_BT.shape[1])
    real = steps >= shift[:, None]
    arrays = {
        "input_ids": np.where(real, ids, 0),
        "attention_mask": real.astype(np.int64),
        "position_ids": np.maximum(steps - shift[:, None], 0),
        "labels": np.where(steps > shift[:, None], ids, -100),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def run(model, tokens_BT: np.ndarray, lengths: np.ndarray, **options: Any) -> tuple[np.ndarray, float, dict]:
    """Logits `[B, T, V]` moved to the left (zeros behind each row's tokens), loss and every gradient."""
    model.zero_grad()
    output = model(**left_padded(tokens_BT, lengths), use_cache=False, **options)
    output.loss.backward()
    logits = np.zeros(output.logits.shape, np.float32)
    for row, length in enumerate(lengths):
        logits[row, :length] = output.logits[row, tokens_BT.shape[1] - length :].detach().numpy()
    gradients = {name: np.array(parameter.grad.numpy()) for name, parameter in model.named_parameters()}
    return logits, float(output.loss.detach()), gradients
