"""Exact log-probabilities of given tokens: the one scorer of `qmax score`, evaluation and preference losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from errors import UserError
from model.forward import Batch, forward
from model.transformer import Transformer
from train.logprobs import score_targets

SMALLEST = 16
"""Least length that a program is compiled for; longer ones are twice the one before."""


def token_logprobs(
    model: Transformer, tokens_BT: Int[Array, "B T"], segments_BT: Int[Array, "B T"]
) -> Float[Array, "B T"]:
    """log p(token | those before it in its row), float32; 0 for the first token and for padding (segment 0).

    Logits are made for a chunk of positions at a time. Each row is one document.
    """
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    hidden_BTD = forward(model, Batch(tokens_BT, positions_BT, segments_BT)).hidden_BTD
    targets_BT = jnp.pad(tokens_BT[:, 1:], ((0, 0), (0, 1)))
    found_BT = score_targets(model, hidden_BTD, targets_BT).logprob_BT
    found_BT = jnp.pad(found_BT[:, :-1], ((0, 0), (1, 0)))
    real_BT = (segments_BT > 0) & (positions_BT > 0)
    return jnp.where(real_BT, found_BT, 0.0)


class Scorer:
    """Scores rows of any lengths in batches of much the same length.

    Args:
        model: the weights.
        batch_tokens: positions in a batch, padding included.
    """

    def __init__(self, model: Transformer, batch_tokens: int = 4096):
        self.config, self.batch_tokens = model.config, batch_tokens
        self.leaves, self._structure = jax.tree.flatten(model)
        self.step = jax.jit(self._step)

    def _step(self, leaves: list[Array], tokens_BT: Array, segments_BT: Array) -> Array:
        return token_logprobs(jax.tree.unflatten(self._structure, leaves), tokens_BT, segments_BT)

    def check(self, tokens: Sequence[int], where: str) -> None:
        """UserError, naming `where`, for a row that the model cannot read."""
        limit, vocab = self.config.max_positions, self.config.vocab_size
        if not tokens:
            raise UserError(f"{where} is empty; give it at least one token")
        if len(tokens) > limit:
            raise UserError(f"{where} has {len(tokens)} tokens, but the model has {limit} positions; cut it")
        wrong = next((token for token in tokens if not 0 <= token < vocab), None)
        if wrong is not None:
            raise UserError(f"{where} holds the id {wrong}, but tokens run from 0 to {vocab - 1}")

    def score(
        self, rows: Sequence[Sequence[int]], progress: Callable[[int], None] | None = None
    ) -> list[list[float | None]]:
        """Log-probabilities of each row's tokens; None for the first, before which there is nothing."""
        found: list[list[float | None]] = [[] for _ in rows]
        waiting: tuple[list[int], Array] | None = None

        def keep(indices: list[int], logprobs: Array) -> None:
            for index, line in zip(indices, np.asarray(logprobs), strict=False):
                found[index] = [None, *line[1 : len(rows[index])].tolist()]
                if progress is not None:
                    progress(len(rows[index]))

        for indices, tokens_BT, segments_BT in self._batches(rows):
            result = self.step(self.leaves, tokens_BT, segments_BT)
            if waiting is not None:
                keep(*waiting)
            waiting = indices, result
        if waiting is not None:
            keep(*waiting)
        return found

    def _batches(self, rows: Sequence[Sequence[int]]) -> Iterator[tuple[list[int], np.ndarray, np.ndarray]]:
        """Rows by length, so that few positions are padding; each length has one number of rows."""
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        while order:
            length = max(SMALLEST, 1 << (len(rows[order[0]]) - 1).bit_length())
            count = max(1, self.batch_tokens // length)
            own = [index for index in order[:count] if len(rows[index]) <= length]
            order = order[len(own) :]
            tokens_BT, segments_BT = np.zeros((2, count, length), np.int32)
            for line, index in enumerate(own):
                tokens_BT[line, : len(rows[index])] = rows[index]
                segments_BT[line, : len(rows[index])] = 1
            yield own, tokens_BT, segments_BT
