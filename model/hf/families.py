"""The families of checkpoints that we read and write, and what each one's config.json says.

A family adds no code to the model: it says which fields of `ModelConfig` its settings stand for; `tables.py` says
where each weight is. Facts are those of the reference implementations in transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from errors import UserError, did_you_mean
from model.config import LatentAttentionConfig, LinearAttentionConfig, ModelConfig, MoEConfig
from model.hf.settings import Settings, attention_multiplier, common, common_back, labels_back, need, refuse


@dataclass(frozen=True)
class Family:
    """One architecture of transformers.

    architecture, model_type: its names in config.json. read: settings -> config. write: config -> the settings
    beyond the common ones. fits: whether a config can be written in this form. fused: experts lie in one tensor.
    """

    architecture: str
    model_type: str
    read: Callable[[Settings], ModelConfig]
    write: Callable[[ModelConfig], dict[str, Any]]
    fits: Callable[[ModelConfig], bool]
    fused: bool = False
    also: tuple[str, ...] = field(default=())
    """Other architectures whose text model this is."""

    @property
    def classifier(self) -> str:
        """The architecture with a head for sequence classification; "" where transformers has none."""
        without = {"olmoe": "", "qwen3_5_moe_text": "", "qwen3_5_text": "Qwen3_5Text"}
        stem = without.get(self.model_type, self.architecture.removesuffix("ForCausalLM"))
        return stem and f"{stem}ForSequenceClassification"

    def name_of(self, config: ModelConfig) -> str:
        """The architecture of a model of this family."""
        return self.classifier if config.num_labels else self.architecture

    def writes(self, config: ModelConfig) -> bool:
        """Whether a model can be written in this form, its head included."""
        return self.fits(config) and bool(self.name_of(config))


# ---- settings of each family ---------------------------------------------------
def _pattern(settings: Settings, kinds: dict[str, str], otherwise: Callable[[int], str]) -> dict[str, Any]:
    """`attention_pattern` and the window, from `layer_types` or, where there is none, from a rule."""
    layers = int(need(settings, "num_hidden_layers"))
    types = settings.get("layer_types") or [otherwise(layer) for layer in range(layers)]
    unknown = sorted({kind for kind in types if kind not in kinds})
    if unknown or len(types) != layers:
        raise UserError(f"config.json has {len(types)} layer_types of {layers} layers, unknown among them: {unknown}")
    pattern = tuple(kinds[kind] for kind in types)
    period = next(p for p in range(1, layers + 1) if layers % p == 0 and pattern == pattern[:p] * (layers // p))
    window = settings.get("sliding_window") or 0
    return {"attention_pattern": pattern[:period], "sliding_window": window if "sliding" in pattern else 0}


FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
KINDS = {FULL: "full", SLIDING: "sliding", LINEAR: "linear"}


def _pattern_back(config: ModelConfig) -> dict[str, Any]:
    names = {ours: theirs for theirs, ours in KINDS.items()}
    return {"layer_types": [names[config.attention_kind(layer)] for layer in range(config.num_layers)]}


def _window(settings: Settings, first: Callable[[int], bool]) -> dict[str, Any]:
    """Qwen2's sliding window: in the layers that `first` tells of, if it is used at all."""
    if not settings.get("use_sliding_window"):
        return {}
    return _pattern(settings, KINDS, lambda layer: SLIDING if first(layer) else FULL)


def _window_back(config: ModelConfig) -> dict[str, Any]:
    if not config.sliding_window:
        return {"use_sliding_window": False}
    # transformers 4 knows the first sliding layer alone; 5 reads the list.
    first = config.attention_pattern.index("sliding") if "full" in config.attention_pattern else 0
    window = {"use_sliding_window": True, "sliding_window": config.sliding_window, "max_window_layers": first}
    return window | _pattern_back(config)


def _dense(settings: Settings) -> dict[str, Any]:
    return {"intermediate_size": need(settings, "intermediate_size")}


def _after(settings: Settings) -> Callable[[int], bool]:
    first = settings.get("max_window_layers", 28)
    return lambda layer: layer >= first


def _read_qwen2(s: Settings) -> ModelConfig:
    window = _window(s, _after(s))
    return ModelConfig(**common(s), **_dense(s), **window, qk_norm=False, qkv_bias=True)


def _write_qwen2(c: ModelConfig) -> dict[str, Any]:
    return {"intermediate_size": c.intermediate_size, **_window_back(c)}


def _read_llama(s: Settings) -> ModelConfig:
    refuse(s, mlp_bias=False, pretraining_tp=1)
    bias = bool(s.get("attention_bias"))
    return ModelConfig(**common(s), **_dense(s), qk_norm=False, qkv_bias=bias, output_bias=bias)


def _write_llama(c: ModelConfig) -> dict[str, Any]:
    return {"intermediate_size": c.intermediate_size, "attention_bias": c.qkv_bias, "mlp_bias": False}


def _read_qwen3(s: Settings) -> ModelConfig:
    refuse(s, attention_bias=False)
    return ModelConfig(**{**common(s), "head_dim": s.get("head_dim") or 128}, **_dense(s), **_window(s, _after(s)))


def _write_qwen3(c: ModelConfig) -> dict[str, Any]:
    return {"intermediate_size": c.intermediate_size, "attention_bias": False, **_window_back(c)}


def _routed(s: Settings, **more: Any) -> MoEConfig:
    """The router and experts in the words of the Qwen families; `more` overrides."""
    shared = s.get("shared_expert_intermediate_size") or 0
    fields: dict[str, Any] = {
        "num_experts": s.get("num_local_experts") or need(s, "num_experts"),
        "experts_per_token": need(s, "num_experts_per_tok"),
        "intermediate_size": need(s, "moe_intermediate_size"),
        "shared_intermediate_size": shared,
        "normalize": bool(s.get("norm_topk_prob", False)),
        "every": s.get("decoder_sparse_step") or 1,
        "dense_layers": tuple(s.get("mlp_only_layers") or ()),
    }
    return MoEConfig(**{**fields, **more})


def _routed_back(c: ModelConfig) -> dict[str, Any]:
    moe = c.moe
    found = {
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "moe_intermediate_size": moe.intermediate_size,
        "norm_topk_prob": moe.normalize,
        "decoder_sparse_step": moe.every,
        "mlp_only_layers": list(moe.dense_layers),
        "intermediate_size": c.intermediate_size,
    }
    return found | ({"shared_expert_intermediate_size": n} if (n := moe.shared_intermediate_size) else {})


def _read_qwen2_moe(s: Settings) -> ModelConfig:
    bias = s.get("qkv_bias", True)
    before = s.get("max_window_layers", 28)
    window = _window(s, lambda layer: bool((layer + 1) % 2) and layer < before)
    return ModelConfig(**common(s), **_dense(s), **window, qk_norm=False, qkv_bias=bias, moe=_routed(s))


def _read_qwen3_moe(s: Settings) -> ModelConfig:
    refuse(s, attention_bias=False, use_sliding_window=False)
    dense = s.get("intermediate_size") or 6144
    return ModelConfig(**common(s), intermediate_size=dense, moe=_routed(s))


def _hybrid(s: Settings) -> dict[str, Any]:
    """What Qwen3-Next and Qwen3.5 share."""
    refuse(s, attention_bias=False)
    every = s.get("full_attention_interval") or 4
    linear = LinearAttentionConfig(
        num_key_heads=need(s, "linear_num_key_heads"),
        num_value_heads=need(s, "linear_num_value_heads"),
        key_dim=s.get("linear_key_head_dim") or 128,
        value_dim=s.get("linear_value_head_dim") or 128,
        conv_kernel=s.get("linear_conv_kernel_dim") or 4,
    )
    pattern = _pattern(s, {FULL: "full", LINEAR: "linear"}, lambda layer: FULL if (layer + 1) % every == 0 else LINEAR)
    fields = {**common(s, share=0.25), "head_dim": s.get("head_dim") or 256}
    return {**fields, **pattern, "linear": linear, "attention_gate": True, "norm": "zero_centred"}


def _hybrid_back(c: ModelConfig) -> dict[str, Any]:
    linear = c.linear
    return _pattern_back(c) | {
        "linear_num_key_heads": linear.num_key_heads,
        "linear_num_value_heads": linear.num_value_heads,
        "linear_key_head_dim": linear.key_dim,
        "linear_value_head_dim": linear.value_dim,
        "linear_conv_kernel_dim": linear.conv_kernel,
        "attention_bias": False,
    }


def _read_qwen3_next(s: Settings) -> ModelConfig:
    return ModelConfig(**_hybrid(s), intermediate_size=s.get("intermediate_size") or 5120, moe=_routed(s))


def _read_qwen35(s: Settings) -> ModelConfig:
    return ModelConfig(**_hybrid(s), **_dense(s))


def _write_qwen35(c: ModelConfig) -> dict[str, Any]:
    return {**_hybrid_back(c), "intermediate_size": c.intermediate_size, "mtp_num_hidden_layers": c.mtp_layers}


def _read_qwen35_moe(s: Settings) -> ModelConfig:
    moe = _routed(s, normalize=True, every=1, dense_layers=())
    return ModelConfig(**_hybrid(s), intermediate_size=s.get("intermediate_size") or moe.intermediate_size, moe=moe)


def _write_qwen35_moe(c: ModelConfig) -> dict[str, Any]:
    routed = _routed_back(c)
    kept = ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size")
    found = {name: routed[name] for name in kept if name in routed}
    return {**_hybrid_back(c), **found, "mtp_num_hidden_layers": c.mtp_layers}


def _read_olmoe(s: Settings) -> ModelConfig:
    refuse(s, attention_bias=False)
    width = need(s, "intermediate_size")
    moe = _routed({**s, "moe_intermediate_size": width}, every=1, dense_layers=())
    clip = float(s.get("clip_qkv") or 0.0)
    fields = {**common(s), "norm_eps": s.get("rms_norm_eps") or 1e-5}
    return ModelConfig(**fields, intermediate_size=width, qk_norm_whole=True, qkv_clip=clip, moe=moe)


def _write_olmoe(c: ModelConfig) -> dict[str, Any]:
    moe = c.moe
    return {
        "intermediate_size": moe.intermediate_size,
        "num_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "norm_topk_prob": moe.normalize,
        "clip_qkv": c.qkv_clip or None,
        "attention_bias": False,
    }


def _read_gpt_oss(s: Settings) -> ModelConfig:
    refuse(s, swiglu_limit=7.0)
    width = need(s, "intermediate_size")
    experts, chosen = need(s, "num_local_experts"), s.get("num_experts_per_tok") or s.get("experts_per_token") or 4
    moe = MoEConfig(
        num_experts=experts, experts_per_token=chosen, intermediate_size=width, bias=True, activation="clamped"
    )
    pattern = _pattern(s, KINDS, lambda layer: SLIDING if (layer + 1) % 2 else FULL)
    fields = {**common(s, theta=150_000.0), "norm_eps": s.get("rms_norm_eps") or 1e-5}
    flags = {"qk_norm": False, "qkv_bias": True, "output_bias": True, "sinks": True, "norm": "float32"}
    return ModelConfig(**fields, **pattern, **flags, intermediate_size=width, moe=moe)


def _write_gpt_oss(c: ModelConfig) -> dict[str, Any]:
    moe = c.moe
    return _pattern_back(c) | {
        "intermediate_size": moe.intermediate_size,
        "num_local_experts": moe.num_experts,
        "num_experts_per_tok": moe.experts_per_token,
        "sliding_window": c.sliding_window,
        "swiglu_limit": 7.0,
        "attention_bias": True,
    }


def _read_deepseek(s: Settings) -> ModelConfig:
    refuse(s, attention_bias=False, moe_layer_freq=1, scoring_func="sigmoid", topk_method="noaux_tc")
    refuse(s, rope_interleave=True)
    width, layers = need(s, "moe_intermediate_size"), need(s, "num_hidden_layers")
    moe = MoEConfig(
        num_experts=need(s, "n_routed_experts"),
        experts_per_token=need(s, "num_experts_per_tok"),
        intermediate_size=width,
        shared_intermediate_size=width * (s.get("n_shared_experts") or 0),
        shared_gate=False,
        score="sigmoid",
        normalize=bool(s.get("norm_topk_prob", True)),
        scale=float(s.get("routed_scaling_factor", 1.0)),
        num_groups=s.get("n_group") or 1,
        groups_per_token=s.get("topk_group") or 1,
        selection_bias=True,
        dense_layers=tuple(range(min(layers, s.get("first_k_dense_replace") or 0))),
    )
    latent = LatentAttentionConfig(
        kv_rank=need(s, "kv_lora_rank"),
        query_rank=s.get("q_lora_rank") or 0,
        nope_dim=need(s, "qk_nope_head_dim"),
        rope_dim=need(s, "qk_rope_head_dim"),
        value_dim=need(s, "v_head_dim"),
    )
    multiplier = attention_multiplier(s)
    fields = {**common(s), **_dense(s), "head_dim": latent.rope_dim, "num_kv_heads": s["num_attention_heads"]}
    return ModelConfig(**fields, qk_norm=False, latent=latent, attention_multiplier=multiplier, moe=moe)


def _write_deepseek(c: ModelConfig) -> dict[str, Any]:
    moe, latent = c.moe, c.latent
    return {
        "intermediate_size": c.intermediate_size,
        "moe_intermediate_size": moe.intermediate_size,
        "n_routed_experts": moe.num_experts,
        "n_shared_experts": moe.shared_intermediate_size // moe.intermediate_size,
        "num_experts_per_tok": moe.experts_per_token,
        "norm_topk_prob": moe.normalize,
        "routed_scaling_factor": moe.scale,
        "n_group": moe.num_groups,
        "topk_group": moe.groups_per_token,
        "first_k_dense_replace": len(moe.dense_layers),
        "kv_lora_rank": latent.kv_rank,
        "q_lora_rank": latent.query_rank or None,
        "qk_nope_head_dim": latent.nope_dim,
        "qk_rope_head_dim": latent.rope_dim,
        "v_head_dim": latent.value_dim,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "rope_interleave": True,
        "attention_bias": False,
        "num_nextn_predict_layers": c.mtp_layers,
    }


# ---- which family writes a config -------------------------------------------------
def _plain(c: ModelConfig) -> bool:
    """No attention but full and sliding, and none of the options of single families."""
    odd = c.latent.kv_rank or "linear" in c.attention_pattern or c.sinks or c.qkv_clip or c.qk_norm_whole
    return not (odd or c.attention_gate or c.mtp_layers or c.rope.share != 1 or c.norm != "cast" or c.moe.bias)


def _dense_only(c: ModelConfig) -> bool:
    return _plain(c) and not c.moe.num_experts


def _qwen_router(c: ModelConfig) -> bool:
    moe = c.moe
    simple = moe.score == "softmax" and moe.scale == 1 and moe.num_groups == 1 and not moe.selection_bias
    return bool(moe.num_experts) and simple and moe.activation == "swiglu"


def _is_hybrid(c: ModelConfig) -> bool:
    attention = "linear" in c.attention_pattern and "sliding" not in c.attention_pattern and c.attention_gate
    return attention and c.norm == "zero_centred" and c.qk_norm and not c.qkv_bias and not c.latent.kv_rank


def _full(c: ModelConfig) -> bool:
    return c.attention_pattern == ("full",)


def _shared(c: ModelConfig) -> bool:
    return bool(c.moe.shared_intermediate_size) and c.moe.shared_gate


FAMILIES = (
    Family(
        "Qwen2ForCausalLM", "qwen2", _read_qwen2, _write_qwen2,
        lambda c: _dense_only(c) and c.qkv_bias and not c.qk_norm and not c.output_bias,
    ),
    Family(
        "Qwen3ForCausalLM", "qwen3", _read_qwen3, _write_qwen3,
        lambda c: _dense_only(c) and c.qk_norm and not c.qkv_bias and not c.output_bias,
    ),
    Family(
        "LlamaForCausalLM", "llama", _read_llama, _write_llama,
        lambda c: _dense_only(c) and _full(c) and not c.qk_norm and c.qkv_bias == c.output_bias,
        also=("MistralForCausalLM",),
    ),
    Family(
        "Qwen2MoeForCausalLM", "qwen2_moe", _read_qwen2_moe,
        lambda c: {**_routed_back(c), "qkv_bias": c.qkv_bias, **_window_back(c)},
        lambda c: _plain(c) and _qwen_router(c) and _shared(c) and not c.qk_norm and not c.output_bias,
    ),
    Family(
        "Qwen3MoeForCausalLM", "qwen3_moe", _read_qwen3_moe,
        lambda c: {**_routed_back(c), "attention_bias": False, "use_sliding_window": False},
        lambda c: _plain(c) and _full(c) and _qwen_router(c) and c.qk_norm and not c.qkv_bias
        and not c.moe.shared_intermediate_size,
    ),
    Family(
        "Qwen3_5MoeForCausalLM", "qwen3_5_moe_text", _read_qwen35_moe, _write_qwen35_moe,
        lambda c: _is_hybrid(c) and _qwen_router(c) and _shared(c) and c.moe.normalize
        and c.num_moe_layers == c.num_layers,
        fused=True, also=("Qwen3_5MoeForConditionalGeneration",),
    ),
    Family(
        "Qwen3NextForCausalLM", "qwen3_next", _read_qwen3_next, lambda c: {**_hybrid_back(c), **_routed_back(c)},
        lambda c: _is_hybrid(c) and _qwen_router(c) and _shared(c),
    ),
    Family(
        "Qwen3_5ForCausalLM", "qwen3_5_text", _read_qwen35, _write_qwen35,
        lambda c: _is_hybrid(c) and not c.moe.num_experts, also=("Qwen3_5ForConditionalGeneration",),
    ),
    Family(
        "OlmoeForCausalLM", "olmoe", _read_olmoe, _write_olmoe,
        lambda c: c.qk_norm and c.qk_norm_whole and _qwen_router(c) and _full(c) and not c.qkv_bias,
    ),
    Family(
        "GptOssForCausalLM", "gpt_oss", _read_gpt_oss, _write_gpt_oss,
        lambda c: c.sinks and c.moe.bias and c.moe.activation == "clamped" and c.norm == "float32",
    ),
    Family(
        "DeepseekV3ForCausalLM", "deepseek_v3", _read_deepseek, _write_deepseek,
        lambda c: bool(c.latent.kv_rank) and _full(c) and c.moe.score == "sigmoid",
    ),
)  # fmt: skip


def family_of_settings(settings: Settings) -> Family:
    """The family that a config.json names. UserError for an unknown one."""
    names = [name for name in settings.get("architectures") or () if isinstance(name, str)]
    known = {name: one for one in FAMILIES for name in (one.architecture, one.classifier, *one.also) if name}
    for name in names:
        if name in known:
            return known[name]
    types = {family.model_type: family for family in FAMILIES}
    if not names and settings.get("model_type") in types:
        return types[settings["model_type"]]
    shown = ", ".join(names) or str(settings.get("model_type"))
    hint = did_you_mean(names[0], known) if names else ""
    raise UserError(f"the architecture {shown} is not known{hint}; known are {', '.join(sorted(known))}")


def family_of_config(config: ModelConfig) -> Family:
    """The family that a model is written as: that of its `layout` if it has one. UserError if none fits."""
    for family in FAMILIES:
        if config.layout == family.model_type and family.writes(config):
            return family
    found = next((family for family in FAMILIES if family.writes(config)), None)
    if found is None:
        raise UserError(
            "no architecture of transformers has this combination of model options; the model can be used here, "
            "not exported"
        )
    return found


def settings_of(config: ModelConfig, family: Family) -> dict[str, Any]:
    """config.json of a model, without what its tokenizer decides."""
    settings = common_back(config, parameters=family.model_type.startswith("qwen3_5"))
    names: dict[str, Any] = {"architectures": [family.name_of(config)], "model_type": family.model_type}
    settings |= names | labels_back(config) | family.write(config) | {"use_cache": True, "attention_dropout": 0.0}
    if config.latent.kv_rank:
        settings.pop("head_dim")
    return settings
