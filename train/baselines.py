"""What a language model has to beat: a general compressor, and counting byte triples."""

from __future__ import annotations

import gzip

import numpy as np

PRIOR = 8.0
"""Weight of the shorter context's prediction, in counts (Dirichlet smoothing, MacKay and Peto 1995)."""


def gzip_bits_per_byte(text: bytes) -> float:
    """Bits per byte of `gzip -9` of `text`, header included."""
    return 8 * len(gzip.compress(text, compresslevel=9)) / len(text)


def trigram_bits_per_byte(training: bytes, text: bytes) -> float:
    """Bits per byte of `text` under a 3-gram model of the bytes of `training`.

    Each byte is predicted from the two before it; counts are smoothed towards the prediction from one byte,
    that towards the prediction from none, and that towards 1/256.
    """
    seen, asked = (np.frombuffer(data, np.uint8).astype(np.int64) for data in (training, text))
    probability = np.full(asked.size, 1 / 256)
    for order in range(3):
        probability = _refine(seen, asked, order, probability)
    return float(-np.log2(probability).mean())


def _refine(seen: np.ndarray, asked: np.ndarray, order: int, prior: np.ndarray) -> np.ndarray:
    """Probabilities of the bytes of `asked` given `order` bytes before each, from counts in `seen`."""

    def contexts(data: np.ndarray) -> np.ndarray:
        keys = np.zeros(data.size - order, np.int64)
        for back in range(order, 0, -1):
            keys = keys * 256 + data[order - back : data.size - back]
        return keys

    before, after = contexts(seen), contexts(asked)
    context_counts = np.bincount(before, minlength=256**order)
    joint_counts = np.bincount(before * 256 + seen[order:], minlength=256 ** (order + 1))
    joint = joint_counts[after * 256 + asked[order:]]
    refined = prior.copy()
    refined[order:] = (joint + PRIOR * prior[order:]) / (context_counts[after] + PRIOR)
    return refined
