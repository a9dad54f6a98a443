"""A sentencepiece model from its pieces: what GGUF and llama2.c files keep of one.

Written as the protocol buffer that the sentencepiece library loads (sentencepiece_model.proto), so that texts are cut
by the same code as with the original file.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from model.protobuf import field, number, varint

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Kinds of pieces; the same numbers in GGUF files."""

BPE = 2
FIXED32 = 5
"""Wire type of a float."""


class Piece(NamedTuple):
    """One token, as sentencepiece spells it: a space is U+2581, a byte `<0x0A>`."""

    text: str
    score: float
    kind: int = NORMAL


def sentencepiece_model(
    pieces: Iterable[Piece], *, add_space: bool = True, remove_spaces: bool = False, charsmap: bytes = b""
) -> bytes:
    """A serialised BPE model.

    add_space: encode with a space before the text. remove_spaces: merge runs of spaces, drop outer ones. charsmap:
    the library's compiled normalisation; none by default.
    """
    pieces = list(pieces)
    body = b"".join(field(1, _piece(piece)) for piece in pieces)
    falls_back = any(piece.kind == BYTE for piece in pieces)
    trainer = number(3, BPE) + number(4, len(pieces)) + number(35, falls_back)
    unknown = next((i for i, piece in enumerate(pieces) if piece.kind == UNKNOWN), 0)
    trainer += number(40, unknown)
    rules = field(1, b"identity") + field(2, charsmap) if charsmap else field(1, b"identity")
    rules += number(3, add_space) + number(4, remove_spaces) + number(5, True)
    return body + field(2, trainer) + field(3, rules)


def _piece(piece: Piece) -> bytes:
    # Pieces that were not learnt have the score 0, by which the tokenizer tells them.
    score = 0.0 if piece.kind == USER_DEFINED else piece.score
    return field(1, piece.text.encode()) + varint(2 << 3 | FIXED32) + struct.pack("<f", score) + number(3, piece.kind)
