"""The sampler: every parameter is data, one value per row, so that no choice of them compiles anything anew."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, UInt32

from errors import UserError

GREEDY_BELOW = 1e-5
"""Temperatures below this mean the most likely token."""

MAX_SEED = 2**63

LARGEST_TOP_K = 2**24
"""Counts up to here are exact in float32; no vocabulary is larger."""

CHUNK = 128
"""Neighbouring tokens among which the second of the two draws is made."""

BITS_OF_INFINITY = 0x7F800000


@dataclass(frozen=True)
class SamplingParams:
    """How one reply is drawn. Filters act in this order: temperature, top-k, top-p, min-p."""

    temperature: float = 1.0
    """What log-probabilities are divided by; 0 takes the most likely token always."""
    top_k: int = 0
    """Keep the k most likely tokens, and any as likely as the last of them; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities, after top-k, sum to at least this."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the most likely one."""
    seed: int | None = None
    """The same seed and prompt give the same reply; None draws a seed."""
    max_tokens: int = 256
    """The reply ends after this many tokens at the latest."""
    stop_ids: tuple[int, ...] | None = None
    """Tokens that end the reply; None takes the tokenizer's."""

    def __post_init__(self) -> None:
        def check(name: str, good: bool, range_: str) -> None:
            if not good:
                raise UserError(f"{name}={getattr(self, name)} is out of range; it must be {range_}")

        check("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "0 or more")
        check("top_k", self.top_k >= 0, "0 (no limit) or more")
        check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        check("seed", self.seed is None or 0 <= self.seed < MAX_SEED, f"between 0 and {MAX_SEED - 1}")
        check("max_tokens", self.max_tokens >= 1, "1 or more")

    def variants(self, count: int) -> list[SamplingParams]:
        """`count` copies with seeds of their own, following this one's: for several replies to one prompt."""
        first = secrets.randbelow(MAX_SEED) if self.seed is None else self.seed
        return [replace(self, seed=(first + i) % MAX_SEED) for i in range(count)]


@struct.dataclass
class SamplingArrays:
    """`SamplingParams` of B rows as arrays; seeds are the two words of a threefry key."""

    temperature_B: Float[Array, " B"]
    top_k_B: Int[Array, " B"]
    top_p_B: Float[Array, " B"]
    min_p_B: Float[Array, " B"]
    seed_B2: UInt32[Array, "B 2"]


def sampling_arrays(params: Sequence[SamplingParams], rows: int | None = None) -> SamplingArrays:
    """The arrays of `params`, filled up with greedy rows to `rows`; a seed of None is drawn here."""
    filler = SamplingParams(temperature=0.0, seed=0)
    padded = [*params, *[filler] * ((rows or len(params)) - len(params))]
    seeds = [secrets.randbelow(MAX_SEED) if p.seed is None else p.seed for p in padded]
    return SamplingArrays(
        temperature_B=jnp.asarray(np.asarray([p.temperature for p in padded], np.float32)),
        top_k_B=jnp.asarray(np.asarray([min(p.top_k, LARGEST_TOP_K) for p in padded], np.int32)),
        top_p_B=jnp.asarray(np.asarray([p.top_p for p in padded], np.float32)),
        min_p_B=jnp.asarray(np.asarray([p.min_p for p in padded], np.float32)),
        seed_B2=jnp.asarray(np.asarray([(seed >> 32, seed & 0xFFFFFFFF) for seed in seeds], np.uint32)),
    )


def sample(
    logits_BV: Float[Array, "B V"],
    params: SamplingArrays,
    step_B: Int[Array, " B"],
    *,
    vocab_limit: int | None = None,
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """The next token of every row and its log-probability.

    The randomness of a row is `fold_in(key(seed), step)` and nothing else, and what a row gets is computed in
    the same way whatever the other rows ask for: a reply does not depend on its company.

    Args:
        logits_BV: float32.
        params: one value per row.
        step_B: tokens that each row has generated so far.
        vocab_limit: tokens from this one on are never chosen (rows of a padded embedding).

    Returns:
        Tokens, int32, and their log-probabilities under the model's own distribution: before temperature,
        filters and `vocab_limit`, as scoring gives them.
    """
    logits_BV = logits_BV.astype(jnp.float32)
    vocab = logits_BV.shape[1]
    allowed_BV = logits_BV
    if vocab_limit is not None and vocab_limit < vocab:
        allowed_BV = jnp.where(jnp.arange(vocab) < vocab_limit, logits_BV, -jnp.inf)
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
