"""Items of /v1/responses: those that are given as a conversation, and what a model wrote as items and events."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal
from uuid import uuid4

from pydantic import Field

from serve.api.errors import ApiError, read
from serve.api.schemas import Body
from serve.parsing import Piece


class Part(Body):
    """Some text of a message, or of what a function returned."""

    type: Literal["input_text", "output_text"]
    text: str
    annotations: list[dict[str, Any]] = Field([], max_length=0)
    logprobs: list[dict[str, Any]] | None = None


class Item(Body):
    """What all items have in common."""

    id: str | None = None
    status: Literal["in_progress", "completed", "incomplete"] = "completed"


class MessageItem(Item):
    """What somebody said."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: str | list[Part]


class CallItem(Item):
    """A call of a function."""

    type: Literal["function_call"]
    call_id: str
    name: str = Field(min_length=1)
    arguments: str


class ResultItem(Item):
    """What a function returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | list[Part]


class ThoughtPart(Body):
    """Some text of a thought."""

    type: Literal["reasoning_text"]
    text: str


class ThoughtItem(Item):
    """A thought."""

    type: Literal["reasoning"]
    summary: list[dict[str, Any]] = Field([], max_length=0)
    content: list[ThoughtPart] = Field([])


ITEMS: dict[str, tuple[type[Item], str]] = {
    "message": (MessageItem, "msg"),
    "function_call": (CallItem, "fc"),
    "function_call_output": (ResultItem, "fco"),
    "reasoning": (ThoughtItem, "rs"),
}
"""By type: what it must look like, and how its id begins."""


class FunctionTool(Body):
    """A function that may be called."""

    type: Literal["function"]
    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


def new_id(kind: str) -> str:
    """An id that nobody can guess."""
    return f"{kind}_{uuid4().hex}"


def items_of(given: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The items of an input as they are kept: each with an id, and with its text in parts."""
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not given:
        raise ApiError(400, "input is empty; give at least one item", param="input", code="invalid_value")
    return [_item_of(item, f"input[{index}]") for index, item in enumerate(given)]


def _item_of(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    kind = given.get("type") or "message"
    if not isinstance(kind, str) or kind not in ITEMS:
        known = ", ".join(ITEMS)
        raise ApiError(400, f"{where}.type is {kind!r}; this server reads {known}", param=f"{where}.type")
    model, prefix = ITEMS[kind]
    item = read(model, given, where)
    found = item.model_dump(exclude_none=True)
    found["id"] = item.id or new_id(prefix)
    if isinstance(item, MessageItem):
        texts = [item.content] if isinstance(item.content, str) else [part.text for part in item.content]
        found["content"] = [text_part(text) if item.role == "assistant" else input_part(text) for text in texts]
    elif isinstance(item, ResultItem) and not isinstance(item.output, str):
        found["output"] = [input_part(part.text) for part in item.output]
    return found


def input_part(text: str) -> dict[str, Any]:
    """Text for the model."""
    return {"type": "input_text", "text": text}


def text_part(text: str, logprobs: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    """Text of the model."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs or []}


def thought_part(text: str) -> dict[str, Any]:
    """Text of a thought."""
    return {"type": "reasoning_text", "text": text}


def tools_of(given: Sequence[Mapping[str, Any]]) -> list[FunctionTool]:
    """The functions that may be called; ApiError for a tool that is none."""
    for index, tool in enumerate(given):
        if tool.get("type") != "function":
            raise ApiError(
                400,
                f"tools[{index}].type is {tool.get('type')!r}; this server has no tools of its own, only functions",
                param=f"tools[{index}].type",
                code="invalid_value",
            )
    return [read(FunctionTool, tool, f"tools[{index}]") for index, tool in enumerate(given)]


# ---- a conversation --------------------------------------------------------------------------------------------------
def messages_of(items: Sequence[Mapping[str, Any]], instructions: str | None) -> list[dict[str, Any]]:
    """The conversation that items are, in the form of /v1/chat/completions.

    Thoughts, words and calls that follow each other are one message of the assistant. Instructions, and what else is
    said to the model before anybody speaks, are one system message: few templates take two.
    """
    found: list[dict[str, Any]] = []
    called: set[str] = set()
    for item in items:
        kind = item["type"]
        if kind == "function_call_output":
            if item["call_id"] not in called:
                raise ApiError(400, f"no function_call has the call_id {item['call_id']!r}", param="input")
            found.append({"role": "tool", "tool_call_id": item["call_id"], "content": _text(item["output"])})
        elif kind == "message" and item["role"] != "assistant":
            role = "user" if item["role"] == "user" else "system"
            found.append({"role": role, "content": _text(item["content"])})
        else:
            called |= {item["call_id"]} if kind == "function_call" else set()
            _say(found, item)
    first = next((index for index, message in enumerate(found) if message["role"] != "system"), len(found))
    opening = [instructions] if instructions else []
    opening += [message["content"] for message in found[:first]]
    return ([{"role": "system", "content": "\n\n".join(opening)}] if opening else []) + found[first:]


def _text(parts: str | Sequence[Mapping[str, Any]]) -> str:
    return parts if isinstance(parts, str) else "".join(part["text"] for part in parts)


def _say(messages: list[dict[str, Any]], item: Mapping[str, Any]) -> None:
    """Adds what the assistant thought, said or called, to its last message where that can go on."""
    kind = item["type"]
    last = messages[-1] if messages and messages[-1]["role"] == "assistant" else None
    if last is not None and kind == "reasoning" and (last["content"] or last.get("tool_calls")):
        last = None
    if last is not None and kind == "message" and last["content"] and not last.get("tool_calls"):
        last = None
    if last is None:
        last = dict[str, Any](role="assistant", content="")
        messages.append(last)
    if kind == "reasoning":
        last["reasoning_content"] = last.get("reasoning_content", "") + _text(item["content"])
    elif kind == "message":
        last["content"] += _text(item["content"])
    else:
        function = {"name": item["name"], "arguments": item["arguments"]}
        last.setdefault("tool_calls", []).append({"id": item["call_id"], "type": "function", "function": function})


# ---- what the model wrote --------------------------------------------------------------------------------------------
class ItemWriter:
    """Pieces of a reply as items, and the events that tell of them; `items` are those so far, whole after `finish`."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self._open: Literal["thought", "words"] | None = None
        self._texts: list[str] = []  # of the item that is open
        self._logprobs: list[dict[str, Any]] = []  # of words that were not given out yet

    def push(self, pieces: Sequence[Piece], logprobs: Sequence[dict[str, Any]] = ()) -> Iterator[dict[str, Any]]:
        """The events of some more pieces; `logprobs` are of the tokens of words that came with them."""
        self._logprobs += logprobs
        for piece in pieces:
            if piece.kind == "call":
                yield from self._end("completed")
                self._logprobs = []  # of white space before the call
                yield from self._call(piece)
                continue
            if self._open != piece.kind:
                yield from self._end("completed")
                yield from self._begin(piece.kind)
            yield from self._say(piece.text)

    def finish(self, *, complete: bool) -> Iterator[dict[str, Any]]:
        """The last events. A reply that is complete says something, be it nothing."""
        if complete and not any(item["type"] != "reasoning" for item in self.items):
            yield from self._end("completed")
            yield from self._begin("words")
        yield from self._end("completed" if complete else "incomplete")

    def _event(self, kind: str, **more: Any) -> dict[str, Any]:
        return {"type": f"response.{kind}", "output_index": len(self.items) - 1, **more}

    def _within(self, kind: str, **more: Any) -> dict[str, Any]:
        return self._event(kind, item_id=self.items[-1]["id"], content_index=0, **more)

    def _added(self, item: dict[str, Any]) -> dict[str, Any]:
        self.items.append(item)
        return self._event("output_item.added", item=dict(item))

    def _begin(self, kind: Literal["thought", "words"]) -> Iterator[dict[str, Any]]:
        self._open, self._texts = kind, []
        if kind == "thought":
            item = {"type": "reasoning", "id": new_id("rs"), "summary": [], "content": [], "status": "in_progress"}
            make = thought_part
        else:
            item = {"type": "message", "id": new_id("msg"), "role": "assistant", "content": [], "status": "in_progress"}
            make = text_part
        yield self._added(item)
        yield self._within("content_part.added", part=make(""))
        item["content"] = [make("")]

    def _say(self, text: str) -> Iterator[dict[str, Any]]:
        self._texts.append(text)
        if self._open == "thought":
            yield self._within("reasoning_text.delta", delta=text)
        else:
            yield self._within("output_text.delta", delta=text, logprobs=self._take_logprobs())

    def _take_logprobs(self) -> list[dict[str, Any]]:
        fresh, self._logprobs = self._logprobs, []
        self.items[-1]["content"][0]["logprobs"] += fresh
        return fresh

    def _end(self, status: Literal["completed", "incomplete"]) -> Iterator[dict[str, Any]]:
        if self._open is None:
            return
        item = self.items[-1]
        (part,) = item["content"]
        part["text"] = "".join(self._texts)
        if self._open == "thought":
            yield self._within("reasoning_text.done", text=part["text"])
        else:
            self._take_logprobs()
            yield self._within("output_text.done", text=part["text"], logprobs=part["logprobs"])
        yield self._within("content_part.done", part=part)
        item["status"], self._open = status, None
        yield self._event("output_item.done", item=item)

    def _call(self, piece: Piece) -> Iterator[dict[str, Any]]:
        assert piece.call is not None
        name, arguments = piece.call.name, piece.call.arguments
        item = {"type": "function_call", "id": new_id("fc"), "call_id": new_id("call"), "name": name}
        item |= {"arguments": "", "status": "in_progress"}
        yield self._added(item)
        here = {"item_id": item["id"]}
        yield self._event("function_call_arguments.delta", **here, delta=arguments)
        yield self._event("function_call_arguments.done", **here, arguments=arguments)
        item |= {"arguments": arguments, "status": "completed"}
        yield self._event("output_item.done", item=item)
