"""Sequences cut over `context`: queries meet the keys of other devices, and memories pass from one to the next.

Inside `sharding.data_parallel` device j has the j-th part of every row. Ring attention: arXiv 2310.01889. For it the
parts are cut in halves, and device j takes the halves j and 2c - 1 - j of c devices' 2c: so all have as much to do of
what a causal mask leaves (zig-zag order, arXiv 2311.09431 section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

AXIS = "context"

Halves = tuple[Any, Any]
"""A tree of what belongs to half j, and to half 2c - 1 - j."""

Attend = Callable[..., tuple[jax.Array, jax.Array]]
"""`(q, k, v, q_segments, k_segments, q_start, k_start) -> (out, lse)`: queries of one piece to the keys of another, of
which the first have these places in their row. out: float32, as if there were no other keys; lse: the log of the sum of
what it was divided by."""

Pull = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]
"""The gradient of `Attend`: `(q, k, v, q_segments, k_segments, q_start, k_start, lse, delta, d_out) -> (dq, dk, dv)`,
where lse is of all keys and delta is `sum(out * d_out)` less the gradient of lse."""


def context_shards() -> int:
    """Devices that a sequence is cut over here; 1 outside `sharding.data_parallel`."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh.shape[AXIS] if AXIS in mesh.manual_axes else 1


def from_previous(x: jax.Array) -> jax.Array:
    """What the device before this one in the sequence has in the place of `x`; zeros on the first."""
    shards = context_shards()
    return jax.lax.ppermute(x, AXIS, [(i, i + 1) for i in range(shards - 1)])


def incoming_state(transition: jax.Array, update: jax.Array) -> jax.Array:
    """The memory that this device's tokens start with, `[..., H, I]`; zero on the first device.

    Args:
        transition, update: `[..., H, H]` and `[..., H, I]`: a device makes `transition @ S + update` of a memory S.
    """
    shards, own = context_shards(), jax.lax.axis_index(AXIS)
    transitions, updates = (jax.lax.all_gather(x, AXIS) for x in (transition, update))

    def body(state: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        index, transition, update = inputs
        return jnp.where(index < own, transition @ state + update, state), None

    return jax.lax.scan(body, jnp.zeros_like(update), (jnp.arange(shards), transitions, updates))[0]


# ---- zig-zag --------------------------------------------------------------------
def _holder(half: int, shards: int) -> int:
    return half if half < shards else 2 * shards - 1 - half


def _moves(parity: int) -> list[tuple[int, int]]:
    """Who sends its first half (0), or its second (1), to whom."""
    shards = context_shards()
    return [(i, _holder(2 * i + parity, shards)) for i in range(shards)]


def _to_halves(*parts: tuple[jax.Array, int]) -> Halves:
    """This device's part of arrays, each cut along the dimension that is given, to the halves that it is to have."""
    even = jax.lax.axis_index(AXIS) % 2 == 0

    def one(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
        first, second = jnp.split(x, 2, axis)
        a, b = jax.lax.ppermute(first, AXIS, _moves(0)), jax.lax.ppermute(second, AXIS, _moves(1))
        return jnp.where(even, a, b), jnp.where(even, b, a)

    low, high = zip(*(one(x, axis) for x, axis in parts), strict=True)
    return low, high


def _from_halves(low: jax.Array, high: jax.Array, axis: int) -> jax.Array:
    """The way back of `_to_halves`, of one array."""
    even = jax.lax.axis_index(AXIS) % 2 == 0
    a, b = jnp.where(even, low, high), jnp.where(even, high, low)
    back = [jax.lax.ppermute(x, AXIS, [(to, of) for of, to in _moves(p)]) for p, x in enumerate((a, b))]
    return jnp.concatenate(back, axis)


def _merge(one: tuple[jax.Array, jax.Array], two: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Attention to two sets of keys, from attention to each."""
    lse = jnp.logaddexp(one[1], two[1])
    return one[0] * jnp.exp(one[1] - lse)[..., None] + two[0] * jnp.exp(two[1] - lse)[..., None], lse


def _pick(condition: jax.Array, yes: Any, no: Any) -> Any:
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), yes, no)


def _rotate(tree: Any) -> Any:
    shards = context_shards()
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, [(i, (i + 1) % shards) for i in range(shards)]), tree)


# ---- ring -----------------------------------------------------------------------
@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def ring_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, attend: Attend, pull: Pull
) -> tuple[jax.Array, jax.Array]:
    """Attention of this device's queries to the keys of all devices, which go around; and its lse.

    Args:
        q: `[..., t, H]`. k, v: `[..., t, H]`. segments: `[B, t]`. t is even.
    """
    return _forward(q, k, v, segments, attend, pull)[0]


def _starts(shard: jax.Array, half: int) -> tuple[jax.Array, jax.Array]:
    return shard * half, (2 * context_shards() - 1 - shard) * half


def _keys(turn: jax.Array | int, around: Halves) -> tuple[list[Any], jax.Array]:
    """Keys, values, segments and places of the halves that are here at this turn; and whether they come before ours."""
    shards, own = context_shards(), jax.lax.axis_index(AXIS)
    owner = (own - turn) % shards
    starts = _starts(owner, around[0][2].shape[1])
    return [(*piece, start) for piece, start in zip(around, starts, strict=True)], owner < own


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array, attend: Attend, pull: Pull
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    low, high = _to_halves(*((x, x.ndim - 2) for x in (q, k, v)), (segments, 1))
    starts = _starts(jax.lax.axis_index(AXIS), segments.shape[1] // 2)
    queries = [(own_q, own_s, start) for (own_q, _, _, own_s), start in zip((low, high), starts, strict=True)]

    def meet(query: Any, key: Any) -> tuple[jax.Array, jax.Array]:
        (q, q_segments, q_start), (k, v, k_segments, k_start) = query, key
        return attend(q, k, v, q_segments, k_segments, q_start, k_start)

    around: Halves = (low[1:], high[1:])
    first, _ = _keys(0, around)
    results = meet(queries[0], first[0]), _merge(meet(queries[1], first[0]), meet(queries[1], first[1]))

    def body(carry: Any, turn: jax.Array) -> tuple[Any, None]:
        around, results = _rotate(carry[0]), carry[1]
        keys, before = _keys(turn, around)
        more = meet(_pick(before, queries[0], queries[1]), _pick(before, keys[0], keys[1]))
        high = _merge(results[1], meet(queries[1], keys[0]))
        return (
            around,
            (_pick(before, _merge(results[0], more), results[0]), _pick(before, high, _merge(high, more))),
        ), None

    (_, results), _ = jax.lax.scan(body, (around, results), jnp.arange(1, context_shards()))
    out = _from_halves(results[0][0], results[1][0], q.ndim - 2)
    lse = _from_halves(results[0][1], results[1][1], q.ndim - 2)
    return (out, lse), (low, high, results)


def _backward(attend: Attend, pull: Pull, saved: Any, cotangents: tuple[jax.Array, jax.Array]) -> tuple[Any, ...]:
    """Keys go around once more, and their gradients with them."""
    low, high, results = saved
    d_out, d_lse = cotangents
    d_halves = _to_halves((d_out, d_out.ndim - 2), (d_lse, d_lse.ndim - 1))
    starts = _starts(jax.lax.axis_index(AXIS), low[3].shape[1])
    queries = []
    for piece, (out, lse), (d_out, d_lse), start in zip((low, high), results, d_halves, starts, strict=True):
        queries.append((piece[0], piece[3], start, lse, jnp.sum(out * d_out, axis=-1) - d_lse, d_out))

    def meet(query: Any, key: Any) -> tuple[jax.Array, ...]:
        (q, q_segments, q_start, lse, delta, d_out), (k, v, k_segments, k_start) = query, key
        return pull(q, k, v, q_segments, k_segments, q_start, k_start, lse, delta, d_out)

    def add(total: Any, part: Any, where: jax.Array | bool = True) -> Any:
        return jax.tree.map(lambda a, b: a + jnp.where(where, b, 0), total, part)

    around: Halves = (low[1:], high[1:])
    keys, _ = _keys(0, around)
    zeros = [jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), piece[:2]) for piece in around]
    first = meet(queries[0], keys[0]), meet(queries[1], keys[0]), meet(queries[1], keys[1])
    d_q = (first[0][0], first[1][0] + first[2][0])
    d_keys = (add(add(zeros[0], first[0][1:]), first[1][1:]), add(zeros[1], first[2][1:]))

    def body(carry: Any, turn: jax.Array) -> tuple[Any, None]:
        (around, d_keys), (d_low, d_high) = _rotate(carry[0]), carry[1]
        keys, before = _keys(turn, around)
        one = meet(queries[1], keys[0])
        more = meet(_pick(before, queries[0], queries[1]), _pick(before, keys[0], keys[1]))
        d_q = (d_low + jnp.where(before, more[0], 0), d_high + one[0] + jnp.where(before, 0, more[0]))
        d_first = add(add(d_keys[0], one[1:]), more[1:], before)
        return ((around, (d_first, add(d_keys[1], more[1:], ~before))), d_q), None

    ((around, d_keys), d_q), _ = jax.lax.scan(body, ((around, d_keys), d_q), jnp.arange(1, context_shards()))
    d_keys = _rotate(d_keys)
    parts = [(d_q[0], d_q[1], low[0]), *((d_keys[0][i], d_keys[1][i], low[i + 1]) for i in (0, 1))]
    return *(_from_halves(a, b, a.ndim - 2).astype(like.dtype) for a, b, like in parts), None


ring_attention.defvjp(_forward, _backward)
