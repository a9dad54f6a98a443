"""Blocks of /v1/messages: those that are given as a conversation, and what a model wrote as blocks and events."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal
from uuid import uuid4

from pydantic import Field

from serve.api.errors import ApiError, read
from serve.api.schemas import Body
from serve.parsing import Piece


class Block(Body):
    """What all blocks have in common. A mark for the cache changes nothing: all beginnings are kept."""

    cache_control: dict[str, Any] | None = None


class TextBlock(Block):
    """Some text."""

    type: Literal["text"]
    text: str
    citations: None = None


class ThinkingBlock(Block):
    """A thought. Its signature is not looked at: clients may put words into a model's mouth."""

    type: Literal["thinking"]
    thinking: str
    signature: str = ""


class ToolUseBlock(Block):
    """A call of a tool."""

    type: Literal["tool_use"]
    id: str
    name: str = Field(min_length=1)
    input: dict[str, Any]


class ToolResultBlock(Block):
    """What a tool returned."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[TextBlock] = ""
    is_error: bool = False


class Message(Body):
    """What somebody said."""

    role: Literal["user", "assistant", "system"]
    content: str | list[dict[str, Any]]


BLOCKS: dict[str, dict[str, type[Block]]] = {
    "user": {"text": TextBlock, "tool_result": ToolResultBlock},
    "assistant": {"text": TextBlock, "thinking": ThinkingBlock, "tool_use": ToolUseBlock},
    "system": {"text": TextBlock},
}
"""Who may say what."""


class Tool(Block):
    """A tool that may be called."""

    type: Literal["custom"] = "custom"
    name: str = Field(min_length=1)
    description: str | None = None
    input_schema: dict[str, Any]
    strict: bool | None = None


def tools_of(given: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tools in the form of /v1/chat/completions; ApiError for one that only Anthropic's servers have."""
    found = []
    for index, one in enumerate(given):
        kind = one.get("type")
        if kind not in (None, "custom"):
            words = f"tools[{index}].type is {kind!r}; this server has no tools of its own, give an input_schema"
            raise ApiError(400, words, param=f"tools[{index}].type")
        tool = read(Tool, one, f"tools[{index}]")
        function = {"name": tool.name, "parameters": tool.input_schema}
        if tool.description is not None:
            function["description"] = tool.description
        found.append({"type": "function", "function": function})
    return found


# ---- a conversation --------------------------------------------------------------------------------------------------
def messages_of(
    given: Sequence[Mapping[str, Any]], system: str | Sequence[Mapping[str, Any]] | None
) -> list[dict[str, Any]]:
    """The conversation in the form of /v1/chat/completions; the blocks of a system prompt are its paragraphs."""
    found: list[dict[str, Any]] = []
    if system:
        blocks = [system] if isinstance(system, str) else blocks_of(system, "system", "system")
        found.append({"role": "system", "content": "\n\n".join(map(text_of, blocks))})
    called: set[str] = set()
    for index, one in enumerate(given):
        where = f"messages[{index}]"
        message = read(Message, one, where)
        if isinstance(message.content, str):
            found.append({"role": message.role, "content": message.content})
            continue
        if not message.content:
            raise ApiError(400, f"{where}.content is empty; give at least one block", param=f"{where}.content")
        blocks = blocks_of(message.content, message.role, f"{where}.content")
        called |= {block.id for block in blocks if isinstance(block, ToolUseBlock)}
        for number, block in enumerate(blocks):
            if isinstance(block, ToolResultBlock) and block.tool_use_id not in called:
                at = f"{where}.content[{number}].tool_use_id"
                raise ApiError(400, f"{at}: no tool_use before has the id {block.tool_use_id!r}", param=at)
        found += said_by_assistant(blocks) if message.role == "assistant" else said_to_model(message.role, blocks)
    return found


def blocks_of(given: Sequence[Mapping[str, Any]], role: str, where: str) -> list[Block]:
    """The blocks of a message; ApiError for those that this role does not say, or that are no text."""
    found = []
    for index, block in enumerate(given):
        kind, known = block.get("type"), BLOCKS[role]
        at = f"{where}[{index}]"
        if not isinstance(kind, str) or kind not in known:
            words = f"{at}.type is {kind!r}; in {role} content this server reads {', '.join(known)}"
            raise ApiError(400, words, param=f"{at}.type")
        found.append(read(known[kind], block, at))
    return found


def text_of(block: str | Block) -> str:
    """The text of what is text."""
    return block if isinstance(block, str) else block.text if isinstance(block, TextBlock) else ""


def said_by_assistant(blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """One message: thoughts, words and calls."""
    message: dict[str, Any] = {"role": "assistant", "content": "".join(map(text_of, blocks))}
    thought = "".join(block.thinking for block in blocks if isinstance(block, ThinkingBlock))
    if thought:
        message["reasoning_content"] = thought
    calls = [block for block in blocks if isinstance(block, ToolUseBlock)]
    if calls:
        message["tool_calls"] = [
            {"id": one.id, "type": "function", "function": {"name": one.name, "arguments": one.input}} for one in calls
        ]
    return [message]


def said_to_model(role: str, blocks: Sequence[Block]) -> list[dict[str, Any]]:
    """Results of tools, each a message of its own, and what is said between them."""
    found: list[dict[str, Any]] = []
    fresh = True  # whether the next text begins a message
    for block in blocks:
        if isinstance(block, ToolResultBlock):
            content = block.content if isinstance(block.content, str) else "".join(map(text_of, block.content))
            # Templates know no results that are errors: the words say it.
            words = f"Error: {content}" if block.is_error else content
            found.append({"role": "tool", "tool_call_id": block.tool_use_id, "content": words})
            fresh = True
        elif fresh:
            found.append({"role": role, "content": text_of(block)})
            fresh = False
        else:
            found[-1]["content"] += text_of(block)
    return found


# ---- what the model wrote --------------------------------------------------------------------------------------------
def input_of(arguments: str) -> dict[str, Any]:
    """The arguments of a call as an object; what is none is kept in one."""
    try:
        found = json.loads(arguments, parse_constant=str)
    except (ValueError, RecursionError):
        found = arguments
    return found if isinstance(found, dict) else {"arguments": found}


class BlockWriter:
    """Pieces of a reply as blocks, and the events that tell of them; `blocks` are those so far, whole at the end."""

    def __init__(self) -> None:
        self.blocks: list[dict[str, Any]] = []
        self._open: Literal["thought", "words"] | None = None
        self._texts: list[str] = []  # of the block that is open

    def push(self, pieces: Sequence[Piece]) -> Iterator[dict[str, Any]]:
        """The events of some more pieces."""
        for piece in pieces:
            if piece.kind == "call":
                yield from self._end()
                yield from self._call(piece)
                continue
            if self._open != piece.kind:
                yield from self._end()
                self._open, self._texts = piece.kind, []
                thought = {"type": "thinking", "thinking": "", "signature": ""}
                yield self._begin(thought if piece.kind == "thought" else {"type": "text", "text": ""})
            name = "thinking" if piece.kind == "thought" else "text"
            self._texts.append(piece.text)
            yield self._delta({"type": f"{name}_delta", name: piece.text})

    def finish(self) -> Iterator[dict[str, Any]]:
        """The last events."""
        yield from self._end()

    def _begin(self, block: dict[str, Any]) -> dict[str, Any]:
        self.blocks.append(block)
        return {"type": "content_block_start", "index": len(self.blocks) - 1, "content_block": dict(block)}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": len(self.blocks) - 1, "delta": delta}

    def _end(self) -> Iterator[dict[str, Any]]:
        if self._open is None:
            return
        block = self.blocks[-1]
        block["thinking" if self._open == "thought" else "text"] = "".join(self._texts)
        if self._open == "thought":  # clients want one to send it back; it says which thought it is, not whose
            block["signature"] = hashlib.sha256(block["thinking"].encode("utf-8", "replace")).hexdigest()
            yield self._delta({"type": "signature_delta", "signature": block["signature"]})
        self._open = None
        yield {"type": "content_block_stop", "index": len(self.blocks) - 1}

    def _call(self, piece: Piece) -> Iterator[dict[str, Any]]:
        assert piece.call is not None
        given = input_of(piece.call.arguments)
        block = {"type": "tool_use", "id": f"toolu_{uuid4().hex}", "name": piece.call.name, "input": {}}
        yield self._begin(block)
        yield self._delta({"type": "input_json_delta", "partial_json": json.dumps(given)})
        block["input"] = given
        yield {"type": "content_block_stop", "index": len(self.blocks) - 1}
