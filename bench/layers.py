"""Single layers, forward and backward: a layer's experts or attention (`layer`), and Gated DeltaNet (`delta`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from bench.parts import attention_part, experts_part
from bench.shapes import Shape
from bench.timing import Timings
from model.config import LinearAttentionConfig, ModelConfig
from model.layers import Keys
from model.linear_attention import GatedDeltaNet

WIDTH, KEY_HEADS, HEADS, HEAD = 1024, 16, 16, 128
TOKENS = 1024
"""The layer of Qwen3.5-0.8B, on one row."""


def peer_config() -> dict[str, int]:
    """The same sizes in the words of transformers."""
    return {
        "hidden_size": WIDTH,
        "linear_num_key_heads": KEY_HEADS,
        "linear_num_value_heads": HEADS,
        "linear_key_head_dim": HEAD,
        "linear_value_head_dim": HEAD,
    }


def layer(part: str, shape: Shape, repeats: int) -> dict[str, Any]:
    """Tokens per second of the experts or the attention of one layer of `shape`, and of all their gradients."""
    return timed({"experts": experts_part, "attention": attention_part}[part](shape), shape.tokens, repeats)


def delta(repeats: int) -> dict[str, Any]:
    """Tokens per second of the layer and of all its gradients, in float32."""
    linear = LinearAttentionConfig(num_key_heads=KEY_HEADS, num_value_heads=HEADS, key_dim=HEAD, value_dim=HEAD)
    config = ModelConfig(
        hidden_size=WIDTH, num_layers=2, attention_pattern=("linear", "full"), linear=linear, norm="zero_centred"
    )
    graphdef, weights = nnx.split(GatedDeltaNet(config, Keys(jax.random.key(0))))
    x, dy = (jax.random.normal(jax.random.key(seed), (1, TOKENS, WIDTH)) for seed in (1, 2))
    valid, documents = jnp.ones((1, TOKENS), bool), jnp.ones((1, TOKENS), jnp.int32)

    def both(weights: Any, x: jax.Array, dy: jax.Array) -> Any:
        def forward(weights: Any, x: jax.Array) -> jax.Array:
            return nnx.merge(graphdef, weights)(x, valid, documents, None)[0]

        y, pull = jax.vjp(forward, weights, x)
        return y, pull(dy)

    compiled = jax.jit(both)
    return timed(lambda: compiled(weights, x, dy), TOKENS, repeats)


def timed(function: Callable[[], Any], tokens: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of calls, after one to compile and one to warm up."""
    timings = Timings()
    for _ in range(2):
        jax.block_until_ready(function())
    timings.take(lambda: jax.block_until_ready(function()), repeats)
    return {"rates": [tokens / seconds for seconds in timings.seconds], "spans": timings.spans}
