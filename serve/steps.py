"""The compiled step of the engine: chunks of prompts, or one more token of every row, and what is drawn after them."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding
from jaxtyping import Array, Int

from model.adapters import Adapters
from model.cache import Cache, KVType, Stored, empty_layer, lay_out, layer_axes
from model.config import ModelConfig
from model.forward import Output, continuation, forward, unembed
from model.transformer import Transformer
from serve.drafts import Drafts, draft, empty_drafts
from serve.logits import Tables, adjust, empty_tables, most_likely
from serve.rows import Rows, unpack_rows
from serve.sampling import sample
from sharding.rules import ACTIVATIONS, constrain, spec

NOBODY = 2**30
"""Slot of a row that keeps nothing."""


@struct.dataclass
class State:
    """What the device keeps between steps.

    layers: as in `Cache`: pages, and what linear layers remember of each slot. last_S: the last token of each slot,
    which the host reads a step later. tables: see there. drafts: where the model's own block makes guesses.
    """

    layers: tuple[tuple[Array, ...], ...]
    last_S: Int[Array, " S"]
    tables: Tables
    drafts: Drafts | None = None


def empty_state(
    config: ModelConfig,
    slots: int,
    pages: int,
    page: int,
    dtype: jnp.dtype,
    kv_type: KVType = "same",
    drafts: int = 0,
) -> State:
    """Nothing yet, in `slots` slots and `pages` pages of all devices together; `drafts`: guesses for each slot."""
    sizes = slots, pages, page, dtype, kv_type
    layers = tuple(empty_layer(config, layer, *sizes) for layer in range(config.num_layers))
    tables, guesses = empty_tables(slots, config.vocab_size), empty_drafts(config, *sizes, drafts)
    return laid_out(config, State(layers, jnp.zeros(slots, jnp.int32), tables, guesses))


def abstract_state(
    config: ModelConfig,
    slots: int,
    pages: int,
    page: int,
    dtype: jnp.dtype,
    mesh: jax.sharding.Mesh | None,
    kv_type: KVType = "same",
    drafts: int = 0,
) -> State:
    """Shapes, types and layout of `empty_state`; allocates nothing."""

    def lay(x: Any, *axes: str | None) -> jax.ShapeDtypeStruct:
        layout = None if mesh is None else NamedSharding(mesh, spec(axes or (None,) * x.ndim, ACTIVATIONS))
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)

    def lay_layer(layer: int, arrays: Stored) -> Any:
        return tuple(lay(x, *axes) for x, axes in zip(arrays, layer_axes(config, layer, len(arrays)), strict=True))

    state = jax.eval_shape(partial(empty_state, config, slots, pages, page, dtype, kv_type, drafts))
    layers: Any = tuple(lay_layer(layer, arrays) for layer, arrays in enumerate(state.layers))
    last_S, tables, own = jax.tree.map(lay, (state.last_S, state.tables, state.drafts))
    if own is not None:
        own = replace(own, stored=lay_layer(config.mtp_layer, own.stored))
    return State(layers, last_S, tables, own)


def laid_out(config: ModelConfig, state: State) -> State:
    """`state` spread over the mesh in force in the same way after every step, so that it can be donated."""
    tables, drafts = jax.tree.map(lambda x: constrain(x, None, None), state.tables), state.drafts
    if drafts is not None:
        axes = layer_axes(config, config.mtp_layer, len(drafts.stored))
        stored = tuple(constrain(x, *own) for x, own in zip(drafts.stored, axes, strict=True))
        drafts = Drafts(stored, constrain(drafts.token_SG, None, None))
    return State(lay_out(config, state.layers), constrain(state.last_S, None), tables, drafts)


def step(
    model: Transformer,
    state: State,
    words_RW: Int[Array, "R W"],
    tokens_RT: Int[Array, "R T"] | None = None,
    *,
    page: int,
    shards: int = 1,
    vocab_limit: int,
    adapters: Adapters | None = None,
    record: bool = False,
) -> tuple[State, tuple[Int[Array, "R Y"], Int[Array, "R T L C"] | None]]:
    """Reads `tokens`, or without them each row's last token, and draws the next one.

    Args:
        words_RW: see `serve.rows`; on as many devices as there are `shards`, each having its rows one after the other.
            Where there are as many rows as slots and no tokens, row r must have slot r.
        page: positions of a page. vocab_limit: rows of the embedding that are tokens. adapters: those that rows name.
        record: give the experts that were chosen too.

    Returns:
        The state; of each row its token, the bits of its log-probability, and `most_likely`; and the experts of each
        token that was read, in each layer with a router.
    """
    rows = unpack_rows(words_RW)
    if adapters is not None:
        model = adapters.on(model, constrain(rows.adapter_R, "batch"))
    if tokens_RT is None:
        tokens_RT = state.last_S[rows.slot_R][:, None]
    result = read(model, state, rows, tokens_RT, rows.count_R, page=page, shards=shards)
    end_R = constrain(jnp.maximum(rows.count_R - 1, 0), "batch")
    hidden_RD = jnp.take_along_axis(result.hidden_BTD, end_R[:, None, None], axis=1)[:, 0]
    logits_RV = unembed(model, hidden_RD)
    with jax.named_scope("sample"):
        token_R, output_RY = draw(logits_RV, rows, state.tables, vocab_limit)
    token_R = constrain(token_R, None)
    kept_R = jnp.where((rows.keep_R > 0) & (rows.count_R > 0), rows.slot_R, NOBODY)
    tables = replace(state.tables, seen_SV=state.tables.seen_SV.at[kept_R, token_R].add(1, mode="drop"))
    last_S, drafts = state.last_S.at[kept_R].set(token_R, mode="drop"), state.drafts
    if drafts is not None:
        following_R = jnp.where(rows.keep_R > 0, token_R, rows.following_R)[:, None]
        is_end_RT = jnp.arange(tokens_RT.shape[1]) == end_R[:, None]
        following_RT = jnp.where(is_end_RT, following_R, jnp.roll(tokens_RT, -1, axis=1))
        read_RT = result.hidden_BTD, following_RT, rows.count_R, jnp.ones_like(end_R), kept_R
        drafts = draft(model, drafts, rows, *read_RT, page=page, vocab_limit=vocab_limit)
    state = laid_out(model.config, State(remembered(result), last_S, tables, drafts))
    return state, (constrain(output_RY, None, None), chosen_experts(result) if record else None)


def read(
    model: Transformer,
    state: State,
    rows: Rows,
    tokens_RT: Int[Array, "R T"],
    count_R: Int[Array, " R"],
    *,
    page: int,
    shards: int,
    undecided: bool = False,
) -> Output:
    """The forward pass of the first `count` tokens of each row; `undecided`: see `Cache`."""

    def lay(x: Array) -> Array:
        return constrain(x, "batch", *[None] * (x.ndim - 1))

    slots, (count, length) = len(state.last_S), tokens_RT.shape
    in_place = count == slots and length == 1
    own_R = None if in_place else lay(rows.slot_R % (slots // shards))
    cache = Cache(state.layers, lay(rows.length_R), lay(rows.table_RX), page, slots_B=own_R, undecided=undecided)
    valid_RT = jnp.arange(length) < count_R[:, None]
    return forward(model, continuation(lay(tokens_RT), cache.lengths_B, lay(valid_RT)), cache)


def remembered(result: Output) -> tuple[tuple[Array, ...], ...]:
    """What layers remember after a step."""
    assert result.cache is not None
    return result.cache.layers


def chosen_experts(result: Output) -> Int[Array, "R T L C"] | None:
    """The experts of each token, as `forward` takes them for replay, small and on all devices; None without any."""
    if result.experts_LBTC is None:
        return None
    chosen = jnp.moveaxis(result.experts_LBTC, 0, 2)
    return constrain(chosen.astype(jnp.int16), None, None, None, None)


def draw(logits_RV: Array, rows: Rows, tables: Tables, vocab_limit: int) -> tuple[Array, Array]:
    """The next token of each row, and what the host is told of it."""
    allowed_RV = adjust(logits_RV.astype(jnp.float32), rows, tables)
    token_R, logprob_R = sample(logits_RV, rows.sampling, rows.step_R, allowed_BV=allowed_RV, vocab_limit=vocab_limit)
    drawn_R2 = jnp.stack([token_R, jax.lax.bitcast_convert_type(logprob_R, jnp.int32)], axis=1)
    return token_R, jnp.concatenate([drawn_R2, most_likely(logits_RV, rows)], axis=1)


def unpack(output: Array) -> tuple[list[list[int]], list[list[float]], np.ndarray, np.ndarray]:
    """What `step` gave, on the host; waits for it.

    Of each row the tokens that were drawn, their log-probabilities, and `[R, T, A]` the most likely ones with theirs.
    """
    words = np.asarray(output)
    words = words.reshape(len(words), -1, words.shape[-1])  # of each row one place, or as many as were guessed
    count = (words.shape[2] - 2) // 2
    tokens = [[token for token in row if token >= 0] for row in words[:, :, 0].tolist()]
    logprobs = words[:, :, 1].copy().view(np.float32).tolist()
    return tokens, logprobs, words[:, :, 2 : 2 + count], words[:, :, 2 + count :].view(np.float32)


def begin(state: State, slot: Any, seen_V: Any, bias_V: Any) -> State:
    """Writes what a request asks of the tables to its slot."""
    tables = state.tables
    seen_SV, bias_SV = tables.seen_SV.at[slot].set(seen_V), tables.bias_SV.at[slot].set(bias_V)
    return replace(state, tables=replace(tables, seen_SV=seen_SV, bias_SV=bias_SV))


def allow(state: State, slots_R: Any, allowed_RW: Any) -> State:
    """Writes the tokens that these slots may draw next; `NOBODY` fills up."""
    allowed_SW = state.tables.allowed_SW.at[slots_R].set(allowed_RW, mode="drop")
    return replace(state, tables=replace(state.tables, allowed_SW=allowed_SW))
