"""Rounding to bfloat16 at random, so that updates smaller than its steps still count on average.

To the nearest, an update below half a step (1/256 of a weight, or less) is lost each time. Rounded up with the
probability of the distance from below, the expectation is the number itself (arXiv 2010.06192, section 3).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt16

from model.tree import Arrays


def round_at_random(x: Float[Array, "*S"], bits: UInt16[Array, "*S"]) -> Float[Array, "*S"]:
    """float32 `x` in bfloat16: one of its two neighbours, each the likelier the nearer it is; itself where it is one.

    bfloat16 is the upper half of a float32. Sixteen random bits are added to the lower half, which is cut off: the sum
    carries with a probability of exactly lower / 2^16. What is not finite stays so.
    """
    whole = jax.lax.bitcast_convert_type(x, jnp.uint32) + bits.astype(jnp.uint32)
    rounded = jax.lax.bitcast_convert_type((whole >> 16).astype(jnp.uint16), jnp.bfloat16)
    # A NaN of all ones would carry into the sign, and one of low bits alone would be cut to infinity.
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


def store(weights: Arrays, like: Mapping[str, Array], seed: int, step: Array) -> Arrays:
    """float32 weights in the types of those that they replace; bits are a function of seed, step and path alone.

    jax draws them element by element (`jax_threefry_partitionable`), so that each device draws those of its own part,
    and any mesh the same.
    """
    key = jax.random.fold_in(jax.random.key(seed), step)

    def one(name: str, x: Array) -> Array:
        if like[name].dtype == x.dtype:
            return x
        own = jax.random.fold_in(key, zlib.crc32(name.encode()))
        return round_at_random(x, jax.random.bits(own, x.shape, jnp.uint16))

    return {name: one(name, x) for name, x in weights.items()}


def cast(arrays: Mapping[str, Array], dtype: str) -> Arrays:
    """The arrays in another type; the same ones where they have it."""
    return {name: array.astype(dtype) for name, array in arrays.items()}
