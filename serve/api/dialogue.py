"""One turn of a conversation, whatever protocol asked for it: the prompt, what the reply must look like, its parts."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from errors import UserError, did_you_mean
from serve.api.errors import ApiError
from serve.api.replies import Choice, Collector
from serve.api.runner import Listener
from serve.api.schemas import Drawing, StructuredOutputs
from serve.api.service import Service
from serve.parsing import CALL, END_CALL, END_THINK, THINK, Piece, ReplyParser
from serve.request import Constraint
from serve.text import ReplyText

ANY_OBJECT = {"type": "object"}


@dataclass(frozen=True)
class Params:
    """What a protocol calls its parameters; errors name them."""

    messages: str = "messages"
    wanted: str = "structured_outputs"


@dataclass(frozen=True)
class Turn:
    """What is asked of the model.

    messages, tools: as /v1/chat/completions has them. drawing: the body, as far as it says how to draw. forced: the
    functions of which one must be called; None where the model decides. wanted: what the words must look like.
    budget: tokens of a thought. beginning: of the reply, which goes on from there. logprobs: alternatives beside each
    token; None: no log-probabilities at all.
    """

    messages: list[dict[str, Any]]
    drawing: Drawing
    max_tokens: int | None = None
    stops: Sequence[str] = ()
    n: int = 1
    logprobs: int | None = None
    tools: Sequence[dict[str, Any]] = ()
    forced: Sequence[dict[str, Any]] | None = None
    parallel: bool = True
    wanted: StructuredOutputs | None = None
    thinking: bool = True
    budget: int | None = None
    beginning: str | None = None
    params: Params = field(default_factory=Params)

    async def prompt(self, service: Service) -> list[int]:
        """The tokens that the model reads; ApiError 400 for a conversation that is malformed."""
        tokens = await service.encode_chat(
            self.messages,
            tools=list(self.tools) or None,
            add_generation_prompt=True,
            enable_thinking=self.thinking and self.beginning is None,
            param=self.params.messages,
        )
        return tokens + (service.tokenizer.encode(self.beginning) if self.beginning is not None else [])


def chosen(
    functions: Sequence[dict[str, Any]], mode: Literal["none", "auto", "required", "named"], name: Any = None
) -> list[dict[str, Any]] | None:
    """The functions of which one must be called; None where the model decides."""
    if mode in ("none", "auto"):
        return None
    if not functions:
        raise ApiError(400, "tool_choice asks for a call, but there are no tools", param="tool_choice")
    if mode == "required":
        return list(functions)
    found = [function for function in functions if function["name"] == name]
    if not found:
        hint = did_you_mean(str(name), [function["name"] for function in functions])
        raise ApiError(400, f"tool_choice names {name!r}, which is none of the tools{hint}", param="tool_choice")
    return found


class Marks:
    """Says of each token what it belongs to; a mark belongs to the thought or call that it begins or ends."""

    def __init__(self, service: Service, *, within: bool, calls: bool):
        self._tokenizer = service.tokenizer
        self._begin, self._end, self._call, self._over = (
            self._tokenizer.token_id(mark) for mark in (THINK, END_THINK, CALL, END_CALL)
        )
        self._calls = calls
        self._state: Literal["start", "thought", "words", "call"] = "thought" if within else "start"

    def kind(self, token: int) -> Literal["thought", "words", "call"]:
        """What the next token belongs to."""
        if self._state == "start":
            if token == self._begin:
                self._state = "thought"
            elif self._tokenizer.token_bytes(token).strip():
                self._state = "words"
        if self._state == "thought":
            self._state = "words" if token == self._end else "thought"
            return "thought"
        if self._state == "words" and self._calls and token == self._call:
            self._state = "call"
        if self._state == "call":
            self._state = "words" if token == self._over else "call"
            return "call"
        return "words"


class Dialogue:
    """The replies to one turn, not started yet. Each protocol says how they are written down.

    named_events: whether the events of a stream carry names, as those of protocols that need no `[DONE]` do.
    """

    named_events = False

    def __init__(self, service: Service, turn: Turn, prompt: list[int]):
        self.service, self.turn, self.prompt = service, turn, prompt
        tokenizer = service.tokenizer
        end = tokenizer.token_id(END_THINK)
        marks = [token for token in prompt if token in (tokenizer.token_id(THINK), end)]
        self.thinks = end is not None
        self.within = self.thinks and bool(marks) and marks[-1] != end
        self.sampling = service.sampling(turn.drawing, turn.max_tokens, turn.logprobs)
        self.requests = [
            service.request(prompt, one, self._constraint(), turn.drawing.priority)
            for one in self.sampling.variants(turn.n)
        ]
        self.choices = [
            Choice(index, ReplyText(tokenizer, (), turn.stops), tokenizer, turn.logprobs)
            for index in range(len(self.requests))
        ]
        self._parsers = [
            ReplyParser(thinking=self.within, thoughts=self.thinks, tools=turn.tools) for _ in self.requests
        ]
        self.calls = [0] * len(self.requests)

    def _constraint(self) -> Constraint | None:
        """What each reply must look like."""
        turn = self.turn
        after = self.service.constraint(turn.wanted, turn.params.wanted)
        if turn.forced is not None:
            if turn.wanted is not None:
                raise ApiError(400, f"tool_choice and {turn.params.wanted} exclude each other", param="tool_choice")
            try:
                after = self.service.grammars.calls(turn.forced, parallel=turn.parallel)
            except UserError as error:
                raise ApiError(400, str(error), param="tools", code="invalid_value") from error
        if self._closed or not turn.thinking:
            return after
        return self.service.after_thought(after, turn.budget, within=self.within)

    @property
    def _closed(self) -> bool:
        """Whether the prompt ends with a thought that is over: an empty one, or one in what is continued."""
        end = self.service.tokenizer.token_id(END_THINK)
        return end is not None and end in self.prompt[-8:]

    def marks(self) -> Marks:
        """For the tokens of one of the replies."""
        return Marks(self.service, within=self.within, calls=bool(self.turn.tools))

    @property
    def thought_tokens(self) -> int:
        """Tokens of thoughts, in all replies."""
        return sum(
            marks.kind(token) == "thought"
            for marks, choice in ((self.marks(), choice) for choice in self.choices)
            for token, _, _ in choice.tokens
        )

    def start(self) -> Listener:
        """Sends the requests to the engine."""
        return self.service.runner.submit(self.requests)

    def failure(self, error: ApiError) -> dict[str, Any]:
        """What a stream ends with when something goes wrong."""
        return error.body

    async def collect(self) -> None:
        """Waits for all replies."""
        await Collector(self.service, self.start(), self.choices).run()

    async def pieces(self) -> AsyncIterator[tuple[Choice, list[Piece]]]:
        """Each choice with what has become certain of it."""
        async for choice, text in Collector(self.service, self.start(), self.choices).pieces():
            yield choice, self.parse(choice, text)

    def parse(self, choice: Choice, text: str) -> list[Piece]:
        """What some more text of a reply says; of several calls the first, where one is all that is wanted."""
        parser = self._parsers[choice.index]
        found = []
        for piece in parser.push(text) + (parser.finish() if choice.finished else []):
            if piece.kind == "call":
                self.calls[choice.index] += 1
                if not self.turn.parallel and self.calls[choice.index] > 1:
                    continue
            found.append(piece)
        return found
