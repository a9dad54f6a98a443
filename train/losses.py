"""Losses: pure functions of what `forward` gives, of targets and of weights."""

from __future__ import annotations

from dataclasses import field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from configs.run import LossConfig
from errors import UserError
from model.forward import Batch, forward, predict_further
from model.moe import RouterStats
from model.quantization import Quantized
from model.transformer import Transformer
from sharding.mesh import platform
from sharding.rules import constrain
from sharding.vocabulary import on_own_logits, over_vocabulary, vocabulary_start
from train.chunks import chunk_length
from train.noise import embedding_noise

SHIFTED = "targets", "weights", "segments"


@struct.dataclass
class Totals:
    """Sums over the whole step, which micro-batches divide by: loss weights, tokens, and those drawn by the model."""

    weight: Float[Array, ""]
    tokens: Float[Array, ""]
    drawn: Float[Array, ""]


@struct.dataclass
class Parts:
    """What a loss is made of, for the log. Sums over a micro-batch, already divided by the step's totals.

    counts_LE: tokens sent to each expert of each routed layer, in this step so far; `[0, 0]` for dense models.
    dropped: pairs of token and expert that no buffer had room for. more: further parts, by the name that they are
    logged under; peaks: such of which the log has the largest, none of them negative. Both are of one micro-batch.
    """

    loss: Float[Array, ""]
    z_loss: Float[Array, ""]
    balance_loss: Float[Array, ""]
    router_z_loss: Float[Array, ""]
    mtp_loss: Float[Array, ""]
    counts_LE: Float[Array, "L E"]
    dropped: Float[Array, ""]
    more: dict[str, Float[Array, ""]] = field(default_factory=dict)
    peaks: dict[str, Float[Array, ""]] = field(default_factory=dict)

    @property
    def sums(self) -> Parts:
        """Without what is of one micro-batch alone."""
        return replace(self, more={}, peaks={})


def no_parts(model: Transformer) -> Parts:
    """The sums before the first micro-batch."""
    layers = model.config.num_routers
    experts = model.config.moe.num_experts if layers else 0
    zero = jnp.zeros((), jnp.float32)
    return Parts(zero, zero, zero, zero, zero, jnp.zeros((layers, experts), jnp.float32), zero)


def cross_entropy(
    hidden_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "D V"] | Quantized,
    targets_BT: Int[Array, "B T"],
    weights_BT: Float[Array, "B T"],
    z_weight: float,
) -> tuple[Float[Array, ""], Float[Array, ""], Float[Array, ""]]:
    """Weighted sums over tokens of `-log p(target) + z_weight * log(Z)^2`, and of its two terms.

    Works on chunks of positions: no more than a chunk's logits exist at once, and their gradient is made in
    the forward pass, so that they are never computed twice. Only the first result is differentiable.
    """
    if isinstance(head_DV, Quantized):
        head_DV = head_DV.dense(hidden_BTD.dtype)
    return _differentiable(hidden_BTD, head_DV, targets_BT, weights_BT, z_weight)  # pyright: ignore[reportReturnType]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _differentiable(
    hidden_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array, z_weight: float
) -> tuple[Array, Array, Array]:
    """`cross_entropy` where no gradient is asked for."""
    return _cross_entropy(hidden_BTD, head_DV, targets_BT, weights_BT, z_weight, gradients=False)[0]


def _cross_entropy(
    hidden_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array, z_weight: float, *, gradients: bool
) -> tuple[tuple[Array, Array, Array], Any]:
    """The sums and, with `gradients`, the gradients of the first by hidden state and head."""
    return on_own_logits(
        partial(_own_cross_entropy, z_weight=z_weight, gradients=gradients),
        hidden_BTD,
        head_DV,
        targets_BT,
        weights_BT,
        gradients=gradients,
    )


def _own_cross_entropy(
    hidden_BTD: Array,
    head_DV: Array,
    targets_BT: Array,
    weights_BT: Array,
    *,
    z_weight: float,
    gradients: bool,
    parts: tuple[str, ...] = (),
) -> tuple[tuple[Array, Array, Array], tuple[Any, Any] | None]:
    """`_cross_entropy` of one device's tokens, with its part of the vocabulary, which is cut over the axes `parts`."""
    batch, length, width = hidden_BTD.shape
    vocab = head_DV.shape[1]
    size = chunk_length(batch, length, vocab, head_DV.size if gradients else 0)
    chunks = length // size
    head_DV = head_DV.astype(hidden_BTD.dtype)

    def chunk(carry: tuple[Any, ...], inputs: tuple[Any, ...]) -> tuple[tuple[Any, ...], Any]:
        nll, z, d_head = carry
        x_BtD, targets_Bt, weights_Bt = inputs
        logits = jnp.matmul(x_BtD, head_DV, preferred_element_type=jnp.float32)
        logits = constrain(logits, "batch", "length", "vocab")
        top = over_vocabulary(jax.lax.pmax, logits.max(-1, keepdims=True), parts)
        exponentials = jnp.exp(logits - top)
        total = over_vocabulary(jax.lax.psum, exponentials.sum(-1, keepdims=True), parts)
        log_z = (jnp.log(total) + top)[..., 0]
        is_target = vocabulary_start(vocab, parts) + jnp.arange(vocab) == targets_Bt[..., None]
        picked = over_vocabulary(jax.lax.psum, jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1), parts)
        nll += jnp.sum(weights_Bt * (log_z - picked))
        z += jnp.sum(weights_Bt * jnp.square(log_z))
        if not gradients:
            return (nll, z, d_head), None
        scale = weights_Bt * (1.0 + 2.0 * z_weight * log_z)
        d_logits = exponentials * (scale[..., None] / total) - jnp.where(is_target, weights_Bt[..., None], 0.0)
        d_logits = d_logits.astype(x_BtD.dtype)
        return (nll, z, add_product(d_head, x_BtD, d_logits)), d_logits @ head_DV.T

    zero = jnp.zeros((), jnp.float32)
    carry = (zero, zero, jnp.zeros((width, vocab), jnp.float32) if gradients else zero)
    inputs = (hidden_BTD, targets_BT, weights_BT)
    if chunks == 1:
        (nll, z, d_head), d_hidden = chunk(carry, inputs)
    else:
        split = jax.tree.map(lambda a: jnp.moveaxis(a.reshape(batch, chunks, size, *a.shape[2:]), 1, 0), inputs)
        (nll, z, d_head), d_hidden = jax.lax.scan(chunk, carry, split)
        if gradients:
            d_hidden = jnp.moveaxis(d_hidden, 0, 1).reshape(hidden_BTD.shape)
    return (nll + z_weight * z, nll, z), (d_hidden, d_head) if gradients else None


def add_product(total_DV: Array, x_BtD: Array, y_BtV: Array) -> Array:
    """`total + x^T y`, a part of the rows at a time where the product would be large beside the chunk it is made of."""
    width, vocab = total_DV.shape
    rows = max(128, width // 8)
    mesh = jax.sharding.get_abstract_mesh()
    whole = platform() != "cpu" or (mesh.size > 1 and not mesh.manual_axes)
    if whole or width % rows or y_BtV.size > (width - rows) * vocab:
        return total_DV + jnp.einsum("btd,btv->dv", x_BtD, y_BtV, preferred_element_type=jnp.float32)

    def part(index: Array, total_DV: Array) -> Array:
        x = jax.lax.dynamic_slice_in_dim(x_BtD, index * rows, rows, axis=-1)
        product = jnp.einsum("btd,btv->dv", x, y_BtV, preferred_element_type=jnp.float32)
        before = jax.lax.dynamic_slice_in_dim(total_DV, index * rows, rows)
        return jax.lax.dynamic_update_slice_in_dim(total_DV, before + product, index * rows, 0)

    return jax.lax.fori_loop(0, width // rows, part, total_DV)


def _forward(
    hidden_BTD: Array, head_DV: Array, targets_BT: Array, weights_BT: Array, z_weight: float
) -> tuple[tuple[Array, Array, Array], tuple[Array, Array]]:
    values, (d_hidden, d_head) = _cross_entropy(hidden_BTD, head_DV, targets_BT, weights_BT, z_weight, gradients=True)
    return values, (d_hidden, d_head.astype(head_DV.dtype))


def _backward(
    z_weight: float, saved: tuple[Array, Array], cotangents: tuple[Array, Array, Array]
) -> tuple[Array, Array, None, None]:
    d_hidden, d_head = saved
    scale = cotangents[0]
    return (d_hidden * scale).astype(d_hidden.dtype), (d_head * scale).astype(d_head.dtype), None, None


_differentiable.defvjp(_forward, _backward)


def balance_loss(counts_LE: Array, scores_LE: Array, tokens: Array, micro_tokens: Array) -> Array:
    """`E * sum_i f_i P_i`, mean over layers; 1 times C where the load is even.

    f: share of tokens that chose expert i, from `counts` over the global batch of `tokens` (every data-parallel
    shard and every micro-batch of this step so far); P: mean score share of this micro-batch. Global-batch
    balance, arXiv 2501.11873, equation 3.
    """
    experts = counts_LE.shape[-1]
    f_LE = jax.lax.stop_gradient(counts_LE) / tokens
    p_LE = scores_LE / micro_tokens
    return experts * jnp.mean(jnp.sum(f_LE * p_LE, axis=-1))


def batch_of(rows: dict[str, Array]) -> Batch:
    """What `forward` takes of the arrays of a batch."""
    return Batch(rows["tokens"], rows["positions"], rows["segments"])


def replay_of(rows: dict[str, Array]) -> Int[Array, "L b T C"] | None:
    """The experts that tokens are to be sent to, as `forward` takes them; None where the rows have none."""
    return jnp.moveaxis(rows["experts"].astype(jnp.int32), 2, 0) if "experts" in rows else None


def next_token(
    model: Transformer, rows: dict[str, Array], totals: Totals, before: Parts, config: LossConfig
) -> tuple[Array, Parts]:
    """The loss of one micro-batch, and its parts added to those `before` it in the step.

    `rows` are the arrays of a batch, each `[b, T]`: tokens, positions, segments, targets, weights; and keys of the
    noise on embeddings, `noise` `[b, 2]`, where there is any.
    """
    if model.config.num_labels:
        raise UserError(
            f"model.num_labels={model.config.num_labels} makes a model for sequence classification, which predicts no "
            "tokens; set it to 0 to train on text"
        )
    batch = batch_of(rows)
    noise = None
    if "noise" in rows:
        noise = embedding_noise(rows["noise"], batch.segments_BT, model.config.hidden_size, config.neftune)
    output = forward(model, batch, noise=noise)
    with jax.named_scope("loss"):
        total, nll, z = cross_entropy(output.hidden_BTD, model.head(), rows["targets"], rows["weights"], config.z_loss)
    loss = total / totals.weight
    zero = jnp.zeros((), jnp.float32)
    parts = Parts(nll / totals.weight, z / totals.weight, zero, zero, zero, jnp.zeros_like(before.counts_LE), zero)
    stats = output.stats
    if model.mtp is not None:
        with jax.named_scope("mtp"):
            further, further_stats = further_token(model, batch, rows, output.hidden_BTD)
        mtp = further / totals.weight
        loss += config.mtp * mtp
        parts = replace(parts, mtp_loss=mtp)
        if further_stats is not None:
            last = jax.tree.map(lambda a: a[None], further_stats)
            stats = last if stats is None else jax.tree.map(lambda *a: jnp.concatenate(a), stats, last)
    return with_routers(model, loss, parts, stats, rows, totals, before, config)


def with_routers(
    model: Transformer,
    loss: Array,
    parts: Parts,
    stats: RouterStats | None,
    rows: dict[str, Array],
    totals: Totals,
    before: Parts,
    config: LossConfig,
) -> tuple[Array, Parts]:
    """`loss` of a micro-batch with what is asked of its routers, and `parts` of it added to those `before`."""
    if stats is not None:
        tokens = jnp.maximum(jnp.sum(rows["segments"] > 0), 1).astype(jnp.float32)
        routed = len(stats.counts_E)
        counts_LE = before.counts_LE[:routed] + stats.counts_E
        seen = counts_LE[0].sum() / model.config.moe.experts_per_token
        share = tokens / totals.tokens
        balance = balance_loss(counts_LE, stats.scores_E, jnp.maximum(seen, 1), tokens) * share
        router_z = jnp.mean(stats.z) / totals.tokens
        loss += config.balance * balance + config.router_z_loss * router_z
        # Where its loss is not asked for, the block for the token after the next is not run and has counted nothing.
        own_LE = jnp.pad(stats.counts_E, ((0, len(before.counts_LE) - routed), (0, 0)))
        parts = replace(parts, balance_loss=balance, router_z_loss=router_z, counts_LE=own_LE)
        parts = replace(parts, dropped=stats.dropped.sum())
    parts = jax.lax.stop_gradient(parts)
    return loss, replace(jax.tree.map(jnp.add, before.sums, parts.sums), more=parts.more, peaks=parts.peaks)


def further_token(
    model: Transformer, batch: Batch, rows: dict[str, Array], hidden_BTD: Array
) -> tuple[Array, RouterStats | None]:
    """The sum over tokens of `-log p(token after the next)` of the multi-token prediction block, weighted.

    DeepSeek-V3, arXiv 2412.19437, equation 24. A token counts as its successor does, within its document.
    """
    further_BTD, stats = predict_further(model, batch, hidden_BTD)
    targets_BT, weights_BT, segments_BT = (jnp.pad(rows[name][:, 1:], ((0, 0), (0, 1))) for name in SHIFTED)
    weights_BT = jnp.where(segments_BT == rows["segments"], weights_BT, 0.0)
    total, _, _ = cross_entropy(further_BTD, model.head(), targets_BT, weights_BT, 0.0)
    return total, stats


def totals(rows: dict[str, Array]) -> Totals:
    """The step's sums, from the whole batch; never zero.

    What the loss is a mean over is the `total` of rows that have one, the pairs of rows of pairs (which have `labels`),
    and else all weights.
    """
    if "total" in rows:
        weight = jnp.sum(rows["total"])
    elif "labels" in rows:
        weight = jnp.sum(rows["segments"].max(axis=-1) // 2).astype(jnp.float32)
    else:
        weight = jnp.sum(rows["weights"])
    return Totals(
        weight=jnp.maximum(weight, 1e-9),
        tokens=jnp.maximum(jnp.sum(rows["segments"] > 0), 1).astype(jnp.float32),
        drawn=jnp.sum(rows.get("drawn", jnp.zeros(()))),
    )
