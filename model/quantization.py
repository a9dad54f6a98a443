"""Weights in 8 bits, for decoding: its time is that of reading them.

Each output channel has a scale of its own, its largest magnitude over 127 (arXiv 2208.07339, section 2.1, for the
weights alone): what is summed over has one scale, so that it comes out of the sum, and products are of numbers as they
are stored.
"""

from __future__ import annotations

from typing import Any, Literal

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int8

WeightType = Literal["same", "int8"]

LARGEST = 127


@struct.dataclass
class Quantized:
    """`values * scale`; where `linear` and its kin take a weight, they take this too.

    values: of the weight's shape. scale: of the same rank, with size 1 along what products sum over.
    """

    values: Int8[Array, "*S"]
    scale: Float[Array, "*S"]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Dimensions of the weight."""
        return self.values.ndim

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, index: Any) -> Quantized:
        return Quantized(self.values[index], self.scale[index])

    def astype(self, dtype: Any) -> Quantized:
        """Itself: it is cast where it is multiplied."""
        return self

    def as_matrix(self) -> Quantized:
        """All dimensions but the last as one; they must be what products sum over."""
        return Quantized(self.values.reshape(-1, self.shape[-1]), self.scale.reshape(1, -1))

    @property
    def mT(self) -> Quantized:  # noqa: N802 (as arrays call it)
        """With the last two dimensions exchanged."""
        return Quantized(self.values.mT, self.scale.mT)


def quantize(weight: Float[Array, "*S"], sums: tuple[int, ...]) -> Quantized:
    """The nearest in 8 bits.

    Args:
        sums: dimensions that products sum over.
    """
    weight = weight.astype(jnp.float32)
    scale = jnp.max(jnp.abs(weight), axis=sums, keepdims=True) / LARGEST
    values = jnp.round(weight / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
    return Quantized(values, scale)
