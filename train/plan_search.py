"""`qmax plan --search N`: which meshes to compile, by a rough count of bytes held and sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from configs.run import Run
from errors import UserError
from sharding.mesh import AXES, MeshConfig
from sharding.topology import Chip
from terminal import progress_bar

MOST_TENSOR = 8
"""More shards of heads and widths than this are never worth their traffic while training."""


def meshes(run: Run, devices: int, slices: int) -> Iterator[Run]:
    """`run` on every mesh of so many devices whose axes divide what they cut; slices lie along `data`."""
    context = run.mesh.context
    for tensor in divisors(min(MOST_TENSOR, devices)):
        for expert in divisors(min(devices, max(run.model.moe.num_experts, 1))):
            rest = slices * tensor * expert * context
            if devices % rest:
                continue
            for data in divisors(devices // rest):
                mesh = MeshConfig(slices * data, devices // (rest * data), expert, tensor, context, run.mesh.exchange)
                try:
                    yield replace(run, mesh=mesh)
                except UserError:
                    continue


def divisors(number: int) -> list[int]:
    """Of `number`, in order."""
    return [one for one in range(1, number + 1) if number % one == 0]


def rough_seconds(run: Run, chip: Chip) -> float:
    """Seconds that a device is busy with weights and tokens on their way, without regard to the torus; infinite where
    what it holds does not fit."""
    mesh, model = run.mesh, run.model
    tokens = run.data.batch_size * run.data.sequence_length / (mesh.batch_shards * mesh.context)
    experts = model.num_moe_layers * model.moe.num_experts * 3 * model.hidden_size * model.moe.intermediate_size
    rest = model.parameters_total - experts
    shared = experts / (mesh.expert * mesh.tensor) + rest / mesh.tensor
    kept = 2.0 * tokens * model.hidden_size * model.num_layers if run.remat == "block" else 0.0
    held = 16 * (experts + rest) / (mesh.expert * mesh.tensor * mesh.fsdp) + kept
    if held > 0.8 * chip.limit:
        return float("inf")
    weights = 3 * 2 * shared * (mesh.fsdp - 1) / mesh.fsdp
    rows = 2.0 * tokens * model.hidden_size
    moved = min(5 * (mesh.expert - 1), 5 * 1.25 * model.moe.experts_per_token) * rows * model.num_moe_layers
    heads = 8 * rows * (mesh.tensor - 1) / mesh.tensor * model.num_layers
    copies = 4 * shared / mesh.fsdp * (mesh.data - 1) / mesh.data
    return (weights + moved + heads + copies) / (4 * chip.link)


def search(
    run: Run, devices: Sequence[Any], chip: Chip, args: Any, plan: Callable[..., dict[str, Any]]
) -> list[dict[str, Any]]:
    """Plans of the likeliest meshes, the best first: those that fit, by the time of a step with nothing hidden.

    Raises:
        UserError: no mesh divides, or none is likely to fit.
    """
    if args.mode != "train":
        raise UserError("--search is for --mode train; name a mesh for the others")
    runs = sorted(meshes(run, len(devices), args.slices), key=lambda one: rough_seconds(one, chip))
    runs = [one for one in runs if rough_seconds(one, chip) < float("inf")][: args.search]
    if not runs:
        raise UserError(
            f"no mesh of {len(devices)} devices divides {run.data.batch_size} rows and the model's sizes and has room "
            "for weights and optimizer; change data.batch_size or the topology"
        )
    found = []
    with progress_bar("compiling", len(runs), unit="meshes") as bar:
        for one in runs:
            found.append(plan(one, devices, chip, args))
            bar.advance(note=", ".join(f"{axis} {getattr(one.mesh, axis)}" for axis in AXES))
    return sorted(found, key=lambda one: (not one["fits"], -one.get("mfu_low", 0.0)))
