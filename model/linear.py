"""Products of activations and weights: plain, or in 8 bits while training.

An 8-bit product is qwix's (https://github.com/google/qwix): both sides are divided by the largest magnitude along what
is summed over (of each token, and of each output channel), so that the scales come out of the sum; rounded; multiplied
in 8 bits, which an accelerator does at up to twice the rate; and scaled back. The backward pass does the same with the
gradient that comes in, and reuses what the forward pass has rounded.
"""

from __future__ import annotations

from functools import cache, partial
from math import prod
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Int8

from errors import UserError
from model.lora import LowRank
from model.quantization import Quantized
from sharding.mesh import platform

Matmul = Literal["plain", "int8", "fp8"]

Weight = Array | Quantized | LowRank
"""What stands for a weight in a product."""

TYPES = {"int8": (jnp.int8, jnp.int8), "fp8": (jnp.float8_e4m3fn, jnp.float8_e5m2)}
"""Of activations and weights, and of gradients, which need range more than precision (arXiv 2209.05433, section 3)."""

LARGEST = {"int8": "absmax", "fp8": f"absmax,{448 / 240}"}
"""What the largest magnitude stands for, in qwix's terms: in e4m3 for 240, not 448. What `jax.checkpoint` keeps passes
through `reduce_precision`, which takes the highest exponent for infinity and makes NaN of more than 240."""


BLOCK, FEW = 128, 64
"""Columns in 8 bits that are multiplied at a time on a CPU, and the most rows for which that is worth it."""


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


def in_float32(x: Float[Array, "*B D"], matrix: Float[Array, "D N"] | Quantized) -> Float[Array, "*B N"]:
    """`x @ matrix`, summed in float32 and left so."""
    if isinstance(matrix, Quantized):
        out = widened(_rows(x), matrix.values) * matrix.scale[0]
    else:
        out = jnp.matmul(_rows(x), matrix.astype(x.dtype), preferred_element_type=jnp.float32)
    return out.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def widened(x: Float[Array, "*B D"], values: Int8[Array, "*E D N"]) -> Float[Array, "*B N"]:
    """`x` times integers of 8 bits in the type of `x`, summed in float32.

    For a backward pass they are widened again: to keep them so would take the memory that 8 bits save.


    On a CPU a few rows are multiplied with some columns at a time, which stay in its cache: XLA would write all of them
    in 32 bits first, which for the head of a model takes twelve times as long.
    """
    rows, columns = prod(x.shape[:-1]), values.shape[-1]
    blocks = columns // BLOCK
    plain = values.ndim > 2 or rows > FEW or columns % BLOCK or blocks < 2
    if plain or platform() != "cpu" or not jax.sharding.get_abstract_mesh().empty:
        return jnp.matmul(x, values.astype(x.dtype), preferred_element_type=jnp.float32)

    def block(index: Array) -> Array:
        own = jax.lax.dynamic_slice_in_dim(values, index * BLOCK, BLOCK, axis=1)
        return jnp.matmul(x, own.astype(x.dtype), preferred_element_type=jnp.float32)

    out = jnp.moveaxis(jax.lax.map(block, jnp.arange(blocks)), 0, -2)
    return out.reshape(*x.shape[:-1], columns)


def _widened_backward(saved: tuple[Array, Array], d_out: Array) -> tuple[Array, None]:
    x, values = saved
    d_x = jnp.matmul(d_out.astype(x.dtype), values.mT.astype(x.dtype), preferred_element_type=jnp.float32)
    return d_x.astype(x.dtype), None


widened.defvjp(lambda x, values: (widened(x, values), (x, values)), _widened_backward)


def _rows(x: Float[Array, "*B D"]) -> Array:
    """One token of each row as a matrix: with a dimension of size 1 a TPU multiplies four times as long."""
    return x[:, 0] if x.ndim == 3 and x.shape[1] == 1 else x


def linear(x: Float[Array, "*B D"], weight: Weight, matmul: Matmul = "plain") -> Array:
    """`[*B, *N]`: the sum over D of `x` times `weight`, in the type of `x`.

    Args:
        matmul: how, while training. With int8 an entry differs from the exact one by at most
            `(s sum|w| + t sum|x|) / 2 + D s t / 4`, where s and t are 2/255 of the largest |x| and |w| in the sum.
    """
    if isinstance(weight, LowRank):
        return linear(x, weight.base, matmul) + linear(weight.scaled(x @ weight.a.astype(x.dtype).T), weight.b)
    if isinstance(weight, Quantized):
        return in_float32(x, weight).astype(x.dtype).reshape(*x.shape[:-1], *weight.outputs)
    weight = weight.astype(x.dtype)
    if matmul == "plain":
        # As a matrix, see `sharding.data_parallel`.
        out = jnp.tensordot(_rows(x), weight.reshape(len(weight), -1), 1)
        out = out.reshape(*x.shape[:-1], *weight.shape[1:])
        # A TPU moves what is split into heads about in memory: here, in the type of `x`, not in float32 as part of what
        # follows it, of which the compiler for v6e (libtpu 0.0.52) dies too.
        split = weight.ndim > 2 and platform() == "tpu"
        return jax.lax.optimization_barrier(out) if split else out
    return _quantized(x, weight, (((x.ndim - 1,), (0,)), ((), ())), matmul)


def merge_heads(out_BTNI: Float[Array, "B T N I"], o_NID: Weight, matmul: Matmul = "plain") -> Float[Array, "B T D"]:
    """The output projection: all heads of a token times one matrix, in the type of `out_BTNI`.

    A plain product: as an einsum over two dimensions XLA transposes the weight at every decode step.
    """
    if isinstance(o_NID, LowRank):
        a_RX = o_NID.a.astype(out_BTNI.dtype).reshape(len(o_NID.a), -1)
        low_BTR = o_NID.scaled(out_BTNI.reshape(*out_BTNI.shape[:2], -1) @ a_RX.T)
        return merge_heads(out_BTNI, o_NID.base, matmul) + linear(low_BTR, o_NID.b)
    o_XD = o_NID
    if not isinstance(o_NID, Quantized):
        o_XD = o_NID.astype(out_BTNI.dtype).reshape(-1, o_NID.shape[-1])
    return linear(out_BTNI.reshape(*out_BTNI.shape[:2], -1), o_XD, matmul)


def on_own_weight(rows: Float[Array, "*E M D"], weight: Weight, matmul: Matmul) -> Array:
    """`[*E, M, F]`: the rows of each expert times its weight."""
    if isinstance(weight, LowRank):
        return on_own_weight(rows, weight.base, matmul) + (rows @ weight.a.mT) @ weight.b * weight.scale
    if isinstance(weight, Quantized):
        return (widened(rows, weight.values) * weight.scale).astype(rows.dtype)
    if matmul == "plain":
        return rows @ weight
    experts, last = tuple(range(rows.ndim - 2)), rows.ndim - 1
    return _quantized(rows, weight, (((last,), (last - 1,)), (experts, experts)), matmul)


def by_groups(
    rows_SX: Array,
    weight_EDF: Weight,
    sizes_E: Int[Array, " E"],
    expert_S: Int[Array, " S"],
    matmul: Matmul,
    *,
    back: bool = False,
) -> Array:
    """Rows, sorted by expert, times the weight of theirs; `sizes` counts the rows of each, `expert` is that of each.

    From `[S, D]` to `[S, F]`, or with `back` from `[S, F]` to `[S, D]`. In 8 bits an output channel has one scale for
    all experts.
    """
    if isinstance(weight_EDF, LowRank):
        out = by_groups(rows_SX, weight_EDF.base, sizes_E, expert_S, matmul, back=back)
        return out + into(out_of(rows_SX, weight_EDF.a, sizes_E), weight_EDF.b, sizes_E) * weight_EDF.scale
    if isinstance(weight_EDF, Quantized):
        out: Array = on_values(rows_SX, weight_EDF.values, sizes_E, back)
        scale_EX = weight_EDF.scale[..., 0] if back else weight_EDF.scale[:, 0]
        return (out * jnp.take(scale_EX, expert_S, axis=0, mode="clip")).astype(rows_SX.dtype)
    if matmul == "plain":
        return out_of(rows_SX, weight_EDF, sizes_E) if back else into(rows_SX, weight_EDF, sizes_E)
    from qwix._src.core.ragged_dot_qt import ragged_dot_qt

    weight = jnp.swapaxes(weight_EDF, 1, 2) if back else weight_EDF
    return ragged_dot_qt(rows_SX, weight, sizes_E, ragged_config(matmul), jax.lax.Precision.DEFAULT)


def sums_by_group(x_SX: Array, y_SY: Array, sizes_G: Int[Array, " G"]) -> Float[Array, "G X Y"]:
    """`sum_s x[s] outer y[s]` over the rows of each group, which stand one group after the other."""
    if platform() == "tpu" and x_SX.dtype == jnp.bfloat16:
        from model.kernels import grouped  # a second of imports, which only TPUs need

        if grouped.fits(len(x_SX)):
            return grouped.sums_by_group(x_SX, y_SY, sizes_G)
    return _product(x_SX, y_SY, sizes_G, (0, 0), False)


def _product(x_SX: Array, y: Array, sizes_E: Array, contracted: tuple[int, int], grouped: bool) -> Array:
    """A ragged product: of rows with each group's own matrix (`grouped`), or of two sets of rows to one matrix each."""
    numbers = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(((contracted[0],), (contracted[1],)), ((), ())),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=[0] if grouped else [],
    )
    # Products of bfloat16 are exact as they are; the TPU's kernel refuses to be asked for more.
    exact = None if x_SX.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    return jax.lax.ragged_dot_general(x_SX, y, sizes_E, numbers, precision=exact)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def on_values(rows_SX: Array, values_EDF: Int8[Array, "E D F"], sizes_E: Array, back: bool) -> Array:
    """Rows times the integers of 8 bits of their expert, `[S, D]` to `[S, F]`, or with `back` the way back."""
    return _product(rows_SX, values_EDF, sizes_E, (1, 2 if back else 1), True)


def _values_backward(back: bool, saved: tuple[Array, ...], d_out: Array) -> tuple[Array, None, None]:
    values_EDF, sizes_E = saved
    return on_values(d_out, values_EDF, sizes_E, not back), None, None


on_values.defvjp(
    lambda rows, values, sizes, back: (on_values(rows, values, sizes, back), (values, sizes)), _values_backward
)


@jax.custom_vjp
def into(rows_SD: Array, weight_EDF: Array, sizes_E: Array) -> Float[Array, "S F"]:
    """Rows times the matrix of their expert, from the width of the model to that of the expert.

    With the gradients written out no weight is ever transposed in memory.
    """
    return _product(rows_SD, weight_EDF, sizes_E, (1, 1), True)


@jax.custom_vjp
def out_of(hidden_SF: Array, weight_EDF: Array, sizes_E: Array) -> Float[Array, "S D"]:
    """The way back, by a weight that lies the same way."""
    return _product(hidden_SF, weight_EDF, sizes_E, (1, 2), True)


def _into_backward(saved: tuple[Array, ...], d_out_SF: Array) -> tuple[Array, Array, None]:
    rows_SD, weight_EDF, sizes_E = saved
    return out_of(d_out_SF, weight_EDF, sizes_E), sums_by_group(rows_SD, d_out_SF, sizes_E), None


def _out_of_backward(saved: tuple[Array, ...], d_out_SD: Array) -> tuple[Array, Array, None]:
    hidden_SF, weight_EDF, sizes_E = saved
    return into(d_out_SD, weight_EDF, sizes_E), sums_by_group(d_out_SD, hidden_SF, sizes_E), None


into.defvjp(lambda *args: (into(*args), args), _into_backward)
out_of.defvjp(lambda *args: (out_of(*args), args), _out_of_backward)


def _quantized(x: Array, y: Array, dimensions: Any, matmul: Matmul) -> Array:
    from qwix._src.core.dot_general_qt import dot_general_qt

    return dot_general_qt(x, y, dimensions, dense_config(matmul))
