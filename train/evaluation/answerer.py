"""Who is examined: a model in this process, or one at an endpoint. What both are asked, and what they answer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from errors import UserError
from train.tasks.likelihood import Continuation, Likelihood
from train.tasks.task import Message, Problem

Tell = Callable[[int], None]
"""Called with how many more have been done."""


@dataclass(frozen=True)
class Settings:
    """How replies are drawn.

    temperature: 0 takes the most likely token always. top_p: see `SamplingParams`. max_tokens: longest reply.
    samples: replies to each problem. seed: of the first. thinking: False asks for the answer without thinking first.
    system: what stands before a problem.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    max_tokens: int = 1024
    samples: int = 1
    seed: int = 0
    thinking: bool = True
    system: str = ""

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_tokens < 1:
            raise UserError(f"--samples {self.samples} and --max-tokens {self.max_tokens} must be 1 or more")
        if self.samples > 1 and self.temperature == 0:
            raise UserError(
                f"--samples {self.samples} at temperature 0 gives the same reply each time; set --temperature"
            )


class Ask(NamedTuple):
    """A problem, and the seed of the reply."""

    problem: Problem
    seed: int

    def messages(self, settings: Settings) -> list[Message]:
        """What is said to the model."""
        before = [{"role": "system", "content": settings.system}] if settings.system else []
        return [*before, *self.problem.prompt]


class Reply(NamedTuple):
    """What was said. cut: it came to no end. unfit: the prompt left no room for it. tokens: how long it is."""

    text: str
    cut: bool = False
    unfit: bool = False
    tokens: int = 0


class Answerer(Protocol):
    """Answers problems and weighs continuations."""

    name: str

    @property
    def fingerprint(self) -> str:
        """Of what decides its answers, so that those of another are not taken for its own."""
        ...

    def replies(self, asked: Sequence[Ask], settings: Settings) -> Iterator[tuple[int, Reply]]:
        """Replies as they come, each with the number of what was asked."""
        ...

    def likelihoods(self, asked: Sequence[Continuation], tell: Tell) -> list[Likelihood]:
        """What it says of each continuation."""
        ...
