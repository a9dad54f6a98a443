"""Decode state as a value: it goes into `forward` and a new one comes out."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from model.config import ModelConfig


@struct.dataclass
class Cache:
    """Keys and values of every layer for B rows of up to S positions.

    keys, values: one `[B, K, S, H]` array per layer (never stacked: slicing a stack copies it).
    lengths_B: positions filled in each row; the next token of row b goes to `lengths_B[b]`.
    """

    keys: tuple[Float[Array, "B K S H"], ...]
    values: tuple[Float[Array, "B K S H"], ...]
    lengths_B: Int[Array, " B"]

    @property
    def capacity(self) -> int:
        """Positions that a row can hold (S)."""
        return self.keys[0].shape[2]


def empty_cache(config: ModelConfig, rows: int, capacity: int, dtype: jnp.dtype) -> Cache:
    """A cache of `rows` rows with room for `capacity` positions, nothing filled."""
    shape = (rows, config.num_kv_heads, capacity, config.head_dim)
    layers = range(config.num_layers)
    return Cache(
        keys=tuple(jnp.zeros(shape, dtype) for _ in layers),
        values=tuple(jnp.zeros(shape, dtype) for _ in layers),
        lengths_B=jnp.zeros(rows, jnp.int32),
    )


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
