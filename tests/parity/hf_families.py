"""Tiny models of every family in transformers' words; ours reads them from the directory that transformers saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

BASE = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
FOUR = {**BASE, "num_hidden_layers": 4}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
SHARE = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
SECTIONS = {**SHARE, "mrope_section": [1, 1, 0], "mrope_interleaved": True}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 4,
}
ROUTED = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2}
SHARED = {**ROUTED, "shared_expert_intermediate_size": 16}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", {**BASE, "rope_parameters": PLAIN, "tie_word_embeddings": True}),
    "qwen2_yarn": ("Qwen2ForCausalLM", "Qwen2Config", {**BASE, "rope_parameters": YARN}),
    "qwen2_sliding": (
        "Qwen2ForCausalLM",
        "Qwen2Config",
        {**BASE, "rope_parameters": PLAIN, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {**BASE, **SHARED, "rope_parameters": PLAIN, "norm_topk_prob": False, "mlp_only_layers": [0]},
    ),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**BASE, "head_dim": 16, "rope_parameters": PLAIN}),
    "qwen3_moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {**BASE, **ROUTED, "head_dim": 16, "rope_parameters": YARN, "norm_topk_prob": True},
    ),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        "Qwen3NextConfig",
        {**FOUR, **LINEAR, **SHARED, "head_dim": 16, "rope_parameters": SHARE, "norm_topk_prob": True},
    ),
    "qwen3_5": (
        "Qwen3_5ForCausalLM",
        "Qwen3_5TextConfig",
        {**FOUR, **LINEAR, "head_dim": 16, "rope_parameters": SECTIONS},
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeTextConfig",
        {
            **{name: value for name, value in FOUR.items() if name != "intermediate_size"},
            **LINEAR,
            **SHARED,
            "head_dim": 16,
            "rope_parameters": SECTIONS,
        },
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", {**BASE, "rms_norm_eps": 1e-5, "rope_parameters": LLAMA3}),
    "olmoe": (
        "OlmoeForCausalLM",
        "OlmoeConfig",
        {
            **BASE,
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "norm_topk_prob": False,
            "clip_qkv": 1.5,
            "pad_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **BASE,
            "intermediate_size": 48,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 4,
            "rope_parameters": {
                **YARN,
                "rope_theta": 150000.0,
                "factor": 32.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
            },
        },
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **BASE,
            "num_hidden_layers": 3,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 16,
            "n_shared_experts": 1,
            "n_routed_experts": 8,
            "routed_scaling_factor": 2.5,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
            "qk_nope_head_dim": 24,
            "n_group": 4,
            "topk_group": 2,
            "num_experts_per_tok": 2,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "rope_interleave": True,
            "rope_parameters": {
                **YARN,
                "factor": 40.0,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 0.7,
            },
        },
    ),
}
"""Name -> class of the model, class of its config, and what the config takes."""


def is_known(name: str) -> bool:
    """Whether the release of transformers that is installed has the family; version 4 lacks the newest."""
    import transformers

    return hasattr(transformers, FAMILIES[name][0])


def before_five(options: dict[str, Any]) -> dict[str, Any]:
    """The options as version 4 of transformers takes them: rotary positions in words of their own."""
    rope = dict(options["rope_parameters"])
    words = {key: rope.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    words |= {"rope_scaling": rope} if rope["rope_type"] != "default" else {}
    return {key: value for key, value in options.items() if key != "rope_parameters"} | words


def build(name: str, seed: int) -> Any:
    """The model in float32 with every weight, bias, sink and buffer that is saved drawn at random."""
    import torch
    import transformers

    model_class, config_class, options = FAMILIES[name]
    options = before_five(options) if transformers.__version__.startswith("4.") else options
    config = getattr(transformers, config_class)(**options)
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(config).float().eval()
    kept = set(model.state_dict())
    with torch.no_grad():
        for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if key in kept:
                tensor.copy_(torch.randn_like(tensor) * 0.2)
                if key.endswith("norm.weight") and not name.startswith("qwen3_"):
                    tensor.add_(1.0)
    return model


def save(model: Any, folder: Path) -> None:
    """The model as transformers writes it."""
    model.save_pretrained(folder, safe_serialization=True)


def logits(model: Any, tokens: Any, mask: Any = None) -> Any:
    """`[B, T, V]` float32 of a whole forward pass."""
    import torch

    with torch.no_grad():
        mask = None if mask is None else torch.tensor(mask)
        return model(input_ids=torch.tensor(tokens), attention_mask=mask, use_cache=False).logits.numpy()
