"""Experts by grouped matrix products (`lax.ragged_dot`): for TPUs and GPUs, which have kernels for them.

Pairs of token and expert are sorted by expert, and the rows of as many as a buffer holds are computed at a time: where
most pairs are for experts on other devices, none of the others takes up memory. Exact for any routing; one buffer is
enough unless these experts are far above the mean.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.expert_weights import Activation, Experts, activate
from model.linear import Matmul, by_groups
from sharding.expert_parallel import add_rounds


class Order(NamedTuple):
    """Pairs sorted by expert, those of no expert last. order_R: the pairs. ends_E: where each expert's end."""

    order_R: Array
    ends_E: Array


class Window(NamedTuple):
    """The pairs of one buffer of S rows.

    pair_S, token_S: of each row; beyond the end where the row is empty. real_S1: whether it is not. sizes_E: rows of
    each expert. expert_S: of each row.
    """

    pair_S: Array
    token_S: Array
    real_S1: Array
    sizes_E: Array
    expert_S: Array


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def ragged(
    x_MD: Float[Array, "M D"],
    ids_MC: Int[Array, "M C"],
    weights_MC: Float[Array, "M C"],
    params: Experts,
    capacity: int,
    activation: Activation = "swiglu",
    matmul: Matmul = "plain",
) -> Float[Array, "M D"]:
    """`sum_c weights[m, c] * expert[ids[m, c]](x[m])`; an id of E means nothing.

    Args:
        capacity: rows computed at a time.
    """
    return _forward(x_MD, ids_MC, weights_MC, params, capacity, activation, matmul)[0]


def weighted(
    rows_SD: Array, share_S: Array, params: Experts, window: Window, activation: Activation, matmul: Matmul
) -> Float[Array, "S D"]:
    """Each row through its expert, times its share. The share comes before the last product, as in `on_own_rows`."""

    def product(rows_SX: Array, weight: Array, bias: Array | None, share_S1: Array | int = 1) -> Array:
        out_SY = by_groups(rows_SX, weight, window.sizes_E, matmul)
        return out_SY if bias is None else out_SY + bias[window.expert_S] * share_S1

    gate_SF = product(rows_SD, params.gate_EDF, params.gate_bias_EF)
    up_SF = product(rows_SD, params.up_EDF, params.up_bias_EF)
    # Rows past the last group are undefined in the kernels.
    hidden_SF = jnp.where(window.real_S1, activate(gate_SF, up_SF, activation), 0) * share_S[:, None]
    return product(hidden_SF, params.down_EFD, params.down_bias_ED, share_S[:, None])


def _sort(ids_MC: Array, experts: int) -> Order:
    ids_R = ids_MC.reshape(-1)
    sizes_E = jnp.bincount(ids_R, length=experts)
    return Order(jnp.argsort(ids_R, stable=True).astype(jnp.int32), jnp.cumsum(sizes_E).astype(jnp.int32))


def _window(order: Order, turn: Array | int, capacity: int, choices: int) -> Window:
    pairs = len(order.order_R)
    start = turn * capacity
    at_S = start + jnp.arange(capacity, dtype=jnp.int32)
    real_S = at_S < order.ends_E[-1]
    pair_S = jnp.where(real_S, order.order_R[jnp.minimum(at_S, pairs - 1)], pairs)
    ends_E = jnp.clip(order.ends_E - start, 0, capacity)
    expert_S = jnp.searchsorted(order.ends_E, at_S, side="right").astype(jnp.int32)
    return Window(pair_S, pair_S // choices, real_S[:, None], jnp.diff(ends_E, prepend=0), expert_S)


def _rows(x_MD: Array, window: Window) -> Array:
    return jnp.where(window.real_S1, jnp.take(x_MD, window.token_S, axis=0, mode="clip"), 0)


def _added(like_MD: Array, rows_SD: Array, window: Window) -> Array:
    return jnp.zeros_like(like_MD).at[window.token_S].add(jnp.where(window.real_S1, rows_SD, 0), mode="drop")


def _turns(order: Order, capacity: int, body: Any) -> Any:
    """`body` once where one buffer holds all pairs; else as often as these experts have pairs for."""
    if capacity >= len(order.order_R):
        return body(0)
    return add_rounds(body, -(-order.ends_E[-1] // capacity))


def _forward(
    x_MD: Array,
    ids_MC: Array,
    weights_MC: Array,
    params: Experts,
    capacity: int,
    activation: Activation,
    matmul: Matmul,
) -> tuple[Array, tuple]:
    order = _sort(ids_MC, len(params.gate_EDF))
    weights_R = weights_MC.reshape(-1)

    def body(turn: Array | int) -> Array:
        window = _window(order, turn, capacity, ids_MC.shape[1])
        share_S = jnp.take(weights_R, window.pair_S, mode="fill", fill_value=0)
        return _added(x_MD, weighted(_rows(x_MD, window), share_S, params, window, activation, matmul), window)

    return _turns(order, capacity, body), (x_MD, ids_MC, weights_MC, params, order)


def _backward(capacity: int, activation: Activation, matmul: Matmul, saved: tuple, dy_MD: Array) -> tuple:
    """The hidden layer is computed again, so that none of it was kept."""
    x_MD, ids_MC, weights_MC, params, order = saved
    weights_R = weights_MC.reshape(-1)

    def body(turn: Array | int) -> tuple:
        window = _window(order, turn, capacity, ids_MC.shape[1])
        share_S = jnp.take(weights_R, window.pair_S, mode="fill", fill_value=0)
        _, pull = jax.vjp(
            lambda rows, share, params: weighted(rows, share, params, window, activation, matmul),
            _rows(x_MD, window),
            share_S,
            params,
        )
        d_rows_SD, d_share_S, d_own = pull(_rows(dy_MD, window))
        d_share_S = jnp.where(window.real_S1[:, 0], d_share_S, 0)
        dw_R = jnp.zeros_like(weights_R).at[window.pair_S].add(d_share_S, mode="drop")
        return _added(x_MD, d_rows_SD, window), dw_R, d_own

    dx_MD, dw_R, d_params = _turns(order, capacity, body)
    return dx_MD, None, dw_R.reshape(weights_MC.shape), d_params


ragged.defvjp(_forward, _backward)
