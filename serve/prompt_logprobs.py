"""Log-probabilities of a prompt's own tokens, for `echo`."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from model.forward import continuation, forward, unembed
from serve.engine import Engine
from serve.request import TopTokens
from serve.sampling_params import MAX_TOP_LOGPROBS

SMALLEST, BLOCK = 64, 64
"""Least length that a program is compiled for; longer ones are twice the one before. Positions at a time whose logits
exist."""


class PromptScorer:
    """Scores prompts with an engine's weights, one at a time."""

    def __init__(self, engine: Engine):
        self._device = engine.device
        self._step = jax.jit(self._score)

    def __call__(self, tokens: Sequence[int], top: int) -> tuple[list[float | None], list[TopTokens | None]]:
        """Each token's log-probability and the `top` most likely ones; None for the first: nothing is before it."""
        length = max(SMALLEST, 1 << (len(tokens) - 1).bit_length())
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(tokens)] = tokens
        with self._device.mesh_context():
            own, best, ids = self._step(self._device.leaves, padded, np.int32(len(tokens)))
        logprobs: list[float | None] = [None, *np.asarray(own)[: len(tokens) - 1].tolist()]
        if not top:
            return logprobs, [None] * len(tokens)
        pairs = zip(np.asarray(ids)[:, :top].tolist(), np.asarray(best)[:, :top].tolist(), strict=True)
        each: list[TopTokens | None] = [list(zip(*pair, strict=True)) for pair in pairs]
        return logprobs, [None, *each[: len(tokens) - 1]]

    def _score(self, leaves: list[Array], tokens_BT: Int[Array, "1 T"], count: Array) -> tuple[Array, Array, Array]:
        model = self._device.with_leaves(leaves)
        valid_BT = jnp.arange(tokens_BT.shape[1])[None] < count
        hidden_BTD = forward(model, continuation(tokens_BT, jnp.zeros(1, jnp.int32), valid_BT)).hidden_BTD
        targets_T = jnp.pad(tokens_BT[0, 1:], (0, 1))
        blocks = hidden_BTD[0].reshape(-1, BLOCK, hidden_BTD.shape[-1]), targets_T.reshape(-1, BLOCK)

        def block(inputs: tuple[Array, Array]) -> tuple[Array, Array, Array]:
            hidden_tD, targets_t = inputs
            logits_tV = unembed(model, hidden_tD).astype(jnp.float32)
            logits_tV -= jax.nn.logsumexp(logits_tV, axis=-1, keepdims=True)
            best_tA, ids_tA = jax.lax.top_k(logits_tV, min(MAX_TOP_LOGPROBS, logits_tV.shape[1]))
            return jnp.take_along_axis(logits_tV, targets_t[:, None], axis=1)[:, 0], best_tA, ids_tA

        own, best, ids = (x.reshape(-1, *x.shape[2:]) for x in jax.lax.map(block, blocks))
        return own, best, ids
