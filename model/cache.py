"""Decode state as a value: it goes into `forward` and a new one comes out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int

from model.config import ModelConfig


@struct.dataclass
class Cache:
    """What every layer remembers of B rows of up to S positions.

    layers: of each layer its arrays, never stacked (slicing a stack copies it): keys and values `[B, K, S, H]`;
    or latents `[B, 1, S, U+P]`; or, in a linear layer, its convolutions' inputs and its memory.
    lengths_B: positions filled in each row; the next token of row b goes to `lengths_B[b]`.
    capacity: positions that a row can hold (S).
    empty: nothing was written yet, so that the first batch has only itself to attend to.
    """

    layers: tuple[tuple[Array, ...], ...]
    lengths_B: Int[Array, " B"]
    capacity: int = struct.field(pytree_node=False)
    empty: bool = struct.field(pytree_node=False, default=False)


def empty_cache(config: ModelConfig, rows: int, capacity: int, dtype: jnp.dtype) -> Cache:
    """A cache of `rows` rows with room for `capacity` positions, nothing filled."""
    layers = tuple(empty_layer(config, layer, rows, capacity, dtype) for layer in range(config.num_layers))
    return Cache(layers, jnp.zeros(rows, jnp.int32), capacity, empty=True)


def empty_layer(config: ModelConfig, layer: int, rows: int, capacity: int, dtype: jnp.dtype) -> tuple[Array, ...]:
    """What layer `layer` remembers before the first token."""
    linear, latent = config.linear, config.latent
    if config.attention_kind(layer) == "linear":
        past, N = linear.conv_kernel - 1, linear.num_value_heads
        keys = jnp.zeros((rows, past, linear.num_key_heads, linear.key_dim), dtype)
        values = jnp.zeros((rows, past, N, linear.value_dim), dtype)
        return keys, keys, values, jnp.zeros((rows, N, linear.key_dim, linear.value_dim), jnp.float32)
    if latent.kv_rank:
        return (jnp.zeros((rows, 1, capacity, latent.kv_rank + latent.rope_dim), dtype),)
    empty = jnp.zeros((rows, config.num_kv_heads, capacity, config.head_dim), dtype)
    return empty, empty


def layer_axes(config: ModelConfig, layer: int) -> tuple[tuple[str | None, ...], ...]:
    """Logical axes of what `empty_layer` gives."""
    if config.attention_kind(layer) == "linear":
        keys, values = ("batch", None, "kv_heads", "head_dim"), ("batch", None, "heads", "head_dim")
        return keys, keys, values, ("batch", "heads", None, "head_dim")
    if config.latent.kv_rank:
        return (("batch", None, None, "head_dim"),)
    return (("batch", "kv_heads", None, "head_dim"),) * 2


def write_positions(lengths_B: Array, segments_BT: Array, capacity: int) -> Int[Array, "B T"]:
    """Where each new token goes in its row; padding (segment 0) gets `capacity`, out of range, and is dropped."""
    real_BT = segments_BT > 0
    index_BT = lengths_B[:, None] + jnp.cumsum(real_BT, axis=1, dtype=jnp.int32) - 1
    return jnp.where(real_BT, index_BT, capacity)


def write(stored_BKSH: jax.Array, new_BTKH: jax.Array, index_BT: jax.Array) -> jax.Array:
    """`stored` with `new` written at `index` of each row; out-of-range positions are dropped."""
    if index_BT.size == 1:
        # XLA makes a slice update of a single write, and copies the whole cache around it; two it does in place.
        index_BT = jnp.concatenate([index_BT, jnp.full_like(index_BT, stored_BKSH.shape[2])], axis=1)
        new_BTKH = jnp.concatenate([new_BTKH, new_BTKH], axis=1)
    rows_B1 = jnp.arange(stored_BKSH.shape[0])[:, None]
    return stored_BKSH.at[rows_B1, :, index_BT].set(new_BTKH.astype(stored_BKSH.dtype), mode="drop")
