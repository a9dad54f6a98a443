"""THE model entry: training, scoring, prefill and decoding all call `forward`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float, Int

from model import linear_attention
from model.attention import Mask
from model.cache import Cache, Stored, make_paging, put_slots
from model.layers import rope_tables
from model.linear import in_float32
from model.moe import RouterStats
from model.quantization import Quantized
from model.transformer import (
    BlockOutput,
    Context,
    NextTokenBlock,
    Remat,
    Stack,
    Transformer,
    gathered,
    rematerialised,
)
from sharding.data_parallel import divides, on_own_tokens
from sharding.expert_parallel import exact
from sharding.rules import constrain
from sharding.vocabulary import look_up


@struct.dataclass
class Batch:
    """Tokens and where they stand.

    tokens_BT: ids. positions_BT: rotary positions, restarting with each document. segments_BT: which document
    of its row a token belongs to, from 1; 0 is padding: never routed, never counted, never in a cache.
    With a cache a row holds one document, and padding comes after the tokens.
    """

    tokens_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]
    segments_BT: Int[Array, "B T"]


@struct.dataclass
class Output:
    """What a forward pass gives.

    hidden_BTD: after the final norm; `unembed` makes logits of what is needed. cache: the new one, or None.
    stats: routing per routed layer (leading axis), or None. experts_LBTC: the experts chosen (E for padding).
    """

    hidden_BTD: Float[Array, "B T D"]
    cache: Cache | None
    stats: RouterStats | None
    experts_LBTC: Int[Array, "L B T C"] | None


def continuation(tokens_BT: Array, lengths_B: Array, valid_BT: Array | None = None) -> Batch:
    """A batch that continues rows of which `lengths` tokens are cached already."""
    steps = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)
    valid = jnp.ones_like(tokens_BT) if valid_BT is None else valid_BT.astype(jnp.int32)
    return Batch(tokens_BT, lengths_B[:, None] + steps, valid)


def forward(
    model: Transformer,
    batch: Batch,
    cache: Cache | None = None,
    *,
    replay: Array | None = None,
    noise: Array | None = None,
) -> Output:
    """Runs the model on a batch.

    Args:
        model: the weights.
        batch: `[B, T]` tokens with their positions and segments.
        cache: None while training and scoring: tokens attend within their document of the batch. Otherwise
            tokens are appended to the cache and attend to all of their row.
        replay: `[L, B, T, C]` expert choices to use instead of the router's own.
        noise: `[B, T, D]`, added to the embeddings.
    """
    x_BTD = embed(model, batch.tokens_BT)
    if noise is not None:
        x_BTD += noise.astype(x_BTD.dtype)
    context = make_context(model, batch, cache)
    run = spread_stacks if cache is None and spreads(model, batch) else run_stacks
    x_BTD, layers = run(model, x_BTD, context, cache, replay)
    hidden_BTD = model.norm(x_BTD)
    if cache is not None:
        stored = tuple(layer.stored for layer in layers if layer.stored is not None)
        lengths_B = cache.lengths_B + context.valid_BT.sum(axis=1, dtype=jnp.int32)
        cache = replace(cache, layers=stored, lengths_B=lengths_B)
    routed = [(layer.stats, layer.experts_BTC) for layer in layers if layer.stats is not None]
    if not routed:
        return Output(hidden_BTD, cache, None, None)
    stats, experts = (jax.tree.map(lambda *leaves: jnp.stack(leaves), *part) for part in zip(*routed, strict=True))
    return Output(hidden_BTD, cache, stats, experts)


def settle(model: Transformer, before: tuple[Stored, ...], read: Cache, kept_B: Int[Array, " B"]) -> tuple[Stored, ...]:
    """What layers remember once it is told that the first `kept` tokens of a batch stand.

    Keys and values of tokens that do not stand lie behind the row's end, and nobody looks at them; linear layers make
    their state of what they read.

    Args:
        before: the layers of the cache that went into `forward`. read: the cache that came out, `undecided`.
    """
    found = list(read.layers)
    for layer, stored in enumerate(before):
        if model.config.attention_kind(layer) == "linear":
            after = linear_attention.settle(found[layer], kept_B)
            found[layer] = put_slots(stored, after, read.slots_B, kept_B > 0)
    return tuple(found)


def embed(model: Transformer, tokens_BT: Array) -> Float[Array, "B T D"]:
    """The rows of the embedding for these tokens, in the model's type."""
    with jax.named_scope("embed"):
        table = model.embedding_VD[...]
        if isinstance(table, Quantized):
            x_BTD = look_up(table.values, tokens_BT, model.dtype)
            x_BTD *= jnp.take(table.scale, tokens_BT, axis=0).astype(model.dtype)
        else:
            x_BTD = look_up(table, tokens_BT, model.dtype)
        return constrain(x_BTD, "batch", "length", "embed")


def predict_further(
    model: Transformer, batch: Batch, hidden_BTD: Float[Array, "B T D"]
) -> tuple[Float[Array, "B T D"], RouterStats | None]:
    """Hidden states that predict the token after the next, through the multi-token prediction block.

    `hidden` is what `forward` gave for this batch without a cache. Where a document's next token is not in the
    batch the result means nothing.
    """
    assert model.mtp is not None, "the model has no block for multi-token prediction"
    context = make_context(model, batch, None)
    following_BT = jnp.pad(batch.tokens_BT[:, 1:], ((0, 0), (0, 1)))

    def run(block: NextTokenBlock, tokens: tuple[Array, Array, Context]) -> tuple[Array, RouterStats | None]:
        step = rematerialised(lambda block, *tokens: gathered(block, context)(*tokens), model.remat)
        further_BTD, output = step(block, *tokens)
        return further_BTD, output.stats

    tokens = (hidden_BTD, embed(model, following_BT), context)
    return spread(run, model.mtp, tokens, model.cut_over_data) if spreads(model, batch) else run(model.mtp, tokens)


def draft_further(
    model: Transformer, batch: Batch, hidden_BTD: Float[Array, "B T D"], cache: Cache
) -> tuple[Float[Array, "B T D"], Cache]:
    """As `predict_further` for rows that go on from a cache, whose one layer is the block's; and the new cache.

    Args:
        batch: positions of the tokens that `hidden` is of; its own tokens are those that came after them.
    """
    assert model.mtp is not None, "the model has no block for multi-token prediction"
    context = make_context(model, batch, cache)
    further_BTD, output = model.mtp(hidden_BTD, embed(model, batch.tokens_BT), context, cache.layers[0])
    assert output.stored is not None
    lengths_B = cache.lengths_B + context.valid_BT.sum(axis=1, dtype=jnp.int32)
    return further_BTD, replace(cache, layers=(output.stored,), lengths_B=lengths_B)


def make_context(model: Transformer, batch: Batch, cache: Cache | None) -> Context:
    """What all blocks share of a batch: rotary tables, who sees whom, what is padding, where documents begin."""
    valid_BT = batch.segments_BT > 0
    paging = None if cache is None else make_paging(cache, batch.segments_BT)
    if cache is None:
        mask = Mask(batch.segments_BT, model.context_exchange)
        before_BT = jnp.pad(batch.segments_BT, ((0, 0), (1, 0)))[:, :-1]
        begins_BT = valid_BT & (batch.segments_BT != before_BT)
        documents_BT = jnp.cumsum(begins_BT, axis=1, dtype=jnp.int32)
    else:
        mask = None
        documents_BT = jnp.zeros_like(batch.segments_BT)
    # Behind the barrier XLA computes sines once, and not again in every layer that rotates.
    rope = jax.lax.optimization_barrier(
        rope_tables(model.config.rope, model.config.rotary_dim, batch.positions_BT, model.dtype)
    )
    return Context(
        rope,
        mask,
        paging,
        valid_BT,
        documents_BT,
        training=cache is None,
        exchange=model.exchange if cache is None else exact(model.exchange),
        cut_over_data=model.cut_over_data,
        matmul=model.matmul if cache is None else "plain",
    )


def spreads(model: Transformer, batch: Batch) -> bool:
    """Whether layers run on each device's own tokens; otherwise the compiler lays everything out."""
    return model.exchange != "gspmd" and divides(batch.tokens_BT.shape, model.dtype)


def spread(
    run: Callable[[Any, Any], tuple[Any, Any]], module: nnx.Module, tokens: Any, cut_over_data: bool
) -> tuple[Any, Any]:
    """`run(module, tokens)` on each device's own tokens; gives arrays `[B, T, ...]`, and sums over tokens."""
    leaves, structure = jax.tree.flatten(module)
    variables = jax.tree.leaves(module, is_leaf=lambda node: isinstance(node, nnx.Variable))
    axes = [leaf.get_metadata()["axes"] for leaf in variables]
    return on_own_tokens(lambda own, tokens: run(structure.unflatten(own), tokens), leaves, axes, tokens, cut_over_data)


def spread_stacks(
    model: Transformer, x_BTD: Array, context: Context, cache: Cache | None, replay: Array | None
) -> tuple[Array, list[BlockOutput]]:
    """`run_stacks` on each device's own tokens; without a cache."""
    assert cache is None

    def run(own: Transformer, tokens: tuple[Array, Context, Array | None]) -> tuple[Any, Any]:
        x_BTD, context, replay_BTLC = tokens
        own_replay = None if replay_BTLC is None else jnp.moveaxis(replay_BTLC, 2, 0)
        x_BTD, layers = run_stacks(own, x_BTD, context, None, own_replay)
        return (x_BTD, [layer.experts_BTC for layer in layers]), [layer.stats for layer in layers]

    replay_BTLC = None if replay is None else jnp.moveaxis(replay, 0, 2)
    (x_BTD, experts), stats = spread(run, model, (x_BTD, context, replay_BTLC), model.cut_over_data)
    return x_BTD, [BlockOutput(None, *output) for output in zip(stats, experts, strict=True)]


def run_stacks(
    model: Transformer, x_BTD: Array, context: Context, cache: Cache | None, replay: Array | None
) -> tuple[Array, list[BlockOutput]]:
    """All blocks in order: scanned where a stack repeats and there is no cache, one by one otherwise."""
    outputs: list[BlockOutput] = []
    routed = 0
    for stack in model.stacks:
        routers = sum(model.config.is_moe(len(outputs) + i) for i in range(len(stack.blocks)))
        count = routers * stack.repeats
        own_replay = None if replay is None else replay[routed : routed + count]
        if stack.repeats > 1 and cache is None:
            x_BTD, layers = scan_stack(stack, x_BTD, context, model.remat, own_replay)
        else:
            x_BTD, layers = unrolled_stack(stack, x_BTD, context, model.remat, cache, len(outputs), own_replay)
        routed += count
        outputs += layers
    return x_BTD, outputs


def unrolled_stack(
    stack: Stack, x_BTD: Array, context: Context, remat: Remat, cache: Cache | None, first: int, replay: Array | None
) -> tuple[Array, list[BlockOutput]]:
    """The blocks of a stack one after the other; `first` is the index of its first layer."""
    outputs: list[BlockOutput] = []
    routed = 0
    step = rematerialised(lambda block, x, *rest: gathered(block, context)(x, context, *rest), remat)
    for repeat in range(stack.repeats):
        for position in range(len(stack.blocks)):
            index = first + len(outputs)
            stored = None if cache is None else cache.layers[index]
            own = None if replay is None or routed >= replay.shape[0] else replay[routed]
            x_BTD, output = step(stack.layer(repeat, position), x_BTD, stored, own)
            routed += output.stats is not None
            outputs.append(output)
    return x_BTD, outputs


def scan_stack(
    stack: Stack, x_BTD: Array, context: Context, remat: Remat, replay: Array | None
) -> tuple[Array, list[BlockOutput]]:
    """The repeats of a stack in one `lax.scan`, so that compile time does not grow with depth."""
    routers = None if replay is None else replay.reshape(stack.repeats, -1, *replay.shape[1:])
    # Each block by itself: otherwise a backward pass has the weights and values of a whole pattern at once.
    step = rematerialised(lambda block, x, own: gathered(block, context)(x, context, None, own), remat)

    def body(x_BTD: Array, inputs: tuple) -> tuple[Array, list[BlockOutput]]:
        blocks, own = inputs
        outputs: list[BlockOutput] = []
        routed = 0
        for block in blocks:
            chosen = None if own is None or routed >= own.shape[0] else own[routed]
            x_BTD, output = step(block, x_BTD, chosen)
            routed += output.stats is not None
            outputs.append(output)
        return x_BTD, outputs

    x_BTD, stacked = jax.lax.scan(body, x_BTD, (list(stack.blocks), routers))
    return x_BTD, [
        jax.tree.map(lambda leaf, repeat=repeat: leaf[repeat], output)
        for repeat in range(stack.repeats)
        for output in stacked
    ]


def unembed(model: Transformer, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
    """Logits, float32. Call it on few positions, or on chunks: nobody keeps `[B, T, V]`."""
    return in_float32(hidden, model.head())
