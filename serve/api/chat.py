"""POST /v1/chat/completions."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from typing import Any
from uuid import uuid4

from errors import UserError, did_you_mean
from serve.api.errors import ApiError
from serve.api.replies import Choice, Collector, usage
from serve.api.runner import Listener
from serve.api.schemas import ChatBody, StructuredOutputs
from serve.api.service import Service
from serve.parsing import END_THINK, THINK, Piece, ReplyParser
from serve.request import Constraint

ANY_OBJECT = {"type": "object"}
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


def chosen_functions(body: ChatBody, functions: Sequence[dict[str, Any]]) -> list[dict[str, Any]] | None:
    """The functions of which one must be called; None where the model decides."""
    choice = body.tool_choice
    if choice in (None, "auto", "none"):
        return None
    if not functions:
        raise ApiError(400, "tool_choice asks for a call, but there are no tools", param="tool_choice")
    if choice == "required":
        return list(functions)
    named = choice.get("function") if isinstance(choice, dict) else None
    name = named.get("name") if isinstance(named, dict) else None
    found = [function for function in functions if function["name"] == name]
    if not found:
        hint = did_you_mean(str(name), [function["name"] for function in functions])
        raise ApiError(400, f"tool_choice names {name!r}, which is none of the tools{hint}", param="tool_choice")
    return found


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


class Chat:
    """The replies to one body, not started yet; make it with `make`."""

    def __init__(self, service: Service, body: ChatBody, prompt: list[int], functions: list[dict[str, Any]]):
        self.service, self.body, self.prompt = service, body, prompt
        self.id, self.created = f"chatcmpl-{uuid4().hex}", int(time.time())
        self._called = body.tool_choice if body.tool_choice != "none" else None
        self.tools = body.tools or [] if body.tool_choice != "none" else []
        end = service.tokenizer.token_id(END_THINK)
        marks = [token for token in prompt if token in (service.tokenizer.token_id(THINK), end)]
        self.thinks = end is not None
        self._within = self.thinks and bool(marks) and marks[-1] != end
        top = body.top_logprobs if body.logprobs else None
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs to be true", param="top_logprobs", code="invalid_value")
        limit = body.max_completion_tokens or body.max_tokens
        params = service.sampling(body, limit, top)
        self.forced = chosen_functions(body, functions)
        self.requests = [
            service.request(prompt, one, self._constraint(), body.priority) for one in params.variants(body.n or 1)
        ]
        asked = (top or 0) if body.logprobs else None
        self.choices = [
            Choice(index, service.text(prompt, body, context=False), service.tokenizer, asked)
            for index in range(len(self.requests))
        ]
        self.parsers = [
            ReplyParser(thinking=self._within, thoughts=self.thinks, tools=self.tools) for _ in self.requests
        ]
        self._calls = [0] * len(self.requests)

    def _constraint(self) -> Constraint | None:
        """What each reply must look like."""
        body, wanted = self.body, self.body.structured_outputs
        format_ = body.response_format
        if format_ is not None and format_.type != "text":
            if wanted is not None:
                raise ApiError(
                    400, "response_format and structured_outputs exclude each other", param="response_format"
                )
            schema: dict[str, Any] = ANY_OBJECT
            if format_.type == "json_schema":
                if format_.json_schema is None or format_.json_schema.schema_ is None:
                    raise ApiError(400, "response_format.json_schema.schema is missing", param="response_format")
                schema = format_.json_schema.schema_
            wanted = StructuredOutputs(json=schema)
        after = self.service.constraint(wanted)
        if self.forced is not None:
            if wanted is not None:
                raise ApiError(400, "tool_choice and response_format exclude each other", param="tool_choice")
            try:
                after = self.service.grammars.calls(self.forced, parallel=body.parallel_tool_calls is not False)
            except UserError as error:
                raise ApiError(400, str(error), param="tools", code="invalid_value") from error
        if self._closed or not wants_thinking(body):
            return after
        return self.service.after_thought(after, body.thinking_budget, within=self._within)

    @property
    def _closed(self) -> bool:
        """Whether the prompt ends with a thought that is over: an empty one, or one in what is continued."""
        end = self.service.tokenizer.token_id(END_THINK)
        last = [token for token in self.prompt[-8:] if token == end]
        return bool(last)

    def start(self) -> Listener:
        """Sends the requests to the engine."""
        return self.service.runner.submit(self.requests)

    def response(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A response, or a piece of one."""
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.service.name}
        return {**head, "choices": choices, **more}

    def usage(self) -> dict[str, Any]:
        """Tokens read and generated."""
        return usage(len(self.prompt), self.requests[:1], self.requests)

    def finish_reason(self, choice: Choice) -> str | None:
        """How a reply ended: with calls, unless one function was asked for by name."""
        if choice.finished == "stop" and self._calls[choice.index] and not isinstance(self._called, dict):
            return "tool_calls"
        return choice.finished

    def parse(self, choice: Choice, text: str) -> list[Piece]:
        """What some more text of a reply says."""
        parser = self.parsers[choice.index]
        found = parser.push(text)
        if choice.finished:
            found += parser.finish()
        if self.body.parallel_tool_calls is False:
            found = [piece for piece in found if piece.kind != "call" or self._first(choice)]
        else:
            self._calls[choice.index] += sum(piece.kind == "call" for piece in found)
        return found

    def _first(self, choice: Choice) -> bool:
        self._calls[choice.index] += 1
        return self._calls[choice.index] == 1

    async def whole(self) -> dict[str, Any]:
        """The response at once."""
        await Collector(self.service, self.start(), self.choices).run()
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
        async for choice, text in Collector(self.service, self.start(), self.choices).pieces():
            for piece in self.parse(choice, text):
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
    functions = functions_of(body)
    messages, beginning = continued(body)
    thinking = wants_thinking(body) and beginning is None
    tools = body.tools if body.tool_choice != "none" else None
    prompt = await service.encode_chat(messages, tools=tools, add_generation_prompt=True, enable_thinking=thinking)
    if beginning is not None:
        prompt += service.tokenizer.encode(beginning)
    return Chat(service, body, prompt, functions)
