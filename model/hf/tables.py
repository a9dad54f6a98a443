"""Where each weight of a family's checkpoints is: tables of rules, ours relative to a block, theirs to a layer."""

from __future__ import annotations

from collections.abc import Callable

from model.config import ModelConfig
from model.hf.families import Family
from model.hf.rules import Copy, ExpertsEach, ExpertsFused, ExpertsInterleaved, Matrix, Part, Rule, Same

Experts = Callable[[str], Rule]
"""From the name before the experts' own to the rule for them: which layout a checkpoint has."""


def attention_rules(config: ModelConfig, layer: int, family: Family) -> list[Rule]:
    """The attention of a block; their names begin after the layer's number."""
    if config.attention_kind(layer) == "linear":
        return linear_rules(config, split=family.model_type != "qwen3_next")
    if config.latent.kv_rank:
        return latent_rules(config)
    theirs = "self_attn."
    q = (Part("q_DNH"), Part("gate_DNH")) if config.attention_gate else (Part("q_DNH"),)
    rules: list[Rule] = [
        Matrix(f"{theirs}q_proj.weight", q, groups=config.num_heads),
        Matrix(f"{theirs}k_proj.weight", (Part("k_DKH"),)),
        Matrix(f"{theirs}v_proj.weight", (Part("v_DKH"),)),
        Matrix(f"{theirs}o_proj.weight", (Part("o_NHD", inputs=2),)),
    ]
    if config.qkv_bias:
        heads = {"q": "q_bias_NH", "k": "k_bias_KH", "v": "v_bias_KH"}
        rules += [Same(f"{theirs}{name}_proj.bias", ours, flat=True) for name, ours in heads.items()]
    if config.output_bias:
        rules.append(Same(f"{theirs}o_proj.bias", "o_bias_D"))
    if config.qk_norm:
        rules += [Same(f"{theirs}{name}.weight", f"{name}.weight") for name in ("q_norm", "k_norm")]
    if config.sinks:
        rules.append(Same(f"{theirs}sinks", "sinks_N"))
    return rules


def linear_rules(config: ModelConfig, *, split: bool) -> list[Rule]:
    """Gated DeltaNet, with projections in blocks (Qwen3.5) or in groups by key head (Qwen3-Next)."""
    theirs, heads = "linear_attn.", config.linear.num_key_heads
    qkv, gate = (Part("q_DKH"), Part("k_DKH"), Part("v_DNI")), Part("gate_DNI")
    taps = (Part("q_conv_WKH"), Part("k_conv_WKH"), Part("v_conv_WNI"))
    rules: list[Rule]
    if split:
        rules = [
            Matrix(f"{theirs}in_proj_qkv.weight", qkv),
            Matrix(f"{theirs}in_proj_z.weight", (gate,)),
            Matrix(f"{theirs}in_proj_b.weight", (Part("beta_DN"),)),
            Matrix(f"{theirs}in_proj_a.weight", (Part("decay_DN"),)),
        ]
    else:
        rules = [
            Matrix(f"{theirs}in_proj_qkvz.weight", (*qkv, gate), groups=heads),
            Matrix(f"{theirs}in_proj_ba.weight", (Part("beta_DN"), Part("decay_DN")), groups=heads),
        ]
    return [
        *rules,
        Matrix(f"{theirs}conv1d.weight", taps, taps=True),
        Same(f"{theirs}A_log", "log_rate_N"),
        Same(f"{theirs}dt_bias", "decay_bias_N"),
        Same(f"{theirs}norm.weight", "norm.weight"),
        Matrix(f"{theirs}out_proj.weight", (Part("o_NID", inputs=2),)),
    ]


def latent_rules(config: ModelConfig) -> list[Rule]:
    """Multi-head latent attention; its rotary pairs lie side by side on disk."""
    theirs, latent, heads = "self_attn.", config.latent, config.num_heads
    query = Part("q_QNH", rotary=latent.rope_dim)
    rules: list[Rule] = []
    if latent.query_rank:
        rules += [
            Matrix(f"{theirs}q_a_proj.weight", (Part("q_down_DQ"),)),
            Same(f"{theirs}q_a_layernorm.weight", "q_norm.weight"),
            Matrix(f"{theirs}q_b_proj.weight", (query,)),
        ]
    else:
        rules.append(Matrix(f"{theirs}q_proj.weight", (query,)))
    return [
        *rules,
        Matrix(f"{theirs}kv_a_proj_with_mqa.weight", (Part("kv_down_DU", rotary=latent.rope_dim),)),
        Same(f"{theirs}kv_a_layernorm.weight", "kv_norm.weight"),
        Matrix(f"{theirs}kv_b_proj.weight", (Part("k_UNH"), Part("v_UNI")), groups=heads),
        Matrix(f"{theirs}o_proj.weight", (Part("o_NID", inputs=2),)),
    ]


def swiglu_rules(theirs: str, ours: str) -> list[Rule]:
    """A dense gated feed-forward."""
    names = {"gate_proj": "gate_DF", "up_proj": "up_DF", "down_proj": "down_FD"}
    return [Matrix(f"{theirs}{name}.weight", (Part(ours + own),)) for name, own in names.items()]


def feed_forward_rules(config: ModelConfig, layer: int, family: Family, experts: Experts) -> list[Rule]:
    """The feed-forward of a block."""
    theirs, moe = "mlp.", config.moe
    if not config.is_moe(layer):
        return swiglu_rules(theirs, "")
    router = "router" if family.model_type == "gpt_oss" else "gate"
    rules: list[Rule] = [Matrix(f"{theirs}{router}.weight", (Part("router_DE"),)), experts(f"{theirs}experts.")]
    if moe.bias:
        rules.append(Same(f"{theirs}{router}.bias", "router_bias_E"))
    if moe.selection_bias:
        rules.append(Same(f"{theirs}{router}.e_score_correction_bias", "bias_E"))
    if moe.shared_intermediate_size:
        name = "shared_expert" if moe.shared_gate else "shared_experts"
        rules += swiglu_rules(f"{theirs}{name}.", "shared.")
        if moe.shared_gate:
            rules.append(Matrix(f"{theirs}shared_expert_gate.weight", (Part("shared_gate_D"),)))
    return rules


def experts_layout(config: ModelConfig, family: Family) -> Experts:
    """The layout that a family is written in."""
    if family.model_type == "gpt_oss":
        return lambda theirs: ExpertsInterleaved("", theirs)
    return (lambda theirs: ExpertsFused("", theirs)) if family.fused else (lambda theirs: ExpertsEach("", theirs))


def block_rules(config: ModelConfig, layer: int, family: Family, experts: Experts) -> list[Rule]:
    """All of one block; ours relative to the block, theirs to the layer."""
    norms = {
        "input_layernorm.weight": "attention_norm.weight",
        "post_attention_layernorm.weight": "feed_forward_norm.weight",
    }
    rules: list[Rule] = [Same(theirs, ours) for theirs, ours in norms.items()]
    rules += [rule.within("attention.", "") for rule in attention_rules(config, layer, family)]
    return rules + [rule.within("feed_forward.", "") for rule in feed_forward_rules(config, layer, family, experts)]


def mtp_rules(config: ModelConfig, family: Family, experts: Experts) -> list[Rule]:
    """The multi-token prediction block: beside the model (Qwen) or as one layer more (DeepSeek)."""
    block = block_rules(config, config.mtp_layer, family, experts)
    if family.model_type != "deepseek_v3":
        return [
            Same("mtp.pre_fc_norm_embedding.weight", "mtp.embedding_norm.weight"),
            Same("mtp.pre_fc_norm_hidden.weight", "mtp.hidden_norm.weight"),
            Matrix("mtp.fc.weight", (Part("mtp.join_XD"),)),
            *(rule.within("mtp.block.", "mtp.layers.0.") for rule in block),
            Same("mtp.norm.weight", "mtp.norm.weight"),
        ]
    theirs = f"model.layers.{config.num_layers}."
    return [
        Same(f"{theirs}enorm.weight", "mtp.embedding_norm.weight"),
        Same(f"{theirs}hnorm.weight", "mtp.hidden_norm.weight"),
        Matrix(f"{theirs}eh_proj.weight", (Part("mtp.join_XD"),)),
        *(rule.within("mtp.block.", theirs) for rule in block),
        Same(f"{theirs}shared_head.norm.weight", "mtp.norm.weight"),
        Copy(Same(f"{theirs}embed_tokens.weight", "embedding_VD")),
        Copy(head_rule(config, f"{theirs}shared_head.head.weight")),
    ]


def head_rule(config: ModelConfig, theirs: str) -> Same | Matrix:
    """The output head under a name: the embedding where they are tied."""
    return Same(theirs, "embedding_VD") if config.tied_head else Matrix(theirs, (Part("head_DV"),))


def model_rules(config: ModelConfig, family: Family, experts: Experts | None = None) -> list[Rule]:
    """The whole table of a model in list form. `experts`: the layout of a checkpoint, if not the family's own."""
    experts = experts or experts_layout(config, family)
    rules: list[Rule] = [Same("model.embed_tokens.weight", "embedding_VD"), Same("model.norm.weight", "norm.weight")]
    if not config.tied_head:
        rules.append(head_rule(config, "score.weight" if config.num_labels else "lm_head.weight"))
    for layer in range(config.num_layers):
        prefixes = f"stacks.0.blocks.{layer}.", f"model.layers.{layer}."
        rules += [rule.within(*prefixes) for rule in block_rules(config, layer, family, experts)]
    return rules + (mtp_rules(config, family, experts) if config.mtp_layers else [])
