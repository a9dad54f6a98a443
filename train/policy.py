"""Losses of reinforcement learning: pure functions of the log-probabilities of tokens that the model itself has drawn.

All are means of `-A * (a clipped ratio)`; how tokens are weighed against each other is in the rows (`weights` over
`total`), so that one loss serves all ways of taking the mean.
"""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from configs.alignment import RLConfig
from configs.run import LossConfig
from model.forward import forward
from model.transformer import Transformer
from train.logprobs import score_targets
from train.losses import Parts, Totals, batch_of, no_parts, replay_of, with_routers


@struct.dataclass
class Ratios:
    """How far the model has moved from the one that drew the tokens. `ratio_BT`: of each token; 1 where nothing was."""

    ratio_BT: Float[Array, "B T"]
    clipped_BT: Float[Array, "B T"]


def token_ratios(difference_BT: Float[Array, "B T"], low: float, high: float) -> Ratios:
    """`exp(difference)` and the same within [1 - low, 1 + high] (PPO, arXiv 1707.06347; DAPO, 2503.14476)."""
    ratio_BT = jnp.exp(difference_BT)
    return Ratios(ratio_BT, jnp.clip(ratio_BT, 1 - low, 1 + high))


def sequence_ratios(
    difference_BT: Float[Array, "B T"],
    drawn_BT: Float[Array, "B T"],
    segments_BT: Int[Array, "B T"],
    low: float,
    high: float,
) -> Ratios:
    """The geometric mean of the ratios of a reply's tokens, at each of them (GSPO, arXiv 2507.18071, equation 7).

    drawn: 1 for tokens of replies. The gradient of a reply's mean goes to all of its tokens.
    """
    length = segments_BT.shape[1]

    def spread(values_T: Array, drawn_T: Array, segments_T: Array) -> Array:
        sums = jax.ops.segment_sum(values_T * drawn_T, segments_T, length + 1)
        counts = jax.ops.segment_sum(drawn_T, segments_T, length + 1)
        return (sums / jnp.maximum(counts, 1))[segments_T]

    return token_ratios(jax.vmap(spread)(difference_BT, drawn_BT, segments_BT), low, high)


def surrogate(ratios: Ratios, advantages_BT: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """`-min(ratio A, clip(ratio) A)`, of each token (arXiv 1707.06347, equation 7)."""
    return -jnp.minimum(ratios.ratio_BT * advantages_BT, ratios.clipped_BT * advantages_BT)


def k3(logprobs_BT: Float[Array, "B T"], reference_BT: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """`exp(r) - r - 1` with `r = log reference - log p`: never negative, in the mean the divergence from the reference.

    J. Schulman, "Approximating KL divergence" (2020); GRPO, arXiv 2402.03300, equation 4.
    """
    r_BT = reference_BT - logprobs_BT
    return jnp.exp(r_BT) - r_BT - 1


def truncated_weights(old_BT: Float[Array, "B T"], sampler_BT: Float[Array, "B T"], most: float) -> Float[Array, "B T"]:
    """`min(p_trainer / p_sampler, most)`: what corrects for a sampler that is not quite the model that is trained.

    Truncated importance sampling, Ionides (2008), for language models F. Yao et al. (2025).
    """
    return jnp.minimum(jnp.exp(old_BT - sampler_BT), most)


def policy_loss(
    model: Transformer, rows: dict[str, Array], totals: Totals, before: Parts, config: RLConfig, routers: LossConfig
) -> tuple[Array, Parts]:
    """The loss of a micro-batch of replies.

    `rows`, each `[b, T]`, beside those of any training: weights (of tokens in the mean, to be divided by `total`),
    drawn (1 for a token that the model has drawn), advantages, sampler (log-probability when it was drawn); and, as the
    run needs them, old (the trainer's own before the first update), reference, experts `[b, T, L, C]`.
    """
    output = forward(model, batch_of(rows), replay=replay_of(rows))
    scores = score_targets(model, output.hidden_BTD, rows["targets"], config.temperature)
    drawn_BT, weights_BT = rows["drawn"], rows["weights"]
    # In the first update after a rollout the model is the one that drew: its own log-probabilities are the old ones.
    old_BT = rows.get("old", jax.lax.stop_gradient(scores.tempered_BT))
    difference_BT = (scores.tempered_BT - old_BT) * drawn_BT
    ends = config.clip_low, config.clip_high
    if config.ratio == "sequence":
        ratios = sequence_ratios(difference_BT, drawn_BT, rows["segments"], *ends)
    else:
        ratios = token_ratios(difference_BT, *ends)
    losses_BT = surrogate(ratios, rows["advantages"])
    gap_BT = jnp.abs(jax.lax.stop_gradient(scores.logprob_BT) - rows["sampler"]) * drawn_BT
    if config.truncate:
        losses_BT *= truncated_weights(
            rows.get("old", jax.lax.stop_gradient(scores.logprob_BT)), rows["sampler"], config.truncate
        )
    if config.kl and config.kl_estimator == "k3":
        losses_BT += config.kl * k3(scores.logprob_BT, rows["reference"])
    loss = jnp.sum(losses_BT * weights_BT) / totals.weight
    drawn = jnp.maximum(totals.drawn, 1)

    def mean(values_BT: Array) -> Array:
        return jnp.sum(values_BT * drawn_BT) / drawn

    clipped_BT = (ratios.ratio_BT * rows["advantages"] > ratios.clipped_BT * rows["advantages"]).astype(jnp.float32)
    more = {"entropy": mean(scores.entropy_BT), "ratio": mean(ratios.ratio_BT), "clip_fraction": mean(clipped_BT)}
    peaks = {"ratio_max": jnp.max(ratios.ratio_BT * drawn_BT)}
    if "old" not in rows:  # later the model is another one than the sampler was, on purpose
        more["logprob_gap"] = mean(gap_BT)
        peaks["logprob_gap_max"] = jnp.max(gap_BT)
    if "reference" in rows:
        more["kl"] = mean(k3(scores.logprob_BT, rows["reference"]))
    parts = replace(no_parts(model), loss=loss, more=more, peaks=peaks)
    return with_routers(model, loss, parts, output.stats, rows, totals, before, routers)
