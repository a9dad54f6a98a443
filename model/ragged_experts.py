"""Experts by grouped matrix products (`lax.ragged_dot`): for TPUs and GPUs, which have kernels for them.

Pairs of token and expert are sorted by expert, and the rows of as many as a buffer holds are computed at a time: where
most pairs are for experts on other devices, none of the others takes up memory. Exact for any routing; one buffer is
enough unless these experts are far above the mean. Rows move by gathers and products alone: a TPU scatters rows one
after the other, and a GPU adds them in any order.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.expert_weights import Activation, Experts, activate
from model.linear import Matmul, by_groups, sums_by_group
from model.quantization import completed, differentiable
from sharding.expert_parallel import add_rounds

TOKENS_AT_A_TIME = 128
"""Tokens to which one product adds rows: the width of a TPU's registers."""


FEW_TOKENS = 512
"""Up to so many one product adds the rows of all of them, most of it zeros: less than it takes to sort them."""


class Order(NamedTuple):
    """Pairs sorted by expert, those of no expert last. order_R: the pairs. ends_E: where each expert's end."""

    order_R: Array
    ends_E: Array


class Window(NamedTuple):
    """The pairs of one buffer of S rows.

    pair_S, token_S: of each row; beyond the end where the row is empty. sizes_E: rows of each expert. expert_S: of each
    row. real_S1: whether a row is not empty.
    """

    pair_S: Array
    token_S: Array
    sizes_E: Array
    expert_S: Array
    real_S1: Array


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
    rows_SD: Array,
    share_S: Array,
    params: Experts,
    sizes_E: Array,
    expert_S: Array,
    real_S1: Array,
    activation: Activation,
    matmul: Matmul,
) -> Float[Array, "S D"]:
    """Rows sorted by expert through their experts, times their shares, which come before the last product.

    Args:
        sizes_E: rows of each expert. expert_S: of each row. real_S1: whether a row is of any.
    """

    def plus(out_SX: Array, bias_EX: Array | None, share_S1: Array | int = 1) -> Array:
        return out_SX if bias_EX is None else out_SX + bias_EX[expert_S] * share_S1

    gate_SF = by_groups(rows_SD, params.gate_EDF, sizes_E, expert_S, matmul)
    if params.up_EDF is None:
        gate_SF, up_SF = jnp.split(gate_SF, 2, axis=-1)
    else:
        up_SF = by_groups(rows_SD, params.up_EDF, sizes_E, expert_S, matmul)
    gate_SF, up_SF = plus(gate_SF, params.gate_bias_EF), plus(up_SF, params.up_bias_EF)
    # Rows past the last group are undefined in the kernels.
    hidden_SF = jnp.where(real_S1, activate(gate_SF, up_SF, activation), 0) * share_S[:, None]
    out_SD = by_groups(hidden_SF, params.down_EDF, sizes_E, expert_S, matmul, back=True)
    return plus(out_SD, params.down_bias_ED, share_S[:, None])


def packed(
    rows_XESD: Array,
    share_XES: Array,
    counts_XE: Array,
    params: Experts,
    activation: Activation = "swiglu",
    matmul: Matmul = "plain",
) -> Float[Array, "X E S D"]:
    """Rows that X shards sent, each expert's put one after the other and through it, and back to where they were.

    Of the S rows from one shard for one expert the first `counts` mean something: no others are computed, and what
    stands in their places afterwards is not to be read.
    """
    shards, experts, size, width = rows_XESD.shape
    count = shards * experts * size
    place_XES = jnp.arange(count, dtype=jnp.int32).reshape(shards, experts, size)
    real_XES = jnp.arange(size) < counts_XE[..., None]
    place_S, real_S = (a.swapaxes(0, 1).reshape(-1) for a in (place_XES, real_XES))
    to_S = jnp.where(real_S, jnp.cumsum(real_S, dtype=jnp.int32) - 1, count)
    from_S = jnp.full(count, count, jnp.int32).at[to_S].set(place_S, mode="drop")
    back_S = jnp.full(count, count, jnp.int32).at[place_S].set(to_S)
    sizes_E = counts_XE.sum(0)
    expert_S = jnp.minimum(_place(jnp.cumsum(sizes_E), jnp.arange(count)), experts - 1)
    real_S1 = (jnp.arange(count) < sizes_E.sum())[:, None]
    rows_SD = permute(rows_XESD.reshape(count, width), from_S, back_S)
    share_S = permute(share_XES.reshape(count, 1), from_S, back_S)[:, 0]
    out_SD = weighted(rows_SD, share_S, params, sizes_E, expert_S, real_S1, activation, matmul)
    return permute(out_SD, back_S, from_S).reshape(rows_XESD.shape)


@jax.custom_vjp
def permute(x_SD: Array, index_S: Array, inverse_S: Array) -> Array:
    """`x[index]`; anything where the index is beyond the end. With the inverse its gradient is a gather too."""
    return jnp.take(x_SD, index_S, axis=0, mode="clip")


permute.defvjp(
    lambda x_SD, index_S, inverse_S: (permute(x_SD, index_S, inverse_S), inverse_S),
    lambda inverse_S, dy_SD: (jnp.take(dy_SD, inverse_S, axis=0, mode="clip"), None, None),
)


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
    expert_S = _place(order.ends_E, at_S)
    return Window(pair_S, pair_S // choices, jnp.diff(ends_E, prepend=0), expert_S, real_S[:, None])


def _place(ends_E: Array, at_S: Array) -> Int[Array, " S"]:
    """The expert of each place among sorted pairs; by comparing with all, for a search goes in steps."""
    return jnp.searchsorted(ends_E, at_S, side="right", method="compare_all").astype(jnp.int32)


def _rows(x_MD: Array, window: Window) -> Array:
    """The rows of these pairs; empty places get one of the others, which nothing reads."""
    return jnp.take(x_MD, window.token_S, axis=0, mode="clip")


def _added(rows_SD: Array, window: Window, order: Order, shape_MC: tuple[int, ...]) -> Float[Array, "M D"]:
    """The sum of each token's rows. What stands in empty places may be anything."""
    tokens, choices = shape_MC
    if len(rows_SD) == tokens * choices:  # all pairs: each has its place
        place_R = jnp.zeros_like(order.order_R).at[order.order_R].set(jnp.arange(len(rows_SD), dtype=jnp.int32))
        place_R = jnp.where(place_R < order.ends_E[-1], place_R, len(rows_SD))
        return jnp.take(rows_SD, place_R.reshape(shape_MC), axis=0, mode="fill", fill_value=0).sum(1)
    if tokens <= FEW_TOKENS:
        one_hot_MS = (window.token_S == jnp.arange(tokens)[:, None]).astype(rows_SD.dtype)
        return one_hot_MS @ jnp.where(window.real_S1, rows_SD, 0)
    order_S = jnp.argsort(window.pair_S)
    token_S = window.token_S[order_S]
    rows_SD = jnp.take(rows_SD, jnp.where(token_S < tokens, order_S, 0), axis=0, mode="clip")
    blocks = -(-tokens // TOKENS_AT_A_TIME)
    one_hot = (token_S[:, None] % TOKENS_AT_A_TIME == jnp.arange(TOKENS_AT_A_TIME)).astype(rows_SD.dtype)
    starts_G = jnp.minimum((jnp.arange(blocks) + 1) * TOKENS_AT_A_TIME, tokens)
    ends_G = jnp.searchsorted(token_S, starts_G, method="compare_all")
    sums_GID = sums_by_group(one_hot, rows_SD, jnp.diff(ends_G, prepend=0))
    return sums_GID.reshape(-1, rows_SD.shape[1])[:tokens]


def _turns(order: Order, capacity: int, body: Any) -> Any:
    """The sum of `body` over one buffer where it holds all pairs; else over as many as these experts have pairs for."""
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
        out_SD = weighted(_rows(x_MD, window), share_S, params, *window[2:], activation, matmul)
        return _added(out_SD, window, order, ids_MC.shape)

    return _turns(order, capacity, body), (x_MD, ids_MC, weights_MC, params, order)


def _backward(capacity: int, activation: Activation, matmul: Matmul, saved: tuple, dy_MD: Array) -> tuple:
    """The hidden layer is computed again, so that none of it was kept."""
    x_MD, ids_MC, weights_MC, params, order = saved
    weights_R = weights_MC.reshape(-1)

    def body(turn: Array | int) -> tuple:
        window = _window(order, turn, capacity, ids_MC.shape[1])
        share_S = jnp.take(weights_R, window.pair_S, mode="fill", fill_value=0)
        _, pull = jax.vjp(
            lambda rows, share, part: weighted(rows, share, completed(part, params), *window[2:], activation, matmul),
            _rows(x_MD, window),
            share_S,
            differentiable(params),
        )
        d_rows_SD, d_share_S, d_own = pull(_rows(dy_MD, window))
        d_share_S = jnp.where(window.real_S1[:, 0], d_share_S, 0)
        dw_R = jnp.zeros_like(weights_R).at[window.pair_S].add(d_share_S, mode="drop")
        return _added(d_rows_SD, window, order, ids_MC.shape), dw_R, d_own

    dx_MD, dw_R, d_params = _turns(order, capacity, body)
    return dx_MD, None, dw_R.reshape(weights_MC.shape), d_params


ragged.defvjp(_forward, _backward)
