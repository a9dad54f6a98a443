"""Axis names of the device mesh, and its construction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from errors import UserError

if TYPE_CHECKING:
    import jax

AXES = ("data", "fsdp", "expert", "context", "tensor")
"""`data`: replicas of the weights; `fsdp`: weights and optimizer cut up, batch too; `expert`: experts
cut up, batch too; `context`: sequences cut up; `tensor`: heads, feed-forward width and vocabulary cut up."""

Exchange = Literal["auto", "ring", "all_to_all", "dropping", "gspmd"]
ContextExchange = Literal["ring", "all_gather"]

BATCH_AXES = ("data", "fsdp", "expert")
"""Mesh axes over which the rows of a batch are spread."""

TOKEN_AXES = (*BATCH_AXES, "context")
"""Mesh axes over which the tokens of a batch are spread."""


@dataclass(frozen=True)
class MeshConfig:
    """How many devices stand along each axis; their product must be the number of devices used."""

    data: int = 1
    """Replicas of the model, each with its part of the batch."""
    fsdp: int = 1
    """Shards of weights and optimizer state, each with its part of the batch."""
    expert: int = 1
    """Shards of the experts, each with its part of the batch."""
    tensor: int = 1
    """Shards of heads, feed-forward width and vocabulary."""
    context: int = 1
    """Shards of each sequence, for sequences too long for one device."""
    exchange: Exchange = "auto"
    """How tokens meet experts on other devices: gathered around a ring; sent to and fro, in further rounds where a
    buffer is too small, or (`dropping`) in one, while training, and what is left out is logged; or as the compiler does
    it."""
    context_exchange: ContextExchange = "ring"
    """How queries meet keys on other devices: these go around a ring, or are gathered."""
    cut_over_data: bool = False
    """Cut weights over `data` too, not only while they rest (ZeRO-3): those of each layer travel between slices three
    times in a step, and no device has more than its part of them."""

    def __post_init__(self) -> None:
        for axis, size in self.sizes.items():
            if size < 1:
                raise UserError(f"mesh.{axis}={size} must be at least 1")

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes in the order of `AXES`."""
        return tuple(self.sizes.values())

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each axis by name, in the order of `AXES`."""
        return {axis: getattr(self, axis) for axis in AXES}

    @property
    def num_devices(self) -> int:
        """Devices that the mesh uses."""
        return math.prod(self.shape)

    @property
    def words(self) -> str:
        """Axes and sizes, for people."""
        return " x ".join(f"{axis}={size}" for axis, size in zip(AXES, self.shape, strict=True))

    @property
    def batch_shards(self) -> int:
        """Parts that the rows of a batch are cut into."""
        return self.data * self.fsdp * self.expert


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """The mesh of `config` over the first `config.num_devices` of `devices` (all, by default).

    Raises:
        UserError: there are fewer devices than the mesh needs.
    """
    import jax
    from jax.sharding import AxisType

    here, devices = devices is None, list(devices or jax.devices())
    if config.num_devices > len(devices):
        raise UserError(
            f"the mesh {config.words} needs {config.num_devices} devices and {len(devices)} "
            f"{devices[0].platform} device(s) are here; on a CPU, emulate more with "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={config.num_devices}"
        )
    if here and config.num_devices < len(devices) and jax.process_count() > 1:
        raise UserError(
            f"the mesh {config.words} uses {config.num_devices} of the {len(devices)} devices of "
            f"{jax.process_count()} processes; a run of several processes uses all of them"
        )
    grid = device_grid(config.shape, devices[: config.num_devices])
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def device_grid(shape: tuple[int, ...], devices: Sequence[Any]) -> Any:
    """Devices in the form of a mesh, so that neighbours along an axis have links; slices lie along the first axis.

    Raises:
        UserError: the first axis does not divide over the slices.
    """
    from jax.experimental import mesh_utils

    # Machines with GPUs are numbered as slices too; what lies along which axis is the user's choice there.
    slices = len({getattr(device, "slice_index", 0) for device in devices if device.platform == "tpu"})
    if slices <= 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if shape[0] % slices:
        raise UserError(f"mesh.data={shape[0]} does not divide over {slices} slices, whose links between them are slow")
    within, between = (shape[0] // slices, *shape[1:]), (slices, *(1,) * (len(shape) - 1))
    return mesh_utils.create_hybrid_device_mesh(within, between, devices, allow_split_physical_axes=True)


def platform() -> str:
    """What the program that is being traced is made for: `cpu`, `gpu` or `tpu`.

    The mesh in force decides, which may be of devices that are not here.
    """
    import jax

    device = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        return jax.default_backend()
    kind = device.device_kind.lower()
    return kind if kind == "cpu" else "tpu" if kind.startswith("tpu") else "gpu"
