"""Attention to pages of keys and values by jax's ragged paged attention for TPUs; its plain twin reads copies of them.

Each page is read where it lies, and pages behind a row's end are not read (arXiv 2309.06180; kernel: jax's own).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import kernel
from jaxtyping import Array, Float, Int

from model.kernels import exact_products

LANES = 128
"""Widths of heads that the kernel takes are multiples of this."""

VMEM = 32 * 2**20
"""Bytes of its fast memory that the kernel may take; with the default 64 heads do not fit."""


BLOCK, QUERIES = 2**21, 32
"""Bytes of pages, and queries, that the kernel takes at a time."""


def fits(width: int) -> bool:
    """Whether the kernel takes heads of this width."""
    return width % LANES == 0


def arguments(
    q_BTNH: Float[Array, "B T N H"], lengths_B: Int[Array, " B"], table_BX: Int[Array, "B X"]
) -> tuple[Array, ...]:
    """The kernel's arguments beside the pages: queries of all rows one after the other, and where each row begins.

    Padding counts as tokens: what it gets means nothing, and tokens before it do not see it.
    """
    rows, queries = q_BTNH.shape[:2]
    starts = jnp.arange(rows + 1, dtype=jnp.int32) * queries
    return q_BTNH.reshape(-1, *q_BTNH.shape[2:]), lengths_B + queries, table_BX, starts, jnp.array([rows], jnp.int32)


def attend(
    q_BTNH: Float[Array, "B T N H"],
    pages: Float[Array, "P page 2K H"],
    lengths_B: Int[Array, " B"],
    table_BX: Int[Array, "B X"],
    scale: float,
    window: int | None,
) -> Float[Array, "B T N H"]:
    """Causal attention of each row's T newest tokens, which are in its pages already, to all of the row.

    Args:
        lengths_B: positions of each row before these tokens.
        window: positions that a query sees, itself included; None for all before it.
    """
    q_MNH, kv_lens, table, starts, count = arguments(q_BTNH, lengths_B, table_BX)
    with exact_products(q_BTNH.dtype):
        out_MNH = kernel.ragged_paged_attention(
            q_MNH,
            pages,
            kv_lens,
            table,
            starts,
            count,
            sm_scale=scale,
            sliding_window=window,
            num_kv_pages_per_block=min(table.shape[1], max(1, BLOCK * len(pages) // pages.nbytes)),
            num_queries_per_block=min(len(q_MNH), QUERIES),
            vmem_limit_bytes=VMEM,
        )
    return out_MNH.reshape(q_BTNH.shape)
