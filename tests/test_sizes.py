"""Law: a configuration's arithmetic is that of the module it describes, and the named sizes are the published ones."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import ClosedJaxpr, Jaxpr

from errors import UserError
from model.cache import empty_cache
from model.config import LatentAttentionConfig, LinearAttentionConfig, ModelConfig, MoEConfig
from model.forward import continuation, forward, unembed
from model.sizes import NAMED, named
from model.transformer import Transformer
from model.tree import Skeleton

# Billions of parameters: in all, and used by one token (chosen and shared experts, and both embeddings; a tied
# embedding counts once). One number where every parameter is used.
PUBLISHED: dict[str, float | tuple[float, float]] = {
    "Qwen2.5-0.5B": 0.494,
    "Qwen2.5-1.5B": 1.544,
    "Qwen2.5-3B": 3.086,
    "Qwen2.5-7B": 7.616,
    "Qwen2.5-14B": 14.77,
    "Qwen2.5-32B": 32.76,
    "Qwen2.5-72B": 72.71,
    "Qwen1.5-MoE-A2.7B": (14.32, 2.69),
    "Qwen2-57B-A14B": (57.41, 14.25),
    "Qwen3-0.6B": 0.596,
    "Qwen3-1.7B": 1.721,
    "Qwen3-4B": 4.022,
    "Qwen3-4B-2507": 4.022,
    "Qwen3-8B": 8.191,
    "Qwen3-14B": 14.768,
    "Qwen3-32B": 32.762,
    "Qwen3-30B-A3B": (30.53, 3.35),
    "Qwen3-30B-A3B-2507": (30.53, 3.35),
    "Qwen3-235B-A22B": (235.09, 22.19),
    "Qwen3-235B-A22B-2507": (235.09, 22.19),
    "Qwen3-Coder-30B-A3B": (30.53, 3.35),
    "Qwen3-Coder-480B-A35B": (480.15, 35.47),
    "Qwen3-Next-80B-A3B": (79.67, 3.87),
    "Qwen3.5-0.8B": 0.75,
    "Qwen3.5-2B": 1.88,
    "Qwen3.5-4B": 4.21,
    "Qwen3.5-9B": 8.95,
    "Qwen3.5-27B": 26.9,
    "Qwen3.6-27B": 26.9,
    "Qwen3.8-27B": 26.9,
    "Qwen3.5-35B-A3B": (34.66, 3.45),
    "Qwen3.6-35B-A3B": (34.66, 3.45),
    "Qwen3.5-122B-A10B": (122.11, 9.77),
    "Qwen3.5-397B-A17B": (396.35, 17.35),
    "Qwen3.8-2.4T-A95B": (2419.8, 95.29),
    "Llama-3.1-405B": 405.85,
    "DeepSeek-V3": (671.03, 37.55),
    "gpt-oss-20b": (20.91, 3.61 + 201_088 * 2880 / 1e9),  # published without the input embedding
    "gpt-oss-120b": (116.83, 5.13 + 201_088 * 2880 / 1e9),
    "OLMoE-1B-7B": (6.92, 1.28),
}

TINY = ModelConfig(
    vocab_size=32,
    hidden_size=8,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=16,
    qk_norm=False,
)
ROUTED = MoEConfig(num_experts=6, experts_per_token=2, intermediate_size=10)
VARIANTS = {
    "plain": TINY,
    "qk_norm": replace(TINY, qk_norm=True),
    "bias": replace(TINY, qkv_bias=True),
    "gate": replace(TINY, attention_gate=True),
    "tied": replace(TINY, tie_embeddings=True),
    "routed": replace(TINY, moe=ROUTED),
    "shared": replace(TINY, moe=replace(ROUTED, shared_intermediate_size=12)),
    "shared_ungated": replace(TINY, moe=replace(ROUTED, shared_intermediate_size=12, shared_gate=False)),
    "alternating": replace(TINY, num_layers=4, moe=replace(ROUTED, every=2)),
    "dense_first": replace(TINY, num_layers=4, moe=replace(ROUTED, dense_layers=(0,))),
    "grouped": replace(TINY, moe=replace(ROUTED, score="sigmoid", num_groups=3, groups_per_token=2)),
    "biased_choice": replace(TINY, moe=replace(ROUTED, selection_bias=True)),
    "hybrid": replace(
        TINY,
        num_layers=4,
        attention_pattern=("linear", "full"),
        linear=LinearAttentionConfig(num_key_heads=2, num_value_heads=4, key_dim=4, value_dim=6),
        attention_gate=True,
        norm="zero_centred",
    ),
    "latent": replace(
        TINY, latent=LatentAttentionConfig(kv_rank=6, query_rank=10, nope_dim=6, rope_dim=4, value_dim=5)
    ),
    "latent_direct": replace(TINY, latent=LatentAttentionConfig(kv_rank=6, nope_dim=6, rope_dim=4, value_dim=5)),
    "sinks": replace(
        TINY,
        attention_pattern=("sliding", "full"),
        sliding_window=5,
        sinks=True,
        qkv_bias=True,
        output_bias=True,
        moe=replace(ROUTED, bias=True, activation="clamped"),
    ),
    "whole_norm": replace(TINY, qk_norm=True, qk_norm_whole=True, qkv_clip=1.0),
    "mtp": replace(TINY, moe=ROUTED, mtp_layers=1),
}


def abstract(config: ModelConfig, *, stacked: bool = False) -> Transformer:
    """The module, holding shapes: allocates nothing."""
    return jax.eval_shape(lambda key: Transformer(config, key, stacked=stacked), jax.random.key(0))


def test_every_named_size_is_checked():
    assert NAMED.keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_totals(name: str):
    published = PUBLISHED[name]
    total, active = published if isinstance(published, tuple) else (published, published)
    config = named(name)
    # To a thousandth, or to the digits that were published.
    assert config.parameters_total / 1e9 == pytest.approx(total, rel=1e-3, abs=0.0055)
    assert config.parameters_active / 1e9 == pytest.approx(active, rel=1e-3, abs=0.0055)


def test_names_are_found_whatever_their_case():
    assert named("qwen3-30b-a3b") is NAMED["Qwen3-30B-A3B"]


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match=r"'Qwen3-30B-A4B'; did you mean 'Qwen3-30B-A3B'\?"):
        named("Qwen3-30B-A4B")
    with pytest.raises(UserError, match=r"did you mean 'Llama-3\.1-405B'"):
        named("llama-3.1-405")


def test_what_sets_the_families_apart():
    assert named("Qwen2.5-7B").qkv_bias
    assert not named("Qwen2.5-7B").qk_norm
    assert not named("Qwen3-8B").qkv_bias
    assert named("Qwen3-8B").qk_norm
    assert not named("Qwen2-57B-A14B").moe.normalize
    assert named("Qwen3-235B-A22B").moe.normalize
    assert named("Qwen3-235B-A22B").moe.shared_intermediate_size == 0
    assert named("Qwen3-Coder-480B-A35B").rope.theta == 1e7
    assert named("Llama-3.1-405B").rope.scaling == "llama3"
    assert {name for name, config in NAMED.items() if config.tie_embeddings} == {
        *("Qwen2.5-0.5B", "Qwen2.5-1.5B", "Qwen2.5-3B"),
        *("Qwen3-0.6B", "Qwen3-1.7B", "Qwen3-4B", "Qwen3-4B-2507"),
        *("Qwen3.5-0.8B", "Qwen3.5-2B", "Qwen3.5-4B"),
    }


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_parameters_are_the_modules_elements(name: str, stacked: bool):
    skeleton = Skeleton(abstract(VARIANTS[name], stacked=stacked))
    weights = [skeleton.shapes[path] for path in skeleton.weights]
    assert VARIANTS[name].parameters_total + VARIANTS[name].mtp_parameters == sum(map(prod, weights))
    assert (len(weights) < len(skeleton.shapes)) == VARIANTS[name].moe.selection_bias


@pytest.mark.parametrize(
    "name",
    ["Qwen3-235B-A22B", "Qwen1.5-MoE-A2.7B", "Llama-3.1-405B", "Qwen3.8-2.4T-A95B", "DeepSeek-V3", "gpt-oss-120b"],
)
def test_parameters_of_a_published_size_are_the_modules_elements(name: str):
    skeleton, config = Skeleton(abstract(NAMED[name], stacked=True)), NAMED[name]
    assert config.parameters_total + config.mtp_parameters == sum(prod(skeleton.shapes[n]) for n in skeleton.weights)


def test_active_parameters_leave_out_the_experts_not_chosen():
    config = VARIANTS["alternating"]
    unused = (6 - 2) * 3 * 8 * 10  # experts not chosen x three matrices of 8 x 10
    assert config.parameters_active == config.parameters_total - 2 * unused
    assert TINY.parameters_active == TINY.parameters_total


def test_flops_by_hand():
    # Two per weight of: queries 8x16, keys 8x8, values 8x8, output 16x8, three feed-forward matrices 8x16, two
    # norms of 8, in each of 2 layers; the final norm and the head 8x32. Scores and values over 10 positions:
    # four per channel of 4 heads of 4, in each layer.
    layer = 128 + 64 + 64 + 128 + 3 * 128 + 2 * 8
    assert TINY.flops_per_token(10) == 2 * (2 * layer + 8 + 256) + 4 * 2 * 16 * 10
    # Tied, the same head is multiplied.
    assert VARIANTS["tied"].flops_per_token(10) == TINY.flops_per_token(10)
    # Routed: two experts 8x10 of six, and the router 8x6, in place of the feed-forward.
    change = 2 * 3 * 80 + 48 - 3 * 128
    assert VARIANTS["routed"].flops_per_token(10) == TINY.flops_per_token(10) + 2 * 2 * change


def products(jaxpr: Any, times: int = 1) -> Iterator[float]:
    """Floating-point operations of each matrix product of a program, loops of known length unrolled."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            yield 2.0 * times * prod(equation.outvars[0].aval.shape) * prod(shape[axis] for axis in contracted)
        inner = times * equation.params.get("length", 1) if equation.primitive.name == "scan" else times
        for value in equation.params.values():
            if isinstance(value, ClosedJaxpr | Jaxpr):
                yield from products(getattr(value, "jaxpr", value), inner)


@pytest.mark.parametrize("name", ["plain", "gate", "tied", "routed", "shared", "dense_first", "whole_norm"])
def test_flops_are_those_of_one_decoded_token(name: str):
    """One token against a full cache multiplies exactly what it uses; norms are the small rest."""
    config = replace(VARIANTS[name], hidden_size=64, head_dim=16, intermediate_size=96, vocab_size=256)

    def decode(model: Transformer) -> jax.Array:
        token = jnp.zeros((1, 1), jnp.int32)
        cache = empty_cache(config, 1, 50, jnp.dtype(jnp.float32))
        return unembed(model, forward(model, continuation(token, cache.lengths_B), cache).hidden_BTD)

    counted = sum(products(jax.make_jaxpr(decode)(abstract(config)).jaxpr))
    assert config.flops_per_token(50) == pytest.approx(counted, rel=0.01)


def test_cache_bytes():
    # Keys and values of 4 heads of 128 in 48 layers, two bytes each.
    assert named("Qwen3-30B-A3B").kv_bytes_per_token(2) == 2 * 4 * 128 * 48 * 2
    config = VARIANTS["alternating"]
    cache = empty_cache(config, rows=3, capacity=7, dtype=jnp.dtype(jnp.float32))
    assert sum(array.nbytes for array in jax.tree.leaves(cache.layers)) == 3 * 7 * config.kv_bytes_per_token(4)
