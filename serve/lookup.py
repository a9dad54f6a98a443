"""Guesses of what comes next in a text: what followed the last time that the same few tokens came. No jax here."""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2
"""Tokens that have to come again for a guess; a longer match is the better one."""


class Lookup:
    """Where each few tokens of a text ended last."""

    def __init__(self) -> None:
        self._ends: dict[tuple[int, ...], int] = {}
        self._read = 0

    def guess(self, tokens: Sequence[int], count: int) -> list[int]:
        """Up to `count` tokens that may follow; `tokens` begins with those of the call before."""
        for end in range(max(self._read, SHORTEST), len(tokens)):  # the last few would find themselves
            for size in range(SHORTEST, min(LONGEST, end) + 1):
                self._ends[tuple(tokens[end - size : end])] = end
        self._read = len(tokens)
        for size in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            end = self._ends.get(tuple(tokens[-size:]))
            if end is not None:
                return list(tokens[end : end + count])
        return []
