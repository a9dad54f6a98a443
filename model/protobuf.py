"""Protocol buffers: as much of the wire format as a sentencepiece model needs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def varint(value: int) -> bytes:
    """A number in base 128, the lowest digit first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def number(place: int, value: int) -> bytes:
    """A field that holds a whole number."""
    return varint(place << 3) + varint(value)


def field(place: int, content: bytes) -> bytes:
    """A field that holds bytes, text or a message."""
    return varint(place << 3 | 2) + varint(len(content)) + content


def fields_of(data: bytes) -> Iterator[tuple[int, Any]]:
    """The fields of a message: number, and its value (int) or, of all other kinds, its bytes."""
    at = 0

    def read() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        tag = read()
        if tag & 7 == 0:
            yield tag >> 3, read()
            continue
        size = read() if tag & 7 == 2 else 8 if tag & 7 == 1 else 4
        yield tag >> 3, data[at : at + size]
        at += size
