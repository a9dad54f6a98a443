"""Layers where each device works on its own tokens (fully sharded data parallelism), under `shard_map`.

Weights arrive as they are stored, cut over `fsdp` (and over `expert`, if they are not of experts), and are gathered
layer by layer; their gradients are scattered the same way. What a gradient sums over other axes is summed once, after
the last layer, and not in every one: so no layer waits for all devices. `tensor` stays with the compiler.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import shard_map
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from sharding.mesh import TOKEN_AXES, platform
from sharding.rules import TOKENS, is_even, names_of, spec, weights_table, without

GATHERED = "gathered"
"""Name of gathered weights, for `keep_all_but_gathered`."""


def divides(tokens: Sequence[int], dtype: jnp.dtype) -> bool:
    """Whether a batch of `[B, T]` tokens, whose activations are of `dtype`, can be cut over the mesh in force."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return False
    if platform() == "cpu" and dtype == jnp.bfloat16:
        return False  # XLA's compiler for CPUs dies of sums over devices in bfloat16
    return is_even(tokens, TOKENS, mesh)


def on_own_tokens(
    function: Callable[[list[Any], Any], tuple[Any, Any]],
    weights: list[jax.Array],
    axes: Sequence[tuple[str | None, ...]],
    tokens: Any,
    cut_over_data: bool = False,
) -> tuple[Any, Any]:
    """`function(weights, tokens)` on each device's part of `tokens`.

    Args:
        function: gives arrays `[B, T, ...]`, and sums over tokens, which are added over the devices.
        weights: cut as `weights_table` says; `function` gathers them with `gather`.
        axes: the logical axes of each; one more dimension in front is of layers.
        tokens: any tree of `[B, T, ...]` arrays.
    """
    table = weights_table(cut_over_data)
    cut = [
        without(spec(("layers",) * (leaf.ndim - len(own)) + tuple(own), table), ["tensor"])
        for leaf, own in zip(weights, axes, strict=True)
    ]

    if platform() == "cpu":
        # Gradients of weights in bfloat16 would be summed in it, see `divides`.
        weights = [leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf for leaf in weights]

    def local(weights: list[Any], tokens: Any) -> tuple[Any, Any]:
        arrays, sums = function(weights, tokens)
        return arrays, jax.tree.map(lambda a: a[None], sums)

    arrays, sums = shard_map(
        local, in_specs=(cut, TOKENS), out_specs=(TOKENS, P(TOKEN_AXES)), axis_names=set(TOKEN_AXES), check_vma=False
    )(weights, tokens)
    return arrays, jax.tree.map(lambda a: a.sum(0), sums)


def gather(leaf: jax.Array, axes: tuple[str | None, ...], dtype: jnp.dtype, cut_over_data: bool = False) -> jax.Array:
    """A weight whole along what is cut over `fsdp`, in `dtype`; itself if nothing is, or outside `on_own_tokens`."""
    mesh = jax.sharding.get_abstract_mesh()
    cut = [names_of(entry) for entry in spec(axes, weights_table(cut_over_data))]
    dimension = next((i for i, names in enumerate(cut) if "fsdp" in names), None)
    if "fsdp" not in mesh.manual_axes or dimension is None:
        return leaf
    # A router works in float32.
    leaf = leaf if "router" in axes else leaf.astype(dtype)
    over = tuple(name for name in cut[dimension] if mesh.shape[name] > 1)
    if over:
        leaf = _gather(leaf, dimension, over)
    return checkpoint_name(leaf, GATHERED)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(leaf: jax.Array, dimension: int, over: tuple[str, ...]) -> jax.Array:
    """The shards along these mesh axes, one after the other in `dimension`.

    First those along `data`, if it is among them: then little travels between slices. What is cut along its first or
    its last dimension travels as a matrix whose rows are cut. Products want a matrix too: so what they get need not be
    moved about in memory, as several dimensions in tiles of registers would be.
    """
    inner = 0 < dimension < leaf.ndim - 1
    whole = leaf if inner else _rows(leaf, dimension)
    near = tuple(axis for axis in over if axis != "data")
    for axes in (over[len(near) :], near):
        whole = jax.lax.all_gather(whole, axes, axis=dimension if inner else 0, tiled=True) if axes else whole
    if inner:
        return whole
    return _unrows(whole, leaf.shape, dimension)


def _rows(leaf: jax.Array, dimension: int) -> jax.Array:
    """As a matrix with the first or the last dimension as rows."""
    return leaf.reshape(len(leaf), -1) if dimension == 0 else leaf.reshape(-1, leaf.shape[-1]).T


def _unrows(rows: jax.Array, shape: tuple[int, ...], dimension: int) -> jax.Array:
    """The way back, to `shape` but for the size of that dimension."""
    return rows.reshape(-1, *shape[1:]) if dimension == 0 else rows.T.reshape(*shape[:-1], -1)


def _scatter(dimension: int, over: tuple[str, ...], _: None, d_leaf: jax.Array) -> tuple[jax.Array]:
    """The sum over these mesh axes of this device's shard.

    TPUs scatter neither along the last dimension nor over all devices at once: for both the compiler takes twice the
    traffic (an all-reduce, and a slice). So one mesh axis comes after the other.
    """
    inner = 0 < dimension < d_leaf.ndim - 1
    part = d_leaf if inner else _rows(d_leaf, dimension)
    for axis in over:
        part = jax.lax.psum_scatter(part, axis, scatter_dimension=dimension if inner else 0, tiled=True)
    if "data" in over and platform() == "tpu":
        # The compiler for v6e (libtpu 0.0.52) fails at joining what comes from other slices with its new form.
        part = jax.lax.optimization_barrier(part)
    return (part if inner else _unrows(part, d_leaf.shape, dimension),)


_gather.defvjp(lambda leaf, dimension, over: (_gather(leaf, dimension, over), None), _scatter)


def keep_all_but_gathered(primitive: Any, *_: Any, **params: Any) -> bool:
    """A policy of `jax.checkpoint`: a backward pass gathers weights again rather than keep all of them."""
    gathers = primitive.name == "all_gather" and {"data", "fsdp"} & set(names_of(params["axis_name"]))
    return not gathers and params.get("name") != GATHERED
