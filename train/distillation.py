"""The loss of distillation: how far what the student says of every token is from what the teacher says.

Nobody keeps the logits of all tokens: those of both models are made for a chunk of positions at a time, and again in
the backward pass.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from configs.alignment import DistillConfig
from configs.run import LossConfig
from model.forward import forward, unembed
from model.transformer import Transformer
from sharding.rules import constrain
from train.chunks import chunk_length, in_chunks
from train.losses import Parts, Totals, batch_of, no_parts, with_routers

LEAST = -30.0
"""Log-probability of what cannot be: tokens that the teacher has not, the rest of a vocabulary that is all known."""
IDS, SAID = "teacher_ids", "teacher_logprobs"
"""Arrays of a batch: the teacher's likeliest tokens `[B, T, K]`, -1 where there is none, and `[B, T, K + 2]` of them.

These are the log-probabilities of the K tokens and of all others together, at the temperature of the loss; and that of
the target, at temperature 1.
"""


def divergence(
    teacher: Float[Array, "*B C"], student: Float[Array, "*B C"], direction: Literal["forward", "reverse"]
) -> Float[Array, "*B"]:
    """KL of two distributions over C classes, given as log-probabilities, in nats.

    forward: `sum p_t (log p_t - log p_s)`; reverse: `sum p_s (log p_s - log p_t)`. Classes that are -inf in both, and
    in forward those that are -inf for the teacher, add nothing.
    """
    first, second = (teacher, student) if direction == "forward" else (student, teacher)
    there = first > -jnp.inf
    gap = jnp.where(there, first, 0.0) - jnp.where(there, second, 0.0)
    return jnp.sum(jnp.where(there, jnp.exp(first) * gap, 0.0), axis=-1)


def in_classes(logprobs_BtV: Float[Array, "B t V"], ids_BtK: Int[Array, "B t K"]) -> Float[Array, "B t C"]:
    """Log-probabilities of K tokens and of all others together: C = K + 1 classes; -inf at ids below 0.

    The last is `log sum_{v not in ids} p_v`, summed over the others themselves: 1 less the sum of the K would be lost
    in rounding where they are nearly all.
    """
    there = ids_BtK >= 0
    own = jnp.take_along_axis(logprobs_BtV, jnp.where(there, ids_BtK, 0), axis=-1)
    row, column = jnp.ogrid[: ids_BtK.shape[0], : ids_BtK.shape[1]]
    beyond = jnp.where(there, ids_BtK, logprobs_BtV.shape[-1])
    others = logprobs_BtV.at[row[..., None], column[..., None], beyond].set(LEAST, mode="drop")
    rest = jax.nn.logsumexp(others, axis=-1, keepdims=True)
    return jnp.concatenate([jnp.where(there, own, -jnp.inf), rest], axis=-1)


def tell(
    logits_BtV: Float[Array, "B t V"], targets_Bt: Int[Array, "B t"], top_k: int, temperature: float
) -> tuple[Int[Array, "B t K"], Float[Array, "B t K+2"]]:
    """What a teacher with these logits says: the arrays `IDS` and `SAID`."""
    warm = jax.nn.log_softmax(logits_BtV / temperature, axis=-1)
    _, ids = jax.lax.top_k(warm, top_k)
    return ids, jnp.concatenate([in_classes(warm, ids), -_nll(logits_BtV, targets_Bt)[..., None]], axis=-1)


def tell_rows(teacher: Transformer, rows: dict[str, Array], top_k: int, temperature: float) -> dict[str, Array]:
    """What the teacher says of all targets of a batch: its arrays `IDS` and `SAID`."""
    hidden_BTD = forward(teacher, batch_of(rows)).hidden_BTD
    batch, length = rows["targets"].shape
    size = chunk_length(batch, length, teacher.config.vocab_size)

    def chunk(part: tuple[Array, Array]) -> dict[str, Array]:
        logits_BtV = constrain(unembed(teacher, part[0]), "batch", "length", "vocab")
        ids, said = tell(logits_BtV, part[1], top_k, temperature)
        return {IDS: ids.astype(jnp.int32), SAID: said}

    return in_chunks(chunk, (hidden_BTD, rows["targets"]), size)


@struct.dataclass
class Compared:
    """Of each target, float32. kl: at the temperature of the loss; all else at 1. same: 1 where both have the same most
    likely token. entropy: the student's."""

    kl: Float[Array, "B T"]
    nll: Float[Array, "B T"]
    teacher_nll: Float[Array, "B T"]
    entropy: Float[Array, "B T"]
    same: Float[Array, "B T"]


def compare(
    model: Transformer, teacher: Transformer | None, arrays: dict[str, Array], config: DistillConfig
) -> Compared:
    """How two models differ at each target. Differentiable by `model` and `hidden`, in `kl` and `nll`.

    Args:
        arrays: hidden `[B, T, D]` of the student and targets `[B, T]`; beside them teacher `[B, T, D']`, its hidden
            states, or what it says: `IDS` and `SAID`.
    """
    batch, length = arrays["targets"].shape
    vocab, top_k = model.config.vocab_size, config.top_k

    @jax.checkpoint
    def chunk(part: dict[str, Array]) -> Compared:
        targets_Bt = part["targets"]
        logits = constrain(unembed(model, part["hidden"]), "batch", "length", "vocab")
        plain = jax.nn.log_softmax(logits, axis=-1)
        student = jax.nn.log_softmax(logits / config.temperature, axis=-1) if config.temperature != 1 else plain
        theirs = None
        if teacher is not None:
            theirs = constrain(unembed(teacher, part["teacher"]), "batch", "length", "vocab")
            theirs = jax.lax.stop_gradient(theirs)
        if theirs is not None and not top_k:
            warm = jax.nn.log_softmax(theirs / config.temperature, axis=-1)
            missing = ((0, 0), (0, 0), (0, vocab - warm.shape[-1]))
            kl = divergence(jnp.pad(warm, missing, constant_values=LEAST), student, config.direction)
            teacher_nll, best = _nll(theirs, targets_Bt), theirs.argmax(-1)
        else:
            known = (part[IDS], part[SAID]) if theirs is None else tell(theirs, targets_Bt, top_k, config.temperature)
            kl = divergence(known[1][..., :-1], in_classes(student, known[0]), config.direction)
            teacher_nll, best = -known[1][..., -1], known[0][..., 0]
        entropy = -jnp.sum(jnp.exp(plain) * plain, axis=-1)
        same = (logits.argmax(-1) == best).astype(jnp.float32)
        kept = jax.lax.stop_gradient((teacher_nll, entropy, same))
        return Compared(kl, _nll(logits, targets_Bt), *kept)

    both = vocab + (0 if teacher is None else teacher.config.vocab_size)
    return in_chunks(chunk, arrays, chunk_length(batch, length, both))


def distill_loss(
    model: Transformer,
    rows: dict[str, Array],
    totals: Totals,
    before: Parts,
    config: DistillConfig,
    routers: LossConfig,
    teacher: Transformer | None = None,
) -> tuple[Array, Parts]:
    """`temperature^2 KL + mix nll`, the mean over weighted targets of a micro-batch.

    The square keeps gradients as large as they are without softening (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        rows: those of any training, each `[b, T]`; without a `teacher` also what it says, `IDS` and `SAID`.
        teacher: has no gradient.
    """
    output = forward(model, batch_of(rows))
    arrays = {"hidden": output.hidden_BTD, "targets": rows["targets"]}
    if teacher is None:
        arrays |= {name: rows[name] for name in (IDS, SAID)}
    else:
        arrays["teacher"] = jax.lax.stop_gradient(forward(teacher, batch_of(rows)).hidden_BTD)
    found = compare(model, teacher, arrays, config)

    def mean(values_BT: Array) -> Array:
        return jnp.sum(jnp.where(rows["weights"] > 0, values_BT * rows["weights"], 0.0)) / totals.weight

    kl, nll = mean(found.kl), mean(found.nll)
    loss = config.temperature**2 * kl + config.mix * nll
    more = {"kl": kl, "nll": nll, "teacher_nll": mean(found.teacher_nll)}
    more |= {"entropy": mean(found.entropy), "agreement": mean(found.same)}
    parts = replace(no_parts(model), loss=loss, more=more)
    return with_routers(model, loss, parts, output.stats, rows, totals, before, routers)


def _nll(logits_BtV: Array, targets_Bt: Array) -> Array:
    """`-log p(target)`; a sum over all rather than a look-up: a part of the vocabulary stays where it is."""
    is_target = jnp.arange(logits_BtV.shape[-1]) == targets_Bt[..., None]
    return jax.nn.logsumexp(logits_BtV, axis=-1) - jnp.where(is_target, logits_BtV, 0.0).sum(-1)
