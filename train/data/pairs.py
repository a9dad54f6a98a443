"""Documents of preference learning: what a store keeps of them, how they are shortened, and the arrays of their rows.

    preference: [tokens of chosen, hundredths of margin, chosen ..., rejected ...]     one pair of replies to a prompt
    kto:        [1 good or 0 bad, prompt and reply ...]                                one reply to a prompt

The header's words are as wide as tokens, and never tokens of a row. In a row, the k-th document has segments 2k - 1 and
2k: chosen and rejected; or the sequence and a mismatch, the same prompt with the reply of the store's next document,
of which the KL term of KTO is estimated (arXiv 2402.01306, section 4.1). `labels` float32 [T] has on every token of
both the margin; or 1 for good and -1 for bad.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from train.data.packing import Fetch, empty_row, put

HEADER = {"preference": 2, "kto": 1}
"""Words before the tokens of a document."""
LARGEST_WORD = (1 << 16) - 1
END = 1 << 62
"""Where to stop reading a document that is read whole."""

Sequence = tuple[np.ndarray, np.ndarray]
"""Tokens int32 [n] and their loss mask bool [n]."""


@dataclass(frozen=True, slots=True)
class Cut:
    """How long a document may be in a row of `length` inputs, and whether its end is kept rather than its beginning."""

    kind: str
    length: int
    left: bool

    def whole(self, lengths: np.ndarray) -> np.ndarray:
        """Inputs of documents of `lengths` words (int64 [n]) that are not cut: both sequences, without last tokens."""
        words = lengths - HEADER[self.kind]
        return words - 2 if self.kind == "preference" else 2 * (words - 1)

    def shortened(self, doc: int, fetch: Fetch) -> int:
        """Inputs of a document that is too long for a row, when it is cut; 0 when too little is left.

        That is nothing to learn on some side; or, for kto, nothing of the prompt, which the mismatch needs too.
        """
        sequences = [self.window(sequence) for sequence in self.sequences(doc, fetch)[0]]
        if not all(mask[1:].any() for _, mask in sequences) or (self.kind == "kto" and sequences[0][1][0]):
            return 0
        inputs = sum(len(tokens) - 1 for tokens, _ in sequences)
        return inputs if self.kind == "preference" else 2 * inputs

    def window(self, sequence: Sequence) -> Sequence:
        """At most half a row of inputs, and the target of the last."""
        tokens, mask = sequence
        count = self.length // 2 + 1
        part = slice(max(0, len(tokens) - count), None) if self.left else slice(count)
        return tokens[part], mask[part]

    def sequences(self, doc: int, fetch: Fetch) -> tuple[list[Sequence], float]:
        """The sequences of a document (two of a pair, else one) as they are stored, and its label."""
        words, mask = fetch(doc, 0, END)
        assert mask is not None, "a store of preferences has masks"
        header = HEADER[self.kind]
        tokens, mask = words[header:], mask[header:]
        if self.kind == "kto":
            return [(tokens, mask)], 1.0 if words[0] else -1.0
        first = int(words[0])
        return [(tokens[:first], mask[:first]), (tokens[first:], mask[first:])], int(words[1]) / 100

    def fitted(self, doc: int, fetch: Fetch) -> tuple[list[Sequence], float]:
        """`sequences`, cut where they do not fit a row."""
        sequences, label = self.sequences(doc, fetch)
        inputs = sum(len(tokens) - 1 for tokens, _ in sequences)
        if inputs * (1 if self.kind == "preference" else 2) > self.length:
            sequences = [self.window(sequence) for sequence in sequences]
        return sequences, label


def materialize_pairs(
    pieces: Iterable[tuple[int, int, int]], fetch: Fetch, cut: Cut, documents: int
) -> dict[str, np.ndarray]:
    """The arrays of one row, each [T]: as `packing.materialize`, and `labels`. The store has so many `documents`."""
    row = empty_row(cut.length, labels=True)
    at, segment = 0, 1
    for doc, _, _ in pieces:
        sequences, label = cut.fitted(doc, fetch)
        if cut.kind == "kto":
            other = cut.sequences((doc + 1) % documents, fetch)[0][0]
            sequences = [sequences[0], mismatch(sequences[0], other)]
        for tokens, mask in sequences:
            end = put(row, at, segment, tokens, mask)
            row["labels"][at:end] = label
            at, segment = end, segment + 1
    return row


def mismatch(own: Sequence, other: Sequence) -> Sequence:
    """The prompt of `own` and the reply of `other`, no longer than `own`. A reply begins where its mask does."""
    prompt, start = int(np.argmax(own[1])), int(np.argmax(other[1]))
    tokens = np.concatenate([own[0][:prompt], other[0][start:]])[: len(own[0])]
    mask = np.concatenate([own[1][:prompt], other[1][start:]])[: len(own[0])]
    return tokens, mask
