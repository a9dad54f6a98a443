"""Which mesh axis each logical axis lies on. The only tables of their kind; the model names logical axes alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from errors import UserError
from sharding.mesh import BATCH_AXES

Table = Mapping[str, str | tuple[str, ...] | None]

TRAIN: Table = {
    "layers": None,
    "embed": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "expert": "expert",
    "router": None,
}
"""Weights while training: cut over fsdp too, and gathered layer by layer as they are used."""

DECODE: Table = {**TRAIN, "embed": None}
"""Weights while decoding: nothing is gathered, so each token reads only what its device holds."""

ACTIVATIONS: Table = {
    "batch": BATCH_AXES,
    "length": None,
    "embed": None,
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "vocab": "tensor",
    "expert": "expert",
    "slot": ("data", "fsdp"),
}
"""Activations, in both. `slot` is a row of an expert's buffer."""


def spec(axes: Sequence[str | None], table: Table) -> P:
    """The partition of an array whose dimensions carry the logical names `axes` (None: not cut).

    Raises:
        ValueError: a name is not in the table, or two dimensions fall on one mesh axis.
    """
    entries = [None if axis is None else table[axis] for axis in axes]
    used = [name for entry in entries if entry for name in ((entry,) if isinstance(entry, str) else entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"two dimensions of {tuple(axes)} fall on one mesh axis: {entries}")
    return P(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out on the mesh in force as ACTIVATIONS says; `x` itself where there is none, or inside `shard_map`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1 or mesh.manual_axes:
        return x
    return jax.lax.with_sharding_constraint(x, spec(axes, ACTIVATIONS))


def array_sharding(axes: Sequence[str | None], ndim: int, mesh: jax.sharding.Mesh, table: Table) -> NamedSharding:
    """How a weight of `ndim` dimensions with logical `axes` lies on `mesh`; a stacked one has one dimension more."""
    return NamedSharding(mesh, spec(("layers",) * (ndim - len(axes)) + tuple(axes), table))


def batch_sharding(mesh: jax.sharding.Mesh, ndim: int = 2) -> NamedSharding:
    """How a `[B, ...]` array of a batch is laid out."""
    return NamedSharding(mesh, P(BATCH_AXES, *(None,) * (ndim - 1)))


def batch_share(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Which share of a batch's rows this process feeds, and of how many.

    Processes whose devices hold the same rows, such as two along `tensor`, feed the same share.

    Raises:
        UserError: two processes hold rows of which some are the same and some are not.
    """
    shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    rows: dict[int, set[int]] = {}
    for device, (index,) in batch_sharding(mesh, 1).devices_indices_map((shards,)).items():
        rows.setdefault(device.process_index, set()).update(range(shards)[index])
    shares = sorted({tuple(sorted(mine)) for mine in rows.values()})
    if sum(map(len, shares)) != shards or len({len(share) for share in shares}) > 1:
        raise UserError(
            f"the {shards} parts of a batch do not fall evenly on {len(rows)} processes: {shares[:4]}; "
            "let mesh.tensor be a multiple or a divisor of the devices of a process"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)
