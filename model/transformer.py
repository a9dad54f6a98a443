"""Blocks and the stack of them. A stack is a pattern of blocks, repeated; a model is a few stacks."""

from __future__ import annotations

from typing import Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx, struct
from jaxtyping import Array, Float

from model.attention import Attention, Mask
from model.cache import Paging, put_slots, take_slots
from model.config import ModelConfig
from model.latent_attention import LatentAttention
from model.layers import FeedForward, Keys, RMSNorm, weight
from model.linear import Matmul, check_installed, linear
from model.linear_attention import GatedDeltaNet
from model.lora import Narrow, adapt, freeze
from model.lora_config import LoraConfig
from model.moe import MoE, RouterStats
from sharding.data_parallel import gather, keep_all_but_gathered
from sharding.mesh import ContextExchange, Exchange
from sharding.rules import constrain

Remat = Literal["none", "block", "dots"]
NO_ADAPTERS = LoraConfig()
LORA_KEY = 2**31 - 1
"""Folded into a layer's key it gives that of its adapters, far from those of its weights."""

Module = TypeVar("Module", bound=nnx.Module)


@struct.dataclass
class Context:
    """What all blocks of one forward pass share; every array is `[B, T, ...]`."""

    rope: tuple[Array, Array]
    mask: Mask | None
    paging: Paging | None
    valid_BT: Array
    documents_BT: Array
    training: bool = struct.field(pytree_node=False)
    exchange: Exchange = struct.field(pytree_node=False)
    cut_over_data: bool = struct.field(pytree_node=False, default=False)
    matmul: Matmul = struct.field(pytree_node=False, default="plain")


class BlockOutput(NamedTuple):
    """What one block gives besides the residual stream; None where it has no cache or no router."""

    stored: tuple[Array, ...] | None
    stats: RouterStats | None
    experts_BTC: Array | None


class Block(nnx.Module):
    """`x += attention(norm(x)); x += feed_forward(norm(x))`, where attention may be of another kind in each layer."""

    def __init__(self, config: ModelConfig, layer: int, keys: Keys):
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm)
        if config.attention_kind(layer) == "linear":
            self.attention = GatedDeltaNet(config, keys)
        elif config.latent.kv_rank:
            self.attention = LatentAttention(config, layer, keys)
        else:
            self.attention = Attention(config, layer, keys)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps, config.norm)
        if config.is_moe(layer):
            self.feed_forward = MoE(config, keys)
        else:
            self.feed_forward = FeedForward(config.hidden_size, config.intermediate_size, config.num_layers, keys)

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        context: Context,
        stored: tuple[Array, ...] | None = None,
        replay_BTC: Array | None = None,
    ) -> tuple[Float[Array, "B T D"], BlockOutput]:
        normed, matmul = self.attention_norm(x_BTD), context.matmul
        if isinstance(self.attention, GatedDeltaNet):
            before = None if stored is None or context.paging is None else take_slots(stored, context.paging)
            paging = context.paging
            undecided = paging is not None and paging.undecided
            tokens = normed, context.valid_BT, context.documents_BT
            attended, after = self.attention(*tokens, before, matmul, undecided=undecided)
            if undecided:
                stored = after
            elif stored is not None and after is not None and paging is not None:
                stored = put_slots(stored, after, paging.slots_B, paging.reach_B > paging.lengths_B)
        else:
            attended, stored = self.attention(normed, context.rope, context.mask, stored, context.paging, matmul)
        x_BTD = constrain(x_BTD + attended, "batch", "length", "embed")
        normed = self.feed_forward_norm(x_BTD)
        if isinstance(self.feed_forward, MoE):
            out, stats, experts_BTC = self.feed_forward(
                normed,
                context.valid_BT,
                training=context.training,
                exchange=context.exchange,
                matmul=matmul,
                replay_BTC=replay_BTC,
            )
        else:
            out, stats, experts_BTC = self.feed_forward(normed, matmul), None, None
        return constrain(x_BTD + out, "batch", "length", "embed"), BlockOutput(stored, stats, experts_BTC)


class NextTokenBlock(nnx.Module):
    """Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): one block that predicts a token further.

    It joins the hidden state of position t with the embedding of token t + 1; embedding and output head are the
    model's own.
    """

    def __init__(self, config: ModelConfig, keys: Keys):
        D = config.hidden_size
        self.embedding_norm = RMSNorm(D, config.norm_eps, config.norm)
        self.hidden_norm = RMSNorm(D, config.norm_eps, config.norm)
        self.join_XD = weight(keys, (2 * D, D), (None, "embed"), 2 * D, sums=(0,))
        self.block = Block(config, config.mtp_layer, keys)
        self.norm = RMSNorm(D, config.norm_eps, config.norm)

    def __call__(
        self,
        hidden_BTD: Float[Array, "B T D"],
        embedded_BTD: Float[Array, "B T D"],
        context: Context,
        stored: tuple[Array, ...] | None = None,
    ) -> tuple[Float[Array, "B T D"], BlockOutput]:
        """The hidden state that predicts token t + 2, from that of t and the embedding of token t + 1."""
        both_BTX = jnp.concatenate([self.embedding_norm(embedded_BTD), self.hidden_norm(hidden_BTD)], axis=-1)
        x_BTD, output = self.block(linear(both_BTX, self.join_XD[...], context.matmul), context, stored)
        return self.norm(x_BTD), output


def stack_plan(config: ModelConfig, stacked: bool) -> list[tuple[tuple[int, ...], int]]:
    """Stacks as (layers of the pattern, repeats), in order.

    As a list: one pattern of all layers. Stacked: a prefix, then the shortest pattern that repeats to the end
    (DeepSeek: three dense layers, then 58 routed ones; Qwen3: one pattern of a single layer).
    """
    kinds = [(config.is_moe(layer), config.attention_kind(layer)) for layer in range(config.num_layers)]
    if not stacked:
        return [(tuple(range(config.num_layers)), 1)]
    best: tuple[int, int] | None = None
    for prefix in range(config.num_layers):
        rest = config.num_layers - prefix
        period = next(
            p
            for p in range(1, rest + 1)
            if rest % p == 0 and all(kinds[i] == kinds[i + p] for i in range(prefix, config.num_layers - p))
        )
        if best is None or prefix + period < sum(best):
            best = (prefix, period)
    assert best is not None
    prefix, period = best
    plan: list[tuple[tuple[int, ...], int]] = []
    start = 0
    while start < prefix:
        run = next((i for i in range(start, prefix) if kinds[i] != kinds[start]), prefix) - start
        plan.append(((start,), run))
        start += run
    return [*plan, (tuple(range(prefix, prefix + period)), (config.num_layers - prefix) // period)]


class Stack(nnx.Module):
    """`repeats` times a pattern of blocks; with more than one repeat every leaf has a leading layer axis."""

    def __init__(self, config: ModelConfig, pattern: tuple[int, ...], repeats: int, key: Array, lora: LoraConfig):
        def block(first: int, repeat: int | Array) -> Block:
            layer_key = jax.random.fold_in(key, first + repeat * len(pattern))
            made = Block(config, first, Keys(layer_key))
            if lora.rank:
                adapt(made, lora, jax.random.fold_in(layer_key, LORA_KEY))
                freeze(made, lora)
            return made

        if repeats == 1:
            blocks = [block(layer, 0) for layer in pattern]
        else:
            indices = jnp.arange(repeats)
            blocks = [jax.vmap(lambda r, layer=layer: block(layer, r))(indices) for layer in pattern]
        self.blocks = nnx.List(blocks)
        self.repeats = repeats

    def layer(self, repeat: int, position: int) -> Block:
        """One block, with its own arrays."""
        block = self.blocks[position]
        return block if self.repeats == 1 else jax.tree.map(lambda leaf: leaf[repeat], block)


def gathered(module: Module, context: Context) -> Module:
    """A block with whole weights in place of those that `sharding.data_parallel` has cut."""
    dtype = context.rope[0].dtype

    def whole(leaf: nnx.Variable) -> nnx.Variable:
        kind = leaf[...].dtype if isinstance(leaf, Narrow) else dtype
        return leaf.replace(gather(leaf[...], leaf.get_metadata()["axes"], kind, context.cut_over_data))

    module = jax.tree.map(lambda leaf: leaf, module)
    for _, part in nnx.iter_modules(module):
        if isinstance(part, MoE):
            part.join()
    return jax.tree.map(whole, module, is_leaf=lambda node: isinstance(node, nnx.Variable))


def rematerialised(function, remat: Remat):
    """`function`, keeping for the backward pass all values but gathered weights, none, or matrix products' results."""
    policies = {
        "none": keep_all_but_gathered,
        "block": None,
        "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    }
    if remat == "none" and not jax.sharding.get_abstract_mesh().manual_axes:
        return function
    return jax.checkpoint(function, policy=policies[remat])


class Transformer(nnx.Module):
    """Embedding, stacks of blocks, final norm, output head.

    Args:
        config: sizes.
        key: decides the initial weights; the same for both forms.
        dtype: type of activations; weights are float32.
        remat: what the backward pass computes again.
        stacked: one array per pattern position, scanned, instead of one per layer.
        exchange: how tokens meet experts on other devices, see `sharding.expert_parallel`.
        context_exchange: how queries meet keys on other devices, see `sharding.context_parallel`.
        cut_over_data: how weights lie while training, see `sharding.rules`.
        matmul: how weights are multiplied while training, see `model.linear`.
        lora: adapters that are trained in the place of weights, if any.
    """

    def __init__(
        self,
        config: ModelConfig,
        key: Array,
        *,
        dtype: jnp.dtype = jnp.float32,
        remat: Remat = "none",
        stacked: bool = False,
        exchange: Exchange = "auto",
        context_exchange: ContextExchange = "ring",
        cut_over_data: bool = False,
        matmul: Matmul = "plain",
        lora: LoraConfig = NO_ADAPTERS,
    ):
        check_installed(matmul)
        V, D = config.vocab_size, config.hidden_size
        keys = Keys(jax.random.fold_in(key, config.num_layers))
        # At unit variance the token itself, not the average of its neighbours, decides where early layers route
        # it: the load is even from the start. As an output head it has to be small.
        self.embedding_VD = weight(keys, (V, D), ("vocab", "columns"), D if config.tied_head else 1, sums=(1,))
        self.stacks = nnx.List(
            [Stack(config, pattern, repeats, key, lora) for pattern, repeats in stack_plan(config, stacked)]
        )
        self.norm = RMSNorm(D, config.norm_eps, config.norm)
        own = Keys(jax.random.fold_in(key, config.num_layers + 1))
        self.mtp = NextTokenBlock(config, own) if config.mtp_layers else None
        if config.num_labels:
            self.head_DV = weight(keys, (D, config.num_labels), ("embed", None), D)
        else:
            self.head_DV = None if config.tied_head else weight(keys, (D, V), ("columns", "vocab"), D, sums=(0,))
        self.config = config
        self.dtype = dtype
        self.remat: Remat = remat
        self.stacked = stacked
        self.exchange: Exchange = exchange
        self.context_exchange: ContextExchange = context_exchange
        self.cut_over_data = cut_over_data
        self.matmul: Matmul = matmul
        if lora.rank:
            head = self.head_DV
            freeze(self, lora)
            # No other model has had the labels: with a frozen head at random there is nothing to adapt to.
            self.head_DV = head if config.num_labels else self.head_DV

    def head(self) -> Float[Array, "D V"]:
        """The output head, to tokens or labels; the transposed embedding when they are tied."""
        return self.embedding_VD[...].mT if self.head_DV is None else self.head_DV[...]
