"""What a compiled program's text says: its collectives over which axes, how often, and the compiler's cycles."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import numpy as np

from sharding.expert_parallel import OVERFLOW

BETWEEN_SLICES = ("data",)
"""The axis that slices lie along: what goes to others is sent by their hosts, and not along an axis of one slice."""

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "s4": 4, "u4": 4}
UNKNOWN_CYCLES = 1 << 40
"""The compiler writes larger numbers where it has no estimate."""

SCATTERING = "all-reduce-scatter"
"""How the names of such computations begin."""

OFFLOADED = "offload"
"""In the names of gathers and scatters that the sparse cores do beside the matrix core."""

UNSTATED = ("fusion", "scatter", "gather", "sort")
"""Operations that take time whether or not the compiler states how much."""

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][a-z0-9\-]*)\(")
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
OWN_MESH = re.compile(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
BETWEEN = re.compile(r'_xla_megascale_target="\{([\d,]+)\}.*_xla_megascale_transfer_type="(\w+)"')
"""In the attributes of a `send` to other slices: which, and what kind of collective it is a part of."""

CALLED = re.compile(r"\b(body|calls|called_computations|branch_computations)=\{?((?:%?[\w.\-]+(?:, ?)?)+)\}?")


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind over the same axes of the mesh.

    axes: names, or none where the groups are no product of axes. count: per run of the program. bytes: of the whole
    array that a device ends with (all-gather) or begins with, summed over `count`. looped: whether any stands in a
    loop.
    """

    kind: str
    axes: tuple[str, ...]
    devices: int
    count: int
    bytes: int
    asynchronous: bool
    looped: bool = False


@dataclass(frozen=True)
class Kernel:
    """A kernel of which the compiler knows nothing.

    count: per run of the program. shapes: of its results and its operands. bytes: of all of these.
    """

    name: str
    count: int
    shapes: tuple[tuple[int, ...], ...]
    bytes: int


@dataclass(frozen=True)
class Program:
    """What was read of a program.

    cycles: of the matrix core, as far as the compiler estimates them. unstated_bytes: that operations read and write
    for which the compiler states no cycles, such as gathers by the sparse cores, scatters and sorting.
    """

    collectives: tuple[Collective, ...]
    cycles: int
    kernels: tuple[Kernel, ...]
    unstated_bytes: int


def read_program(text: str, mesh_shape: Mapping[str, int], overflow: int = 0) -> Program:
    """Reads an optimised program.

    Args:
        text: `compiled.as_text()`.
        mesh_shape: size of each axis, in the order of the mesh.
        overflow: how often loops go round that are for what did not fit into a buffer.
    """
    computations, entry = _computations(text)
    times, fused, offloaded = _times(computations, entry, overflow)
    found: dict[tuple[str, tuple[str, ...], int, bool], list[int]] = defaultdict(lambda: [0, 0, 0])
    cycles = unstated_bytes = 0
    kernels: list[Kernel] = []
    for name, lines in computations.items():
        often = times[name]
        if not often:
            continue
        shapes = {match[1]: match[2] for line in lines if (match := INSTRUCTION.match(line))}
        for line in lines:
            match = INSTRUCTION.match(line)
            if not match:
                continue
            one = _collective(line, match, name, mesh_shape)
            if one:
                entry_of = found[one[0]]
                entry_of[0] += often
                entry_of[1] += often * one[1]
                entry_of[2] = max(entry_of[2], often)
            elif match[3] == "custom-call" and 'custom_call_target="tpu_custom_call"' in line:
                kernels.append(_kernel(match, line, often))
            elif match[3].endswith("-done") and OFFLOADED in match[1] and name not in offloaded:
                unstated_bytes += often * 2 * _size(match[2])
            estimate = re.search(r'"estimated_cycles":"(\d+)"', line)
            if name in fused:
                continue
            if estimate and int(estimate[1]) < UNKNOWN_CYCLES:
                cycles += often * int(estimate[1])
            elif estimate or match[3] in UNSTATED:
                unstated_bytes += often * 2 * _moved(match, line, shapes)
    collectives = (
        Collective(kind, axes, devices, count, size, later, most > 1)
        for (kind, axes, devices, later), (count, size, most) in found.items()
    )
    ordered = tuple(sorted(collectives, key=lambda one: -one.bytes))
    return Program(ordered, cycles, tuple(kernels), unstated_bytes)


def _collective(
    line: str, match: re.Match[str], computation: str, mesh_shape: Mapping[str, int]
) -> tuple[tuple[str, tuple[str, ...], int, bool], int] | None:
    """What kind of collective an instruction is, over which axes, of how many devices, whether asynchronous; and its
    bytes. None if it is no collective."""
    between = BETWEEN.search(line) if match[3] == "send" else None
    if between:
        kind, slices = between[2].lower().replace("_", "-"), len(between[1].split(","))
        size = _sizes(match[2])[0] * (slices if kind == "all-gather" else 1)
        return (kind, BETWEEN_SLICES, slices, True), size
    kind, start = match[3].removesuffix("-start"), match[3].endswith("-start")
    if kind not in KINDS:
        return None
    axes, devices = _groups(line, mesh_shape)
    if devices == 1:
        return None
    # A TPU's reduce-scatter may be written as a fusion of this name: an all-reduce whose result is cut.
    told = "reduce-scatter" if computation.startswith(SCATTERING) else kind
    later = start or "async" in computation
    return (told, axes, devices, later), _bytes(match[2], kind, devices, start)


def _moved(match: re.Match[str], line: str, shapes: Mapping[str, str]) -> int:
    """Bytes that an operation writes. A scatter changes its operand where it lies: it writes what it is given."""
    if "scatter" not in match[1]:
        return _size(match[2])
    operands = re.findall(r"%([\w.\-]+)", line[match.end() :].partition(")")[0])
    given = [shapes[name] for name in operands if name in shapes]
    return min(_size(match[2]), sum(_size(shape) for shape in given if ARRAY.findall(shape) != ARRAY.findall(match[2])))


def _kernel(match: re.Match[str], line: str, often: int) -> Kernel:
    operands = line.partition("operand_layout_constraints={")[2].partition("}}")[0]
    shapes = tuple(
        tuple(int(size) for size in sizes.split(",") if size) for _, sizes in ARRAY.findall(match[2] + " " + operands)
    )
    return Kernel(re.sub(r"[.\d]+$", "", match[1]), often, shapes, _size(match[2]) + _size(operands))


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, and the name of the first to run."""
    found: dict[str, list[str]] = {}
    entry = current = ""
    for line in text.splitlines():
        header = HEADER.match(line)
        if header:
            current = header[2]
            found[current] = []
            entry = current if header[1] else entry
        elif line == "}":  # what kernels say of themselves may go over several lines
            current = ""
        elif current:
            found[current].append(line)
    return found, entry


def _times(computations: Mapping[str, list[str]], entry: str, overflow: int) -> tuple[Counter[str], set[str], set[str]]:
    """How often each computation runs; which are the inside of a fusion, and which of what runs beside the core."""
    times: Counter[str] = Counter()
    fused: set[str] = set()
    offloaded: set[str] = set()

    def visit(name: str, often: int) -> None:
        times[name] += often
        for line in computations.get(name, ()):
            for kind, names in CALLED.findall(line):
                for called in (word.strip().lstrip("%") for word in names.split(",")):
                    if called not in computations:
                        continue
                    if " fusion(" in line:
                        fused.add(called)
                    if " custom-call-start(" in line:
                        offloaded.add(called)
                    visit(called, often * (_trips(line, computations, overflow) if kind == "body" else 1))

    visit(entry, 1)
    return times, fused, offloaded


def _trips(line: str, computations: Mapping[str, list[str]], overflow: int) -> int:
    """How often a loop goes round; where that is not written, the largest constant of its condition."""
    if OVERFLOW in line:
        return overflow
    known = re.search(r'known_trip_count":\{"n":"?(\d+)', line)
    if known:
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", line)
    lines = computations.get(condition[1], []) if condition else []
    constants = [int(value) for one in lines for value in re.findall(r"s32\[\]\S* constant\((\d+)\)", one)]
    return max(constants, default=1)


def _sizes(shape: str) -> list[int]:
    """Bytes of each array in the text of a shape."""
    sizes = []
    for dtype, dimensions in ARRAY.findall(shape):
        bits = BITS.get(dtype) or int(next(iter(re.findall(r"\d+", dtype)), "0"))
        sizes.append(prod(int(one) for one in dimensions.split(",") if one) * bits // 8)
    return sizes


def _size(shape: str) -> int:
    return sum(_sizes(shape))


def _bytes(shape: str, kind: str, devices: int, start: bool) -> int:
    sizes = _sizes(shape)
    # The start of an asynchronous one gives its operand beside its result.
    size = max(sizes, default=0) if start else sum(sizes)
    return size * devices if kind == "reduce-scatter" else size


def _groups(line: str, mesh_shape: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The axes that a group runs along, and its devices."""
    named = re.search(r"replica_groups=mesh\[[^\]]*\][^{]*\{([^}]*)\}", line)
    if named and set(axes := tuple(re.findall(r"\w+", named[1]))) <= set(mesh_shape):
        axes = tuple(axis for axis in axes if mesh_shape[axis] > 1)
        return axes, prod(mesh_shape[axis] for axis in axes)
    group = _first_group(line, prod(mesh_shape.values()))
    if group is None:
        return (), 0
    places = np.unravel_index(np.asarray(group), tuple(mesh_shape.values()))
    axes = tuple(axis for axis, place in zip(mesh_shape, places, strict=True) if len(set(place.tolist())) > 1)
    return axes if prod(mesh_shape[axis] for axis in axes) == len(group) else (), len(group)


def _first_group(line: str, devices: int) -> list[int] | None:
    spread = re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if spread:
        return _order(spread[3], spread[4]).reshape(int(spread[1]), int(spread[2]))[0].tolist()
    own = OWN_MESH.search(line)
    if own:  # a mesh that the compiler made up: its axes with sizes, the order of devices, the axes of a group
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", own[1])}
        axes = re.findall(r"\w+", own[4])
        if not set(axes) <= set(sizes):
            return None
        ids = _order(own[2] or str(prod(sizes.values())), own[3]).reshape(tuple(sizes.values()))
        return ids[tuple(slice(None) if name in axes else 0 for name in sizes)].reshape(-1).tolist()
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", line)
    if listed:
        return [int(one) for one in listed[1].split(",")]
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", line)
    if pairs:
        return [int(pairs[1]), int(pairs[2])]
    return list(range(devices)) if "replica_groups={}" in line else None


def _order(sizes: str, axes: str | None) -> np.ndarray:
    """Devices as `[sizes]T(axes)` writes them: counted in a grid, whose axes then change places."""
    grid = [int(one) for one in sizes.split(",")]
    ids = np.arange(prod(grid)).reshape(grid)
    return ids.transpose([int(one) for one in axes.split(",")]) if axes else ids
