"""Losses over replies that people prefer: pure functions of the log-probabilities of whole replies.

A batch has its replies in rows, several in each: the k-th pair of a row is its segments 2k-1 and 2k.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float

from configs.alignment import PreferenceConfig
from configs.run import LossConfig
from model.forward import forward, unembed
from model.transformer import Transformer
from train.logprobs import score_targets
from train.losses import Parts, Totals, batch_of, no_parts, with_routers


@struct.dataclass
class Pairs:
    """One number for each reply of each pair, `[B, P]`; there: whether the pair exists."""

    first_BP: Float[Array, "B P"]
    second_BP: Float[Array, "B P"]
    there_BP: Bool[Array, "B P"]


def sum_replies(values_BT: Float[Array, "B T"], rows: dict[str, Array]) -> Pairs:
    """Sums of what belongs to each reply; padding belongs to none."""
    segments_BT = rows["segments"]
    length = segments_BT.shape[1]
    sums = jax.vmap(lambda values, segments: jax.ops.segment_sum(values, segments, length + 2))(values_BT, segments_BT)
    first_BP, second_BP = sums[:, 1 : length + 1 : 2], sums[:, 2 : length + 2 : 2]
    pair_P = jnp.arange(first_BP.shape[1])
    return Pairs(first_BP, second_BP, pair_P < segments_BT.max(axis=1, keepdims=True) // 2)


def dpo_losses(
    chosen: Float[Array, "*B"],
    rejected: Float[Array, "*B"],
    chosen_tokens: Float[Array, "*B"],
    rejected_tokens: Float[Array, "*B"],
    config: PreferenceConfig,
) -> tuple[Float[Array, "*B"], Float[Array, "*B"], Float[Array, "*B"]]:
    """The loss of each pair, and the rewards of both replies that it implies.

    Args:
        chosen, rejected: log-probability of a whole reply less that of the reference; for simpo without a reference.
        chosen_tokens, rejected_tokens: their lengths.

    sigmoid: `-log sigmoid(beta * (chosen - rejected))` (arXiv 2305.18290, equation 7), with label smoothing a mixture
    of both ways round. ipo: `(chosen - rejected - 1 / (2 beta))^2` of means over tokens, as its authors advise
    (2310.12036, equation 17). simpo: `-log sigmoid(beta * (chosen - rejected) - margin)` of means over tokens
    (2405.14734, equation 6).
    """
    beta = config.beta
    if config.loss != "sigmoid":
        chosen, rejected = chosen / jnp.maximum(chosen_tokens, 1), rejected / jnp.maximum(rejected_tokens, 1)
    logits = chosen - rejected
    if config.loss == "ipo":
        losses = jnp.square(logits - 1 / (2 * beta))
    elif config.loss == "simpo":
        losses = -jax.nn.log_sigmoid(beta * logits - config.margin)
    else:
        wrong = config.label_smoothing
        losses = -(1 - wrong) * jax.nn.log_sigmoid(beta * logits) - wrong * jax.nn.log_sigmoid(-beta * logits)
    return losses, beta * chosen, beta * rejected


def kto_losses(
    ratio: Float[Array, "*B"], divergence: Float[Array, ""], good: Bool[Array, "*B"], config: PreferenceConfig
) -> Float[Array, "*B"]:
    """`w_good (1 - sigmoid(beta (ratio - z)))` of good replies, `w_bad (1 - sigmoid(beta (z - ratio)))` of bad ones.

    KTO, arXiv 2402.01306, equation 8. ratio: log-probability of a reply less that of the reference. divergence: z, an
    estimate of how far the model is from the reference, which the gradient does not go through.
    """
    z = jax.lax.stop_gradient(divergence)
    value = jax.nn.sigmoid(config.beta * jnp.where(good, ratio - z, z - ratio))
    return jnp.where(good, config.good, config.bad) * (1 - value)


def told_apart(margin: Float[Array, "*B"]) -> Float[Array, "*B"]:
    """1 where the chosen reply has the larger reward; a half where the two are equal but for rounding."""
    return jnp.where(jnp.abs(margin) < 1e-5, 0.5, (margin > 0).astype(jnp.float32))


def mean_of(values_BP: Array, there_BP: Array, totals: Totals) -> Array:
    """This micro-batch's part of the mean over all pairs of the step."""
    return jnp.sum(jnp.where(there_BP, values_BP, 0.0)) / totals.weight


def preference_loss(
    model: Transformer,
    rows: dict[str, Array],
    totals: Totals,
    before: Parts,
    config: PreferenceConfig,
    routers: LossConfig,
    objective: str,
) -> tuple[Array, Parts]:
    """The loss of a micro-batch of dpo, kto or reward; `reference` in `rows` are log-probabilities, `[b, T]`."""
    output = forward(model, batch_of(rows))
    if objective == "reward":
        loss, more = reward_parts(model, output.hidden_BTD, rows, totals)
    else:
        logprobs_BT = score_targets(model, output.hidden_BTD, rows["targets"]).logprob_BT
        of = kto_parts if objective == "kto" else dpo_parts
        loss, more = of(logprobs_BT, rows, totals, config)
    parts = replace(no_parts(model), loss=loss, more=more)
    return with_routers(model, loss, parts, output.stats, rows, totals, before, routers)


def dpo_parts(
    logprobs_BT: Array, rows: dict[str, Array], totals: Totals, config: PreferenceConfig
) -> tuple[Array, dict[str, Array]]:
    """The mean loss of pairs, and what is logged of it."""
    weights_BT = rows["weights"]
    own = sum_replies(logprobs_BT * weights_BT, rows)
    tokens = sum_replies(weights_BT, rows)
    chosen_BP, rejected_BP = own.first_BP, own.second_BP
    if config.loss != "simpo":
        reference = sum_replies(rows["reference"] * weights_BT, rows)
        chosen_BP, rejected_BP = chosen_BP - reference.first_BP, rejected_BP - reference.second_BP
    losses, good, bad = dpo_losses(chosen_BP, rejected_BP, tokens.first_BP, tokens.second_BP, config)
    loss = mean_of(losses, own.there_BP, totals)
    nll_BP = -own.first_BP / jnp.maximum(tokens.first_BP, 1)
    if config.sft:
        loss += config.sft * mean_of(nll_BP, own.there_BP, totals)
    found = {"accuracy": told_apart(good - bad), "reward_margin": good - bad}
    found |= {"chosen_reward": good, "rejected_reward": bad, "chosen_nll": nll_BP}
    return loss, {name: mean_of(value, own.there_BP, totals) for name, value in found.items()}


def kto_parts(
    logprobs_BT: Array, rows: dict[str, Array], totals: Totals, config: PreferenceConfig
) -> tuple[Array, dict[str, Array]]:
    """The mean loss of single replies, and what is logged of it; second in each pair is another prompt's reply."""
    weights_BT = rows["weights"]
    ratio = sum_replies((logprobs_BT - rows["reference"]) * weights_BT, rows)
    good_BP = sum_replies(rows["labels"], rows).first_BP > 0
    there_BP = ratio.there_BP
    # Of this micro-batch's mismatched replies, as the authors do: z_ref, never negative.
    z = jnp.sum(jnp.where(there_BP, ratio.second_BP, 0.0)) / jnp.maximum(there_BP.sum(), 1)
    z = jnp.maximum(z, 0.0)
    losses = kto_losses(ratio.first_BP, z, good_BP, config)
    sign = jnp.where(good_BP, 1.0, -1.0)
    found = {
        "accuracy": ((ratio.first_BP - z) * sign > 0).astype(jnp.float32),
        "divergence": jnp.broadcast_to(z, there_BP.shape),
    }
    found |= {"reward_margin": config.beta * (ratio.first_BP - z) * sign}
    return mean_of(losses, there_BP, totals), {name: mean_of(value, there_BP, totals) for name, value in found.items()}


def reward_parts(
    model: Transformer, hidden_BTD: Array, rows: dict[str, Array], totals: Totals
) -> tuple[Array, dict[str, Array]]:
    """`-log sigmoid(r(chosen) - r(rejected) - margin)`, the mean over pairs, and what is logged of it.

    Bradley-Terry with a margin, Llama 2, arXiv 2307.09288, equation 2. The reward of a reply stands at its last token.
    """
    segments_BT = rows["segments"]
    following_BT = jnp.pad(segments_BT[:, 1:], ((0, 0), (0, 1)))
    last_BT = (segments_BT != following_BT).astype(jnp.float32)
    rewards_BT = score_hidden(model, hidden_BTD) * last_BT
    own, margin = sum_replies(rewards_BT, rows), sum_replies(rows["labels"] * last_BT, rows)
    difference_BP = own.first_BP - own.second_BP
    losses = -jax.nn.log_sigmoid(difference_BP - margin.first_BP)
    found = {"accuracy": told_apart(difference_BP), "reward_margin": difference_BP}
    found |= {"chosen_reward": own.first_BP, "rejected_reward": own.second_BP}
    more = {name: mean_of(value, own.there_BP, totals) for name, value in found.items()}
    return mean_of(losses, own.there_BP, totals), more


def score_hidden(model: Transformer, hidden_BTD: Float[Array, "B T D"]) -> Float[Array, "B T"]:
    """What a reward model gives at each token, float32."""
    return unembed(model, hidden_BTD)[..., 0]
