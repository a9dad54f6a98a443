"""Arrays from one layout to another, on the devices: weights handed from training to generation.

A layer that was stacked with others becomes an array of its own: slicing a stack at every step would copy it.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax


def reshard(leaf: jax.Array, wanted: Sequence[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    """`leaf`, or its slices along the first dimension where several are wanted, in their types and layouts.

    One program does it all, so that nothing goes through the host. What is right already is shared, not copied.

    Args:
        wanted: shapes, types and, on a mesh, layouts.
    """
    if len(wanted) == 1:
        (one,) = wanted
        leaf = leaf.astype(one.dtype)
        return [leaf if one.sharding is None else jax.device_put(leaf, one.sharding)]

    def split(stacked: jax.Array) -> list[jax.Array]:
        return [stacked[index].astype(one.dtype) for index, one in enumerate(wanted)]

    if wanted[0].sharding is None:
        return jax.jit(split)(leaf)
    return jax.jit(split, out_shardings=[one.sharding for one in wanted])(leaf)
