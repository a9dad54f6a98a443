"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

from errors import did_you_mean
from serve.api.dialogue import ANY_OBJECT, Dialogue, Params, Turn, chosen
from serve.api.errors import ApiError
from serve.api.replies import Choice, usage
from serve.api.schemas import ChatBody, StructuredOutputs
from serve.api.service import Service
from serve.parsing import Piece

TEMPLATE_OPTIONS = ("enable_thinking",)


def wants_thinking(body: ChatBody) -> bool:
    """Whether the model may think, by any of the names that this has."""
    kwargs = body.chat_template_kwargs or {}
    unknown = next((name for name in kwargs if name not in TEMPLATE_OPTIONS), None)
    if unknown is not None:
        hint = did_you_mean(unknown, TEMPLATE_OPTIONS)
        raise ApiError(400, f"chat_template_kwargs has no {unknown!r}{hint}", param="chat_template_kwargs")
    if body.enable_thinking is not None:
        return body.enable_thinking
    if "enable_thinking" in kwargs:
        return bool(kwargs["enable_thinking"])
    return body.reasoning_effort not in ("none", "minimal")


def functions_of(body: ChatBody) -> list[dict[str, Any]]:
    """The functions that may be called; ApiError for a tool that is none."""
    found = []
    for index, tool in enumerate(body.tools or []):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            raise ApiError(400, f"tools[{index}] must be of type function, with a function", param="tools")
        if not isinstance(function.get("name"), str) or not function["name"]:
            raise ApiError(400, f"tools[{index}].function has no name", param="tools")
        if not isinstance(function.get("parameters", {}), dict):
            raise ApiError(400, f"tools[{index}].function.parameters must be a JSON schema", param="tools")
        found.append(function)
    return found


def forced_functions(body: ChatBody, functions: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The functions of which one must be called; None where the model decides."""
    choice = body.tool_choice
    if not isinstance(choice, dict):
        return chosen(functions, choice or "auto")
    named = choice.get("function")
    return chosen(functions, "named", named.get("name") if isinstance(named, dict) else None)


def continued(body: ChatBody) -> tuple[list[dict[str, Any]], str | None]:
    """The messages, and the beginning of the reply if the last one is that (`partial`, `continue_final_message`)."""
    messages = [
        {name: value for name, value in message.items() if name not in ("partial", "cache_control")}
        for message in body.messages
    ]
    last = body.messages[-1]
    if not (last.get("partial") or body.continue_final_message):
        return messages, None
    if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
        raise ApiError(400, "what is continued must be an assistant's message with text", param="messages")
    return messages[:-1], last["content"]


def wanted_of(body: ChatBody) -> tuple[StructuredOutputs | None, Params]:
    """What the words must look like, and which parameter says so."""
    format_ = body.response_format
    if format_ is None or format_.type == "text":
        return body.structured_outputs, Params()
    if body.structured_outputs is not None:
        raise ApiError(400, "response_format and structured_outputs exclude each other", param="response_format")
    schema: dict[str, Any] = ANY_OBJECT
    if format_.type == "json_schema":
        if format_.json_schema is None or format_.json_schema.schema_ is None:
            raise ApiError(400, "response_format.json_schema.schema is missing", param="response_format")
        schema = format_.json_schema.schema_
    return StructuredOutputs(json=schema), Params(wanted="response_format")


def turn_of(body: ChatBody) -> Turn:
    """What a body asks of the model; ApiError for what makes no sense."""
    functions = functions_of(body)
    messages, beginning = continued(body)
    if body.top_logprobs is not None and not body.logprobs:
        raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value")
    wanted, params = wanted_of(body)
    return Turn(
        messages,
        body,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        stops=body.stops,
        n=body.n or 1,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        tools=body.tools or [] if body.tool_choice != "none" else [],
        forced=forced_functions(body, functions),
        parallel=body.parallel_tool_calls is not False,
        wanted=wanted,
        thinking=wants_thinking(body),
        budget=body.thinking_budget,
        beginning=beginning,
        params=params,
    )


class Chat(Dialogue):
    """The replies to one body, as OpenAI's clients read them; make it with `make`."""

    def __init__(self, service: Service, turn: Turn, prompt: list[int], body: ChatBody):
        super().__init__(service, turn, prompt)
        self.body = body
        self.id, self.created = f"chatcmpl-{uuid4().hex}", int(time.time())

    def response(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A response, or a piece of one."""
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.service.name}
        return {**head, "choices": choices, **more}

    def usage(self) -> dict[str, Any]:
        """Tokens read and generated."""
        return usage(len(self.prompt), self.requests[:1], self.requests)

    def finish_reason(self, choice: Choice) -> str | None:
        """How a reply ended: with calls, unless one function was asked for by name."""
        if choice.finished == "stop" and self.calls[choice.index] and not isinstance(self.body.tool_choice, dict):
            return "tool_calls"
        return choice.finished

    async def whole(self) -> dict[str, Any]:
        """The response at once."""
        await self.collect()
        found = []
        for choice in self.choices:
            message = message_of(self.parse(choice, choice.written))
            found.append(
                {
                    "index": choice.index,
                    "message": message,
                    "logprobs": choice.chat_logprobs(),
                    "finish_reason": self.finish_reason(choice) or "stop",
                }
            )
        return self.response("chat.completion", found, usage=self.usage())

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """The response in pieces."""
        with_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        more: dict[str, Any] = {"usage": None} if with_usage else {}

        def chunk(choice: Choice, delta: dict[str, Any], finished: str | None = None) -> dict[str, Any]:
            logprobs = choice.chat_logprobs(fresh=True)
            logprobs = logprobs if logprobs and logprobs["content"] else None
            one = {"index": choice.index, "delta": delta, "logprobs": logprobs, "finish_reason": finished}
            return self.response("chat.completion.chunk", [one], **more)

        for choice in self.choices:
            yield chunk(choice, {"role": "assistant", "content": ""})
        called = [0] * len(self.choices)
        async for choice, pieces in self.pieces():
            for piece in pieces:
                delta = delta_of(piece, called[choice.index])
                called[choice.index] += piece.kind == "call"
                yield chunk(choice, delta)
            if choice.finished:
                yield chunk(choice, {}, self.finish_reason(choice))
        if with_usage:
            yield self.response("chat.completion.chunk", [], usage=self.usage())


def call_of(piece: Piece) -> dict[str, Any]:
    """A call as OpenAI has it."""
    assert piece.call is not None
    function = {"name": piece.call.name, "arguments": piece.call.arguments}
    return {"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": function}


def delta_of(piece: Piece, number: int) -> dict[str, Any]:
    """What a piece adds to the message."""
    if piece.kind == "call":
        return {"tool_calls": [{"index": number, **call_of(piece)}]}
    if piece.kind == "thought":  # both names are in use
        return {"reasoning_content": piece.text, "reasoning": piece.text}
    return {"content": piece.text}


def message_of(pieces: Sequence[Piece]) -> dict[str, Any]:
    """The whole message."""
    words = "".join(piece.text for piece in pieces if piece.kind == "words")
    thought = "".join(piece.text for piece in pieces if piece.kind == "thought")
    calls = [call_of(piece) for piece in pieces if piece.kind == "call"]
    message: dict[str, Any] = {"role": "assistant", "content": words if words or not calls else None, "refusal": None}
    if thought:
        message |= {"reasoning_content": thought, "reasoning": thought}
    if calls:
        message["tool_calls"] = calls
    return message


async def make(service: Service, body: ChatBody) -> Chat:
    """The replies to a body, not started yet. ApiError for one that cannot be answered."""
    turn = turn_of(body)
    return Chat(service, turn, await turn.prompt(service), body)
