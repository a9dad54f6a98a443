"""Attention of new tokens to the pages of their rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model import cache as kv
from model.flash import MASKED
from sharding.mesh import platform
from sharding.rules import on_own_parts

Stored = tuple[Array, ...]
Read = Callable[[Stored, Array], tuple[Array, Array]]

GROUPED = ("batch", "kv_heads", None, "length", "head_dim")
"""Logical axes of queries `[B, K, G, T, H]`."""


def attend_to_pages(
    q_BTNH: Float[Array, "B T N H"],
    stored: Stored,
    paging: kv.Paging,
    scale: float,
    window: int | None,
    sinks_N: Float[Array, " N"] | None,
) -> Float[Array, "B T N H"]:
    """Attention of each row's newest tokens, whose keys and values are in its pages already, to all of the row.

    By a kernel that reads pages where they lie, or page by page.
    """
    batch, queries, heads, width = q_BTNH.shape
    together = len(stored) == 1
    if together and sinks_N is None:
        from model.kernels import paged  # a second of imports, which only TPUs need

        if paged.fits(width):
            axes = ("batch", "length", "heads", "head_dim")
            found = on_own_parts(
                lambda q, pages, lengths, table: paged.attend(q, pages, lengths, table, scale, window),
                (q_BTNH, stored[0], paging.lengths_B, paging.table_BX),
                (axes, kv.PAIRS, ("batch",), kv.TABLE),
                axes,
            )
            if found is not None:
                return found
    kv_heads = stored[0].shape[2] // 2 if together else stored[0].shape[1]
    grouped = (batch, queries, kv_heads, heads // kv_heads, width)
    q_BKGTH = (q_BTNH * scale).reshape(grouped).transpose(0, 2, 3, 1, 4)
    sinks_KG = None if sinks_N is None else sinks_N.reshape(kv_heads, -1)
    read, axes = (_pairs, (kv.PAIRS,)) if together else (_keys_and_values, (kv.KEYS,) * len(stored))
    out_BKGTH = page_by_page(q_BKGTH, stored, axes, read, paging, window, sinks_KG, GROUPED)
    return out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, -1)


def _pairs(stored: Stored, pages_M: Array) -> tuple[Array, Array]:
    x_MpXH = jnp.take(stored[0], pages_M, axis=0, mode="clip")
    return x_MpXH[:, :, ::2].swapaxes(1, 2), x_MpXH[:, :, 1::2].swapaxes(1, 2)


def _keys_and_values(stored: Stored, pages_M: Array) -> tuple[Array, Array]:
    k_MKpH, v_MKpH = kv.taken(stored, pages_M, 2)
    return k_MKpH, v_MKpH


def page_by_page(
    q_BKGTH: Float[Array, "B K G T H"],
    stored: Stored,
    stored_axes: tuple[tuple[str | None, ...], ...],
    read: Read,
    paging: kv.Paging,
    window: int | None,
    sinks_KG: Float[Array, "K G"] | None,
    axes: tuple[str | None, ...],
) -> Float[Array, "B K G T I"]:
    """Attention, some pages of each row at a time, as far as the longest row reaches (FlashAttention-2, algorithm 1).

    Pages behind a row's end leave its bits as they are: a reply does not depend on the length of its company.

    Args:
        q_BKGTH: scaled. stored_axes: logical axes of `stored`. read: keys `[M, K, page, H]` and values of M pages.
        axes: logical axes of the queries and of the result.
    """

    def local(q: Array, index_BT: Array, reach_B: Array, table_BX: Array, sinks: Array | None, *stored: Array) -> Array:
        attend = partial(_attend, read=read, page=paging.page, window=window)
        return attend(q, stored, index_BT, reach_B, table_BX, sinks)

    args = (q_BKGTH, paging.index_BT, paging.reach_B, paging.table_BX, sinks_KG, *stored)
    args_axes = (axes, kv.TOKENS, ("batch",), kv.TABLE, (axes[1], axes[2]), *stored_axes)
    found = on_own_parts(local, args, args_axes, axes)
    if found is None:
        raise ValueError(f"{[x.shape for x in args if x is not None]} do not divide over the mesh in force")
    return found


def _attend(
    q_BKGTH: Array,
    stored: Stored,
    index_BT: Int[Array, "B T"],
    reach_B: Int[Array, " B"],
    table_BX: Int[Array, "B X"],
    sinks_KG: Array | None,
    *,
    read: Read,
    page: int,
    window: int | None,
) -> Array:
    batch, kv_heads, groups, queries, _ = q_BKGTH.shape
    # On a CPU one page of each row stays in its cache; elsewhere a few make products that are worth a kernel.
    together = 1 if platform() == "cpu" else min(8, table_BX.shape[1])
    table_BX = jnp.pad(table_BX, ((0, 0), (0, -table_BX.shape[1] % together)))
    # G and T form one dimension: with two, XLA transposes the keys first.
    q_BKYH = q_BKGTH.reshape(batch, kv_heads, groups * queries, -1)
    index_BY = jnp.tile(index_BT, (1, groups))
    span = together * page

    def pages(place: Array) -> tuple[Array, Array]:
        numbers_BX = jax.lax.dynamic_slice_in_dim(table_BX, place * together, together, axis=1)
        parts = (x.astype(q_BKGTH.dtype) for x in read(stored, numbers_BX.reshape(-1)))
        if together == 1:
            k, v = parts
            return k, v
        k, v = (
            x.reshape(batch, together, kv_heads, page, -1).swapaxes(1, 2).reshape(batch, kv_heads, span, -1)
            for x in parts
        )
        return k, v

    def step(place: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        top, total, out = carry
        k_BKpH, v_BKpI = pages(place)
        scores = jnp.einsum("bkyh,bkph->bkyp", q_BKYH, k_BKpH, preferred_element_type=jnp.float32)
        keys = place * span + jnp.arange(span)
        seen = keys <= index_BY[:, :, None]
        if window is not None:
            seen &= keys > index_BY[:, :, None] - window
        scores = jnp.where(seen[:, None], scores, MASKED)
        higher = jnp.maximum(top, scores.max(-1))
        kept, shares = jnp.exp(top - higher), jnp.exp(scores - higher[..., None])
        added = jnp.einsum("bkyp,bkpi->bkyi", shares.astype(v_BKpI.dtype), v_BKpI, preferred_element_type=jnp.float32)
        return higher, total * kept + shares.sum(-1), out * kept[..., None] + added

    width = jax.eval_shape(pages, jnp.int32(0))[1].shape[-1]
    empty = jnp.zeros((batch, kv_heads, groups * queries), jnp.float32)
    if sinks_KG is None:
        start = (empty + MASKED, empty)
    else:  # one more logit, with a value of zero
        start = (jnp.broadcast_to(jnp.repeat(sinks_KG.astype(jnp.float32), queries, axis=1), empty.shape), empty + 1)
    first = 0 if window is None else jnp.maximum(index_BT.min() - window + 1, 0) // span
    last = -(-reach_B.max() // span)
    out = jnp.zeros((*empty.shape, width), jnp.float32)
    _, total, out = jax.lax.fori_loop(first, last, step, (*start, out))
    out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return out.reshape(batch, kv_heads, groups, queries, width).astype(q_BKGTH.dtype)
