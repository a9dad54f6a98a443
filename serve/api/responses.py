"""/v1/responses: what OpenAI's newer clients speak."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from fastapi import FastAPI, Query, Request
from starlette.responses import Response as HttpResponse

from serve.api.dialogue import ANY_OBJECT, Dialogue, Params, Turn, chosen
from serve.api.errors import ApiError, Json
from serve.api.replies import Choice
from serve.api.response_items import FunctionTool, ItemWriter, items_of, messages_of, new_id, tools_of
from serve.api.response_store import ResponseStore, Stored
from serve.api.schemas import ResponsesBody, StructuredOutputs
from serve.api.sending import send
from serve.api.service import Service
from serve.parsing import Piece

if TYPE_CHECKING:
    from serve.api.app import Shared


def wanted_of(body: ResponsesBody) -> StructuredOutputs | None:
    """What the words must look like."""
    format_ = body.text.format if body.text is not None else None
    if format_ is None or format_.type == "text":
        return None
    if format_.type == "json_object":
        return StructuredOutputs(json=ANY_OBJECT)
    for name, value in (("name", format_.name), ("schema", format_.schema_)):
        if value is None:
            raise ApiError(400, f"text.format.{name} is missing", param=f"text.format.{name}")
    return StructuredOutputs(json=format_.schema_)


def forced_functions(body: ResponsesBody, tools: Sequence[FunctionTool]) -> list[dict[str, Any]] | None:
    """The functions of which one must be called; None where the model decides."""
    functions = [{"name": tool.name, "parameters": tool.parameters or ANY_OBJECT} for tool in tools]
    choice = body.tool_choice
    if not isinstance(choice, dict):
        return chosen(functions, choice or "auto")
    if choice.get("type") != "function" or choice.keys() != {"type", "name"}:
        raise ApiError(
            400, 'tool_choice takes none, auto, required or {"type": "function", "name": ...}', param="tool_choice"
        )
    return chosen(functions, "named", choice.get("name"))


def format_of(body: ResponsesBody) -> dict[str, Any]:
    """What the words must look like, as the response says it again."""
    format_ = body.text.format if body.text is not None else None
    return {"type": "text"} if format_ is None else format_.model_dump(by_alias=True, exclude_none=True)


@dataclass(frozen=True)
class Asked:
    """A body with its parts read.

    items: the whole conversation. store: where the response is kept, if it is.
    """

    body: ResponsesBody
    items: list[dict[str, Any]]
    tools: list[FunctionTool]
    store: ResponseStore | None


def turn_of(asked: Asked) -> Turn:
    """What a body asks of the model."""
    body, tools = asked.body, asked.tools
    logprobs = "message.output_text.logprobs" in (body.include or [])
    if body.top_logprobs and not logprobs:
        raise ApiError(400, 'top_logprobs needs "message.output_text.logprobs" in include', param="top_logprobs")
    return Turn(
        messages_of(asked.items, body.instructions),
        body,
        max_tokens=body.max_output_tokens,
        logprobs=(body.top_logprobs or 0) if logprobs else None,
        tools=[] if body.tool_choice == "none" else [chat_tool(tool) for tool in tools],
        forced=forced_functions(body, tools),
        parallel=body.parallel_tool_calls is not False,
        wanted=wanted_of(body),
        thinking=body.reasoning is None or body.reasoning.effort not in ("none", "minimal"),
        budget=body.thinking_budget,
        params=Params(messages="input", wanted="text.format"),
    )


def chat_tool(tool: FunctionTool) -> dict[str, Any]:
    """A function as /v1/chat/completions has it."""
    named = {"name": tool.name, "description": tool.description, "parameters": tool.parameters or ANY_OBJECT}
    return {"type": "function", "function": {name: one for name, one in named.items() if one is not None}}


class Response(Dialogue):
    """The response to one body, not made yet; make it with `make`."""

    named_events = True

    def __init__(self, service: Service, turn: Turn, prompt: list[int], asked: Asked):
        super().__init__(service, turn, prompt)
        self.body, self._asked = asked.body, asked
        self.id, self.created = new_id("resp"), int(time.time())
        self._writer, self._kinds = ItemWriter(), self.marks()
        self._status, self._sent = "in_progress", 0

    def response(self, **more: Any) -> dict[str, Any]:
        """The response as it stands, with what was asked for and what was taken for what was left open."""
        body, ended = self.body, self._status in ("completed", "incomplete")
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": int(time.time()) if self._status == "completed" else None,
            "status": self._status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if self._status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.service.name,
            "output": list(self._writer.items),
            "parallel_tool_calls": self.turn.parallel,
            "previous_response_id": body.previous_response_id,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
            "service_tier": "default",
            "store": self._asked.store is not None,
            "temperature": self.sampling.temperature,
            "text": {"format": format_of(body), "verbosity": "medium"},
            "tool_choice": body.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in self._asked.tools],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": self.sampling.top_p,
            "truncation": "disabled",
            "usage": self.usage() if ended else None,
            "user": body.user,
            "safety_identifier": body.safety_identifier,
            "prompt_cache_key": body.prompt_cache_key,
            **more,
        }

    def usage(self) -> dict[str, Any]:
        """Tokens read and generated."""
        (request,) = self.requests
        return {
            "input_tokens": len(self.prompt),
            "input_tokens_details": {"cached_tokens": request.cached_tokens, "cache_write_tokens": 0},
            "output_tokens": len(request.tokens),
            "output_tokens_details": {"reasoning_tokens": self.thought_tokens},
            "total_tokens": len(self.prompt) + len(request.tokens),
        }

    def failure(self, error: ApiError) -> dict[str, Any]:
        """The event that a stream ends with when something goes wrong."""
        for _ in self._writer.finish(complete=False):
            pass
        self._status = "failed"
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        response = self.response(error={"code": code, "message": error.message})
        return self._numbered({"type": "response.failed", "response": response})

    def _numbered(self, event: dict[str, Any]) -> dict[str, Any]:
        self._sent += 1
        return {**event, "sequence_number": self._sent - 1}

    def _logprobs(self, choice: Choice) -> list[dict[str, Any]]:
        """Of the words that have come since the last call."""
        found = choice.chat_logprobs(fresh=True)
        entries = found["content"] if found is not None else []
        tokens = [token for token, _, _ in choice.tokens[len(choice.tokens) - len(entries) :]]
        return [entry for entry, token in zip(entries, tokens, strict=True) if self._kinds.kind(token) == "words"]

    def _write(self, choice: Choice, pieces: Sequence[Piece]) -> Iterator[dict[str, Any]]:
        """The events of some more of the reply; after the last of them the response is over."""
        yield from self._writer.push(pieces, self._logprobs(choice))
        if choice.finished:
            complete = choice.finished == "stop"
            yield from self._writer.finish(complete=complete)
            self._status = "completed" if complete else "incomplete"

    async def whole(self) -> dict[str, Any]:
        """The response at once."""
        async for choice, pieces in self.pieces():
            for _ in self._write(choice, pieces):
                pass
        return self._end()

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """The response as events."""
        for kind in ("created", "in_progress"):
            yield self._numbered({"type": f"response.{kind}", "response": self.response()})
        async for choice, pieces in self.pieces():
            for event in self._write(choice, pieces):
                yield self._numbered(event)
        response = self._end()
        yield self._numbered({"type": f"response.{self._status}", "response": response})

    def _end(self) -> dict[str, Any]:
        response = self.response()
        if self._asked.store is not None:
            self._asked.store.put(Stored(response, self._asked.items))
        return response


async def make(service: Service, body: ResponsesBody, store: ResponseStore) -> Response:
    """The response to a body, not made yet. ApiError for one that cannot be answered."""
    items = items_of(body.input)
    if body.previous_response_id is not None:
        past = store.get(body.previous_response_id, "previous_response_id")
        items = [*past.items, *past.response["output"], *items]
    asked = Asked(body, items, tools_of(body.tools or []), None if body.store is False else store)
    turn = turn_of(asked)
    return Response(service, turn, await turn.prompt(service), asked)


def add_responses(app: FastAPI, shared: Shared) -> None:
    """The endpoints."""

    @app.post("/v1/responses")
    async def respond(request: Request, body: ResponsesBody) -> HttpResponse:
        made = await make(shared.model(body.model), body, shared.responses)
        return await send(request, made, shared.settings.timeout, stream=bool(body.stream))

    @app.get("/v1/responses/{name}")
    async def past(name: str, stream: bool = False) -> HttpResponse:
        if stream:
            raise ApiError(400, "a past response comes whole; leave stream away", param="stream")
        return Json(shared.responses.get(name).response)

    @app.delete("/v1/responses/{name}")
    async def forget(name: str) -> dict[str, Any]:
        shared.responses.drop(name)
        return {"id": name, "object": "response", "deleted": True}

    @app.get("/v1/responses/{name}/input_items")
    async def read_from(
        name: str,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> HttpResponse:
        items = shared.responses.get(name).items
        items = items if order == "asc" else items[::-1]
        if after is not None:
            found = [index for index, item in enumerate(items) if item["id"] == after]
            if not found:
                raise ApiError(400, f"after names {after!r}, which is none of the items", param="after")
            items = items[found[0] + 1 :]
        page = items[:limit]
        ends = {"first_id": page[0]["id"] if page else "", "last_id": page[-1]["id"] if page else ""}
        return Json({"object": "list", "data": page, **ends, "has_more": len(items) > limit})
