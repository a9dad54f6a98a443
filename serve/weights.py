"""A model's weights as decoding wants them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from model.config import ModelConfig
from model.quantization import Quantized, WeightType, quantize, stored_form
from model.transformer import Transformer
from model.tree import Arrays, Skeleton, list_names, make_skeleton
from sharding.reshard import reshard
from sharding.rules import DECODE, array_sharding, in_shape


def decode_weights(model: Transformer, mesh: jax.sharding.Mesh | None, weight_type: WeightType = "same") -> Transformer:
    """`model` as decoding wants it: one array per layer, in the type it computes in or in 8 bits, laid out on `mesh`.

    Arrays that are right already are shared, not copied. The router stays in float32: it computes in that.
    """
    config = model.config
    listed = make_skeleton(config, stacked=False, dtype=model.dtype)

    def place(arrays: Arrays, wanted: dict[str, Any]) -> Arrays:
        found: Arrays = {}
        for name, leaf in arrays.items():
            names = list_names(name, config) if model.stacked else [name]
            if isinstance(wanted[names[0]], Quantized):
                layers = [leaf] if len(names) == 1 else [leaf[index] for index in range(len(names))]
                found |= {
                    own: _quantized(layer, sums[own], wanted[own]) for own, layer in zip(names, layers, strict=True)
                }
            else:
                found |= zip(names, reshard(leaf, [wanted[own] for own in names]), strict=True)
        return found

    wanted = abstract_arrays(config, model.dtype, mesh, weight_type)
    own, sums = Skeleton(model), listed.sums
    weights, state = (place(arrays, kind) for arrays, kind in zip(own.split(model), wanted, strict=True))
    return own.merge(weights, state) if not model.stacked else listed.merge(weights, state)


def _quantized(leaf: Array, sums: tuple[int, ...], wanted: Quantized) -> Any:
    layout = jax.tree.map(lambda a: a.sharding, wanted)
    return jax.jit(quantize, static_argnums=1, out_shardings=None if wanted.values.sharding is None else layout)(
        leaf, sums
    )


def abstract_weights(
    config: ModelConfig, dtype: jnp.dtype, mesh: jax.sharding.Mesh | None, weight_type: WeightType = "same"
) -> Transformer:
    """Shapes, types and layout of `decode_weights`; allocates nothing."""
    arrays = abstract_arrays(config, dtype, mesh, weight_type)
    return make_skeleton(config, stacked=False, dtype=dtype).merge(*arrays)


def weight_bytes(config: ModelConfig, dtype: jnp.dtype, weight_type: WeightType) -> int:
    """Bytes of `decode_weights`, on all devices together if each array is on one."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(abstract_weights(config, dtype, None, weight_type)))


def abstract_arrays(
    config: ModelConfig, dtype: jnp.dtype, mesh: jax.sharding.Mesh | None, weight_type: WeightType
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The weights and the other state of `abstract_weights`, by path."""
    skeleton = make_skeleton(config, stacked=False, dtype=dtype)
    axes, weights, sums = skeleton.axes, skeleton.weights, skeleton.sums

    def abstract(shape: tuple[int, ...], own: tuple[str | None, ...], kind: Any) -> Any:
        layout = None
        if mesh is not None:
            layout = array_sharding(own, len(shape), mesh, DECODE)
            layout = layout.update(spec=in_shape(layout.spec, shape))
        return jax.ShapeDtypeStruct(shape, kind, sharding=layout)

    arrays: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name, shape in skeleton.shapes.items():
        is_state = name not in weights
        kind = jnp.float32 if is_state or axes[name][:1] == ("router",) else dtype
        if weight_type == "int8" and name in sums:
            form = stored_form(shape, axes[name], sums[name])
            values, scale = abstract(form.values, form.axes, jnp.int8), abstract(form.scale, form.axes, jnp.float32)
            arrays[is_state][name] = Quantized(values, scale, form.outputs)
        else:
            arrays[is_state][name] = abstract(shape, axes[name], kind)
    return arrays
