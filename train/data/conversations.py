"""Rows as text or as conversations: OpenAI messages, ShareGPT and Alpaca become one form, or a reason why not."""

from __future__ import annotations

import json
from typing import Any

from errors import did_you_mean

Message = dict[str, Any]

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
SPEAKERS = {
    **ROLES,
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
}
"""Who speaks in a ShareGPT turn; `function_call` is an assistant's turn that only calls tools."""


class BadRowError(ValueError):
    """Why a row cannot be used, as half a sentence."""


def row_text(value: dict[str, Any]) -> str:
    """Text of a row of any kind: its `text`, or what the turns of its conversation say. Raises BadRowError."""
    if "text" in value:
        return document_text(value)
    messages, _ = conversation(value)
    return "\n".join(message["content"] for message in messages if message["content"])


def document_text(value: dict[str, Any]) -> str:
    """The `text` of a row for pretraining. Raises BadRowError."""
    if "text" not in value:
        raise BadRowError(f'no "text"; its fields are {_names(value)}')
    text = value["text"]
    if not isinstance(text, str):
        raise BadRowError(f'"text" is a {type(text).__name__}, not a string')
    _check_unicode(text)
    return text


def conversation(value: dict[str, Any]) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Messages (role, content, perhaps reasoning_content, tool_calls and weight) and tools of a row.

    Raises BadRowError.
    """
    if "messages" in value:
        messages = turns_of(value, "messages")
    elif "conversations" in value:
        messages = turns_of(value, "conversations")
    elif "instruction" in value and "output" in value:
        messages = _alpaca(value)
    else:
        raise BadRowError(
            f'no "messages", "conversations" or "instruction" with "output"; its fields are {_names(value)}'
        )
    messages = with_system(value, messages)
    if not any(message["role"] == "assistant" for message in messages):
        raise BadRowError("no turn of the assistant, so nothing to learn")
    check_said(messages)
    tools = tools_of(value)
    check_unicode(messages, tools)
    return messages, tools


def with_system(value: dict[str, Any], messages: list[Message]) -> list[Message]:
    """Messages that begin with the `system` of a row, where it has one and they have none."""
    system = value.get("system")
    if isinstance(system, str) and system and not (messages and messages[0]["role"] == "system"):
        return [{"role": "system", "content": system}, *messages]
    return messages


def check_said(messages: list[Message]) -> None:
    """Raises BadRowError for a turn of the assistant that says, thinks and calls nothing."""
    turns = [message for message in messages if message["role"] == "assistant"]
    for number, turn in enumerate(turns, 1):
        if not (turn["content"].strip() or turn.get("reasoning_content") or turn.get("tool_calls")):
            raise BadRowError(f"turn {number} of the assistant is empty")


def check_unicode(*values: Any) -> None:
    """Raises BadRowError for half a character in any string of `values`."""
    _check_unicode(json.dumps(values, ensure_ascii=False))


def _check_unicode(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise BadRowError(f"half a character (a lone surrogate) at character {error.start + 1}") from error


def _names(value: dict[str, Any]) -> str:
    return ", ".join(sorted(map(repr, value))[:8]) or "none"


def turns_of(value: dict[str, Any], name: str) -> list[Message]:
    """Messages of the list of turns under `name` in a row: OpenAI's, ShareGPT's, or (elsewhere) either.

    Raises BadRowError.
    """
    turns = value[name]
    if not isinstance(turns, list) or not turns:
        raise BadRowError(f'"{name}" is not a list of turns')
    read = {"messages": _openai, "conversations": _sharegpt}.get(name, one_turn)
    return [read(turn) for turn in turns]


def one_turn(turn: Any) -> Message:
    """A message of one turn in either form. Raises BadRowError."""
    return _sharegpt(turn) if isinstance(turn, dict) and "from" in turn else _openai(turn)


def _openai(turn: Any) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        raise BadRowError('a message without a "role"')
    if turn["role"] not in ROLES:
        raise BadRowError(f"unknown role {turn['role']!r}{did_you_mean(turn['role'], ROLES)}")
    message: Message = {"role": ROLES[turn["role"]], "content": ""}
    for name in ("reasoning_content", "tool_calls", "name", "tool_call_id"):
        if turn.get(name) is not None:
            message[name] = turn[name]
    if turn.get("weight") is not None:
        message["weight"] = _weight(turn)
    _check_calls(message.get("tool_calls", []))
    content = turn.get("content")
    if isinstance(content, list):
        for part in content:
            _add_part(message, part)
    elif isinstance(content, str):
        message["content"] = content
    elif content is not None or not (message.get("tool_calls") or message.get("reasoning_content")):
        raise BadRowError(f'"content" of the {turn["role"]} is a {type(content).__name__}, not a string')
    return message


def _weight(turn: dict[str, Any]) -> int:
    """OpenAI's word on whether a turn of the assistant is learned: 0 or 1."""
    weight = turn["weight"]
    if turn["role"] != "assistant":
        raise BadRowError(f'a "weight" on a turn of the {turn["role"]}; it goes on the assistant\'s alone')
    if isinstance(weight, bool) or weight not in (0, 1):
        raise BadRowError(f'"weight" is {weight!r}, neither 0 nor 1')
    return int(weight)


def _add_part(message: Message, part: Any) -> None:
    """One part of a content that is a list: text, reasoning, or a call of a tool."""
    kind = part.get("type") if isinstance(part, dict) else None
    text = (part.get("text") or part.get("value") or "") if isinstance(part, dict) else None
    if not isinstance(text, str):
        raise BadRowError(f"a part of a content that holds no text (type {kind!r})")
    if kind == "text":
        message["content"] += text
    elif kind in ("reasoning", "thinking"):
        message["reasoning_content"] = message.get("reasoning_content", "") + text
    elif kind == "tool_call":
        message.setdefault("tool_calls", []).extend(_calls(text))
    else:
        raise BadRowError(f"a part of a content of unknown type {kind!r}")


def _check_calls(calls: Any) -> None:
    if not isinstance(calls, list):
        raise BadRowError('"tool_calls" is not a list')
    for call in calls:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRowError("a tool call without a name")


def _sharegpt(turn: Any) -> Message:
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str) or not isinstance(turn.get("value"), str):
        raise BadRowError('a turn without "from" and "value" strings')
    speaker = turn["from"]
    if speaker not in SPEAKERS:
        raise BadRowError(f"unknown speaker {speaker!r}{did_you_mean(speaker, SPEAKERS)}")
    if speaker == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": _calls(turn["value"])}
    return {"role": SPEAKERS[speaker], "content": turn["value"]}


def _calls(text: str) -> list[dict[str, Any]]:
    """Tool calls in OpenAI's form, from JSON of one `{"name", "arguments"}` or a list of them."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRowError("a function call that is not JSON") from error
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise BadRowError('a function call without a "name"')
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]


def tools_of(value: dict[str, Any]) -> list[dict[str, Any]] | None:
    """Tools of a row in OpenAI's form, from a list or the JSON of one; bare functions are wrapped."""
    tools = value.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise BadRowError('"tools" is not JSON') from error
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRowError('"tools" is not a list of objects')
    return [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]


def _alpaca(value: dict[str, Any]) -> list[Message]:
    output = value["output"]
    if not isinstance(output, str):
        raise BadRowError(f'"output" is a {type(output).__name__}, not a string')
    return [instruction_of(value), {"role": "assistant", "content": output}]


def instruction_of(value: dict[str, Any]) -> Message:
    """The user's message of a row in Alpaca's form: `instruction`, and `input` on a line of its own."""
    given = value.get("input") or ""
    for name, text in (("instruction", value["instruction"]), ("input", given)):
        if not isinstance(text, str):
            raise BadRowError(f'"{name}" is a {type(text).__name__}, not a string')
    return {"role": "user", "content": f"{value['instruction']}\n{given}" if given else value["instruction"]}
