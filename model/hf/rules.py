"""How tensors of a Hugging Face checkpoint correspond to weights of ours: small reversible rules.

A rule names tensors of theirs and weights of ours and moves between them without arithmetic, so that a round trip
gives the same bits. Reading works on numpy views, which cost nothing until they are copied onto a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each array by name."""

Get = Callable[[str], np.ndarray]
"""A tensor of theirs by name."""


class Rule(Protocol):
    """One correspondence. `shapes` are those of our weights."""

    @property
    def ours(self) -> tuple[str, ...]: ...

    def expected(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        """Their tensors, with the shapes that they must have."""
        ...

    def read(self, get: Get, shapes: Shapes) -> Iterator[tuple[str, np.ndarray]]:
        """Our weights from their tensors, by name; each is made when it is asked for."""
        ...

    def write(self, arrays: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        """Their tensors from our weights (jax arrays)."""
        ...

    def within(self, ours: str, theirs: str) -> Rule:
        """The rule for names that stand inside these prefixes."""
        ...


@dataclass(frozen=True)
class Same:
    """The same numbers in the same order. flat: theirs has one dimension."""

    theirs: str
    name: str
    flat: bool = False

    @property
    def ours(self) -> tuple[str, ...]:
        return (self.name,)

    def expected(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        shape = shapes[self.name]
        return {self.theirs: (prod(shape),) if self.flat else shape}

    def read(self, get: Get, shapes: Shapes) -> Iterator[tuple[str, np.ndarray]]:
        yield self.name, get(self.theirs).reshape(shapes[self.name])

    def write(self, arrays: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        return {self.theirs: arrays[self.name].reshape(self.expected(shapes)[self.theirs])}

    def within(self, ours: str, theirs: str) -> Same:
        return replace(self, name=ours + self.name, theirs=theirs + self.theirs)


@dataclass(frozen=True)
class Part:
    """A weight of ours that is some rows of a matrix of theirs.

    inputs: how many of our first dimensions are the matrix's columns. rotary: channels at the end of each head
    whose rotary pairs lie side by side in theirs (0, 1), (2, 3), ... and half a head apart in ours.
    """

    ours: str
    inputs: int = 1
    rotary: int = 0


@dataclass(frozen=True)
class Matrix:
    """`[rows, columns]` of theirs (a torch linear layer: outputs first) as weights of ours, inputs first.

    groups: the rows are so many groups, each of which holds a share of every part, in order. taps: the matrix is
    that of a depthwise convolution, `[rows, 1, taps]`.
    """

    theirs: str
    parts: tuple[Part, ...]
    groups: int = 1
    taps: bool = False

    @property
    def ours(self) -> tuple[str, ...]:
        return tuple(part.ours for part in self.parts)

    def expected(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        rows = sum(prod(shapes[part.ours][part.inputs :]) for part in self.parts)
        columns = prod(shapes[self.parts[0].ours][: self.parts[0].inputs])
        return {self.theirs: (rows, 1, columns) if self.taps else (rows, columns)}

    def read(self, get: Get, shapes: Shapes) -> Iterator[tuple[str, np.ndarray]]:
        matrix = get(self.theirs)
        matrix = matrix.reshape(self.groups, -1, matrix.shape[-1])
        start = 0
        for part in self.parts:
            shape = shapes[part.ours]
            inputs, outputs = shape[: part.inputs], shape[part.inputs :]
            size = prod(outputs) // self.groups
            rows = matrix[:, start : start + size].reshape(*outputs, *inputs)
            if part.rotary:
                rows = to_halves(rows, len(outputs) - 1, part.rotary)
            axes = (*range(len(outputs), len(shape)), *range(len(outputs)))
            yield part.ours, rows.transpose(axes)
            start += size

    def write(self, arrays: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        blocks = []
        for part in self.parts:
            array = arrays[part.ours]
            axes = (*range(part.inputs, array.ndim), *range(part.inputs))
            rows = array.transpose(axes)
            if part.rotary:
                rows = to_pairs(rows, array.ndim - part.inputs - 1, part.rotary)
            blocks.append(rows.reshape(self.groups, -1, prod(array.shape[: part.inputs])))
        joined = blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)
        return {self.theirs: joined.reshape(self.expected(shapes)[self.theirs])}

    def within(self, ours: str, theirs: str) -> Matrix:
        parts = tuple(replace(part, ours=ours + part.ours) for part in self.parts)
        return replace(self, theirs=theirs + self.theirs, parts=parts)


def to_halves(array: Any, axis: int, channels: int) -> Any:
    """The last `channels` along `axis` from pairs side by side to pairs half of them apart."""
    order = np.concatenate([np.arange(0, channels, 2), np.arange(1, channels, 2)])
    return _reorder(array, axis, order)


def to_pairs(array: Any, axis: int, channels: int) -> Any:
    """The inverse of `to_halves`."""
    return _reorder(array, axis, np.arange(channels).reshape(2, -1).T.reshape(-1))


def _reorder(array: Any, axis: int, order: np.ndarray) -> Any:
    plain = array.shape[axis] - len(order)
    return array.take(np.concatenate([np.arange(plain), plain + order]), axis=axis)


GATE, UP, DOWN = "gate_EDF", "up_EDF", "down_EDF"


@dataclass(frozen=True)
class ExpertsEach:
    """Three matrices for every expert, as most checkpoints have them. `names` are those of gate, up and down."""

    prefix: str
    theirs: str
    names: tuple[str, str, str] = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")

    @property
    def ours(self) -> tuple[str, ...]:
        return tuple(self.prefix + name for name in (GATE, UP, DOWN))

    def expected(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        found = {}
        for ours, name in zip(self.ours, self.names, strict=True):
            experts, *shape = shapes[ours]
            shape = tuple(shape if ours.endswith(DOWN) else reversed(shape))
            found |= {f"{self.theirs}{expert}.{name}": shape for expert in range(experts)}
        return found

    def read(self, get: Get, shapes: Shapes) -> Iterator[tuple[str, np.ndarray]]:
        for ours, name in zip(self.ours, self.names, strict=True):
            stacked = np.stack([get(f"{self.theirs}{expert}.{name}") for expert in range(shapes[ours][0])])
            yield ours, stacked if ours.endswith(DOWN) else stacked.swapaxes(1, 2)

    def write(self, arrays: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        found = {}
        for ours, name in zip(self.ours, self.names, strict=True):
            turned = np.asarray(arrays[ours] if ours.endswith(DOWN) else jnp.swapaxes(arrays[ours], 1, 2))
            found |= {f"{self.theirs}{expert}.{name}": turned[expert] for expert in range(len(turned))}
        return found

    def within(self, ours: str, theirs: str) -> ExpertsEach:
        return replace(self, prefix=ours + self.prefix, theirs=theirs + self.theirs)


@dataclass(frozen=True)
class ExpertsFused:
    """All experts in two tensors: gate above up `[E, 2F, D]`, and down `[E, D, F]`.

    turned: with the last two dimensions exchanged, as some checkpoints were written.
    """

    prefix: str
    theirs: str
    turned: bool = False

    @property
    def ours(self) -> tuple[str, ...]:
        return tuple(self.prefix + name for name in (GATE, UP, DOWN))

    @property
    def tensors(self) -> tuple[str, str]:
        """Names of their two tensors."""
        return f"{self.theirs}gate_up_proj", f"{self.theirs}down_proj"

    def expected(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        experts, width, hidden = shapes[self.prefix + GATE]
        both, down = (experts, 2 * hidden, width), (experts, width, hidden)
        if self.turned:
            both, down = (experts, width, 2 * hidden), (experts, hidden, width)
        return dict(zip(self.tensors, (both, down), strict=True))

    def read(self, get: Get, shapes: Shapes) -> Iterator[tuple[str, np.ndarray]]:
        both, down = (get(name) for name in self.tensors)
        both, down = (both, down.swapaxes(1, 2)) if self.turned else (both.swapaxes(1, 2), down)
        hidden = shapes[self.prefix + GATE][2]
        yield from zip(self.ours, (both[..., :hidden], both[..., hidden:], down), strict=True)

    def write(self, arrays: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        gate, up, down = (arrays[name] for name in self.ours)
        both = jnp.concatenate([gate, up], axis=-1)
        found = (both, jnp.swapaxes(down, 1, 2)) if self.turned else (jnp.swapaxes(both, 1, 2), down)
        return dict(zip(self.tensors, found, strict=True))

    def within(self, ours: str, theirs: str) -> ExpertsFused:
        return replace(self, prefix=ours + self.prefix, theirs=theirs + self.theirs)


@dataclass(frozen=True)
class ExpertsInterleaved:
    """gpt-oss: gate and up channels in turn, `[E, D, 2F]`, and down `[E, F, D]`; with biases."""

    prefix: str
    theirs: str

    @property
    def ours(self) -> tuple[str, ...]:
        return tuple(self.prefix + n for n in (GATE, UP, DOWN, "gate_bias_EF", "up_bias_EF", "down_bias_ED"))

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of their four tensors: weights, then biases."""
        return tuple(self.theirs + n for n in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"))

    def expected(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        experts, width, hidden = shapes[self.prefix + GATE]
        found = (experts, width, 2 * hidden), (experts, hidden, width), (experts, 2 * hidden), (experts, width)
        return dict(zip(self.tensors, found, strict=True))

    def read(self, get: Get, shapes: Shapes) -> Iterator[tuple[str, np.ndarray]]:
        both, down, bias, down_bias = (get(name) for name in self.tensors)
        found = (both[..., ::2], both[..., 1::2], down.swapaxes(1, 2), bias[..., ::2], bias[..., 1::2], down_bias)
        yield from zip(self.ours, found, strict=True)

    def write(self, arrays: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        gate, up, down, gate_bias, up_bias, down_bias = (arrays[name] for name in self.ours)

        def in_turn(a: Any, b: Any) -> Any:
            return jnp.stack([a, b], axis=-1).reshape(*a.shape[:-1], -1)

        found = (in_turn(gate, up), jnp.swapaxes(down, 1, 2), in_turn(gate_bias, up_bias), down_bias)
        return dict(zip(self.tensors, found, strict=True))

    def within(self, ours: str, theirs: str) -> ExpertsInterleaved:
        return replace(self, prefix=ours + self.prefix, theirs=theirs + self.theirs)


@dataclass(frozen=True)
class Copy:
    """A tensor of theirs that repeats one that another rule reads; `of` is our weight, `rule` how it is written."""

    rule: Same | Matrix

    @property
    def ours(self) -> tuple[str, ...]:
        return ()

    def expected(self, shapes: Shapes) -> dict[str, tuple[int, ...]]:
        return self.rule.expected(shapes)

    def read(self, get: Get, shapes: Shapes) -> Iterator[tuple[str, np.ndarray]]:
        yield from ()

    def write(self, arrays: Mapping[str, Any], shapes: Shapes) -> dict[str, Any]:
        return self.rule.write(arrays, shapes)

    def within(self, ours: str, theirs: str) -> Copy:
        return Copy(self.rule.within(ours, theirs))
