"""Tokens on one device, their experts on another: the exchanges between them, under `shard_map`.

    ring         every shard of experts is shown the tokens of all shards (all-gather) and computes those that chose
                 its experts; the sums go back to where the tokens are (reduce-scatter)
    all_to_all   every pair of token and expert travels to its expert and back, in buffers of one size per expert

    dropping     as all_to_all, but what does not fit into the buffers is left out, and counted

All but the last are exact for any routing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import shard_map
from jax.sharding import PartitionSpec as P

from sharding.mesh import BATCH_AXES, Exchange
from sharding.rules import Table, in_shape, names_of, spec, without

BUFFER_FACTOR = 1.25
"""Rows of a buffer as a multiple of an even load; what does not fit goes in a further round, or through blocks."""

OVERFLOW = "overflow_rounds"
"""Name, in a compiled program, of the loops that run only where a buffer was too small."""

Params = Mapping[str, jax.Array]
"""Weights of one layer's experts; the first dimension is the expert."""

Compute = Callable[[jax.Array, jax.Array, jax.Array, Params, int], jax.Array]
"""`sum_c weights[m, c] * expert[ids[m, c]](x[m])` as `(x_MD, ids_MC, weights_MC, params, shards) -> y_MD`; an id beyond
the last expert means nothing, and about one in `shards` is not."""

Apply = Callable[[jax.Array, jax.Array, jax.Array, Params], jax.Array]
"""`(rows_XESD, share_XES, counts_XE, params) -> out_XESD`: each expert on the rows that came for it from each of X
shards, times their shares; of S rows the first `counts` mean something, and the others have a share of zero."""


def buffer_rows(pairs: float, multiple: int) -> int:
    """Rows of a buffer for so many pairs at an even load."""
    return -(-int(pairs * BUFFER_FACTOR) // multiple) * multiple


def send_rows(pairs_mC: tuple[int, ...], experts: int) -> int:
    """Rows of the buffers that one device sends to each of all experts."""
    tokens, choices = pairs_mC
    return min(buffer_rows(tokens * choices / experts, 8), tokens)


def left_out(exchange: Exchange, counts_E: jax.Array, pairs_mC: tuple[int, ...]) -> jax.Array:
    """Pairs of this device's tokens that its buffers have no room for, if they are left out then.

    Args:
        counts_E: tokens of this device that chose each expert.
    """
    mesh, experts = jax.sharding.get_abstract_mesh(), len(counts_E)
    if exchange != "dropping" or "expert" not in mesh.manual_axes or experts % mesh.shape["expert"]:
        return jnp.zeros((), jnp.float32)
    return jnp.maximum(counts_E - send_rows(pairs_mC, experts), 0).sum()


def exact(kind: Exchange) -> Exchange:
    """The exchange of the same kind that leaves nothing out."""
    return "all_to_all" if kind == "dropping" else kind


def chosen(kind: Exchange, shards: int, choices: int) -> Exchange:
    """The exchange that moves less, where the choice is left to us.

    Per token a ring moves `2 (shards - 1)` rows; the other at most `2 * 1.25 * choices`, and gathers more on the way.
    """
    if kind != "auto":
        return kind
    return "ring" if shards <= 2 * choices else "all_to_all"


def spread_experts(
    x_MD: jax.Array,
    ids_MC: jax.Array,
    weights_MC: jax.Array,
    params: Params,
    *,
    axes: Mapping[str, Any],
    table: Table,
    exchange: Exchange,
    compute: Compute,
    apply: Apply,
) -> jax.Array:
    """What `compute` gives, with tokens over the batch's axes of the mesh and experts where `table` puts them.

    Inside `sharding.data_parallel` tokens and experts are this device's already. Elsewhere, where they do not divide
    or `gspmd` is asked for, the compiler lays it out.

    Args:
        axes: logical axes of each of `params`; of one that is made of several arrays, those of each in its place.
        table: where they lie.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return compute(x_MD, ids_MC, weights_MC, params, 1)
    own = set(mesh.manual_axes)
    left = set(mesh.axis_names) - own
    shards = mesh.shape["expert"]
    experts = len(next(iter(params.values()))) * (shards if "expert" in own else 1)
    kind = chosen(exchange, shards, ids_MC.shape[1])
    divides = experts % shards == 0 and len(x_MD) % prod(mesh.shape[axis] for axis in BATCH_AXES if axis in left) == 0
    specs = {
        name: jax.tree.map(lambda a, axes: in_shape(without(spec(axes, table), own), a.shape), leaf, axes[name])
        for name, leaf in params.items()
    }
    # Weights that are still cut over fsdp are for the compiler to gather.
    cut = {
        name for one in jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P)) for n in one for name in names_of(n)
    }
    if not divides or (not own and (kind == "gspmd" or "fsdp" in cut)):
        return compute(x_MD, ids_MC, weights_MC, params, 1)
    rows = P() if own else P(BATCH_AXES, None)

    def local(x_mD: jax.Array, ids_mC: jax.Array, weights_mC: jax.Array, params: Params) -> jax.Array:
        # Every shard of the width has the whole of a weight that is not cut along it: one of them adds it.
        first = jax.lax.axis_index("tensor") == 0
        whole = {name for name, own in axes.items() if isinstance(own, tuple) and "mlp" not in own}
        params = {name: jnp.where(first, leaf, 0) if name in whole else leaf for name, leaf in params.items()}
        if kind in ("all_to_all", "dropping"):
            capacity = send_rows(ids_mC.shape, experts)
            y_mD = _all_to_all(x_mD, ids_mC, weights_mC, params, apply, capacity, kind == "dropping")
        else:
            y_mD = _ring(x_mD, ids_mC, weights_mC, params, compute)
        return jax.lax.psum(y_mD, "tensor")

    return shard_map(local, in_specs=(rows, rows, rows, specs), out_specs=rows, axis_names=left, check_vma=False)(
        x_MD, ids_MC, weights_MC, dict(params)
    )


def _ring(x_mD: jax.Array, ids_mC: jax.Array, weights_mC: jax.Array, params: Params, compute: Compute) -> jax.Array:
    """The tokens of all shards come here, and what our experts add to them goes back."""
    experts = len(next(iter(params.values())))
    short = jnp.int16 if experts * jax.lax.axis_size("expert") < 2**15 else jnp.int32  # half of what travels
    x_MD, ids_MC, weights_MC = (
        jax.lax.all_gather(a, "expert", tiled=True) for a in (x_mD, ids_mC.astype(short), weights_mC)
    )
    own_MC = ids_MC.astype(jnp.int32) - jax.lax.axis_index("expert") * experts
    own_MC = jnp.where((own_MC >= 0) & (own_MC < experts), own_MC, experts)
    y_MD = compute(x_MD, own_MC, weights_MC, params, jax.lax.axis_size("expert"))
    return jax.lax.psum_scatter(y_MD, "expert", tiled=True)


def add_rounds(body: Callable[[jax.Array | int], Any], rounds: jax.Array) -> Any:
    """The sum of `body(turn)` over the rounds: one at least, and hardly ever another."""

    def more(turn: jax.Array, total: Any) -> Any:
        return jax.tree.map(jnp.add, total, body(turn))

    first = body(0)
    with jax.named_scope(OVERFLOW):
        return jax.lax.fori_loop(1, rounds, more, first)


# ---- all_to_all -----------------------------------------------------------------
class Plan(NamedTuple):
    """This shard's pairs by the expert that they go to.

    order_R: pairs sorted by expert. first_E, sizes_E: where each expert's begin, and how many. rank_R: each pair's
    place among those of its expert. rounds: as many as the busiest expert of any shard needs.
    """

    order_R: jax.Array
    first_E: jax.Array
    sizes_E: jax.Array
    rank_R: jax.Array
    rounds: jax.Array


def _plan(ids_mC: jax.Array, experts: int, capacity: int) -> Plan:
    ids_R = ids_mC.reshape(-1)
    order_R = jnp.argsort(ids_R, stable=True).astype(jnp.int32)
    sizes_E = jnp.bincount(ids_R, length=experts).astype(jnp.int32)
    first_E = jnp.cumsum(sizes_E) - sizes_E
    sorted_R = jnp.minimum(ids_R[order_R], experts - 1)
    rank_R = jnp.zeros_like(order_R).at[order_R].set(jnp.arange(len(order_R), dtype=jnp.int32) - first_E[sorted_R])
    # All that exchange must agree, or some wait for ever.
    rounds = jax.lax.pmax(-(-sizes_E.max() // capacity), "expert")
    return Plan(order_R, first_E, sizes_E, rank_R, rounds)


def _sent(plan: Plan, turn: jax.Array | int, capacity: int) -> jax.Array:
    """`[E, capacity]`: the pairs that this round sends to each expert, `R` where the buffer is empty."""
    pairs = len(plan.order_R)
    rank = turn * capacity + jnp.arange(capacity, dtype=jnp.int32)
    at = jnp.minimum(plan.first_E[:, None] + rank, pairs - 1)
    return jnp.where(rank < plan.sizes_E[:, None], plan.order_R[at], pairs)


def _slots(plan: Plan, ids_mC: jax.Array, turn: jax.Array | int, experts: int, capacity: int) -> jax.Array:
    """`[m, C]`: the row of the flattened buffers in which each pair travels this time; beyond their end if in none."""
    rank_mC = plan.rank_R.reshape(ids_mC.shape) - turn * capacity
    here = (ids_mC < experts) & (rank_mC >= 0) & (rank_mC < capacity)
    return jnp.where(here, ids_mC * capacity + rank_mC, experts * capacity)


def _to_experts(rows: jax.Array) -> jax.Array:
    """What stands here for all experts `[E, ...]` to what all shards have for ours, `[X, e, ...]`."""
    split = rows.reshape(jax.lax.axis_size("expert"), -1, *rows.shape[1:])
    return jax.lax.all_to_all(split, "expert", 0, 0)


def _to_tokens(rows: jax.Array) -> jax.Array:
    """The way back of `_to_experts`."""
    come = jax.lax.all_to_all(rows, "expert", 0, 0)
    return come.reshape(-1, *rows.shape[2:])


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return jnp.take(x, index, axis=0, mode="fill", fill_value=0)


def _take_any(x: jax.Array, index: jax.Array) -> jax.Array:
    """As `_take`, where it does not matter what empty places get: their share is zero."""
    return jnp.take(x, index, axis=0, mode="clip")


def _arrive(
    plan: Plan, turn: jax.Array | int, capacity: int, weights_mC: jax.Array, *arrays_mD: jax.Array
) -> tuple[jax.Array, ...]:
    """What comes to our experts this time: shares, how many pairs from each shard, and rows of each of the arrays."""
    pairs_ES = _sent(plan, turn, capacity)
    share = _to_experts(_take(weights_mC.reshape(-1), pairs_ES))
    counts = _to_experts(jnp.clip(plan.sizes_E - turn * capacity, 0, capacity))
    return share, counts, *(_to_experts(_take_any(a, pairs_ES // weights_mC.shape[1])) for a in arrays_mD)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _all_to_all(
    x_mD: jax.Array, ids_mC: jax.Array, weights_mC: jax.Array, params: Params, apply: Apply, capacity: int, once: bool
) -> jax.Array:
    """Rounds of buffers there and back, or only one. Rows are moved by gathers alone, forward and backward."""
    return _forward(x_mD, ids_mC, weights_mC, params, apply, capacity, once)[0]


def _forward(
    x_mD: jax.Array, ids_mC: jax.Array, weights_mC: jax.Array, params: Params, apply: Apply, capacity: int, once: bool
) -> tuple[jax.Array, Any]:
    experts = len(next(iter(params.values()))) * jax.lax.axis_size("expert")
    plan = _plan(ids_mC, experts, capacity)

    def body(turn: jax.Array | int) -> jax.Array:
        share, counts, rows = _arrive(plan, turn, capacity, weights_mC, x_mD)
        back = _to_tokens(apply(rows, share, counts, params))
        slots_mC = _slots(plan, ids_mC, turn, experts, capacity)
        return _take(back.reshape(-1, back.shape[-1]), slots_mC).sum(1)

    y_mD = body(0) if once else add_rounds(body, plan.rounds)
    return y_mD, (x_mD, ids_mC, weights_mC, params, plan)


def _backward(apply: Apply, capacity: int, once: bool, saved: Any, dy_mD: jax.Array) -> tuple[Any, ...]:
    """Each round travels again, and its expert is computed again, so that nothing of it was kept."""
    x_mD, ids_mC, weights_mC, params, plan = saved
    experts = len(next(iter(params.values()))) * jax.lax.axis_size("expert")
    leaves, structure = jax.tree.flatten(params)
    # Integers, such as weights in 8 bits have, have no gradient.
    part = [leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) else None for leaf in leaves]

    def again(rows: jax.Array, share: jax.Array, counts: jax.Array, part: list[Any]) -> jax.Array:
        own = [leaf if given is None else given for given, leaf in zip(part, leaves, strict=True)]
        return apply(rows, share, counts, structure.unflatten(own))

    def body(turn: jax.Array | int) -> Any:
        share, counts, rows, dy = _arrive(plan, turn, capacity, weights_mC, x_mD, dy_mD)
        _, pull = jax.vjp(lambda rows, share, part: again(rows, share, counts, part), rows, share, part)
        d_rows, d_share, d_own = pull(dy)
        slots_mC = _slots(plan, ids_mC, turn, experts, capacity)
        d_rows = _to_tokens(d_rows)
        dx_mD = _take(d_rows.reshape(-1, d_rows.shape[-1]), slots_mC).sum(1)
        return dx_mD, _take(_to_tokens(d_share).reshape(-1), slots_mC), d_own

    dx_mD, dw_mC, d_part = body(0) if once else add_rounds(body, plan.rounds)
    return dx_mD, None, dw_mC, structure.unflatten(d_part)


_all_to_all.defvjp(_forward, _backward)
