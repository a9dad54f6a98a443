"""Grouped-query attention (arXiv 2305.13245) with the options of the Qwen families."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from model import cache as kv
from model.config import ModelConfig
from model.flash import MASKED, over_context
from model.layers import Keys, RMSNorm, rotate, weight
from model.linear import Matmul, linear, merge_heads
from model.paged_attention import attend_to_pages
from sharding.context_parallel import context_shards
from sharding.mesh import ContextExchange, platform
from sharding.rules import constrain, on_own_parts

QUERY_BLOCK = 512
"""Queries attended at a time: scores of longer sequences are never all in memory."""

SECTIONS, SMALLEST_SECTION = 8, 64
"""Most parts that causal queries are cut into, each reading only the keys it can see; and queries worth a part."""


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSI: Float[Array, "B K S I"],
    visible_BTS: Array,
    scale: float,
    sinks_N: Float[Array, " N"] | None = None,
) -> Float[Array, "B T N I"]:
    """Softmax attention, scores in float32; query head n reads key/value head n // (N / K).

    A sink is one more logit of each query's softmax, with a value of zero (StreamingLLM, arXiv 2309.17453; learnt
    in gpt-oss). A query that sees no key (padding) gets a finite, meaningless result.
    """
    batch, queries, heads, _ = q_BTNH.shape
    kv_heads = k_BKSH.shape[1]
    grouped = (batch, queries, kv_heads, heads // kv_heads, -1)
    q_BKGTH = (q_BTNH * scale).reshape(grouped).transpose(0, 2, 3, 1, 4)
    sinks_KG11 = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(kv_heads, -1, 1, 1)
    out_BKGTI = _attend(q_BKGTH, k_BKSH, v_BKSI, visible_BTS[:, None, None], sinks_KG11)
    return out_BKGTI.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, -1)


@jax.custom_vjp
def _attend(q: Array, k: Array, v: Array, visible: Array, sinks: Array | None) -> Array:
    """`attend` on `[B, K, G, T, H]` queries that are scaled already.

    The gradient is written out (FlashAttention, arXiv 2205.14135, appendix B.2): weights are kept before they are
    divided by their sum, and one pass over them makes the gradient of the scores.
    """
    return _attend_forward(q, k, v, visible, sinks)[0]


def _products(equation: str, x_BKGTa: Array, y_BKSH: Array, dtype: Any) -> Array:
    """A product over grouped queries. G and T form one dimension: with two, XLA transposes the keys first."""
    groups, queries = x_BKGTa.shape[2:4]
    x = x_BKGTa.reshape(*x_BKGTa.shape[:2], groups * queries, -1)
    out = jnp.einsum(equation, x, y_BKSH, preferred_element_type=dtype)
    return out.reshape(*out.shape[:2], groups, queries, -1)


def _attend_forward(q: Array, k: Array, v: Array, visible: Array, sinks: Array | None) -> tuple[Array, tuple]:
    scores = jnp.where(visible, _products("bkxh,bksh->bkxs", q, k, jnp.float32), MASKED)
    top = scores.max(-1, keepdims=True)
    top = top if sinks is None else jnp.maximum(top, sinks)
    shares = jnp.exp(scores - top)
    total = shares.sum(-1, keepdims=True)
    sink_shares = None if sinks is None else jnp.exp(sinks - top)
    total = total if sink_shares is None else total + sink_shares
    shares = shares.astype(v.dtype)
    out = (_products("bkxs,bksi->bkxi", shares, v, jnp.float32) / total).astype(q.dtype)
    return out, (q, k, v, shares, total, sink_shares, out)


def _attend_backward(saved: tuple, d_out: Array) -> tuple:
    q, k, v, shares, total, sink_shares, out = saved
    d_out = d_out.astype(jnp.float32) / total
    delta = jnp.sum(d_out * out, axis=-1, keepdims=True)
    d_out = d_out.astype(v.dtype)
    d_shares = _products("bkxi,bksi->bkxs", d_out, v, jnp.float32)
    d_scores = (shares * (d_shares - delta)).astype(q.dtype)
    d_q = _products("bkxs,bksh->bkxh", d_scores, k, q.dtype)
    flat = (*q.shape[:2], q.shape[2] * q.shape[3], -1)
    d_k = jnp.einsum("bkxs,bkxh->bksh", d_scores.reshape(flat), q.reshape(flat)).astype(k.dtype)
    d_v = jnp.einsum("bkxs,bkxi->bksi", shares.reshape(flat), d_out.reshape(flat)).astype(v.dtype)
    d_sinks = None if sink_shares is None else -jnp.sum(sink_shares * delta, axis=(0, 3))[..., None]
    return d_q, d_k, d_v, None, d_sinks


_attend.defvjp(_attend_forward, _attend_backward)


@struct.dataclass
class Mask:
    """What each query of a batch may see of it, made for some queries at a time so that no `[T, S]` array is kept.

    segments_BT: documents. exchange: how keys are met where they lie on other devices.
    """

    segments_BT: Int[Array, "B T"]
    exchange: ContextExchange = struct.field(pytree_node=False, default="ring")

    def visible(self, start: int | Array, size: int, first: int, end: int, window: int | None) -> Array:
        """`[B, size, end - first]`: keys up to each query, within the window and of its document."""
        index = start + jnp.arange(size)[:, None]
        keys = jnp.arange(first, end)
        seen = keys <= index
        if window is not None:
            seen &= keys > index - window
        segments = jax.lax.dynamic_slice_in_dim(self.segments_BT, start, size, axis=1)
        return seen & (segments[:, :, None] == self.segments_BT[:, None, first:end])

    def sections(self, queries: int, window: int | None) -> Iterator[tuple[int, int, int, int]]:
        """Queries as (start, size) with the keys (first, end) that they can see between them.

        Sizes above `QUERY_BLOCK` are multiples of it.
        """
        size = max(SMALLEST_SECTION, -(-queries // SECTIONS))
        size = size if size <= QUERY_BLOCK else -(-size // QUERY_BLOCK) * QUERY_BLOCK
        for start in range(0, queries, size):
            stop = min(start + size, queries)
            whole = stop - (stop - start) % QUERY_BLOCK if stop - start > QUERY_BLOCK else stop
            for begin, end in ((start, whole), (whole, stop)):
                if end > begin:
                    yield begin, end - begin, 0 if window is None else max(0, begin - window + 1), end


def attend_in_blocks(
    q_BTNH: Array,
    k_BKSH: Array,
    v_BKSI: Array,
    mask: Mask,
    scale: float,
    window: int | None = None,
    sinks_N: Array | None = None,
) -> Float[Array, "B T N I"]:
    """`attend` over sections of queries; in long ones block by block, recomputed in the backward pass.

    For TPUs a kernel does it, where it can; of sequences that are cut over devices each does its part.
    """
    if context_shards() > 1:
        return of_cut_sequences(q_BTNH, k_BKSH, v_BKSI, mask.segments_BT, mask.exchange, scale, window, sinks_N)
    if platform() == "tpu":
        found = by_kernel(q_BTNH, k_BKSH, v_BKSI, mask.segments_BT, scale, window, sinks_N)
        if found is not None:
            return found
    parts = []
    for start, size, first, end in mask.sections(q_BTNH.shape[1], window):
        k, v = k_BKSH[:, :, first:end], v_BKSI[:, :, first:end]
        rows = min(size, QUERY_BLOCK)

        def block(begin: int | Array, k=k, v=v, rows=rows, first=first, end=end) -> Array:
            q = jax.lax.dynamic_slice_in_dim(q_BTNH, begin, rows, axis=1)
            return attend(q, k, v, mask.visible(begin, rows, first, end, window), scale, sinks_N)

        if size == rows:
            parts.append(block(start))
        else:
            out = jax.lax.map(jax.checkpoint(block), jnp.arange(start, start + size, rows))
            parts.append(jnp.moveaxis(out, 0, 1).reshape(q_BTNH.shape[0], size, *out.shape[3:]))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)


def of_cut_sequences(
    q_BTNH: Array,
    k_BKSH: Array,
    v_BKSI: Array,
    segments_BT: Array,
    exchange: ContextExchange,
    scale: float,
    window: int | None,
    sinks_N: Array | None,
) -> Array:
    """`attend_in_blocks` of a batch to itself where each device has a part of every sequence."""
    batch, queries, heads, _ = q_BTNH.shape
    kv_heads = k_BKSH.shape[1]
    q_BKGTH = (q_BTNH * scale).reshape(batch, queries, kv_heads, heads // kv_heads, -1).transpose(0, 2, 3, 1, 4)
    sinks_KG = None if sinks_N is None else sinks_N.reshape(kv_heads, -1)
    out_BKGTI = over_context(q_BKGTH, k_BKSH, v_BKSI, segments_BT, sinks_KG, window, exchange)
    return out_BKGTI.transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, -1)


def by_kernel(
    q_BTNH: Array,
    k_BKSH: Array,
    v_BKSI: Array,
    segments_BT: Array,
    scale: float,
    window: int | None,
    sinks_N: Array | None,
) -> Array | None:
    """`attend_in_blocks` of a batch to itself by a kernel; None where there is none for these shapes."""
    from model.kernels import splash  # a second of imports, which only TPUs need

    if not splash.fits(q_BTNH.shape[1], k_BKSH.shape[2]):
        return None
    heads, keys = ("batch", "length", "heads", "head_dim"), ("batch", "kv_heads", None, "head_dim")
    return on_own_parts(
        lambda q, k, v, segments, sinks: splash.splash(q, k, v, segments, scale, window, sinks),
        (q_BTNH, k_BKSH, v_BKSI, segments_BT, sinks_N),
        (heads, keys, keys, ("batch", "length"), ("heads",)),
        heads,
    )


class Attention(nnx.Module):
    """Projections, rotary positions, attention, and the way back into the residual stream."""

    def __init__(self, config: ModelConfig, layer: int, keys: Keys):
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q_DNH = weight(keys, (D, N, H), ("embed", "heads", "head_dim"), D, sums=(0,))
        self.k_DKH = weight(keys, (D, K, H), ("embed", "kv_heads", "head_dim"), D, sums=(0,))
        self.v_DKH = weight(keys, (D, K, H), ("embed", "kv_heads", "head_dim"), D, sums=(0,))
        out = ("heads", "head_dim", "embed")
        self.o_NHD = weight(keys, (N, H, D), out, N * H, residual_layers=config.num_layers, sums=(0, 1))
        self.gate_DNH = (
            weight(keys, (D, N, H), ("embed", "heads", "head_dim"), D, sums=(0,)) if config.attention_gate else None
        )
        if config.qkv_bias:
            self.q_bias_NH = nnx.Param(jnp.zeros((N, H), jnp.float32), axes=("heads", "head_dim"))
            self.k_bias_KH = nnx.Param(jnp.zeros((K, H), jnp.float32), axes=("kv_heads", "head_dim"))
            self.v_bias_KH = nnx.Param(jnp.zeros((K, H), jnp.float32), axes=("kv_heads", "head_dim"))
        else:
            self.q_bias_NH = self.k_bias_KH = self.v_bias_KH = None
        self.o_bias_D = nnx.Param(jnp.zeros(D, jnp.float32), axes=("embed",)) if config.output_bias else None
        self.sinks_N = nnx.Param(jnp.zeros(N, jnp.float32), axes=("heads",)) if config.sinks else None
        whole = config.qk_norm_whole
        norms = [RMSNorm(n * H if whole else H, config.norm_eps, config.norm) for n in (N, K) if config.qk_norm]
        self.q_norm, self.k_norm = norms or (None, None)
        self.norm_whole, self.clip, self.scale = whole, config.qkv_clip, config.attention_scale
        self.window = config.sliding_window if config.attention_kind(layer) == "sliding" else None

    def project(self, x_BTD: Array, cos: Array, sin: Array, matmul: Matmul) -> tuple[Array, Array, Array]:
        """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]`; queries and keys normalised and rotated."""

        def one(weight: nnx.Param, bias: nnx.Param | None, heads: str) -> Array:
            y = linear(x_BTD, weight[...], matmul)
            y = y if bias is None else y + bias[...].astype(y.dtype)
            return constrain(y, "batch", "length", heads, "head_dim")

        q_BTNH = self.normed(self.q_norm, one(self.q_DNH, self.q_bias_NH, "heads"))
        k_BTKH = self.normed(self.k_norm, one(self.k_DKH, self.k_bias_KH, "kv_heads"))
        v_BTKH = one(self.v_DKH, self.v_bias_KH, "kv_heads")
        if self.clip:
            q_BTNH, k_BTKH, v_BTKH = (jnp.clip(x, -self.clip, self.clip) for x in (q_BTNH, k_BTKH, v_BTKH))
        return rotate(q_BTNH, cos, sin), rotate(k_BTKH, cos, sin), v_BTKH

    def normed(self, norm: RMSNorm | None, x_BTNH: Array) -> Array:
        """Each head normalised, or all together."""
        if norm is None:
            return x_BTNH
        if not self.norm_whole:
            return norm(x_BTNH)
        return norm(x_BTNH.reshape(*x_BTNH.shape[:2], -1)).reshape(x_BTNH.shape)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: tuple[Array, Array],
        mask: Mask | None,
        stored: tuple[Array, ...] | None = None,
        paging: kv.Paging | None = None,
        matmul: Matmul = "plain",
    ) -> tuple[Float[Array, "B T D"], tuple[Array, ...] | None]:
        """Attention over the batch itself or, without a mask, over `stored` keys and values and the batch.

        Returns the output and, with `stored` pages, those that now hold this batch too, as `paging` says.
        """
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, *rope, matmul)
        sinks_N = None if self.sinks_N is None else self.sinks_N[...]
        if stored is not None and paging is not None:
            stored = kv.write(stored, (k_BTKH, v_BTKH), paging)
        with jax.named_scope("attend"):
            if mask is not None:
                k_BKSH, v_BKSH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
                out_BTNH = attend_in_blocks(q_BTNH, k_BKSH, v_BKSH, mask, self.scale, self.window, sinks_N)
            else:
                assert stored is not None and paging is not None, "without a mask it attends to what is stored"
                out_BTNH = attend_to_pages(q_BTNH, stored, paging, self.scale, self.window, sinks_N)
        if self.gate_DNH is not None:
            out_BTNH = out_BTNH * jax.nn.sigmoid(linear(x_BTD, self.gate_DNH[...], matmul))
        out_BTNH = constrain(out_BTNH, "batch", "length", "heads", "head_dim")
        out_BTD = merge_heads(out_BTNH, self.o_NHD[...], matmul)
        out_BTD = out_BTD if self.o_bias_D is None else out_BTD + self.o_bias_D[...].astype(x_BTD.dtype)
        return out_BTD, stored
