"""What is computed of whole texts, beside generation: log-probabilities of a prompt for `echo`, and embeddings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from model.forward import continuation, forward, unembed
from model.transformer import Transformer
from serve.request import TopTokens
from serve.sampling_params import MAX_TOP_LOGPROBS

if TYPE_CHECKING:
    from serve.device import Device

SMALLEST, BLOCK = 64, 64
"""Least length that a program is compiled for; longer ones are twice the one before. Positions at a time whose logits
exist."""


class Prompts:
    """Reads texts with an engine's weights, one at a time, without its pages."""

    def __init__(self, device: Device):
        self._device = device

    def logprobs(self, tokens: Sequence[int], top: int) -> tuple[list[float | None], list[TopTokens | None]]:
        """Each token's log-probability and the `top` most likely ones; None for the first: nothing is before it."""
        own, best, ids = self._device.read("score", self._padded(tokens), len(tokens))
        found: list[float | None] = [None, *np.asarray(own)[: len(tokens) - 1].tolist()]
        if not top:
            return found, [None] * len(tokens)
        pairs = zip(np.asarray(ids)[:, :top].tolist(), np.asarray(best)[:, :top].tolist(), strict=True)
        each: list[TopTokens | None] = [list(zip(*pair, strict=True)) for pair in pairs]
        return found, [None, *each[: len(tokens) - 1]]

    def embedding(self, tokens: Sequence[int]) -> np.ndarray:
        """See `embed`."""
        return np.asarray(self._device.read("embed", self._padded(tokens), len(tokens)))

    @staticmethod
    def _padded(tokens: Sequence[int]) -> np.ndarray:
        padded = np.zeros(max(SMALLEST, 1 << (len(tokens) - 1).bit_length()), np.int32)
        padded[: len(tokens)] = tokens
        return padded


def hidden(model: Transformer, tokens_T: Int[Array, " T"], count: Array, rows: int) -> Float[Array, "T D"]:
    """The last hidden states of one text. On a mesh the batch is cut, so it needs as many `rows` as there are parts."""
    tokens_BT = jnp.broadcast_to(tokens_T, (rows, len(tokens_T)))
    valid_BT = jnp.broadcast_to(jnp.arange(len(tokens_T)) < count, tokens_BT.shape)
    return forward(model, continuation(tokens_BT, jnp.zeros(rows, jnp.int32), valid_BT)).hidden_BTD[0]


def score(model: Transformer, tokens_T: Int[Array, " T"], count: Array, rows: int) -> tuple[Array, Array, Array]:
    """Of each position the log-probability of the token after it, and the most likely ones: [T], [T, A] and their ids.

    Logits of a few positions exist at a time.
    """
    hidden_TD = hidden(model, tokens_T, count, rows)
    blocks = hidden_TD.reshape(-1, BLOCK, hidden_TD.shape[-1]), jnp.pad(tokens_T[1:], (0, 1)).reshape(-1, BLOCK)

    def block(inputs: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        hidden_tD, targets_t = inputs
        logits_tV = unembed(model, hidden_tD).astype(jnp.float32)
        logits_tV -= jax.nn.logsumexp(logits_tV, axis=-1, keepdims=True)
        best_tA, ids_tA = jax.lax.top_k(logits_tV, min(MAX_TOP_LOGPROBS, logits_tV.shape[1]))
        return jnp.take_along_axis(logits_tV, targets_t[:, None], axis=1)[:, 0], best_tA, ids_tA

    own, best, ids = (x.reshape(-1, *x.shape[2:]) for x in jax.lax.map(block, blocks))
    return own, best, ids


def embed(model: Transformer, tokens_T: Int[Array, " T"], count: Array, rows: int) -> Float[Array, " D"]:
    """The mean of a text's last hidden states (after the final norm), of length 1, in float32."""
    hidden_TD = hidden(model, tokens_T, count, rows).astype(jnp.float32)
    sum_D = jnp.sum(jnp.where(jnp.arange(len(tokens_T))[:, None] < count, hidden_TD, 0.0), axis=0)
    return sum_D / jnp.maximum(jnp.linalg.norm(sum_D), 1e-30)
