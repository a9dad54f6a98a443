"""What a model wrote, taken apart: thoughts, words for the user, calls of tools. Never raises.

Text may come in any pieces: what is given out for them, put together, does not depend on where they were cut. Calls
come in the form of Hermes, which Qwen2.5 and Qwen3 write (`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`),
or that of Qwen3-Coder and later (`<tool_call><function=NAME><parameter=KEY>value</parameter></function></tool_call>`).
What looks like neither is words for the user.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from serve.text import unfinished

THINK, END_THINK, CALL, END_CALL = "<think>", "</think>", "<tool_call>", "</tool_call>"

FUNCTION = re.compile(r"<function=([^>\n]*)>(.*?)(?:</function>|\Z)", re.DOTALL)
PARAMETER = re.compile(r"<parameter=([^>\n]*)>\n?(.*?)(?:\n?</parameter>|(?=\n?<parameter=)|\Z)", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A call of a tool; arguments are JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True)
class Piece:
    """Some more of a reply."""

    kind: Literal["thought", "words", "call"]
    text: str = ""
    call: Call | None = None


class ReplyParser:
    """Takes a reply apart as it comes.

    Args:
        thinking: the prompt ended within a thought. tools: those that may be called; without any, calls are words.
        thoughts: whether the model marks thoughts; otherwise their marks are words.
    """

    def __init__(self, *, thinking: bool = False, thoughts: bool = True, tools: Sequence[Mapping[str, Any]] = ()):
        self._state: Literal["start", "thought", "words", "call"] = "thought" if thinking else "start"
        self._thoughts, self._held = thoughts, ""
        self._types = {name: types for name, types in map(parameter_types, tools) if name}
        self._calls = bool(tools)
        self._fresh = True  # nothing but white space since the last mark: it belongs to the mark

    def push(self, text: str) -> list[Piece]:
        """What is certain after some more text."""
        self._held += text
        found: list[Piece] = []
        while self._step(found):
            pass
        return joined(found)

    def finish(self) -> list[Piece]:
        """The rest, when no text follows."""
        found: list[Piece] = []
        while self._step(found):
            pass
        held, self._held = self._held, ""
        if self._state == "call":
            self._end_call(held, found, closed=False)
        elif held.strip() or not self._fresh:
            kind = "thought" if self._state == "thought" else "words"
            self._say(kind, held.rstrip() if kind == "thought" else held, found)
        return joined(found)

    def _step(self, found: list[Piece]) -> bool:
        """Takes what can be taken from what is held; False if more text is needed."""
        if self._state == "start":
            return self._begin()
        if self._state == "call":
            body, mark, rest = self._held.partition(END_CALL)
            if not mark:
                return False
            self._held, self._state = rest, "words"
            self._end_call(body, found, closed=True)
            return True
        if self._state == "thought":
            return self._until((END_THINK,), "thought", found)
        marks = ((CALL,) if self._calls else ()) + ((END_THINK,) if self._thoughts else ())
        return self._until(marks, "words", found)

    def _begin(self) -> bool:
        """Whether the reply begins with a thought; white space before it is part of its mark."""
        text = self._held.lstrip()
        if self._thoughts and text.startswith(THINK):
            self._held, self._state, self._fresh = text.removeprefix(THINK), "thought", True
            return True
        if not text or (self._thoughts and THINK.startswith(text)):
            return False
        self._state = "words"
        self._fresh = False
        return True

    def _until(self, marks: Sequence[str], kind: Literal["thought", "words"], found: list[Piece]) -> bool:
        """Gives out what stands before the first of these marks, and goes on behind it."""
        at, mark = min(((self._held.find(m), m) for m in marks if m in self._held), default=(-1, ""))
        if at < 0:
            # White space may be the space before a mark, which is part of the mark.
            keep = unfinished(self._held, marks)
            keep = len(self._held) - len(self._held[: len(self._held) - keep].rstrip()) if marks else keep
            self._say(kind, self._held[: len(self._held) - keep], found)
            self._held = self._held[len(self._held) - keep :]
            return False
        before, self._held = self._held[:at], self._held[at + len(mark) :]
        self._say(kind, before.rstrip(), found)
        self._fresh = True
        self._state = "call" if mark == CALL else "words"
        return True

    def _say(self, kind: Literal["thought", "words"], text: str, found: list[Piece]) -> None:
        if self._fresh:
            text = text.lstrip()
        if text:
            self._fresh = False
            found.append(Piece(kind, text))

    def _end_call(self, body: str, found: list[Piece], *, closed: bool) -> None:
        calls = parse_calls(body, self._types)
        if calls:
            found += [Piece("call", call=call) for call in calls]
            self._fresh = True
        else:  # it is no call: nothing of what was said is lost
            found.append(Piece("words", CALL + body + (END_CALL if closed else "")))
            self._fresh = False


def joined(pieces: Sequence[Piece]) -> list[Piece]:
    """Pieces with neighbours of one kind put together."""
    found: list[Piece] = []
    for piece in pieces:
        if found and piece.kind == found[-1].kind != "call":
            found[-1] = Piece(piece.kind, found[-1].text + piece.text)
        else:
            found.append(piece)
    return found


def parse_calls(body: str, types: Mapping[str, Mapping[str, str]]) -> list[Call]:
    """The calls between two marks; none if it is not in a form that is known."""
    text = body.strip()
    if text.startswith("<function="):
        return [
            Call(name.strip(), json.dumps(parameters(inner, types.get(name.strip(), {})), ensure_ascii=False))
            for name, inner in FUNCTION.findall(text)
            if name.strip()
        ]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if not isinstance(found, dict) or not isinstance(found.get("name"), str) or not found["name"]:
        return []
    arguments = found.get("arguments", found.get("parameters", {}))
    if isinstance(arguments, str):
        return [Call(found["name"], arguments)]
    return [Call(found["name"], json.dumps(arguments, ensure_ascii=False))]


def parameters(text: str, types: Mapping[str, str]) -> dict[str, Any]:
    """Parameters of a call in the form of Qwen3-Coder: text, or JSON where the tool says that it is another type."""
    found: dict[str, Any] = {}
    for key, value in PARAMETER.findall(text):
        kind = types.get(key.strip(), "string")
        found[key.strip()] = value if kind == "string" else as_json(value)
    return found


def as_json(text: str) -> Any:
    """What a JSON text says; the text itself where it is none. Python's spelling of constants is understood."""
    spelled = {"True": "true", "False": "false", "None": "null"}.get(text.strip(), text)
    try:
        return json.loads(spelled)
    except (ValueError, RecursionError):
        return text


def parameter_types(tool: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
    """A tool's name, and the types of its parameters as far as it names any."""
    function = tool.get("function", tool)
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        return "", {}
    schema = function.get("parameters")
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(properties, Mapping):
        return function["name"], {}
    kinds = {key: value.get("type") for key, value in properties.items() if isinstance(value, Mapping)}
    return function["name"], {key: kind if isinstance(kind, str) else "any" for key, kind in kinds.items()}
