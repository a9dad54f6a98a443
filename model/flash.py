"""Attention of a piece of a sequence to another piece, in a form whose results can be put together.

FlashAttention-2, arXiv 2307.08691: the output over some keys and the logarithm of their sum are enough to add others;
the gradient needs the scores again, and no more.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sharding.context_parallel import AXIS, ring_attention
from sharding.mesh import ContextExchange

MASKED = -1e30
"""Score of a key that may not be seen; finite, so that a row without any key gives no NaN."""

BLOCK = 512
"""Queries attended at a time: no more than their scores exist at once."""


def over_context(
    q_BKGTH: Float[Array, "B K G T H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSI: Float[Array, "B K S I"],
    segments_BT: Int[Array, "B T"],
    sinks_KG: Float[Array, "K G"] | None,
    window: int | None,
    exchange: ContextExchange,
) -> Float[Array, "B K G T I"]:
    """Causal attention within documents of a sequence cut over devices; queries are scaled already.

    With `all_gather` every device has all keys for a while, and reads them all for each of its queries.
    """
    out: Array
    lse: Array
    # Masks that depend on queries: jax would make all of them ahead, before the first layer, and keep them.
    q_BKGTH, segments_BT = jax.lax.optimization_barrier((q_BKGTH, segments_BT))
    attend, pull = partial(attend_piece, window=window), partial(pull_piece, window=window)
    if exchange == "ring" and segments_BT.shape[1] % 2 == 0:
        out, lse = ring_attention(q_BKGTH, k_BKSH, v_BKSI, segments_BT, attend, pull)
    else:
        gathered = [jax.lax.all_gather(x, AXIS, axis=axis, tiled=True) for x, axis in ((k_BKSH, 2), (v_BKSI, 2))]
        segments_BS = jax.lax.all_gather(segments_BT, AXIS, axis=1, tiled=True)
        start = jax.lax.axis_index(AXIS) * segments_BT.shape[1]
        out, lse = to_all_keys(q_BKGTH, *gathered, segments_BT, segments_BS, start, window)
    if sinks_KG is not None:
        out *= jax.nn.sigmoid(lse - sinks_KG.astype(jnp.float32)[..., None])[..., None]
    return out.astype(q_BKGTH.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def to_all_keys(
    q: Array, k: Array, v: Array, q_segments: Array, k_segments: Array, q_start: Array, window: int | None
) -> tuple[Array, Array]:
    """`attend_piece` to the keys of whole rows, with its gradient."""
    return attend_piece(q, k, v, q_segments, k_segments, q_start, 0, window)


def _forward(
    q: Array, k: Array, v: Array, q_segments: Array, k_segments: Array, q_start: Array, window: int | None
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
    out, lse = attend_piece(q, k, v, q_segments, k_segments, q_start, 0, window)
    return (out, lse), (q, k, v, q_segments, k_segments, q_start, out, lse)


def _backward(window: int | None, saved: tuple[Array, ...], cotangents: tuple[Array, Array]) -> tuple[Any, ...]:
    q, k, v, q_segments, k_segments, q_start, out, lse = saved
    d_out, d_lse = cotangents
    delta = jnp.sum(out * d_out, axis=-1) - d_lse
    gradients = pull_piece(q, k, v, q_segments, k_segments, q_start, 0, lse, delta, d_out, window)
    return *(d.astype(x.dtype) for d, x in zip(gradients, (q, k, v), strict=True)), None, None, None


to_all_keys.defvjp(_forward, _backward)


def _visible(q_segments, k_segments, q_start, k_start, window: int | None) -> Array:
    """`[B, T, S]`: keys up to each query, within the window and its document."""
    queries = (q_start + jnp.arange(q_segments.shape[1]))[:, None]
    keys = k_start + jnp.arange(k_segments.shape[1])
    seen = keys <= queries
    if window is not None:
        seen &= keys > queries - window
    return seen & (q_segments[:, :, None] == k_segments[:, None, :])


def _scores(q_BKGTH: Array, k_BKSH: Array, seen_BTS: Array) -> Array:
    scores = jnp.einsum("bkgth,bksh->bkgts", q_BKGTH, k_BKSH, preferred_element_type=jnp.float32)
    return jnp.where(seen_BTS[:, None, None], scores, MASKED)


def attend_piece(
    q_BKGTH: Array,
    k_BKSH: Array,
    v_BKSI: Array,
    q_segments: Array,
    k_segments: Array,
    q_start: Array | int,
    k_start: Array | int,
    window: int | None = None,
) -> tuple[Float[Array, "B K G T I"], Float[Array, "B K G T"]]:
    """Output over these keys alone, float32, and the logarithm of the sum of exponentials of their scores."""

    def block(rows: tuple[Array, ...]) -> tuple[Array, Array]:
        q, segments, start = rows
        scores = _scores(q, k_BKSH, _visible(segments, k_segments, start, k_start, window))
        lse = jax.nn.logsumexp(scores, axis=-1)
        shares = jnp.exp(scores - lse[..., None]).astype(v_BKSI.dtype)
        return jnp.einsum("bkgts,bksi->bkgti", shares, v_BKSI, preferred_element_type=jnp.float32), lse

    out, lse = jax.lax.map(block, _blocks(q_BKGTH, q_segments, q_start))
    return _join(out), _join(lse)


def pull_piece(
    q_BKGTH: Array,
    k_BKSH: Array,
    v_BKSI: Array,
    q_segments: Array,
    k_segments: Array,
    q_start: Array | int,
    k_start: Array | int,
    lse_BKGT: Array,
    delta_BKGT: Array,
    d_out_BKGTI: Array,
    window: int | None = None,
) -> tuple[Array, Array, Array]:
    """Gradients of queries, keys and values, float32; appendix B.2 of FlashAttention, arXiv 2205.14135.

    Args:
        lse: over all keys of the queries. delta: `sum(out * d_out)`, less the gradient of lse.
    """

    def block(carry: tuple[Array, Array], rows: Any) -> tuple[tuple[Array, Array], Array]:
        d_k, d_v = carry
        (q, segments, start), (lse, delta, d_out) = rows
        scores = _scores(q, k_BKSH, _visible(segments, k_segments, start, k_start, window))
        shares = jnp.exp(scores - lse[..., None])
        d_out = d_out.astype(v_BKSI.dtype)
        d_v += jnp.einsum("bkgts,bkgti->bksi", shares.astype(d_out.dtype), d_out, preferred_element_type=jnp.float32)
        d_shares = jnp.einsum("bkgti,bksi->bkgts", d_out, v_BKSI, preferred_element_type=jnp.float32)
        d_scores = (shares * (d_shares - delta[..., None])).astype(q.dtype)
        d_k += jnp.einsum("bkgts,bkgth->bksh", d_scores, q, preferred_element_type=jnp.float32)
        return (d_k, d_v), jnp.einsum("bkgts,bksh->bkgth", d_scores, k_BKSH, preferred_element_type=jnp.float32)

    zeros = (jnp.zeros(k_BKSH.shape, jnp.float32), jnp.zeros(v_BKSI.shape, jnp.float32))
    size = _block_size(q_BKGTH.shape[3])
    more = tuple(_split(x, size, 3) for x in (lse_BKGT, delta_BKGT, d_out_BKGTI))
    (d_k, d_v), d_q = jax.lax.scan(block, zeros, (_blocks(q_BKGTH, q_segments, q_start), more))
    return _join(d_q), d_k, d_v


def _block_size(length: int) -> int:
    return next(size for size in range(min(BLOCK, length), 0, -1) if length % size == 0)


def _split(x: Array, size: int, axis: int) -> Array:
    """Blocks of `size` along `axis`, in a new dimension in front."""
    return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, size, *x.shape[axis + 1 :]), axis, 0)


def _blocks(q_BKGTH: Array, segments_BT: Array, start: Array | int) -> tuple[Array, Array, Array]:
    length = segments_BT.shape[1]
    size = _block_size(length)
    return _split(q_BKGTH, size, 3), _split(segments_BT, size, 1), start + jnp.arange(0, length, size)


def _join(blocks: Array) -> Array:
    """The inverse of `_split` along the queries, dimension 3."""
    moved = jnp.moveaxis(blocks, 0, 3)
    return moved.reshape(*moved.shape[:3], -1, *moved.shape[5:])
