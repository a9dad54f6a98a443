"""The order of data as arithmetic: permutations and mixtures that answer for any position without remembering one.

Own arithmetic, so that a run is the same under every version of the libraries, has no limit of 2^32 rows, and epoch 1
of seed 0 is not epoch 0 of seed 1.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

import numpy as np

_SMALL = 1024  # up to here permutations are sorted hashes: exactly uniform, and cheaper than cycle walking
_ROUNDS = 6


def derive(*parts: int | str) -> int:
    """A 64-bit key from numbers and words; other parts give an unrelated key."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def mix(x: np.ndarray) -> np.ndarray:
    """A fixed pseudo-random bijection of uint64 (splitmix64)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(i: np.ndarray, n: int, key: int) -> np.ndarray:
    """Where positions `i` (integers in [0, n)) go under permutation `key` of n; int64 of the shape of `i`.

    A Feistel network over the next power of four, walked until it lands below n: any position in O(1), no table.
    """
    if n <= _SMALL:
        return _sorted_hashes(n, key)[np.asarray(i, np.int64)]
    half = np.uint64((max((n - 1).bit_length(), 2) + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = mix(np.arange(_ROUNDS, dtype=np.uint64) + np.uint64(key))
    x = np.array(i, np.uint64)
    todo = np.ones(x.shape, bool)
    while todo.any():
        left, right = x[todo] >> half, x[todo] & mask
        for round_key in keys:
            left, right = right, left ^ (mix(right ^ round_key) & mask)
        x[todo] = (left << half) | right
        todo = x >= np.uint64(n)
    return x.astype(np.int64)


@functools.lru_cache(64)
def _sorted_hashes(n: int, key: int) -> np.ndarray:
    return np.argsort(mix(mix(np.arange(n, dtype=np.uint64)) + np.uint64(key)), kind="stable")


def shares(weights: Sequence[float]) -> list[int]:
    """Whole-number proportions (of about a million) for weights; a positive weight never rounds to nothing."""
    total = sum(weights)
    return [max(1, round(weight / total * (1 << 20))) if weight > 0 else 0 for weight in weights]


def interleave(k: np.ndarray, proportions: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Which source stands at positions `k` (int64, below 2^42) of the mixture, and its how-manieth item that is.

    Every source comes evenly: after any number of positions each has had its share to within the number of sources.
    """
    chosen = np.full(k.shape, -1, np.int64)
    item = np.zeros(k.shape, np.int64)
    before, after = k.astype(np.int64), k.astype(np.int64) + 1  # items left for the remaining sources
    remaining = sum(proportions)
    for source, share in enumerate(proportions):
        if not share:
            continue
        rest = remaining - share
        next_before, next_after = before * rest // remaining, after * rest // remaining
        taken = (before - next_before != after - next_after) & (chosen < 0)
        chosen[taken], item[taken] = source, (before - next_before)[taken]
        before, after, remaining = next_before, next_after, rest
    return chosen, item
