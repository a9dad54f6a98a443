"""The experts' computation behind one function, one backend per situation.

Every backend is exact for any routing (nothing is dropped) and is checked, gradients included, against
`reference`. On a CPU `lax.ragged_dot` is expanded to a dense product over all experts, so there the work is
laid out by hand: per pair (token, expert) for one token, in fixed buffers of each expert for training, in
blocks of one expert's rows for everything else.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from model.expert_weights import Activation, Experts, activate, down, expert_at, hidden_of, on_own_rows, plus
from model.linear import Matmul
from model.lora import LowRank
from model.quantization import Quantized, completed, differentiable
from model.ragged_experts import packed, ragged
from sharding.expert_parallel import buffer_rows
from sharding.mesh import platform
from sharding.rules import constrain

OVERFLOW_BLOCK = 128
"""Rows of one expert computed at a time when its buffer overflows."""


def run_experts(
    x_MD: Float[Array, "M D"],
    ids_MC: Int[Array, "M C"],
    weights_MC: Float[Array, "M C"],
    params: Experts,
    *,
    training: bool,
    activation: Activation = "swiglu",
    shards: int = 1,
    matmul: Matmul = "plain",
) -> Float[Array, "M D"]:
    """`sum_c weights[m, c] * expert[ids[m, c]](x[m])`; an id of E means nothing.

    With `shards` about one pair in so many is for these experts.

    While decoding the path depends on shapes alone, never on what other rows hold, so that the bits of a
    row do not depend on its company.
    """
    tokens, experts = x_MD.shape[0], params.gate_EDF.shape[0]
    pairs = ids_MC.size // shards
    mesh = jax.sharding.get_abstract_mesh()
    if platform() != "cpu" and (mesh.size <= 1 or mesh.manual_axes):
        return ragged(x_MD, ids_MC, weights_MC, params, ring_rows(ids_MC.size, shards), activation, matmul)
    if training:
        capacity = min(tokens, train_capacity(pairs, experts))
        return grouped(x_MD, ids_MC, weights_MC, params, capacity, OVERFLOW_BLOCK, activation, matmul)
    if tokens == 1:
        return per_pair(x_MD, ids_MC, weights_MC, params, activation)
    return grouped(x_MD, ids_MC, weights_MC, params, 0, decode_block(pairs, experts), activation)


def ring_rows(pairs: int, shards: int) -> int:
    """Rows that are computed first of so many pairs, of which about one in `shards` is for these experts."""
    even = pairs / shards
    return pairs if shards == 1 else min(buffer_rows(even, 512 if even > 512 else 32), pairs)


def on_received_rows(
    rows_XESD: Float[Array, "X E S D"],
    share_XES: Float[Array, "X E S"],
    counts_XE: Int[Array, "X E"],
    params: Experts,
    activation: Activation = "swiglu",
    matmul: Matmul = "plain",
) -> Float[Array, "X E S D"]:
    """Each expert on the rows that X shards sent it, times their shares. Beyond `counts` rows mean nothing."""
    if platform() != "cpu":
        return packed(rows_XESD, share_XES, counts_XE, params, activation, matmul)
    shards, experts, size, width = rows_XESD.shape
    rows, share = (a.swapaxes(0, 1).reshape(experts, shards * size, *a.shape[3:]) for a in (rows_XESD, share_XES))
    out = on_own_rows(rows, params, activation, share, matmul)
    return out.reshape(experts, shards, size, width).swapaxes(0, 1)


def train_capacity(pairs: int, experts: int) -> int:
    """Rows of an expert's buffer: 2.5 standard deviations of an even draw above the even load.

    Every row is computed, full or empty: what exceeds a smaller buffer takes less time in blocks than a larger one
    takes always, however uneven the load.
    """
    even = pairs / experts
    return -(-int(even + 2.5 * even**0.5) // 8) * 8


def decode_block(pairs: int, experts: int) -> int:
    """Rows per block. Few pairs: near the even load, so that few rows of a block are empty. Many: two standard
    deviations of an even draw above it, so that most experts need one block, each of which copies their weights."""
    even = pairs / experts
    if even <= 32:
        return next(block for block in (4, 8, 16, 32) if block >= even)
    return min(-(-int(even + 2 * even**0.5) // 16) * 16, 160)


def reference(
    x_MD: Array, ids_MC: Array, weights_MC: Array, params: Experts, activation: Activation = "swiglu"
) -> Array:
    """Every expert on every token; what the other backends are checked against."""
    experts = params.gate_EDF.shape[0]
    chosen_MCE = jax.nn.one_hot(ids_MC, experts, dtype=x_MD.dtype)
    share_EM = jnp.einsum("mc,mce->em", weights_MC, chosen_MCE)
    return jnp.einsum("emd,em->md", on_own_rows(x_MD[None], params, activation), share_EM)


def per_pair(
    x_MD: Array, ids_MC: Array, weights_MC: Array, params: Experts, activation: Activation = "swiglu"
) -> Array:
    """One (token, expert) pair at a time, reading just that expert's weights: one token's decode on a CPU."""
    experts = params.gate_EDF.shape[0]

    def one(pair: tuple[Array, Array]) -> Array:
        x_D, expert = pair
        return on_own_rows(x_D[None], expert_at(params, jnp.minimum(expert, experts - 1)), activation)[0]

    y_RD = jax.lax.map(one, (jnp.repeat(x_MD, ids_MC.shape[1], axis=0), ids_MC.reshape(-1)))
    weights_MC = jnp.where(ids_MC < experts, weights_MC, 0)
    return jnp.einsum("mcd,mc->md", y_RD.reshape(*ids_MC.shape, -1), weights_MC)


class Plan(NamedTuple):
    """Where each (token, choice) pair is computed.

    The first `capacity` pairs of an expert have a slot in its buffer; later ones are taken in blocks.
    order_R: pairs sorted by expert. first_E: where each expert's pairs start in that order.
    slot_R: each pair's row of the buffers, `E * capacity` if it has none. pair_S: each buffer row's pair,
    `R` if empty. block_ends_E: cumulated number of overflow blocks.
    """

    order_R: Array
    sizes_E: Array
    first_E: Array
    slot_R: Array
    pair_S: Array
    block_ends_E: Array


def make_plan(ids_MC: Array, experts: int, capacity: int, block: int) -> Plan:
    """Sorts the pairs by expert and hands out slots and blocks."""
    ids_R = ids_MC.reshape(-1)
    pairs = ids_R.shape[0]
    order_R = jnp.argsort(ids_R, stable=True).astype(jnp.int32)
    sizes_E = jnp.bincount(ids_R, length=experts).astype(jnp.int32)
    first_E = jnp.cumsum(sizes_E) - sizes_E
    sorted_R = ids_R[order_R]
    rank = jnp.arange(pairs, dtype=jnp.int32) - first_E[jnp.minimum(sorted_R, experts - 1)]
    fits = (sorted_R < experts) & (rank < capacity)
    slot_sorted = jnp.where(fits, sorted_R * capacity + rank, experts * capacity)
    slot_R = jnp.zeros(pairs, jnp.int32).at[order_R].set(slot_sorted)
    pair_S = jnp.full(experts * capacity, pairs, jnp.int32).at[slot_sorted].set(order_R, mode="drop")
    overflow_E = jnp.maximum(sizes_E - capacity, 0)
    return Plan(order_R, sizes_E, first_E, slot_R, pair_S, jnp.cumsum(-(-overflow_E // block)))


def overflow_rows(plan: Plan, index: Array, capacity: int, block: int) -> tuple[Array, Array]:
    """The expert of overflow block `index`, and its pairs `[block]` (`R` where the block is not full)."""
    pairs = plan.order_R.shape[0]
    expert = jnp.searchsorted(plan.block_ends_E, index, side="right").astype(jnp.int32)
    before = jnp.where(expert > 0, plan.block_ends_E[expert - 1], 0)
    rank = capacity + (index - before) * block + jnp.arange(block, dtype=jnp.int32)
    position = jnp.minimum(plan.first_E[expert] + rank, pairs - 1)
    return expert, jnp.where(rank < plan.sizes_E[expert], plan.order_R[position], pairs)


def rows_of(x_MD: Array, pairs: Array, choices: int) -> Array:
    """The token of each pair; zeros where the pair is out of range."""
    return jnp.take(x_MD, pairs // choices, axis=0, mode="fill", fill_value=0)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def grouped(
    x_MD: Array,
    ids_MC: Array,
    weights_MC: Array,
    params: Experts,
    capacity: int,
    block: int,
    activation: Activation = "swiglu",
    matmul: Matmul = "plain",
) -> Array:
    """Buffers of `capacity` rows per expert in one batched product, then blocks for what does not fit.

    With `capacity=0` all rows go through blocks. Forward and backward move rows by gathers alone in the
    buffered part; the overflow loop runs as often as there are overflow blocks, usually never.
    """
    return grouped_forward(x_MD, ids_MC, weights_MC, params, capacity, block, activation, matmul)[0]


def to_buffers(x_MD: Array, plan: Plan, capacity: int, choices: int) -> Array:
    """The rows of every expert's buffer, `[E, capacity, D]`; empty slots hold zeros."""
    rows = rows_of(x_MD, plan.pair_S, choices).reshape(-1, capacity, x_MD.shape[1])
    return constrain(rows, "expert", "slot", "embed")


def grouped_forward(
    x_MD: Array,
    ids_MC: Array,
    weights_MC: Array,
    params: Experts,
    capacity: int,
    block: int,
    activation: Activation,
    matmul: Matmul,
) -> tuple[Array, tuple]:
    """`grouped` and what its backward pass needs."""
    (tokens, width), choices, experts = x_MD.shape, ids_MC.shape[1], params.gate_EDF.shape[0]
    plan = make_plan(ids_MC, experts, capacity, block)
    weights_R = weights_MC.reshape(-1)
    y_MD, gate, up = jnp.zeros_like(x_MD), None, None
    if capacity:
        rows = to_buffers(x_MD, plan, capacity, choices)
        gate, up = hidden_of(rows, params, matmul)
        out = down(activate(gate, up, activation), params, matmul)
        out = plus(out, params.down_bias_ED).reshape(-1, width)
        out_MCD = jnp.take(out, plan.slot_R, axis=0, mode="fill", fill_value=0).reshape(tokens, choices, width)
        y_MD = jnp.einsum("mcd,mc->md", out_MCD, weights_MC)

    def body(index: Array, y_MD: Array) -> Array:
        expert, pairs = overflow_rows(plan, index, capacity, block)
        rows = rows_of(x_MD, pairs, choices)
        out = on_own_rows(rows, expert_at(params, expert), activation, matmul=matmul)
        share = jnp.take(weights_R, pairs, mode="fill", fill_value=0)
        return y_MD.at[pairs // choices].add(out * share[:, None], mode="drop")

    y_MD = jax.lax.fori_loop(0, plan.block_ends_E[-1], body, y_MD)
    return y_MD, (x_MD, ids_MC, weights_MC, params, plan, gate, up)


def expert_gradients(
    rows: Array,
    gate: Array,
    up: Array,
    share: Array,
    dy: Array,
    params: Experts,
    activation: Activation,
    matmul: Matmul,
) -> tuple:
    """Gradients of one batch of rows of one expert, or of all experts' buffers at once.

    `share` weighs each row's output; `dy` is the gradient of the weighted output. Returns the gradients of
    the rows, of the share, and of the weights but those kept in 8 bits. In 8 bits, or with adapters, the hidden layer
    is computed again.
    """
    if matmul != "plain" or any(isinstance(leaf, LowRank | Quantized) for leaf in params):

        def again(rows: Array, share: Array, part: Experts) -> Array:
            return on_own_rows(rows, completed(part, params), activation, share, matmul)

        return jax.vjp(again, rows, share, differentiable(params))[1](dy)
    assert params.up_EDF is not None
    hidden, pull = jax.vjp(partial(activate, kind=activation), gate, up)
    through = dy @ params.down_EDF
    d_share = jnp.sum(through * hidden, axis=-1)
    d_gate, d_up = pull(through * share[..., None])
    d_down = jnp.swapaxes(dy, -1, -2) @ (hidden * share[..., None])
    d_rows = d_gate @ jnp.swapaxes(params.gate_EDF, -1, -2) + d_up @ jnp.swapaxes(params.up_EDF, -1, -2)
    rows_t = jnp.swapaxes(rows, -1, -2)
    d_biases = ()
    if params.down_bias_ED is not None:
        d_share += jnp.sum(dy * params.down_bias_ED[..., None, :], axis=-1)
        d_biases = (d_gate.sum(-2), d_up.sum(-2), (dy * share[..., None]).sum(-2))
    return d_rows, d_share, Experts(rows_t @ d_gate, rows_t @ d_up, d_down, *d_biases)


def grouped_backward(
    capacity: int, block: int, activation: Activation, matmul: Matmul, saved: tuple, dy_MD: Array
) -> tuple:
    """Gradients of `grouped`; the overflow blocks' hidden layer is computed again."""
    x_MD, ids_MC, weights_MC, params, plan, gate, up = saved
    (tokens, width), choices = x_MD.shape, ids_MC.shape[1]
    weights_R = weights_MC.reshape(-1)
    if capacity:
        rows, dy = (to_buffers(a, plan, capacity, choices) for a in (x_MD, dy_MD))
        share = jnp.take(weights_R, plan.pair_S, mode="fill", fill_value=0).reshape(rows.shape[:2])
        d_rows, d_share, d_params = expert_gradients(rows, gate, up, share, dy, params, activation, matmul)
        d_pairs = jnp.take(d_rows.reshape(-1, width), plan.slot_R, axis=0, mode="fill", fill_value=0)
        dx_MD = d_pairs.reshape(tokens, choices, width).sum(1)
        dw_R = jnp.take(d_share.reshape(-1), plan.slot_R, mode="fill", fill_value=0)
    else:
        dx_MD, dw_R = jnp.zeros_like(x_MD), jnp.zeros_like(weights_R)
        d_params = jax.tree.map(jnp.zeros_like, differentiable(params))

    def body(index: Array, carry: tuple) -> tuple:
        dx_MD, dw_R, d_params = carry
        expert, pairs = overflow_rows(plan, index, capacity, block)
        own = expert_at(params, expert)
        rows, dy = rows_of(x_MD, pairs, choices), rows_of(dy_MD, pairs, choices)
        share = jnp.take(weights_R, pairs, mode="fill", fill_value=0)
        d_rows, d_share, d_own = expert_gradients(rows, *hidden_of(rows, own), share, dy, own, activation, matmul)
        d_params = jax.tree.map(lambda total, part: total.at[expert].add(part), d_params, d_own)
        dx_MD = dx_MD.at[pairs // choices].add(d_rows, mode="drop")
        return dx_MD, dw_R.at[pairs].add(d_share, mode="drop"), d_params

    dx_MD, dw_R, d_params = jax.lax.fori_loop(0, plan.block_ends_E[-1], body, (dx_MD, dw_R, d_params))
    return dx_MD, None, dw_R.reshape(weights_MC.shape), d_params


grouped.defvjp(grouped_forward, grouped_backward)
