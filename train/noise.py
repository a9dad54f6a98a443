"""Noise on embeddings while training on conversations (NEFTune, arXiv 2310.05914, algorithm 1)."""

from __future__ import annotations

import zlib

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from sharding.rules import constrain

OWN = zlib.crc32(b"noise on embeddings")
"""Keeps these keys apart from others of the same seed and step."""


def noise_keys(seed: int, step: Array, rows: int) -> UInt32[Array, "B 2"]:
    """A key for each row of a step's batch, a function of all three alone."""
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), OWN), step)
    return jax.vmap(lambda row: jax.random.key_data(jax.random.fold_in(key, row)))(jnp.arange(rows))


def embedding_noise(
    keys_B2: UInt32[Array, "B 2"], segments_BT: Int[Array, "B T"], width: int, alpha: float
) -> Float[Array, "B T D"]:
    """Uniform in `+- alpha / sqrt(L D)` for the L tokens of each document; 0 for padding. float32.

    jax draws element by element (`jax_threefry_partitionable`), so that any mesh draws the same.
    """
    length = segments_BT.shape[1]

    def row(key_2: Array, segments_T: Array) -> Array:
        tokens = jax.ops.segment_sum(jnp.ones(length), segments_T, length + 1)
        scale_T = jnp.where(segments_T > 0, alpha * jax.lax.rsqrt(tokens[segments_T] * width), 0.0)
        drawn_TD = jax.random.uniform(jax.random.wrap_key_data(key_2), (length, width), minval=-1.0, maxval=1.0)
        return scale_T[:, None] * drawn_TD

    with jax.named_scope("noise"):
        return constrain(jax.vmap(row)(keys_B2, segments_BT), "batch", "length", "embed")
