"""config.json of a Hugging Face checkpoint to ModelConfig fields and back; both generations of its rotary keys."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from errors import UserError
from model.config import ModelConfig, RopeConfig, mscale

PLAIN = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "norm_eps": "rms_norm_eps",
    "max_positions": "max_position_embeddings",
    "tie_embeddings": "tie_word_embeddings",
}
"""Fields that are the same everywhere: ours -> theirs."""

DEFAULTS = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}

Settings = Mapping[str, Any]


def need(settings: Settings, name: str) -> Any:
    """A key that must be there."""
    if settings.get(name) is None:
        raise UserError(f"config.json lacks {name!r}")
    return settings[name]


def refuse(settings: Settings, **plain: Any) -> None:
    """Raises UserError where a key has another value than the one we compute."""
    for name, value in plain.items():
        found = settings.get(name)
        if found is not None and found != value and not (not found and not value):
            raise UserError(f"config.json has {name}={found!r}; only {value!r} is supported")


def common(settings: Settings, share: float = 1.0, theta: float = 10_000.0) -> dict[str, Any]:
    """The fields that every family has. `share` and `theta`: the family's own defaults for rotary positions."""
    refuse(settings, hidden_act="silu")
    fields = {}
    for ours, theirs in PLAIN.items():
        if theirs == "num_key_value_heads":
            fields[ours] = settings.get(theirs) or need(settings, "num_attention_heads")
        else:
            fields[ours] = settings[theirs] if settings.get(theirs) is not None else DEFAULTS.get(theirs)
            if fields[ours] is None:
                need(settings, theirs)
    fields["head_dim"] = settings.get("head_dim") or fields["hidden_size"] // fields["num_heads"]
    fields["rope"] = rope(settings, share, theta)
    return fields


def labels(settings: Settings) -> int:
    """Outputs of the head for sequence classification, 0 for a language model; transformers leaves two unsaid."""
    if not any(str(name).endswith("ForSequenceClassification") for name in settings.get("architectures") or ()):
        return 0
    return len(settings.get("id2label") or ()) or int(settings.get("num_labels") or 2)


def labels_back(config: ModelConfig) -> dict[str, Any]:
    """What a model for sequence classification says of its labels."""
    if not config.num_labels:
        return {}
    names = {str(index): f"LABEL_{index}" for index in range(config.num_labels)}
    back = {name: int(index) for index, name in names.items()}
    return {"num_labels": config.num_labels, "id2label": names, "label2id": back}


def rope(settings: Settings, share: float = 1.0, theta: float = 10_000.0) -> RopeConfig:
    """Rotary positions from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (4)."""
    found = {**(settings.get("rope_scaling") or {}), **(settings.get("rope_parameters") or {})}
    kind = found.get("rope_type", found.get("type", "default"))
    theta = found.get("rope_theta") or settings.get("rope_theta") or theta
    share = found.get("partial_rotary_factor") or settings.get("partial_rotary_factor") or share
    if kind in ("default", "mrope"):
        return RopeConfig(theta=float(theta), share=float(share))
    if kind not in ("yarn", "llama3"):
        raise UserError(f"config.json scales rotary positions by {kind!r}; known are default, yarn and llama3")
    factor = float(need(found, "factor"))
    original = found.get("original_max_position_embeddings") or need(settings, "max_position_embeddings")
    fields: dict[str, Any] = {"theta": float(theta), "share": float(share), "scaling": kind, "factor": factor}
    fields["original_max_positions"] = int(original)
    if kind == "llama3":
        names = ("low_freq_factor", "high_freq_factor")
    else:
        names = ("beta_fast", "beta_slow", "truncate", "attention_factor")
        if found.get("attention_factor") is None and found.get("mscale") and found.get("mscale_all_dim"):
            fields["attention_factor"] = mscale(factor, found["mscale"]) / mscale(factor, found["mscale_all_dim"])
    fields |= {name: found[name] for name in names if found.get(name) is not None}
    return RopeConfig(**fields)


def attention_multiplier(settings: Settings) -> float:
    """DeepSeek's `mscale_all_dim`, which scales query-key products by its factor squared."""
    found = {**(settings.get("rope_scaling") or {}), **(settings.get("rope_parameters") or {})}
    return mscale(float(found.get("factor", 1.0)), float(found.get("mscale_all_dim") or 0.0)) ** 2


def common_back(config: ModelConfig, *, parameters: bool = False) -> dict[str, Any]:
    """The settings that every family has, with rotary positions in the form that both generations read.

    parameters: in the form that only transformers 5 knows, for families that came with it.
    """
    settings = {theirs: getattr(config, ours) for ours, theirs in PLAIN.items()}
    settings |= {"head_dim": config.head_dim, "hidden_act": "silu"}
    scaling = rope_back(config)
    theta, share = config.rope.theta, config.rope.share
    if parameters:
        rotation = {"rope_type": "default", **scaling, "rope_theta": theta, "partial_rotary_factor": share}
        return settings | {"rope_parameters": rotation}
    settings |= {"rope_theta": theta, "rope_scaling": scaling or None}
    return settings | ({"partial_rotary_factor": share} if share != 1.0 else {})


def rope_back(config: ModelConfig) -> dict[str, Any]:
    """The `rope_scaling` of a model; empty where nothing is scaled."""
    rope = config.rope
    if rope.scaling == "none":
        return {}
    found: dict[str, Any] = {
        "rope_type": rope.scaling,
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_positions,
    }
    if rope.scaling == "llama3":
        return found | {"low_freq_factor": rope.low_freq_factor, "high_freq_factor": rope.high_freq_factor}
    found |= {"beta_fast": rope.beta_fast, "beta_slow": rope.beta_slow, "truncate": rope.truncate}
    if config.attention_multiplier != 1.0:
        unit = 0.1 * math.log(rope.factor)
        all_dim = (math.sqrt(config.attention_multiplier) - 1.0) / unit
        factor = rope.attention_factor or mscale(rope.factor, 1.0)
        own = (factor * mscale(rope.factor, all_dim) - 1.0) / unit
        return found | {"mscale": round(own, 9), "mscale_all_dim": round(all_dim, 9)}
    return found | ({"attention_factor": rope.attention_factor} if rope.attention_factor else {})
