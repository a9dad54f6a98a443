"""How long a step takes, as a model whose terms are shown: nothing here was measured.

    matrix core    cycles that the compiler states
    kernels        their operations at KERNEL_SHARE of the peak, or the bytes that they move if that takes longer
    unstated       bytes of operations without a figure, at the memory's rate
    collectives    bytes over the links that an axis of the mesh runs along

Collectives, on a torus (jax-ml.github.io/scaling-book, chapter 3): gathers and scatters pass every byte once around, in
both directions of each dimension, or along a line where an axis does not go around; an all-to-all is held up by its
longest dimension.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np

from configs.run import Run
from sharding.mesh import AXES
from sharding.topology import BETWEEN_SLICES, Chip
from train.hlo import Collective, Kernel, Program

KERNEL_SHARE = 0.7
"""Of the peak, what kernels are assumed to reach: the compiler states nothing of them."""

Spans = Mapping[str, Sequence[tuple[int, bool]]]
"""For each axis of the mesh, along each dimension of the torus it runs along, the devices that it has there and whether
it goes all around; empty for an axis between slices."""


@dataclass(frozen=True)
class Time:
    """Seconds of a step on each device, by what they go to. asynchronous: of the collectives, what the compiler runs
    beside other work."""

    matrix: float
    kernels: float
    unstated: float
    collectives: float
    asynchronous: float
    needed: float

    @property
    def core(self) -> float:
        """All but communication."""
        return self.matrix + self.kernels + self.unstated

    @property
    def low(self) -> float:
        """Seconds of a step if all communication hides behind other work."""
        return max(self.core, self.collectives, 1e-12)

    @property
    def high(self) -> float:
        """If none does."""
        return max(self.core + self.collectives, 1e-12)


def spans_of(mesh: Any) -> Spans:
    """Where the axes of a mesh of TPUs run."""
    devices, found = mesh.devices, {}
    every = np.array([(*one.coords, getattr(one, "core_on_chip", 0)) for one in devices.flat])
    around = [len(set(column.tolist())) for column in every.T]
    for place, axis in enumerate(AXES):
        line = np.moveaxis(devices, place, 0).reshape(devices.shape[place], -1)[:, 0]
        coords = np.array([(*one.coords, getattr(one, "core_on_chip", 0)) for one in line])
        slices = {getattr(one, "slice_index", 0) for one in line}
        extents = [len(set(column.tolist())) for column in coords.T]
        runs = ((size, size == whole > 2) for size, whole in zip(extents, around, strict=True) if size > 1)
        found[axis] = () if len(slices) > 1 else tuple(runs)
    return found


def seconds_of(one: Collective, spans: Spans, chip: Chip) -> float:
    """Of all runs of a collective."""
    if one.devices < 2:
        return 0.0
    share = (one.devices - 1) / one.devices
    runs = [run for axis in one.axes for run in spans.get(axis, ())]
    if not one.axes or not runs:
        between = bool(one.axes) and one.kind != "collective-permute"
        return one.bytes * share / (BETWEEN_SLICES if between else chip.link)
    if one.kind == "all-to-all":
        return one.bytes * max(size / (8 if closed else 4) for size, closed in runs) / chip.link
    if one.kind == "collective-permute":
        return one.bytes / chip.link
    around = one.bytes * share / (sum(2 if closed else 1 for _, closed in runs) * chip.link)
    return 2 * around if one.kind == "all-reduce" else around


def kernel_flops(kernel: Kernel, run: Run, tokens: float, length: int) -> float:
    """Operations per device of one run of a kernel: grouped products, of as many rows as tokens have choices, and
    attention, of the half of all pairs that a causal mask leaves.

    Args:
        tokens: per device. length: of a sequence.
    """
    model = run.model
    grouped = kernel.name.startswith("ragged-dot") or "tgmm" in kernel.name
    if grouped and "metadata" not in kernel.name:
        # Among its arrays one has a matrix for each group: the weights, or their gradient.
        matrix = next((shape[1:] for shape in kernel.shapes if len(shape) == 3), (0, 0))
        return 2 * tokens * model.moe.experts_per_token * prod(matrix)
    if kernel.name.startswith("splash"):
        # Two products forward; five in one kernel backward, or three and four in two.
        products = 2 if "fwd" in kernel.name else 3 if "_dq" in kernel.name and "dkv" not in kernel.name else 5
        return products * 2 * model.num_heads / run.mesh.tensor * model.head_dim * tokens * length / 2
    return 0


def step_time(read: Program, run: Run, spans: Spans, chip: Chip, tokens: float, length: int, needed: float) -> Time:
    """The model of a step.

    Args:
        tokens: per device. length: of a sequence. needed: operations per device that the step is for.
    """
    kernels = sum(
        one.count * max(kernel_flops(one, run, tokens, length) / (KERNEL_SHARE * chip.flops), one.bytes / chip.memory)
        for one in read.kernels
    )
    each = [(seconds_of(one, spans, chip), one.asynchronous) for one in read.collectives]
    return Time(
        matrix=read.cycles / chip.clock,
        kernels=kernels,
        unstated=read.unstated_bytes / chip.memory,
        collectives=sum(seconds for seconds, _ in each),
        asynchronous=sum(seconds for seconds, later in each if later),
        needed=needed / chip.flops,
    )


def costs(time: Time, tokens_per_step: float, devices: int, chip: Chip, tokens: float, price: float) -> dict[str, Any]:
    """Rates, and what `tokens` cost: hours of chips, money at `price` for one, energy."""
    chips = devices / chip.per_chip
    seconds = (time.low, time.high)
    hours = [tokens / tokens_per_step * one * chips / 3600 for one in seconds]
    return {
        "modelled": asdict(time) | {"core": time.core, "step_low": time.low, "step_high": time.high},
        "mfu_low": min(time.needed / time.high, 1.0),
        "mfu_high": min(time.needed / time.low, 1.0),
        "tokens_per_second": [tokens_per_step / one for one in reversed(seconds)],
        "chip_hours": hours,
        "money": [price * one for one in hours],
        "megawatt_hours": [one * chip.per_chip * chip.watts / 1e6 for one in hours],
    }
