"""What a request says of how its reply is drawn. No jax here."""

from __future__ import annotations

import math
import secrets
from dataclasses import dataclass, replace

from errors import UserError

MAX_SEED = 2**63

MAX_TOP_LOGPROBS = 20
"""Most alternatives that are given for a token, as OpenAI has it."""

MAX_STOP_IDS = 8
"""Most tokens of a request that end its reply."""


@dataclass(frozen=True)
class SamplingParams:
    """How one reply is drawn. First come bias and penalties, then filters: temperature, top-k, top-p, min-p."""

    temperature: float = 1.0
    """What log-probabilities are divided by; 0 takes the most likely token always."""
    top_k: int = 0
    """Keep the k most likely tokens, and any as likely as the last of them; 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest most likely tokens whose probabilities, after top-k, sum to at least this."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the most likely one."""
    seed: int | None = None
    """The same seed and prompt give the same reply; None draws a seed."""
    presence_penalty: float = 0.0
    """What is taken from the logit of each token that the reply has already."""
    frequency_penalty: float = 0.0
    """What is taken from the logit of a token for each time that the reply has it."""
    repetition_penalty: float = 1.0
    """What logits above 0 are divided by, and others multiplied with, of tokens that prompt or reply have
    (CTRL, arXiv 1909.05858, section 4.1)."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit)."""
    max_tokens: int = 256
    """The reply ends after this many tokens at the latest."""
    stop_ids: tuple[int, ...] | None = None
    """Tokens that end the reply; None takes the tokenizer's."""
    min_tokens: int = 0
    """Tokens before which none that ends the reply is drawn."""
    top_logprobs: int = 0
    """How many of the most likely tokens to give beside each one."""

    def __post_init__(self) -> None:
        def check(name: str, good: bool, range_: str) -> None:
            if not good:
                raise UserError(f"{name}={getattr(self, name)} is out of range; it must be {range_}")

        check("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "0 or more")
        check("top_k", self.top_k >= 0, "0 (no limit) or more")
        check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        check("seed", self.seed is None or 0 <= self.seed < MAX_SEED, f"between 0 and {MAX_SEED - 1}")
        check("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2")
        check("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2")
        check("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0")
        check("min_tokens", self.min_tokens >= 0, "0 or more")
        check("top_logprobs", 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS, f"between 0 and {MAX_TOP_LOGPROBS}")
        stops = self.stop_ids or ()
        check("stop_ids", len(stops) <= MAX_STOP_IDS, f"at most {MAX_STOP_IDS} tokens")
        check(
            "logit_bias",
            all(token >= 0 and -100 <= by <= 100 for token, by in self.logit_bias),
            "of tokens, by at most 100",
        )
        check("max_tokens", self.max_tokens >= 1, "1 or more")

    def variants(self, count: int) -> list[SamplingParams]:
        """`count` copies with seeds of their own, following this one's: for several replies to one prompt."""
        first = secrets.randbelow(MAX_SEED) if self.seed is None else self.seed
        return [replace(self, seed=(first + i) % MAX_SEED) for i in range(count)]

    @property
    def penalised(self) -> bool:
        """Whether what was said before changes what is drawn."""
        return bool(self.presence_penalty or self.frequency_penalty or self.repetition_penalty != 1)
