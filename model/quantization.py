"""Weights in 8 bits: for decoding, whose time is that of reading them, and beside adapters, which are trained alone.

Each output channel has a scale of its own, its largest magnitude over 127 (arXiv 2208.07339, section 2.1, for the
weights alone): what is summed over has one scale, so that it comes out of the sum, and products are of numbers as they
are stored.
"""

from __future__ import annotations

from math import prod
from types import EllipsisType
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int8

WeightType = Literal["same", "int8"]

LARGEST = 127


@struct.dataclass
class Quantized:
    """`values * scale`; where `linear` and its kin take a weight, they take this too.

    values: as matrices, inputs by outputs (the experts' `down` the other way about): as such they are read where they
    lie, while a TPU moves about what has more dimensions. scale: of the same rank, with size 1 along what products sum
    over. outputs: sizes that the outputs of a product have.
    """

    values: Int8[Array, "*E D F"]
    scale: Float[Array, "*E D F"]
    outputs: tuple[int, ...] = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """As it is stored."""
        return self.values.shape

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: EllipsisType) -> Quantized:
        return self

    def astype(self, dtype: Any) -> Quantized:
        """Itself: it is cast where it is multiplied."""
        return self

    def dense(self, dtype: Any = jnp.float32) -> Float[Array, "*E D F"]:
        """The numbers that it stands for, of its stored shape."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)

    @property
    def mT(self) -> Quantized:  # noqa: N802 (as arrays call it)
        """With the last two dimensions exchanged."""
        return Quantized(self.values.mT, self.scale.mT, self.outputs)


def differentiable(tree: Any) -> Any:
    """`tree` with None in the place of weights in 8 bits: what has gradients."""
    return jax.tree.map(lambda leaf: None if isinstance(leaf, Quantized) else leaf, tree, is_leaf=_is_quantized)


def completed(part: Any, tree: Any) -> Any:
    """The inverse of `differentiable`: `part` with the weights of `tree` that it has not."""
    return jax.tree.map(lambda own, leaf: leaf if own is None else own, part, tree, is_leaf=lambda node: node is None)


def _is_quantized(node: Any) -> bool:
    return isinstance(node, Quantized)


class Form(NamedTuple):
    """How a weight is stored, see `Quantized`: sizes of its values and of its scale, and the values' logical axes."""

    values: tuple[int, ...]
    scale: tuple[int, ...]
    axes: tuple[str | None, ...]
    outputs: tuple[int, ...]


def stored_form(shape: tuple[int, ...], axes: tuple[str | None, ...], sums: tuple[int, ...]) -> Form:
    """The form of a weight of this shape, of which products sum over the dimensions `sums`.

    Of dimensions that become one the first is the one that may be cut.
    """
    if 0 in sums:
        count, outputs = len(sums), shape[len(sums) :]
        values = (prod(shape[:count]), prod(outputs))
        return Form(values, (1, values[1]), (axes[0], axes[count]), outputs)
    return Form(shape, tuple(1 if i in sums else size for i, size in enumerate(shape)), axes, ())


def quantize(weight: Float[Array, "*S"], sums: tuple[int, ...]) -> Quantized:
    """The nearest in 8 bits.

    Args:
        sums: dimensions that products sum over.
    """
    form = stored_form(weight.shape, ("",) * weight.ndim, sums)
    weight = weight.astype(jnp.float32).reshape(form.values)
    over = tuple(i for i, (n, m) in enumerate(zip(form.scale, form.values, strict=True)) if n < m)
    return Quantized(*nearest(weight, over), form.outputs)


def nearest(x: Float[Array, "*S"], over: tuple[int, ...]) -> tuple[Int8[Array, "*S"], Float[Array, "*S"]]:
    """The nearest integers and their scale, one for all along the dimensions `over`."""
    scale = jnp.max(jnp.abs(x), axis=over, keepdims=True) / LARGEST
    return jnp.round(x / jnp.where(scale == 0, 1, scale)).astype(jnp.int8), scale
