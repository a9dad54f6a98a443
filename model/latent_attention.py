"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from model import cache as kv
from model.attention import Mask, attend_in_blocks
from model.config import ModelConfig
from model.layers import Keys, RMSNorm, rotate, weight
from model.linear import Matmul, linear, merge_heads
from model.paged_attention import page_by_page
from sharding.rules import constrain

ABSORBED = ("batch", None, "heads", "length", "head_dim")
"""Logical axes of queries `[B, 1, N, T, U+P]` in the latents' space."""


class LatentAttention(nnx.Module):
    """Keys and values of all heads are made from one latent vector per token, and it is all that a cache holds.

    With a cache queries are carried into the latent's space instead (section 2.1.2): it serves as the one key
    and value head of all query heads, and keys and values are never made.
    """

    def __init__(self, config: ModelConfig, layer: int, keys: Keys):
        latent, D, N = config.latent, config.hidden_size, config.num_heads
        Q, U, H, P, I = latent.query_rank, latent.kv_rank, latent.nope_dim, latent.rope_dim, latent.value_dim
        heads = ("heads", "head_dim")
        if Q:
            self.q_down_DQ = weight(keys, (D, Q), ("embed", None), D, sums=(0,))
            self.q_norm = RMSNorm(Q, config.norm_eps)
        else:
            self.q_down_DQ = self.q_norm = None
        self.q_QNH = weight(keys, (Q or D, N, H + P), (None if Q else "embed", *heads), Q or D, sums=(0,))
        self.kv_down_DU = weight(keys, (D, U + P), ("embed", None), D, sums=(0,))
        self.kv_norm = RMSNorm(U, config.norm_eps)
        self.k_UNH = weight(keys, (U, N, H), (None, *heads), U)
        self.v_UNI = weight(keys, (U, N, I), (None, *heads), U)
        self.o_NID = weight(keys, (N, I, D), (*heads, "embed"), N * I, residual_layers=config.num_layers, sums=(0, 1))
        self.rank, self.plain, self.scale = U, H, config.attention_scale
        self.window = config.sliding_window if config.attention_kind(layer) == "sliding" else None

    def project(self, x_BTD: Array, cos: Array, sin: Array, matmul: Matmul) -> tuple[Array, Array, Array]:
        """Queries `[B, T, N, H+P]`, latents `[B, T, U]` and the shared key `[B, T, 1, P]`, rotated."""
        c_BTQ = x_BTD
        if self.q_down_DQ is not None and self.q_norm is not None:
            c_BTQ = self.q_norm(linear(x_BTD, self.q_down_DQ[...], matmul))
        q_BTNH = constrain(linear(c_BTQ, self.q_QNH[...], matmul), "batch", "length", "heads", "head_dim")
        plain, rotated = q_BTNH[..., : self.plain], rotate(q_BTNH[..., self.plain :], cos, sin)
        down_BTU = linear(x_BTD, self.kv_down_DU[...], matmul)
        c_BTU = self.kv_norm(down_BTU[..., : self.rank])
        shared_BT1P = rotate(down_BTU[..., None, self.rank :], cos, sin)
        return jnp.concatenate([plain, rotated], axis=-1), c_BTU, shared_BT1P

    def read(self, stored: tuple[Array, ...], pages_M: Array) -> tuple[Array, Array]:
        """Pages of latents with shared keys, `[M, 1, page, U+P]`, and of latents alone, which stand for the values."""
        (k_M1pU,) = kv.taken(stored, pages_M, 1)
        return k_M1pU, k_M1pU[..., : self.rank]

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        rope: tuple[Array, Array],
        mask: Mask | None,
        stored: tuple[Array, ...] | None = None,
        paging: kv.Paging | None = None,
        matmul: Matmul = "plain",
    ) -> tuple[Float[Array, "B T D"], tuple[Array, ...] | None]:
        """As `Attention`; `stored` has pages of latents and shared keys."""
        q_BTNH, c_BTU, shared_BT1P = self.project(x_BTD, *rope, matmul)
        k_UNH, v_UNI = (w[...].astype(x_BTD.dtype) for w in (self.k_UNH, self.v_UNI))
        if stored is not None and paging is not None:
            stored = kv.write(stored, (jnp.concatenate([c_BTU[:, :, None], shared_BT1P], axis=-1),), paging)
        with jax.named_scope("attend"):
            if mask is not None:
                plain_BTNH = linear(c_BTU, k_UNH, matmul)
                shared = jnp.broadcast_to(shared_BT1P, (*plain_BTNH.shape[:3], shared_BT1P.shape[-1]))
                k_BTNH = jnp.concatenate([plain_BTNH, shared], axis=-1)
                v_BTNI = linear(c_BTU, v_UNI, matmul)
                k_BNTH, v_BNTI = k_BTNH.transpose(0, 2, 1, 3), v_BTNI.transpose(0, 2, 1, 3)
                out_BTNI = attend_in_blocks(q_BTNH, k_BNTH, v_BNTI, mask, self.scale, self.window)
            else:
                assert stored is not None and paging is not None, "without a mask it attends to what is stored"
                carried = jnp.einsum("btnh,unh->btnu", q_BTNH[..., : self.plain], k_UNH)
                q_BTNU = jnp.concatenate([carried, q_BTNH[..., self.plain :]], axis=-1)
                q_B1NTU = (q_BTNU * self.scale).transpose(0, 2, 1, 3)[:, None]
                out_B1NTU = page_by_page(
                    q_B1NTU, stored, (kv.LATENTS,) * len(stored), self.read, paging, self.window, None, ABSORBED
                )
                out_BTNU = out_B1NTU[:, 0].transpose(0, 2, 1, 3)
                out_BTNI = jnp.einsum("btnu,uni->btni", out_BTNU, v_UNI)
        out_BTNI = constrain(out_BTNI, "batch", "length", "heads", "head_dim")
        return merge_heads(out_BTNI, self.o_NID[...], matmul), stored
