"""The sampler: every parameter is data, one value per row, so that no choice of them compiles anything anew."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

GREEDY_BELOW = 1e-5
"""Temperatures below this mean the most likely token."""

LARGEST_TOP_K = 2**24
"""Counts up to here are exact in float32; no vocabulary is larger."""

CHUNK = 128
"""Neighbouring tokens among which the second of the two draws is made."""

BITS_OF_INFINITY = 0x7F800000


@struct.dataclass
class SamplingArrays:
    """`SamplingParams` of B rows as arrays; seeds are the two words of a threefry key."""

    temperature_B: Float[Array, " B"]
    top_k_B: Int[Array, " B"]
    top_p_B: Float[Array, " B"]
    min_p_B: Float[Array, " B"]
    seed_B2: UInt32[Array, "B 2"]


def sample(
    logits_BV: Float[Array, "B V"],
    params: SamplingArrays,
    step_B: Int[Array, " B"],
    *,
    allowed_BV: Float[Array, "B V"] | None = None,
    vocab_limit: int | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The next token of every row and its log-probability.

    The randomness of a row is `fold_in(key(seed), step)` and nothing else, and what a row gets is computed in
    the same way whatever the other rows ask for: a reply does not depend on its company.

    Args:
        logits_BV: float32.
        params: one value per row.
        step_B: tokens that each row has generated so far.
        allowed_BV: what to draw from instead of `logits`: the same with bias, penalties and what may not be.
        vocab_limit: tokens from this one on are never chosen (rows of a padded embedding).

    Returns:
        Tokens, int32, and their log-probabilities under the model's own distribution: before bias, penalties,
        temperature, filters and `vocab_limit`, as scoring gives them.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    vocab = logits_BV.shape[1]
    allowed_BV = logits_BV if allowed_BV is None else allowed_BV
    if vocab_limit is not None and vocab_limit < vocab:
        allowed_BV = jnp.where(jnp.arange(vocab) < vocab_limit, allowed_BV, -jnp.inf)
    best_B = allowed_BV.max(axis=-1)
    # Two plain reductions are several times faster on a CPU than one that carries values and indices.
    first_best = jnp.where(allowed_BV == best_B[:, None], jnp.arange(vocab, dtype=jnp.int32), vocab).min(axis=-1)
    greedy_B = jnp.minimum(first_best, vocab - 1)  # without a best (NaN) no index is found
    sampled_B = params.temperature_B >= GREEDY_BELOW
    tokens_B = jax.lax.cond(
        sampled_B.any(),
        lambda: jnp.where(sampled_B, draw(allowed_BV, best_B, sampled_B, params, step_B), greedy_B),
        lambda: greedy_B,
    )
    chosen_B = jnp.take_along_axis(logits_BV, tokens_B[:, None], axis=-1)[:, 0]
    return tokens_B, chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)


def draw(logits_BV: Array, best_B: Array, sampled_B: Bool[Array, " B"], params: SamplingArrays, step_B: Array) -> Array:
    """Draws a token of each row from the filtered distribution; of rows not in `sampled` it draws nonsense."""
    temperature_B = jnp.where(sampled_B, params.temperature_B, 1.0)
    weights_BV = jnp.exp((logits_BV - best_B[:, None]) / temperature_B[:, None])
    # The branches give thresholds alone, equal for a row without filters, so the choice changes nobody's bits.
    lowest_B = jax.lax.cond(
        jnp.any(sampled_B & ((params.top_k_B > 0) | (params.top_p_B < 1))),
        lambda: filter_threshold(logits_BV, weights_BV, params),
        lambda: jnp.full_like(best_B, -jnp.inf),
    )
    keep_BV = (logits_BV >= lowest_B[:, None]) & (weights_BV >= params.min_p_B[:, None])
    keys_B = jax.random.wrap_key_data(params.seed_B2, impl="threefry2x32")
    return categorical(jax.vmap(jax.random.fold_in)(keys_B, step_B), jnp.where(keep_BV, weights_BV, 0.0))


def categorical(keys_B: Array, weights_BV: Float[Array, "B V"]) -> Int[Array, " B"]:
    """A token of each row with probability proportional to its weight; never one of weight 0.

    First a chunk of the vocabulary is drawn by its total weight, then a token within it, both by the Gumbel
    trick: V / 128 + 128 random numbers a row instead of V.
    """
    rows, vocab = weights_BV.shape
    weights_BV = jnp.pad(weights_BV, ((0, 0), (0, -vocab % CHUNK)))
    chunks = weights_BV.reshape(rows, -1, CHUNK)

    def pick(key: Array, chunks: Array) -> Array:
        totals = chunks.sum(axis=-1)
        noise = jax.random.gumbel(key, (totals.size + CHUNK,), mode="high")
        chunk = jnp.argmax(jnp.log(totals) + noise[CHUNK:])
        own = jax.lax.dynamic_index_in_dim(chunks, chunk, keepdims=False)
        return (chunk * CHUNK + jnp.argmax(jnp.log(own) + noise[:CHUNK])).astype(jnp.int32)

    return jax.vmap(pick)(keys_B, chunks)


def filter_threshold(logits_BV: Array, weights_BV: Array, params: SamplingArrays) -> Float[Array, " B"]:
    """The smallest logit that top-k and top-p keep in each row; minus infinity where they keep all."""
    ones_BV = jnp.ones_like(weights_BV)
    kth_B = largest_threshold(logits_BV, ones_BV, params.top_k_B.astype(jnp.float32))
    kth_B = jnp.where(params.top_k_B > 0, kth_B, -jnp.inf)
    weights_BV = jnp.where(logits_BV >= kth_B[:, None], weights_BV, 0.0)
    nucleus_B = largest_threshold(logits_BV, weights_BV, params.top_p_B * weights_BV.sum(axis=-1))
    return jnp.where(params.top_p_B < 1, jnp.maximum(kth_B, nucleus_B), kth_B)


def largest_threshold(values_BV: Array, weights_BV: Array, wanted_B: Array) -> Float[Array, " B"]:
    """The largest t of each row such that `sum(weights where values >= t) >= wanted`; -inf if there is none.

    Bisects over all float32 numbers, in their order as integers: exact, with 32 passes over the vocabulary and
    no sort. Float sums taken in a fixed order never decrease when a term is added, so bisection is sound.
    """

    def halve(_: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low_B, high_B = bounds
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)
        above_BV = values_BV >= float_of_order(middle_B)[:, None]
        enough_B = jnp.where(above_BV, weights_BV, 0.0).sum(axis=-1) >= wanted_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    low_B = jnp.full(wanted_B.shape, -BITS_OF_INFINITY - 1, jnp.int32)
    high_B = jnp.full(wanted_B.shape, BITS_OF_INFINITY, jnp.int32)
    return float_of_order(jax.lax.fori_loop(0, 32, halve, (low_B, high_B))[0])


def float_of_order(order: Int[Array, "*B"]) -> Float[Array, "*B"]:
    """The float32 at a place in the order of all of them: -inf at `-BITS_OF_INFINITY - 1`, 0 at 0, inf at the end.

    The places of subnormal numbers hold 0: many processors take them for that when comparing.
    """
    bits = jnp.where(order >= 0, order, order ^ 0x7FFFFFFF)
    normal = (bits & BITS_OF_INFINITY) > 0
    return jax.lax.bitcast_convert_type(jnp.where(normal, bits, 0), jnp.float32)
