"""A state as its leaves: names, descriptions, hashes and safe copies of the arrays of a tree."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def leaf_hashes(state: Any) -> dict[str, str]:
    """Path of each array of `state` -> SHA-256 (hex) of its dtype, shape and bytes. Needs every shard here."""
    hashes = {}
    for path, leaf in flatten(state).items():
        array = np.asarray(leaf)
        head = f"{array.dtype} {array.shape} ".encode()
        hashes["/".join(path)] = hashlib.sha256(head + array.tobytes()).hexdigest()
    return hashes


def flatten(tree: Any, *, arrays: bool = True) -> dict[tuple[str, ...], Any]:
    """Path -> leaf, in the order of jax.tree.leaves."""
    flat: dict[tuple[str, ...], Any] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        if arrays and (not isinstance(leaf, jax.Array) or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)):
            raise TypeError(f"{'/'.join(path)} is a {type(leaf).__name__}; a state holds plain jax arrays")
        if path in flat:
            raise ValueError(f"two arrays of the state are called {'/'.join(path)}")
        flat[path] = leaf
    return flat


def nest(leaves: Mapping[tuple[str, ...], Any]) -> dict[str, Any]:
    """Dicts of dicts: what Orbax stores, whatever containers the state is made of."""
    root: dict[str, Any] = {}
    for path, leaf in leaves.items():
        node = root
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return root


def filled(leaves: Mapping[tuple[str, ...], Any]) -> dict[tuple[str, ...], Any]:
    """Those of `leaves` that have elements; Orbax refuses the others, and there is nothing in them to store."""
    return {path: leaf for path, leaf in leaves.items() if math.prod(leaf.shape)}


def empty(leaf: jax.ShapeDtypeStruct, default: jax.sharding.Sharding) -> jax.Array:
    """The array without elements that `leaf` describes."""
    nothing = np.zeros(leaf.shape, leaf.dtype)
    return jax.make_array_from_callback(leaf.shape, leaf.sharding or default, lambda index: nothing[index])


def own_copies(leaves: Mapping[tuple[str, ...], jax.Array]) -> dict[tuple[str, ...], jax.Array]:
    """`leaves`, where those in host memory are copied.

    Orbax only looks at host memory. Whoever looks keeps a donated buffer from being used in place, so that the next
    step would need twice the memory for as long as the save lasts; and nothing but that would keep the bytes from
    changing under the writer. Device memory is copied to the host by Orbax itself before its `save` returns.
    """
    own = dict(leaves)
    host = [path for path, leaf in leaves.items() if _in_host_memory(leaf)]
    arrays = [leaves[path] for path in host]
    # jnp.copy would compile a program for each shape; this copies without one.
    copies: Sequence[jax.Array] = jax.device_put(arrays, [array.sharding for array in arrays], may_alias=False)
    own.update(zip(host, jax.block_until_ready(copies), strict=True))
    return own


def _in_host_memory(array: jax.Array) -> bool:
    device = next(iter(array.sharding.device_set))
    return device.platform == "cpu" or "host" in (array.sharding.memory_kind or "")


def describe(leaf: Any) -> dict[str, Any]:
    """Shape and dtype of an array, real or abstract, as JSON holds them."""
    return {"shape": list(leaf.shape), "dtype": np.dtype(leaf.dtype).name}


def words(leaf: Mapping[str, Any] | None) -> str:
    """`float32[4, 8]` for what `describe` gave, `missing` for None."""
    return "missing" if leaf is None else f"{leaf['dtype']}{leaf['shape']}"
