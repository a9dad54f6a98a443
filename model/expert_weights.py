"""The weights of a layer's experts, and what each expert does to its rows."""

from __future__ import annotations

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from model.linear import Matmul, on_own_weight

Activation = Literal["swiglu", "clamped"]

CLAMP = 7.0
"""Largest gate, and largest magnitude of up, of the clamped activation."""


class Experts(NamedTuple):
    """Weights of one layer's experts, and biases where it has them.

    `down` lies as the others do, outputs before inputs: so the width that is cut over devices is never the last
    dimension, along which a TPU cannot gather without moving everything about. Without `up` its columns stand behind
    those of `gate`.
    """

    gate_EDF: Float[Array, "E D F"]
    up_EDF: Float[Array, "E D F"] | None
    down_EDF: Float[Array, "E D F"]
    gate_bias_EF: Float[Array, "E F"] | None = None
    up_bias_EF: Float[Array, "E F"] | None = None
    down_bias_ED: Float[Array, "E D"] | None = None


def activate(gate: Array, up: Array, kind: Activation) -> Array:
    """`silu(gate) * up`; clamped, as gpt-oss does it: `(up + 1) * gate * sigmoid(1.702 gate)` within +-7."""
    if kind == "swiglu":
        return jax.nn.silu(gate) * up
    gate, up = jnp.minimum(gate, CLAMP), jnp.clip(up, -CLAMP, CLAMP)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


def plus(x: Array, bias: Array | None) -> Array:
    """`x` with a bias, if there is one, added to every row."""
    return x if bias is None else x + bias[..., None, :]


def hidden_of(rows: Array, params: Experts, matmul: Matmul = "plain") -> tuple[Array, Array]:
    """Gate and up of rows `[..., rows, D]` that belong to the experts of `params`, one each along the first axis."""
    assert params.up_EDF is not None
    gate = plus(on_own_weight(rows, params.gate_EDF, matmul), params.gate_bias_EF)
    return gate, plus(on_own_weight(rows, params.up_EDF, matmul), params.up_bias_EF)


def down(hidden: Array, params: Experts, matmul: Matmul = "plain") -> Array:
    """The last product, `[..., rows, D]`, of hidden rows `[..., rows, F]`; without the bias."""
    return on_own_weight(hidden, params.down_EDF.mT, matmul)


def on_own_rows(
    rows: Array, params: Experts, activation: Activation, share: Array | None = None, matmul: Matmul = "plain"
) -> Array:
    """Each expert of `params` on its own rows, `[..., rows, D]`; times `share` `[..., rows]`, if there is one.

    The share comes before the last product: so its gradient does not need what that gives.
    """
    hidden = activate(*hidden_of(rows, params, matmul), activation)
    if share is None:
        return plus(down(hidden, params, matmul), params.down_bias_ED)
    out = down(hidden * share[..., None], params, matmul)
    return out if params.down_bias_ED is None else out + params.down_bias_ED[..., None, :] * share[..., None]


def expert_at(params: Experts, index: Array) -> Experts:
    """The weights of one expert, as slices."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), params)
