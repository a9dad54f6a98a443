"""How much better than expected each reply was: pure functions of rewards. No jax here."""

from __future__ import annotations

import numpy as np

from configs.alignment import RLConfig

SMALL = 1e-6
"""Added to deviations, so that equal rewards give no advantage and not a division by zero."""


def advantages(rewards_GS: np.ndarray, there_GS: np.ndarray, config: RLConfig) -> np.ndarray:
    """The advantage of each reply, float32 `[G, S]`; 0 where there is none.

    Args:
        rewards_GS: of S replies to each of G prompts. there_GS: bool; replies without a reward count for nothing.

    The baseline is the mean of the group (GRPO, arXiv 2402.03300, section 4.1.2) or of the others in it (RLOO,
    2402.14740, equation 8). Deviations are of the whole group, with the divisor S, as in GRPO.
    """
    rewards = np.where(there_GS, rewards_GS, 0.0).astype(np.float64)
    count = there_GS.sum(axis=1, keepdims=True)
    total = rewards.sum(axis=1, keepdims=True)
    mean = total / np.maximum(count, 1)
    if config.baseline == "others":
        found = rewards - (total - rewards) / np.maximum(count - 1, 1)
    else:
        found = rewards - mean
    found = np.where(there_GS & (count > 1), found, 0.0)
    if config.normalize == "group":
        spread = np.sqrt(
            np.where(there_GS, np.square(rewards - mean), 0.0).sum(axis=1, keepdims=True) / np.maximum(count, 1)
        )
        found = found / (spread + SMALL)
    elif config.normalize == "batch":
        every = found[there_GS]
        if len(every):
            found = np.where(there_GS, (found - every.mean()) / (every.std() + SMALL), 0.0)
    return found.astype(np.float32)


def is_equal(rewards_S: np.ndarray) -> bool:
    """Whether a group teaches nothing: all of its replies are worth the same."""
    return bool(np.ptp(rewards_S) < SMALL) if len(rewards_S) else True
