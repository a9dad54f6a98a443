"""A reply that was drawn for learning, and what is known of it. No jax here."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class Sample:
    """One reply, of one or several turns.

    group: which of the step's prompts it answers. tokens: of prompt and reply. drawn: which of them the model has drawn
    (bool); the others were given: the prompt, and what tools said. logprobs: of the drawn ones (float32, else 0).
    experts: of all but the last token, int16 `[T, L, C]`, where they are recorded. reply: the text to be graded.
    cut: it reached its longest. old, reference: log-probabilities of all tokens by the trainer before the first update,
    and by the reference, where they are needed. reward, parts: what it is worth, and of what that is made.
    skipped: that is not known.
    """

    group: int
    prompt_tokens: int
    tokens: list[int]
    drawn: np.ndarray
    logprobs: np.ndarray
    experts: np.ndarray | None
    reply: str
    cut: bool
    calls: int = 0
    old: np.ndarray | None = None
    reference: np.ndarray | None = None
    reward: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    skipped: bool = False

    @property
    def length(self) -> int:
        """Tokens that the model has drawn."""
        return int(self.drawn.sum())
