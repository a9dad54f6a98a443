"""Grouped-query attention (arXiv 2305.13245) with the options of the Qwen families."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from model import cache as kv
from model.config import ModelConfig
from model.layers import RMSNorm, rotate, weight
from sharding.rules import constrain

MASKED = -1e30
"""Score of a key that may not be seen; finite, so that a row without any key gives no NaN."""

QUERY_BLOCK = 512
"""Queries attended at a time: scores of longer sequences are never all in memory."""


def attend(
    q_BTNH: Float[Array, "B T N H"],
    k_BKSH: Float[Array, "B K S H"],
    v_BKSH: Float[Array, "B K S H"],
    visible_BTS: Array,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Softmax attention, scores in float32; query head n reads key/value head n // (N / K).

    A query that sees no key (padding) gets a finite, meaningless result.
    """
    batch, queries, heads, width = q_BTNH.shape
    kv_heads, keys = k_BKSH.shape[1:3]
    grouped = (batch, kv_heads, heads // kv_heads, queries)
    # Queries that read the same keys form one dimension, X = G * T: with two, XLA transposes the keys first.
    q_BKGTH = q_BTNH.reshape(batch, queries, *grouped[1:3], width).transpose(0, 2, 3, 1, 4)
    q_BKXH = q_BKGTH.reshape(batch, kv_heads, -1, width)
    scores = jnp.einsum("bkxh,bksh->bkxs", q_BKXH, k_BKSH, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(visible_BTS[:, None, None], scores.reshape(*grouped, keys), MASKED)
    probabilities = jax.nn.softmax(scores, axis=-1).astype(v_BKSH.dtype).reshape(batch, kv_heads, -1, keys)
    out_BKXH = jnp.einsum("bkxs,bksh->bkxh", probabilities, v_BKSH)
    return out_BKXH.reshape(*grouped, width).transpose(0, 3, 1, 2, 4).reshape(batch, queries, heads, width)


class Mask:
    """What each query may see, made for a block of queries at a time so that no `[T, S]` array is kept."""

    def __init__(
        self,
        index_BT: Int[Array, "B T"],
        segments_BT: Int[Array, "B T"] | None,
        keys: int,
    ):
        self.index_BT = index_BT
        self.segments_BT = segments_BT
        self.keys = keys

    def visible(self, start: int | Array, size: int) -> Array:
        """`[B, size, S]`: keys at or before each query and, while training, in its document."""
        index = jax.lax.dynamic_slice_in_dim(self.index_BT, start, size, axis=1)
        seen = jnp.arange(self.keys)[None, None] <= index[:, :, None]
        if self.segments_BT is None:
            return seen
        segments = jax.lax.dynamic_slice_in_dim(self.segments_BT, start, size, axis=1)
        return seen & (segments[:, :, None] == self.segments_BT[:, None, :])


def attend_in_blocks(q_BTNH: Array, k_BKSH: Array, v_BKSH: Array, mask: Mask, scale: float) -> Float[Array, "B T N H"]:
    """`attend` over blocks of queries, recomputed in the backward pass, once there are many queries."""
    length = q_BTNH.shape[1]
    if length <= QUERY_BLOCK or length % QUERY_BLOCK:
        return attend(q_BTNH, k_BKSH, v_BKSH, mask.visible(0, length), scale)

    @jax.checkpoint
    def block(start: Array) -> Array:
        q = jax.lax.dynamic_slice_in_dim(q_BTNH, start, QUERY_BLOCK, axis=1)
        return attend(q, k_BKSH, v_BKSH, mask.visible(start, QUERY_BLOCK), scale)

    out = jax.lax.map(block, jnp.arange(0, length, QUERY_BLOCK))
    return jnp.moveaxis(out, 0, 1).reshape(q_BTNH.shape)


class Attention(nnx.Module):
    """Projections, rotary positions, attention, and the way back into the residual stream."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        D, N, K, H = config.hidden_size, config.num_heads, config.num_kv_heads, config.head_dim
        self.q_DNH = weight(rngs, (D, N, H), ("embed", "heads", "head_dim"), D)
        self.k_DKH = weight(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), D)
        self.v_DKH = weight(rngs, (D, K, H), ("embed", "kv_heads", "head_dim"), D)
        self.o_NHD = weight(rngs, (N, H, D), ("heads", "head_dim", "embed"), N * H, residual_layers=config.num_layers)
        self.gate_DNH = weight(rngs, (D, N, H), ("embed", "heads", "head_dim"), D) if config.attention_gate else None
        if config.qkv_bias:
            self.q_bias_NH = nnx.Param(jnp.zeros((N, H), jnp.float32), axes=("heads", "head_dim"))
            self.k_bias_KH = nnx.Param(jnp.zeros((K, H), jnp.float32), axes=("kv_heads", "head_dim"))
            self.v_bias_KH = nnx.Param(jnp.zeros((K, H), jnp.float32), axes=("kv_heads", "head_dim"))
        else:
            self.q_bias_NH = self.k_bias_KH = self.v_bias_KH = None
        self.q_norm = RMSNorm(H, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(H, config.norm_eps) if config.qk_norm else None
        self.scale = config.attention_scale

    def project(self, x_BTD: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """Queries `[B, T, N, H]`, keys and values `[B, T, K, H]`; queries and keys normalised and rotated."""
        dtype = x_BTD.dtype

        def one(weight: nnx.Param, bias: nnx.Param | None, heads: str) -> Array:
            y = jnp.einsum("btd,dnh->btnh", x_BTD, weight[...].astype(dtype))
            y = y if bias is None else y + bias[...].astype(dtype)
            return constrain(y, "batch", "length", heads, "head_dim")

        q_BTNH = one(self.q_DNH, self.q_bias_NH, "heads")
        k_BTKH = one(self.k_DKH, self.k_bias_KH, "kv_heads")
        v_BTKH = one(self.v_DKH, self.v_bias_KH, "kv_heads")
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        return rotate(q_BTNH, cos, sin), rotate(k_BTKH, cos, sin), v_BTKH

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: tuple[Array, Array],
        mask: Mask,
        stored: tuple[Array, Array] | None = None,
    ) -> tuple[Float[Array, "B T D"], tuple[Array, Array] | None]:
        """Attention over the batch itself or, with `stored` keys and values, over those and the batch.

        Returns the output and, with `stored`, the arrays that now hold this batch too.
        """
        q_BTNH, k_BTKH, v_BTKH = self.project(x_BTD, *rope)
        if stored is None:
            k_BKSH, v_BKSH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
        else:
            k_BKSH = kv.write(stored[0], k_BTKH, mask.index_BT)
            v_BKSH = kv.write(stored[1], v_BTKH, mask.index_BT)
            stored = (k_BKSH, v_BKSH)
        with jax.named_scope("attend"):
            out_BTNH = attend_in_blocks(
                q_BTNH, k_BKSH.astype(q_BTNH.dtype), v_BKSH.astype(q_BTNH.dtype), mask, self.scale
            )
        if self.gate_DNH is not None:
            gate_BTNH = jnp.einsum("btd,dnh->btnh", x_BTD, self.gate_DNH[...].astype(x_BTD.dtype))
            out_BTNH = out_BTNH * jax.nn.sigmoid(gate_BTNH)
        out_BTNH = constrain(out_BTNH, "batch", "length", "heads", "head_dim")
        # A plain product: as an einsum over two dimensions XLA transposes the weight at every decode step.
        o_XD = self.o_NHD[...].astype(x_BTD.dtype).reshape(-1, x_BTD.shape[-1])
        return out_BTNH.reshape(*x_BTD.shape[:2], -1) @ o_XD, stored
