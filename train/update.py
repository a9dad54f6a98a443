"""Weights and moments after a step: all at once, or on a CPU a block at a time, which then stays in its caches."""

from __future__ import annotations

from collections.abc import Callable
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
    if elementwise and platform() == "cpu" and jax.sharding.get_abstract_mesh().size <= 1:
        return _by_weight(optimizer, gradients, norm, state, good, seed)
    weights = cast(state.params, "float32")
    updates, opt = optimizer.update(gradients, state.opt, weights, norm=norm)
    params = store(jax.tree.map(jnp.add, weights, updates), state.params, seed, state.step)
    params, opt = if_good(good, (params, opt), (state.params, state.opt))
    added = jnp.where(good, optax.tree.norm(updates), 0.0)
    return Updated(params, opt, optax.tree.norm(cast(params, "float32")), added)


def if_good(good: Array, new: Any, old: Any) -> Any:
    """A tree of `new` arrays where the step counts, else the `old` ones."""
    return jax.tree.map(lambda a, b: jnp.where(good, a, b), new, old)


def _by_weight(
    optimizer: optax.GradientTransformationExtraArgs,
    gradients: Arrays,
    norm: Array,
    state: TrainState,
    good: Array,
    seed: int,
) -> Updated:
    """`update`, block by block of each weight.

    XLA makes several loops of an update, and copies what they write to, as other loops read it: of a large weight four
    times the bytes that have to move go through memory. Those of a block stay in a cache.
    """
    params, opts = {}, {}
    squares = jnp.zeros((2,), jnp.float32)
    for name, weight in state.params.items():

        def moved(gradient: Array, weight: Array, opt: Any, name: str = name) -> tuple[Array, Any, Array]:
            before = weight.astype(jnp.float32)
            updates, after = optimizer.update({name: gradient}, opt, {name: before}, norm=norm)
            (added,) = jax.tree.leaves(updates)
            new = store({name: before + added}, {name: weight}, seed, state.step)[name]
            return new, after, jnp.stack([_square(new), _square(added)])

        # Bits for rounding are drawn for whole weights.
        size = min(weight.size, BLOCK) if weight.dtype == jnp.float32 else weight.size
        params[name], opts[name], more = _in_blocks(moved, good, gradients[name], weight, _of(state.opt, name), size)
        squares += more
    parameter_norm, update_norm = jnp.sqrt(squares)
    return Updated(params, _joined(state.opt, opts), parameter_norm, update_norm)


def _square(x: Array) -> Float[Array, ""]:
    return jnp.sum(jnp.square(x.astype(jnp.float32)))


def _of(opt: Any, name: str) -> Any:
    """The optimizer's state of one weight: dictionaries are by path, all else is shared."""
    return jax.tree.map(lambda part: {name: part[name]} if isinstance(part, dict) else part, opt, is_leaf=_is_by_path)


def _joined(opt: Any, opts: dict[str, Any]) -> Any:
    """A state like `opt` of those of all weights; what they share is the same in each."""

    def one(part: Any, *each: Any) -> Any:
        return {name: own[name] for name, own in zip(opts, each, strict=True)} if isinstance(part, dict) else each[0]

    return jax.tree.map(one, opt, *opts.values(), is_leaf=_is_by_path)


def _is_by_path(part: Any) -> bool:
    return isinstance(part, dict)


def _in_blocks(
    moved: Callable[[Array, Array, Any], tuple[Array, Any, Array]],
    good: Array,
    gradient: Array,
    weight: Array,
    opt: Any,
    size: int,
) -> tuple[Array, Any, Array]:
    """`moved(gradient, weight, opt)`, `size` numbers at a time; its third result is summed.

    The condition is where one loop ends for XLA: a block is read whole before any of it is written.
    """
    whole, structure = jax.tree.flatten((weight, opt))
    of_weight = [leaf.shape == weight.shape for leaf in whole]
    flat_gradient = gradient.reshape(-1)
    flat = [leaf.reshape(-1) if mine else leaf for leaf, mine in zip(whole, of_weight, strict=True)]

    def block(start: int | Array, size: int, carry: tuple[list[Array], Array]) -> tuple[list[Array], Array]:
        now, squares = carry

        def part(x: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(x, start, size)

        def take(now: list[Array]) -> tuple[Array, Any]:
            # What is shared is the same for all blocks.
            own = [part(x) if mine else first for x, first, mine in zip(now, flat, of_weight, strict=True)]
            return jax.tree.unflatten(structure, own)

        def move(now: list[Array], gradient: Array) -> tuple[tuple[Array, Any], Array]:
            new, after, more = moved(part(gradient), *take(now))
            return (new, after), more

        def keep(now: list[Array], _: Array) -> tuple[tuple[Array, Any], Array]:
            own = take(now)
            return own, jnp.stack([_square(own[0]), jnp.zeros(())])

        after, more = jax.lax.cond(good, move, keep, now, flat_gradient)
        new = [
            jax.lax.dynamic_update_slice_in_dim(x, own, start, 0) if mine else own
            for x, own, mine in zip(now, jax.tree.leaves(after), of_weight, strict=True)
        ]
        return new, squares + more

    blocks, rest = divmod(weight.size, size)
    carry = flat, jnp.zeros((2,), jnp.float32)
    carry = jax.lax.fori_loop(0, blocks, lambda index, carry: block(index * size, size, carry), carry)
    carry = block(blocks * size, rest, carry) if rest else carry
    found = [x.reshape(weight.shape) if mine else x for x, mine in zip(carry[0], of_weight, strict=True)]
    return *jax.tree.unflatten(structure, found), carry[1]
