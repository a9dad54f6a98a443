"""Exact log-probabilities of given tokens: the one scorer of `qmax score`, evaluation and preference losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from errors import UserError
from model.forward import Batch, forward, unembed
from model.transformer import Transformer
from train.logprobs import score_targets

SMALLEST = 16
"""Least length that a program is compiled for; longer ones are twice the one before."""


class Scores(NamedTuple):
    """Of each token of a row.

    logprobs: None for the first, before which there is nothing. best: no token was more likely there.
    """

    logprobs: list[float | None]
    best: list[bool]


def token_scores(
    model: Transformer,
    tokens_BT: Int[Array, "B T"],
    segments_BT: Int[Array, "B T"],
    targets_BT: Int[Array, "B T"],
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """log p(target | tokens up to its place), float32, and whether it is the most likely one.

    Without meaning at padding (segment 0). Logits are made for a chunk of positions at a time; a row is one document.
    """
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    hidden_BTD = forward(model, Batch(tokens_BT, positions_BT, segments_BT)).hidden_BTD
    scores = score_targets(model, hidden_BTD, targets_BT)
    return scores.logprob_BT, scores.best_BT


def next_scores(
    model: Transformer, tokens_BT: Int[Array, "B T"], lengths_B: Int[Array, "B"], ids_BK: Int[Array, "B K"]
) -> tuple[Float[Array, "B K"], Bool[Array, "B K"]]:
    """The same of each of K tokens that might follow a row of `lengths` tokens."""
    place_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape)
    segments_BT = (place_BT < lengths_B[:, None]).astype(jnp.int32)
    hidden_BTD = forward(model, Batch(tokens_BT, place_BT, segments_BT)).hidden_BTD
    last_B1D = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)
    logits_BV = unembed(model, last_B1D)[:, 0]
    picked_BK = jnp.take_along_axis(logits_BV, ids_BK, axis=1)
    most_B1 = logits_BV.max(-1, keepdims=True)
    return picked_BK - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True), picked_BK >= most_B1


class Scorer:
    """Scores rows of any lengths in batches of much the same length.

    Args:
        model: the weights.
        batch_tokens: positions in a batch, padding included.
    """

    def __init__(self, model: Transformer, batch_tokens: int = 4096):
        self.config, self.batch_tokens = model.config, batch_tokens
        self.leaves, self._structure = jax.tree.flatten(model)
        self.step, self._next = jax.jit(self._step), jax.jit(self._next_step)

    def _step(
        self, leaves: list[Array], tokens_BT: Array, segments_BT: Array, targets_BT: Array
    ) -> tuple[Array, Array]:
        return token_scores(jax.tree.unflatten(self._structure, leaves), tokens_BT, segments_BT, targets_BT)

    def _next_step(self, leaves: list[Array], tokens_BT: Array, lengths_B: Array, ids_BK: Array) -> tuple[Array, Array]:
        return next_scores(jax.tree.unflatten(self._structure, leaves), tokens_BT, lengths_B, ids_BK)

    def check(self, tokens: Sequence[int], where: str) -> None:
        """UserError, naming `where`, for a row that the model cannot read."""
        limit, vocab = self.config.max_positions, self.config.vocab_size
        if not tokens:
            raise UserError(f"{where} is empty; give it at least one token")
        if len(tokens) > limit + 1:  # the last one is foretold and not read
            raise UserError(f"{where} has {len(tokens)} tokens, but the model has {limit} positions; cut it")
        wrong = next((token for token in tokens if not 0 <= token < vocab), None)
        if wrong is not None:
            raise UserError(f"{where} holds the id {wrong}, but tokens run from 0 to {vocab - 1}")

    def score(self, rows: Sequence[Sequence[int]], progress: Callable[[int], None] | None = None) -> list[Scores]:
        """Of each row's tokens their log-probabilities, and whether they are the most likely; in the rows' order."""
        found: list[Scores] = [Scores([], [])] * len(rows)

        def keep(indices: list[int], logprobs: Array, best: Array) -> None:
            for index, line, most in zip(indices, np.asarray(logprobs), np.asarray(best), strict=False):
                length = len(rows[index])
                found[index] = Scores([None, *line[: length - 1].tolist()], [False, *most[: length - 1].tolist()])
                if progress is not None:
                    progress(length)

        waiting: tuple[list[int], Array, Array] | None = None
        # The last token of a row is foretold and not read; a row of one token is read for its form alone.
        for indices, tokens_BT, segments_BT in self._batches([row[: max(len(row) - 1, 1)] for row in rows]):
            targets_BT = np.zeros_like(tokens_BT)
            for line, index in enumerate(indices):
                targets_BT[line, : len(rows[index]) - 1] = rows[index][1:]
            result = self.step(self.leaves, tokens_BT, segments_BT, targets_BT)
            if waiting is not None:
                keep(*waiting)
            waiting = indices, *result
        if waiting is not None:
            keep(*waiting)
        return found

    def score_next(
        self,
        rows: Sequence[Sequence[int]],
        candidates: Sequence[Sequence[int]],
        progress: Callable[[int], None] | None = None,
    ) -> list[list[tuple[float, bool]]]:
        """What is said of each token that might follow a row: its log-probability, and whether none is more likely.

        One pass over a row, however many tokens might follow: choices by their letters cost a question, not four.
        """
        found: list[list[tuple[float, bool]]] = [[] for _ in rows]
        width = 1 << (max(map(len, candidates), default=1) - 1).bit_length()
        for indices, tokens_BT, segments_BT in self._batches(rows):
            ids_BK = np.zeros((len(tokens_BT), width), np.int32)
            for line, index in enumerate(indices):
                ids_BK[line, : len(candidates[index])] = candidates[index]
            lengths_B = np.maximum(segments_BT.sum(1), 1)
            logprobs, best = (np.asarray(a) for a in self._next(self.leaves, tokens_BT, lengths_B, ids_BK))
            for line, index in enumerate(indices):
                count = len(candidates[index])
                found[index] = list(zip(logprobs[line, :count].tolist(), best[line, :count].tolist(), strict=True))
                if progress is not None:
                    progress(len(rows[index]))
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
