"""The compiled steps of generation: reading prompts, and one more token of every row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from model.cache import Cache, empty_cache, layer_axes
from model.config import ModelConfig
from model.forward import Batch, continuation, forward, unembed
from model.quantization import Quantized, WeightType, quantize, stored_form
from model.transformer import Transformer
from model.tree import Arrays, Skeleton, list_names, make_skeleton
from serve.sampling import SamplingArrays, sample
from sharding.reshard import reshard
from sharding.rules import DECODE, array_sharding, constrain, in_shape


@struct.dataclass
class Rows:
    """What stays the same for each row: how to sample, when to stop (`-1` fills up), and after how many tokens."""

    sampling: SamplingArrays
    stop_BX: Int[Array, "B X"]
    max_tokens_B: Int[Array, " B"]


@struct.dataclass
class State:
    """What changes with each step: the cache, each row's last token, tokens so far, and whether it goes on."""

    cache: Cache
    last_B: Int[Array, " B"]
    step_B: Int[Array, " B"]
    live_B: Bool[Array, " B"]


def prefill(
    model: Transformer,
    tokens_BT: Int[Array, "B T"],
    lengths_B: Int[Array, " B"],
    rows: Rows,
    *,
    capacity: int,
    vocab_limit: int,
) -> tuple[State, Int[Array, "2 B"]]:
    """Reads prompts, padded on the right, into a new cache and samples the first token of each row.

    Args:
        capacity: positions of the cache. vocab_limit: rows of the embedding that are tokens.
    """
    count, length = tokens_BT.shape
    none_B = jnp.zeros(count, jnp.int32)
    batch = continuation(tokens_BT, none_B, jnp.arange(length)[None] < lengths_B[:, None])
    cache = empty_cache(model.config, count, capacity, model.dtype)
    return _advance(model, batch, State(cache, none_B, none_B, lengths_B > 0), rows, vocab_limit)


def decode(model: Transformer, state: State, rows: Rows, *, vocab_limit: int) -> tuple[State, Int[Array, "2 B"]]:
    """One more token of every live row."""
    batch = continuation(state.last_B[:, None], state.cache.lengths_B, state.live_B[:, None])
    return _advance(model, batch, state, rows, vocab_limit)


def _advance(model: Transformer, batch: Batch, state: State, rows: Rows, vocab_limit: int) -> tuple[State, Array]:
    """Forward, logits of each row's last token, sampling, and who goes on."""
    result = forward(model, batch, state.cache)
    assert result.cache is not None
    last_B = jnp.maximum(jnp.sum(batch.segments_BT, axis=1) - 1, 0)
    hidden_BD = jnp.take_along_axis(result.hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
    logits_BV = unembed(model, hidden_BD)
    with jax.named_scope("sample"):
        tokens_B, logprobs_B = sample(logits_BV, rows.sampling, state.step_B, vocab_limit=vocab_limit)
    step_B = state.step_B + state.live_B
    ended_B = jnp.any(tokens_B[:, None] == rows.stop_BX, axis=1) | (step_B >= rows.max_tokens_B)
    output = pack(jnp.where(state.live_B, tokens_B, -1), logprobs_B)
    return lay_out(model.config, State(result.cache, tokens_B, step_B, state.live_B & ~ended_B)), output


def pack(tokens_B: Array, logprobs_B: Float[Array, " B"]) -> Int[Array, "2 B"]:
    """Tokens and log-probabilities as one array: one copy to the host costs less than two."""
    packed = jnp.stack([tokens_B, jax.lax.bitcast_convert_type(logprobs_B, jnp.int32)])
    return constrain(packed, None, None)


def unpack(output: Array) -> tuple[list[int], list[float]]:
    """What `pack` packed, on the host; waits for the step to finish."""
    tokens, bits = np.asarray(output)
    return tokens.tolist(), bits.view(np.float32).tolist()


def lay_out(config: ModelConfig, state: State) -> State:
    """`state` spread over the mesh in force in the same way after every step, so that it can be donated."""
    cache = state.cache
    layers = tuple(
        tuple(constrain(array, *axes) for array, axes in zip(arrays, layer_axes(config, layer), strict=True))
        for layer, arrays in enumerate(cache.layers)
    )
    return State(
        replace(
            cache,
            layers=layers,
            lengths_B=constrain(cache.lengths_B, "batch"),
            table_BX=constrain(cache.table_BX, "batch", None),
        ),
        *(constrain(array, "batch") for array in (state.last_B, state.step_B, state.live_B)),
    )


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
