"""/v1/messages: what Anthropic's clients speak."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from fastapi import FastAPI, Request
from starlette.responses import Response

from serve.api.dialogue import Dialogue, Params, Turn, chosen
from serve.api.errors import ApiError
from serve.api.message_blocks import BlockWriter, messages_of, tools_of
from serve.api.replies import Choice
from serve.api.schemas import CountBody, Drawing, MessagesBody, StructuredOutputs
from serve.api.sending import send
from serve.api.service import Service

if TYPE_CHECKING:
    from serve.api.app import Shared

MODES = {"auto": "auto", "any": "required", "tool": "named", "none": "none"}


def budget_of(body: CountBody) -> int | None:
    """How many tokens a thought may have at most."""
    if body.thinking is None or body.thinking.type != "enabled":
        if body.thinking is not None and body.thinking.budget_tokens is not None:
            words = "thinking.budget_tokens goes with thinking that is enabled"
            raise ApiError(400, words, param="thinking.budget_tokens")
        return None
    budget = body.thinking.budget_tokens
    if budget is None:
        raise ApiError(400, "thinking.budget_tokens is missing", param="thinking.budget_tokens")
    if isinstance(body, MessagesBody) and budget >= body.max_tokens:
        words = f"thinking.budget_tokens ({budget}) must be less than max_tokens ({body.max_tokens})"
        raise ApiError(400, words, param="thinking.budget_tokens")
    return budget


def turn_of(body: CountBody) -> Turn:
    """What a body asks of the model; ApiError for what makes no sense."""
    tools, choice = tools_of(body.tools or []), body.tool_choice
    mode = choice.type if choice is not None else "auto"
    if choice is not None and (choice.name is not None) != (mode == "tool"):
        raise ApiError(400, "tool_choice.name goes with the type tool, and with no other", param="tool_choice.name")
    functions = [tool["function"] for tool in tools]
    forced = chosen(functions, MODES[mode], choice.name if choice is not None else None)  # pyright: ignore[reportArgumentType]
    messages, beginning = messages_of(body.messages, body.system), None
    thinking = body.thinking is not None and body.thinking.type != "disabled"
    budget = budget_of(body)
    if messages[-1]["role"] == "assistant":
        if set(messages[-1]) != {"role", "content"} or thinking:
            words = "messages: the last one begins the reply, so it is text alone, and thinking is not enabled"
            raise ApiError(400, words, param="messages")
        beginning = messages.pop()["content"]
        if not messages:
            raise ApiError(400, "messages: somebody must speak before the assistant does", param="messages")
    form = body.output_config.format if body.output_config is not None else None
    drawing = body if isinstance(body, MessagesBody) else Drawing(model=body.model)
    return Turn(
        messages,
        drawing,
        max_tokens=body.max_tokens if isinstance(body, MessagesBody) else None,
        stops=(body.stop_sequences or ()) if isinstance(body, MessagesBody) else (),
        tools=[] if mode == "none" else tools,
        forced=forced,
        parallel=choice is None or not choice.disable_parallel_tool_use,
        wanted=None if form is None else StructuredOutputs(json=form.schema_),
        thinking=thinking,
        budget=budget,
        beginning=beginning,
        params=Params(wanted="output_config.format"),
    )


class Reply(Dialogue):
    """The message that answers one body, not written yet; make it with `make`."""

    named_events = True

    def __init__(self, service: Service, turn: Turn, prompt: list[int]):
        super().__init__(service, turn, prompt)
        self.id = f"msg_{uuid4().hex}"
        self._writer = BlockWriter()

    def message(self, choice: Choice) -> dict[str, Any]:
        """The message as it stands."""
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.service.name,
            "content": list(self._writer.blocks),
            **self._stop(choice),
            "usage": self.usage(),
        }

    def _stop(self, choice: Choice) -> dict[str, Any]:
        """How the message ended, if it has."""
        if choice.stopped_by is not None:
            reason = "stop_sequence"
        elif choice.finished == "length":
            reason = "max_tokens"
        else:
            reason = "tool_use" if self.calls[0] else "end_turn"
        return {"stop_reason": reason if choice.finished else None, "stop_sequence": choice.stopped_by}

    def usage(self) -> dict[str, Any]:
        """Tokens read, those apart that had been read before, and generated."""
        (request,) = self.requests
        return {
            "input_tokens": len(self.prompt) - request.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": request.cached_tokens,
            "output_tokens": len(request.tokens),
            "output_tokens_details": {"thinking_tokens": self.thought_tokens},
        }

    def failure(self, error: ApiError) -> dict[str, Any]:
        """The event that a stream ends with when something goes wrong."""
        return error.anthropic_body

    async def whole(self) -> dict[str, Any]:
        """The message at once."""
        (choice,) = self.choices
        async for event in self.stream():
            del event
        return self.message(choice)

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """The message as events; the first comes with the first token, when it is known what had been read before."""
        started = False
        async for choice, pieces in self.pieces():
            if not started:
                started = True
                first = {"content": [], "stop_reason": None, "stop_sequence": None}
                yield {"type": "message_start", "message": self.message(choice) | first}
            for event in self._writer.push(pieces):
                yield event
            if choice.finished:
                for event in self._end(choice):
                    yield event

    def _end(self, choice: Choice) -> Iterator[dict[str, Any]]:
        yield from self._writer.finish()
        yield {"type": "message_delta", "delta": self._stop(choice), "usage": self.usage()}
        yield {"type": "message_stop"}


async def make(service: Service, body: MessagesBody) -> Reply:
    """The answer to a body, not started yet. ApiError for one that cannot be given."""
    turn = turn_of(body)
    return Reply(service, turn, await turn.prompt(service))


def add_messages(app: FastAPI, shared: Shared) -> None:
    """The endpoints."""

    @app.post("/v1/messages")
    async def answer(request: Request, body: MessagesBody) -> Response:
        made = await make(shared.model(body.model), body)
        return await send(request, made, shared.settings.timeout, stream=bool(body.stream))

    @app.post("/v1/messages/count_tokens")
    async def count(body: CountBody) -> dict[str, Any]:
        return {"input_tokens": len(await turn_of(body).prompt(shared.model(body.model)))}
