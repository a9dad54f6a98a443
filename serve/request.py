"""What is asked of the engine, and what has come back so far. No jax here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from serve.lookup import Lookup
from serve.pages import Key
from serve.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort"]

Bits = Any

TopTokens = list[tuple[int, float]]
"""The most likely tokens at one place with their log-probabilities, the most likely first."""


class Constraint(Protocol):
    """What may come next in a reply; such a request is read after each step before the next one is sent."""

    def allowed(self) -> Bits | None:
        """Bits of the tokens that may be drawn next, 32 to a word (`[W]`, uint32); None: all."""
        ...

    def take(self, token: int) -> None:
        """Goes on with the token that was drawn."""
        ...


@dataclass
class Completion:
    """One reply.

    tokens: with the stop token that ended it, if one did. logprobs: of each token, under the model's own
    distribution. top: of each token the alternatives, if they were asked for. prompt_tokens: length of the prompt.
    cached_tokens: those of them that had been read before. experts: of each token of prompt and reply but the last,
    where they are recorded: int16, `[T, L, C]`.
    """

    tokens: list[int]
    logprobs: list[float]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int = field(default=0, compare=False)
    top: list[TopTokens] = field(default_factory=list)
    experts: Any = field(default=None, compare=False)

    @property
    def content(self) -> list[int]:
        """The tokens without the one that ended the reply."""
        return self.tokens[:-1] if self.finish_reason == "stop" else self.tokens


@dataclass(eq=False)
class Request:
    """A prompt with everything resolved.

    stop_ids: tokens that end the reply. max_tokens: its longest. priority: lower goes first. adapter: see `Engine`; 0
    for none. on_token: called with each token as it is read. constraint: of what may come.
    """

    prompt: Sequence[int]
    sampling: SamplingParams
    stop_ids: tuple[int, ...]
    max_tokens: int
    priority: int = 0
    adapter: int = 0
    on_token: Callable[[Request, int, float], None] | None = None
    constraint: Constraint | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top: list[TopTokens] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cached_tokens: int = 0
    place: Place | None = None
    lookup: Lookup = field(default_factory=Lookup)
    experts: Any = None

    def take(self, token: int, logprob: float) -> None:
        """Adds a token, and notes the end if this is it."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.constraint is not None:
            self.constraint.take(token)
        if token in self.stop_ids and len(self.tokens) > self.sampling.min_tokens:
            self.finish_reason = "stop"
        elif len(self.tokens) >= self.max_tokens:
            self.finish_reason = "length"

    @property
    def salt(self) -> bytes:
        """What else its keys and values depend on, beside its tokens."""
        return b"adapter %d" % self.adapter if self.adapter else b""

    @property
    def known(self) -> list[int]:
        """All tokens so far."""
        return [*self.prompt, *self.tokens]

    @property
    def completion(self) -> Completion:
        """The reply, once it has ended."""
        assert self.finish_reason is not None
        about = self.finish_reason, len(self.prompt), self.cached_tokens, self.top, self.experts
        return Completion(self.tokens, self.logprobs, *about)


@dataclass(eq=False)
class Place:
    """Where a running request stands; all of it is what was sent to the device, not what has come back.

    slot: its row of what is kept for each request. pages: of its row, in order. target: tokens to be read before the
    next one is sampled. length: positions filled. sampled: tokens generated. keys: of its full pages.
    """

    slot: int
    target: int
    sampled: int
    pages: list[int] = field(default_factory=list)
    keys: list[Key] = field(default_factory=list)
    length: int = 0
    started: bool = False

    @property
    def reading(self) -> bool:
        """Whether some of the prompt has not been read yet."""
        return self.length < self.target
