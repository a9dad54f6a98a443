"""Log-probabilities of given tokens, as scoring and the losses of alignment need them.

Nobody keeps the logits of all tokens: they are made for a chunk of positions at a time, and again in the backward pass.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from model.forward import unembed
from model.transformer import Transformer
from sharding.rules import constrain
from train.chunks import chunk_length, in_chunks


@struct.dataclass
class TokenScores:
    """Of each target, float32.

    logprob_BT: its log-probability. tempered_BT: the same of the distribution at the temperature asked for.
    entropy_BT: of that distribution, in nats; without a gradient. best_BT: no token is more likely; bool.
    """

    logprob_BT: Float[Array, "B T"]
    tempered_BT: Float[Array, "B T"]
    entropy_BT: Float[Array, "B T"]
    best_BT: Bool[Array, "B T"]


def score_targets(
    model: Transformer, hidden_BTD: Float[Array, "B T D"], targets_BT: Int[Array, "B T"], temperature: float = 1.0
) -> TokenScores:
    """What the model says of each target, `hidden` being what `forward` gave at its place. Differentiable."""
    batch, length = targets_BT.shape
    size = chunk_length(batch, length, model.config.vocab_size)

    @jax.checkpoint
    def chunk(part: tuple[Array, Array]) -> TokenScores:
        hidden_BtD, targets_Bt = part
        logits = constrain(unembed(model, hidden_BtD), "batch", "length", "vocab")
        is_target = jnp.arange(logits.shape[-1]) == targets_Bt[..., None]
        # A sum over all rather than a look-up: where the vocabulary is cut over devices, each has its own part of it.
        picked = jnp.where(is_target, logits, 0.0).sum(-1)
        logprob = picked - jax.nn.logsumexp(logits, axis=-1)
        warm = logits / temperature
        log_z = jax.nn.logsumexp(warm, axis=-1)
        tempered = picked / temperature - log_z if temperature != 1 else logprob
        mean = jnp.sum(jax.nn.softmax(warm, axis=-1) * warm, axis=-1)
        best = picked >= logits.max(-1)
        return TokenScores(logprob, tempered, jax.lax.stop_gradient(log_z - mean), best)

    return in_chunks(chunk, (hidden_BTD, targets_BT), size)
