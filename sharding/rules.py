"""Which mesh axis each logical axis lies on. The only tables of their kind; the model names logical axes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from errors import UserError
from sharding.mesh import BATCH_AXES

Table = Mapping[str, str | tuple[str, ...] | None]

TRAIN: Table = {
    "layers": None,
    "embed": ("fsdp", "expert", "context"),
    "columns": "fsdp",
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "expert": "expert",
    "router": "fsdp",
}
"""Weights while training: cut over fsdp and context too, and over expert where no expert has it, and gathered layer by
layer as they are used. `columns` are those of the embedding and the head."""

ALONG_DATA: Table = {**TRAIN, "embed": ("fsdp", "expert", "context", "data"), "router": ("fsdp", "data")}
"""TRAIN with `mesh.cut_over_data`. `data` comes last, and is gathered first: little travels between slices."""

AT_REST: Table = {
    **ALONG_DATA,
    "layers": "data",
    "columns": ("fsdp", "data"),
}
"""Weights between steps, their moments, and the gradients that these take: of what a step has once for each place
along `data`, each updates a part (ZeRO stage 1, arXiv 1910.02054, section 5.1). Of stacked layers that is some of the
layers, which stand together in memory; else `data` comes last, so that it is cut out of what a device holds within the
step."""

DECODE: Table = {**TRAIN, "embed": None, "columns": None, "router": None}
"""Weights while decoding: nothing is gathered, so each token reads only what its device holds."""

ACTIVATIONS: Table = {
    "batch": BATCH_AXES,
    "length": "context",
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


TOKENS = P(BATCH_AXES, "context")
"""How a `[B, T, ...]` array of a batch is cut."""


def weights_table(cut_over_data: bool) -> Table:
    """How weights lie within a step of training, see `MeshConfig.cut_over_data`."""
    return ALONG_DATA if cut_over_data else TRAIN


def spec(axes: Sequence[str | None], table: Table) -> P:
    """The partition of an array whose dimensions carry the logical names `axes` (None: not cut).

    Of several mesh axes for one name those are left out that another dimension has for itself.

    Raises:
        ValueError: a name is not in the table, or two dimensions fall on one mesh axis.
    """
    wanted = [None if axis is None else table[axis] for axis in axes]
    taken = {entry for entry in wanted if isinstance(entry, str)}
    entries = [one if isinstance(one, str) else _one_of(n for n in one or () if n not in taken) for one in wanted]
    used = [name for entry in entries for name in names_of(entry)]
    if len(used) != len(set(used)):
        raise ValueError(f"two dimensions of {tuple(axes)} fall on one mesh axis: {entries}")
    return P(*entries)


def _one_of(names: Iterable[str]) -> Any:
    """The entry of a partition for these mesh axes."""
    found = tuple(names)
    return found if len(found) > 1 else found[0] if found else None


def names_of(entry: Any) -> tuple[str, ...]:
    """The mesh axes that one dimension of a partition is cut over."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def is_even(shape: Sequence[int], partition: P, mesh: Any) -> bool:
    """Whether every dimension of an array divides over the axes of `mesh` that it is cut over."""
    return not any(
        size % prod(mesh.shape[name] for name in names_of(entry)) for size, entry in zip(shape, partition, strict=False)
    )


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """`x` laid out on the mesh in force as ACTIVATIONS says, along those axes that the compiler has to do with."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    left = without(spec(axes, ACTIVATIONS), mesh.manual_axes)
    return jax.lax.with_sharding_constraint(x, left) if any(left) or not mesh.manual_axes else x


def without(partition: P, axes: Iterable[str]) -> P:
    """`partition` with these mesh axes left out."""
    gone = set(axes)
    return P(*(_one_of(name for name in names_of(entry) if name not in gone) for entry in partition))


def in_shape(partition: P, shape: Sequence[int]) -> P:
    """`partition` for an array like another, but of size 1 along some dimensions: these are not cut."""
    return P(*(entry if size > 1 else None for entry, size in zip(partition, shape, strict=False)))


def on_own_parts(
    function: Callable[..., jax.Array],
    args: Sequence[jax.Array | None],
    axes: Sequence[tuple[str | None, ...]],
    out: tuple[str | None, ...],
) -> jax.Array | None:
    """`function(*args)` on each device's parts, as ACTIVATIONS cuts them: for kernels, which the compiler cannot cut.

    Args:
        axes: the logical axes of each argument. out: of the result.

    Returns:
        None where an argument does not divide over the mesh in force.
    """
    mesh = jax.sharding.get_abstract_mesh()
    left = set(mesh.axis_names) - set(mesh.manual_axes)
    if mesh.empty or not left:
        return function(*args)
    specs = [without(spec(own, ACTIVATIONS), mesh.manual_axes) for own in axes]
    if not all(arg is None or is_even(arg.shape, cut, mesh) for arg, cut in zip(args, specs, strict=True)):
        return None
    result = without(spec(out, ACTIVATIONS), mesh.manual_axes)
    return jax.shard_map(function, in_specs=tuple(specs), out_specs=result, axis_names=left, check_vma=False)(*args)


def array_sharding(
    axes: Sequence[str | None], ndim: int, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, table: Table
) -> NamedSharding:
    """How a weight of `ndim` dimensions with logical `axes` lies on `mesh`; a stacked one has one dimension more."""
    return NamedSharding(mesh, spec(("layers",) * (ndim - len(axes)) + tuple(axes), table))


def resting_sharding(
    axes: Sequence[str | None],
    shape: Sequence[int],
    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
    within: Table,
) -> NamedSharding:
    """How a weight and its moments lie on `mesh` between steps: by AT_REST where it divides, else as within a step.

    Args:
        within: how it lies within a step; where that is along `data` already, it stays so.
    """
    for table in ({**AT_REST, "layers": "data" if within is TRAIN else None}, {**AT_REST, "layers": None}):
        wanted = array_sharding(axes, len(shape), mesh, table)
        if is_even(shape, wanted.spec, mesh):
            return wanted
    return array_sharding(axes, len(shape), mesh, within)


def constrain_weights(
    arrays: Mapping[str, jax.Array], axes: Mapping[str, Sequence[str | None]], within: Table, *, at_rest: bool
) -> dict[str, jax.Array]:
    """Arrays shaped like weights, by path, laid out on the mesh in force as `within` a step, or as between steps."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return dict(arrays)

    def lay(name: str, x: jax.Array) -> jax.Array:
        own = axes[name]
        found = resting_sharding(own, x.shape, mesh, within) if at_rest else array_sharding(own, x.ndim, mesh, within)
        return jax.lax.with_sharding_constraint(x, found)

    return {name: lay(name, x) for name, x in arrays.items()}


def batch_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """How a `[B, T]` array of a batch is laid out."""
    return NamedSharding(mesh, TOKENS)


def batch_share(mesh: jax.sharding.Mesh) -> tuple[int, int]:
    """Which share of a batch's rows this process feeds, and of how many.

    Processes whose devices hold the same rows, such as two along `tensor` or `context`, feed the same share.

    Raises:
        UserError: two processes hold rows of which some are the same and some are not.
    """
    shards = prod(mesh.shape[axis] for axis in BATCH_AXES)
    rows: dict[int, set[int]] = {}
    for device, (index,) in NamedSharding(mesh, P(BATCH_AXES)).devices_indices_map((shards,)).items():
        rows.setdefault(device.process_index, set()).update(range(shards)[index])
    shares = sorted({tuple(sorted(mine)) for mine in rows.values()})
    if sum(map(len, shares)) != shards or len({len(share) for share in shares}) > 1:
        raise UserError(
            f"the {shards} parts of a batch do not fall evenly on {len(rows)} processes: {shares[:4]}; "
            "let mesh.tensor be a multiple or a divisor of the devices of a process"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)
