"""What requests may do to logits before a token is drawn: bias, penalties, tokens that may not be."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt32

from serve.request import Request
from serve.rows import ALLOWED, BIAS, Rows
from serve.sampling_params import MAX_TOP_LOGPROBS

IN_PROMPT = 2**24
"""Added to the count of a token that the prompt has."""


@struct.dataclass
class Tables:
    """What is kept for each slot and each token of the vocabulary; read where some row asks for it.

    seen_SV: how often the reply has a token, and `IN_PROMPT` if the prompt has it. bias_SV: added to its logit.
    allowed_SW: bits of the tokens that may be drawn, 32 to a word.
    """

    seen_SV: Int[Array, "S V"]
    bias_SV: Float[Array, "S V"]
    allowed_SW: UInt32[Array, "S W"]


Change = Callable[[Array, Rows, Tables], Array]


def empty_tables(slots: int, vocab: int) -> Tables:
    """Tables of nothing."""
    words = -(-vocab // 32)
    return Tables(
        jnp.zeros((slots, vocab), jnp.int32),
        jnp.zeros((slots, vocab), jnp.float32),
        jnp.zeros((slots, words), jnp.uint32),
    )


def first_tables(request: Request, vocab: int) -> tuple[np.ndarray, np.ndarray]:
    """`seen` and `bias` of a request that has just got its slot."""
    seen_V = np.bincount(request.tokens, minlength=vocab).astype(np.int32)
    seen_V[np.unique(np.asarray(request.prompt))] += IN_PROMPT
    bias_V = np.zeros(vocab, np.float32)
    for token, by in request.sampling.logit_bias:
        bias_V[token] += by
    return seen_V, bias_V


def adjust(logits_RV: Float[Array, "R V"], rows: Rows, tables: Tables) -> Float[Array, "R V"]:
    """Logits to draw from; those of a row that asks for nothing keep their bits, whatever others ask for."""
    penalised_R = (rows.presence_R != 0) | (rows.frequency_R != 0) | (rows.repetition_R != 1)
    short_R = rows.step_R < rows.min_tokens_R
    for wanted_R, change in (
        (penalised_R, _penalise),
        ((rows.special_R & BIAS) > 0, _bias),
        (short_R, _go_on),
        ((rows.special_R & ALLOWED) > 0, _restrict),
    ):
        logits_RV = _where(wanted_R & (rows.count_R > 0), change, logits_RV, rows, tables)
    return logits_RV


def _where(wanted_R: Array, change: Change, logits_RV: Array, rows: Rows, tables: Tables) -> Array:
    """`change` to the logits of these rows; no work where there are none."""
    return jax.lax.cond(
        wanted_R.any(), lambda x: jnp.where(wanted_R[:, None], change(x, rows, tables), x), lambda x: x, logits_RV
    )


def _penalise(logits_RV: Array, rows: Rows, tables: Tables) -> Array:
    seen_RV = tables.seen_SV[rows.slot_R]
    count_RV = seen_RV % IN_PROMPT
    repeated_RV = jnp.where(
        logits_RV > 0, logits_RV / rows.repetition_R[:, None], logits_RV * rows.repetition_R[:, None]
    )
    logits_RV = jnp.where(seen_RV > 0, repeated_RV, logits_RV)
    logits_RV -= rows.frequency_R[:, None] * count_RV
    return logits_RV - rows.presence_R[:, None] * (count_RV > 0)


def _bias(logits_RV: Array, rows: Rows, tables: Tables) -> Array:
    return logits_RV + tables.bias_SV[rows.slot_R]


def _go_on(logits_RV: Array, rows: Rows, tables: Tables) -> Array:
    count = jnp.arange(len(logits_RV))[:, None]
    stop_RX = jnp.where(rows.stop_RX < 0, logits_RV.shape[1], rows.stop_RX)
    return logits_RV.at[count, stop_RX].set(-jnp.inf, mode="drop")


def _restrict(logits_RV: Array, rows: Rows, tables: Tables) -> Array:
    words_RW = tables.allowed_SW[rows.slot_R]
    token = jnp.arange(logits_RV.shape[1])
    bits_RV = (words_RW[:, token // 32] >> (token % 32).astype(jnp.uint32)) & 1
    return jnp.where(bits_RV > 0, logits_RV, -jnp.inf)


def most_likely(logits_RV: Float[Array, "R V"], rows: Rows) -> Int[Array, "R 2*A"]:
    """The most likely tokens of each row, and the bits of their log-probabilities, if any row asks for them."""
    count = min(MAX_TOP_LOGPROBS, logits_RV.shape[1])

    def found() -> Array:
        best_RA, token_RA = jax.lax.top_k(logits_RV, count)
        best_RA -= jax.nn.logsumexp(logits_RV, axis=-1, keepdims=True)
        return jnp.concatenate([token_RA, jax.lax.bitcast_convert_type(best_RA, jnp.int32)], axis=1)

    wanted = ((rows.top_logprobs_R > 0) & (rows.count_R > 0)).any()
    return jax.lax.cond(wanted, found, lambda: jnp.zeros((len(logits_RV), 2 * count), jnp.int32))
