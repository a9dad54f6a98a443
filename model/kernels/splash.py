"""Attention over a batch's own tokens by jax's splash kernel for TPUs; its plain twin is `attention.attend_in_blocks`.

The kernel skips what no query of a block sees and keeps no scores. FlashAttention-2: arXiv 2307.08691.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernel
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jaxtyping import Array, Float, Int

from model.kernels import exact_products

LANES = 128
"""Widths and lengths of the kernel's blocks are multiples of this."""

LARGEST_BLOCK = 1024
"""Keys read at a time, and queries twice that often."""

FUSED_LENGTH = 8192
"""Up to it one kernel makes all gradients; it keeps a part of the queries' gradient for every block of keys."""


KEPT_KEYS = 4096 * 128
"""Numbers of all keys of a head that the gradients' kernel keeps at once: then the queries' gradient has one part."""


def fits(length: int, keys: int) -> bool:
    """Whether the kernel takes so many queries and keys."""
    return length == keys and length % LANES == 0


def splash(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSI: Float[Array, "B K S I"],
    segments_BT: Int[Array, "B T"],
    scale: float,
    window: int | None = None,
    sinks_N: Float[Array, " N"] | None = None,
    *,
    interpret: bool = False,
) -> Float[Array, "B T N I"]:
    """Causal attention within documents, of all heads that are here.

    Args:
        window: positions that a query sees, itself included; None for all before it.
        interpret: run the kernel's steps on any machine, slowly; for tests.
    """
    length, heads, width = q_BTNH.shape[1], q_BTNH.shape[2], v_BKSI.shape[-1]
    one = masks.CausalMask((length, length))
    if window is not None:
        one = masks.LocalMask((length, length), (window - 1, 0), 0)
    run = kernel.make_splash_mha(
        masks.MultiHeadMask([one] * heads),
        block_sizes=block_sizes(length, q_BTNH.shape[-1]),
        head_shards=1,
        q_seq_shards=1,
        interpret=interpret,
    )

    def rows(q: Array, k: Array, v: Array, segments_BT: Array, sinks_N: Array | None) -> Array:
        def row(q_TNH: Array, k_KSH: Array, v_KSI: Array, segments_T: Array) -> Array:
            both = kernel.SegmentIds(q=segments_T, kv=segments_T)
            out_NTI: Any = run(q_TNH.swapaxes(0, 1), k_KSH, v_KSI, both, sinks_N)
            return out_NTI.swapaxes(0, 1)

        return jax.vmap(row)(q, k, v, segments_BT)

    q, k, v = (pad_width(x) for x in ((q_BTNH * scale).astype(k_BKSH.dtype), k_BKSH, v_BKSI))
    out_BTNI: Any = as_they_come(rows, q, k, v, segments_BT, sinks_N)
    return out_BTNI[..., :width].astype(q_BTNH.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def as_they_come(function: Callable[..., Array], q: Array, *args: Array | None) -> Array:
    """`function(q, *args)` with products of bfloat16 as they are, forward and backward."""
    return _forward(function, q, *args)[0]


def _forward(function: Callable[..., Array], q: Array, *args: Array | None) -> tuple[Array, Any]:
    with exact_products(q.dtype):
        out, pull = jax.vjp(function, q, *args)
    return out, (pull, q)


def _backward(function: Callable[..., Array], saved: Any, d_out: Array) -> tuple[Any, ...]:
    pull, first = saved
    with exact_products(first.dtype):
        return pull(d_out)


as_they_come.defvjp(_forward, _backward)


def block_sizes(length: int, width: int) -> kernel.BlockSizes:
    """Blocks that divide `length`."""
    keys = next(size for size in (LARGEST_BLOCK, 512, 256, LANES) if length % size == 0)
    queries = max(keys // 2, LANES)
    sizes = dict.fromkeys(("block_q", "block_kv_compute", "block_q_dkv", "block_kv_dkv_compute"), queries)
    if length <= FUSED_LENGTH:
        kept = length if length * width <= KEPT_KEYS else keys
        return kernel.BlockSizes(block_kv=keys, block_kv_dkv=kept, use_fused_bwd_kernel=True, **sizes)
    return kernel.BlockSizes(block_kv=keys, block_kv_dkv=keys, block_q_dq=queries, block_kv_dq=keys, **sizes)


def pad_width(x: Array) -> Array:
    """`x` with zeros up to a multiple of the lanes in its last dimension."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % LANES)])
