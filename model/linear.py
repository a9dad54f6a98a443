"""Products of activations and weights: plain, or in 8 bits while training.

An 8-bit product is qwix's (https://github.com/google/qwix): both sides are divided by the largest magnitude along what
is summed over (of each token, and of each output channel), so that the scales come out of the sum; rounded; multiplied
in 8 bits, which an accelerator does at up to twice the rate; and scaled back. The backward pass does the same with the
gradient that comes in, and reuses what the forward pass has rounded.
"""

from __future__ import annotations

from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from errors import UserError

Matmul = Literal["plain", "int8", "fp8"]

TYPES = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}
"""Of activations and weights, and of gradients, which need range more than precision (arXiv 2209.05433, section 3)."""

LARGEST = {"int8": "absmax", "fp8": f"absmax,{448 / 240}"}
"""What the largest magnitude stands for, in qwix's terms: in e4m3 for 240, not 448. What `jax.checkpoint` keeps passes
through `reduce_precision`, which takes the highest exponent for infinity and makes NaN of more than 240."""


def check_installed(matmul: Matmul) -> None:
    """Refuses 8-bit products where qwix is missing.

    Raises:
        UserError: it cannot be imported.
    """
    if matmul != "plain":
        try:
            dense_config(matmul)
        except ModuleNotFoundError as error:
            raise UserError(
                f"matmul={matmul} needs qwix ({error}): pip install 'qmax[quantized]', or leave it plain"
            ) from error


@cache
def dense_config(matmul: Matmul) -> Any:
    """qwix's options of a product of two arrays."""
    from qwix._src.core.dot_general_qt import DotGeneralQtConfig  # public only as a patch of jax's functions

    stored, gradient = TYPES[matmul]
    return DotGeneralQtConfig(
        lhs_qtype=stored,
        rhs_qtype=stored,
        lhs_calibration_method=LARGEST[matmul],
        rhs_calibration_method=LARGEST[matmul],
        dlhs_grad_qtype=gradient,
        drhs_grad_qtype=gradient,
        disable_gradient_clipping=True,  # nothing is beyond the largest magnitude
    )


@cache
def ragged_config(matmul: Matmul) -> Any:
    """qwix's options of a grouped product."""
    from qwix._src.core.ragged_dot_qt import RaggedDotQtConfig

    stored, gradient = TYPES[matmul]
    return RaggedDotQtConfig(lhs_qtype=stored, rhs_qtype=stored, dlhs_grad_qtype=gradient, drhs_grad_qtype=gradient)


def linear(x: Float[Array, "*B D"], weight: Float[Array, "D *N"], matmul: Matmul = "plain") -> Array:
    """`[*B, *N]`: the sum over D of `x` times `weight`, in the type of `x`.

    Args:
        matmul: how, while training. With int8 an entry differs from the exact one by at most
            `(s sum|w| + t sum|x|) / 2 + D s t / 4`, where s and t are 2/255 of the largest |x| and |w| in the sum.
    """
    weight = weight.astype(x.dtype)
    if matmul == "plain":
        return jnp.tensordot(x, weight, 1)
    return _quantized(x, weight, (((x.ndim - 1,), (0,)), ((), ())), matmul)


def merge_heads(
    out_BTNI: Float[Array, "B T N I"], o_NID: Float[Array, "N I D"], matmul: Matmul = "plain"
) -> Float[Array, "B T D"]:
    """The output projection: all heads of a token times one matrix, in the type of `out_BTNI`.

    A plain product: as an einsum over two dimensions XLA transposes the weight at every decode step.
    """
    o_XD = o_NID.astype(out_BTNI.dtype).reshape(-1, o_NID.shape[-1])
    return linear(out_BTNI.reshape(*out_BTNI.shape[:2], -1), o_XD, matmul)


def on_own_weight(rows: Float[Array, "*E M D"], weight: Float[Array, "*E D F"], matmul: Matmul) -> Array:
    """`[*E, M, F]`: the rows of each expert times its weight."""
    if matmul == "plain":
        return rows @ weight
    experts, last = tuple(range(rows.ndim - 2)), rows.ndim - 1
    return _quantized(rows, weight, (((last,), (last - 1,)), (experts, experts)), matmul)


def by_groups(
    rows_SD: Float[Array, "S D"], weight_EDF: Float[Array, "E D F"], sizes_E: Int[Array, " E"], matmul: Matmul
) -> Float[Array, "S F"]:
    """Rows, sorted by expert, times the weight of theirs; `sizes` counts the rows of each.

    In 8 bits an output channel has one scale for all experts.
    """
    # Products of bfloat16 are exact as they are; the TPU's kernel refuses to be asked for more.
    exact = None if rows_SD.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    if matmul == "plain":
        return jax.lax.ragged_dot(rows_SD, weight_EDF, sizes_E, precision=exact)
    from qwix._src.core.ragged_dot_qt import ragged_dot_qt

    return ragged_dot_qt(rows_SD, weight_EDF, sizes_E, ragged_config(matmul), jax.lax.Precision.DEFAULT)


def _quantized(x: Array, y: Array, dimensions: Any, matmul: Matmul) -> Array:
    from qwix._src.core.dot_general_qt import dot_general_qt

    return dot_general_qt(x, y, dimensions, dense_config(matmul))
