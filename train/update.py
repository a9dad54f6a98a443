"""Weights and moments after a step: all at once, or on a CPU a block at a time, which then stays in its caches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from model.tree import Arrays
from sharding.mesh import platform
from train.rounding import cast, store
from train.state import TrainState

BLOCK = 2**18
"""Numbers of a weight that are updated at a time on a CPU: eight arrays of so many are 8 MiB."""


class Updated(NamedTuple):
    """What a step leaves.

    params, opt: as in `TrainState`. parameter_norm: of the new weights. update_norm: of what was added to them, which
    is nothing where the step does not count.
    """

    params: Arrays
    opt: Any
    parameter_norm: Float[Array, ""]
    update_norm: Float[Array, ""]


def update(
    optimizer: optax.GradientTransformationExtraArgs,
    elementwise: bool,
    gradients: Arrays,
    norm: Array,
    state: TrainState,
    good: Array,
    seed: int,
) -> Updated:
    """The weights and moments of `state` moved by the optimizer, or left as they are where the step is not `good`.

    Args:
        elementwise: whether a number's update hangs on no other but through `norm`, that of all gradients.
        seed: of the bits that weights in bfloat16 are rounded with.
    """
    large: set[str] = set()
    if elementwise and platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1:
        # Bits for rounding are drawn for whole weights.
        large = {name for name, x in state.params.items() if x.size > BLOCK and x.dtype == jnp.float32}

    def moved(gradients: Arrays, weights: Arrays, opt: Any) -> tuple[Arrays, Any, Array]:
        before = cast(weights, "float32")
        updates, after = optimizer.update(gradients, opt, before, norm=norm)
        new = store(jax.tree.map(jnp.add, before, updates), weights, seed, state.step)
        return new, after, jnp.stack([_squares(new), _squares(updates)])

    small = [name for name in state.params if name not in large]
    before = {name: state.params[name] for name in small}, _of(state, small)
    *after, squares = moved({name: gradients[name] for name in small}, *before)
    params, opt = if_good(good, tuple(after), before)
    squares = jnp.where(good, squares, jnp.stack([_squares(before[0]), jnp.zeros(())]))
    opts = [opt]
    for name in sorted(large):
        own = {name: state.params[name]}, _of(state, [name])
        found, opt, more = _in_blocks(moved, good, {name: gradients[name]}, *own)
        params |= found
        opts.append(opt)
        squares += more
    params = {name: params[name] for name in state.params}
    parameter_norm, update_norm = jnp.sqrt(squares)
    return Updated(params, _joined(state, opts), parameter_norm, update_norm)


def if_good(good: Array, new: Any, old: Any) -> Any:
    """A tree of `new` arrays where the step counts, else the `old` ones."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def _squares(arrays: Any) -> Float[Array, ""]:
    """The sum of the squares of all numbers of arrays by path."""
    return optax.tree.norm(cast(arrays, "float32"), squared=True)


def _of(state: TrainState, names: Sequence[str]) -> Any:
    """The optimizer's state of some weights: dictionaries by path without the others, and what all share."""
    by_path = _by_path(state)

    def some(part: Any) -> Any:
        return {name: part[name] for name in names} if by_path(part) else part

    return jax.tree.map(some, state.opt, is_leaf=by_path)


def _joined(state: TrainState, opts: Sequence[Any]) -> Any:
    """The optimizer's state, of those of parts of the weights; what they share is the same in each."""
    by_path = _by_path(state)

    def one(part: Any, *each: Any) -> Any:
        if not by_path(part):
            return each[0]
        found = {name: x for own in each for name, x in own.items()}
        return {name: found[name] for name in part}

    return jax.tree.map(one, state.opt, *opts, is_leaf=by_path)


def _by_path(state: TrainState) -> Callable[[Any], bool]:
    """Whether a part of the optimizer's state is a dictionary by path; optax has others, by kind of weight."""
    return lambda part: isinstance(part, dict) and part.keys() == state.params.keys()


def _in_blocks(
    moved: Callable[[Arrays, Arrays, Any], tuple[Arrays, Any, Array]],
    good: Array,
    gradients: Arrays,
    weights: Arrays,
    opt: Any,
) -> tuple[Arrays, Any, Array]:
    """`moved(gradients, weights, opt)` of one weight, a block at a time; its third result is summed.

    XLA makes several loops of an update, and copies what they write to, as other loops read it: of a large weight four
    times the bytes that have to move go through memory. Those of a block stay in a cache. The condition is where one
    loop ends for XLA: a block is read whole before any of it is written.
    """
    ((name, weight),) = weights.items()
    whole, structure = jax.tree.flatten((weights, opt))
    of_weight = [leaf.shape == weight.shape for leaf in whole]
    flat = [leaf.reshape(-1) if mine else leaf for leaf, mine in zip(whole, of_weight, strict=True)]

    def block(start: int | Array, size: int, carry: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
        now, squares = carry

        def part(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size)

        def take(now: list[Array]) -> tuple[Arrays, Any]:
            # What is shared is the same for all blocks.
            own = [part(x) if mine else first for x, first, mine in zip(now, flat, of_weight, strict=True)]
            return jax.tree.unflatten(structure, own)

        def move(now: list[Array], gradient: Array) -> tuple[tuple[Arrays, Any], Array]:
            new, after, more = moved({name: part(gradient)}, *take(now))
            return (new, after), more

        def keep(now: list[Array], _: Array) -> tuple[tuple[Arrays, Any], Array]:
            own = take(now)
            return own, jnp.stack([_squares(own[0]), jnp.zeros(())])

        after, more = jax.lax.cond(good, move, keep, now, gradients[name].reshape(-1))
        new = [
            jax.lax.dynamic_update_slice_in_dim(x, own, start, 0) if mine else own
            for x, own, mine in zip(now, jax.tree.leaves(after), of_weight, strict=True)
        ]
        return new, squares + more

    blocks, rest = divmod(weight.size, BLOCK)
    carry = flat, jnp.zeros((2,), jnp.float32)
    carry = jax.lax.fori_loop(0, blocks, lambda index, carry: block(index * BLOCK, BLOCK, carry), carry)
    carry = block(blocks * BLOCK, rest, carry) if rest else carry
    found = [x.reshape(weight.shape) if mine else x for x, mine in zip(carry[0], of_weight, strict=True)]
    return *jax.tree.unflatten(structure, found), carry[1]
