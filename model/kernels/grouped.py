"""Sums over groups of rows by jax's megablox kernel for TPUs; its plain twin is `lax.ragged_dot_general`.

The compilers of jax 0.10 multiply all rows with all groups instead.
"""

from __future__ import annotations

from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jaxtyping import Array, Float, Int

from model.kernels import exact_products

ROWS = (512, 256, 128, 64, 32, 16)
"""Rows that the kernel takes at a time: the first that divides them."""

COLUMNS = 1024
"""Most columns of either side at a time."""


def fits(rows: int) -> bool:
    """Whether the kernel takes so many rows."""
    return any(rows % size == 0 for size in ROWS)


def sums_by_group(
    x_SX: Float[Array, "S X"], y_SY: Float[Array, "S Y"], sizes_G: Int[Array, " G"], *, interpret: bool = False
) -> Float[Array, "G X Y"]:
    """`sum_s x[s] outer y[s]` over the rows of each group, summed in float32, in the type of `x`.

    Args:
        sizes_G: rows of each group, which stand one after the other.
        interpret: run the kernel's steps on any machine, slowly; for tests.
    """
    rows = next(size for size in ROWS if len(x_SX) % size == 0)
    tiles = (rows, min(x_SX.shape[1], COLUMNS), min(y_SY.shape[1], COLUMNS))
    with exact_products(x_SX.dtype):
        return tgmm(x_SX.T, y_SY, sizes_G.astype("int32"), x_SX.dtype, tiles, interpret=interpret)
