"""A continuation as rows of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from train.tasks.likelihood import Continuation


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, with nothing added."""
        ...


@dataclass(frozen=True)
class Pieces:
    """Rows to score, and from which token on each counts; cut: the context has lost its beginning."""

    rows: list[tuple[list[int], int]]
    cut: bool = False

    @property
    def single(self) -> bool:
        """Whether one token counts, the last of one row, after at least one other."""
        return len(self.rows) == 1 and 0 < self.rows[0][1] == len(self.rows[0][0]) - 1


def make_pieces(tokenizer: Encoder, asked: Continuation, prefix: int, most: int) -> Pieces:
    """The rows of a continuation, of which a model with `most` positions reads all but the last token.

    As lm-evaluation-harness has it: context and text are tokenised together, as a model reads them; spaces between them
    belong to the text. A context that is too long loses its beginning. A text without context follows `prefix`; where
    it is too long it is read in windows that share a token, the last of which is full.
    """
    context, text = asked
    if not context:
        return _windows([prefix, *tokenizer.encode(text)], most)
    bare = context.rstrip()
    text = context[len(bare) :] + text
    whole = tokenizer.encode(bare + text)
    start = min(len(tokenizer.encode(bare)), len(whole) - 1)
    if start < 1:
        whole, start = [prefix, *whole], 1
    dropped = max(len(whole) - most - 1, 0)
    return Pieces([(whole[dropped:], max(start - dropped, 1))], cut=dropped > 0)


def _windows(tokens: list[int], most: int) -> Pieces:
    rows = [(tokens[: most + 1], 1)]
    done = most + 1
    while done < len(tokens):
        end = min(done + most, len(tokens))
        rows.append((tokens[end - most - 1 : end], most + 1 - (end - done)))
        done = end
    return Pieces(rows)
