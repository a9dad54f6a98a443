"""Rows of people's preferences: pairs of replies, and replies that are good or bad, in the forms that others use."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from train.data.conversations import (
    BadRowError,
    Message,
    check_said,
    check_unicode,
    instruction_of,
    one_turn,
    tools_of,
    turns_of,
    with_system,
)

LARGEST_MARGIN = 655.35
"""What fits in a store: hundredths in 16 bits."""
HH = "\n\nHuman:"
"""How a dialogue of Anthropic's HH begins."""
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True, slots=True)
class Pair:
    """Two replies to one prompt, as messages; `margin` is by how much the chosen one is better."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    margin: float
    tools: list[dict[str, Any]] | None


@dataclass(frozen=True, slots=True)
class Judged:
    """A reply to a prompt, as messages, and whether it was good."""

    prompt: list[Message]
    reply: list[Message]
    good: bool
    tools: list[dict[str, Any]] | None


def pair_of(value: dict[str, Any]) -> Pair | None:
    """The pair of a row; None for a vote or a tie, which has none. Raises BadRowError."""
    if "chosen" not in value and "rejected" not in value and (_is_vote(value) or "replies" in value):
        return None
    for name in ("chosen", "rejected"):
        if value.get(name) is None:
            raise BadRowError(f'no "{name}"; its fields are {", ".join(sorted(map(repr, value))[:8]) or "none"}')
    prompt = _prompt(value)
    chosen, rejected = (_reply(value, name) for name in ("chosen", "rejected"))
    # A prompt that is a string repeats their question, as in UltraFeedback; one of turns may go before them.
    repeats = isinstance(value.get("prompt"), str) or all(s[: len(prompt)] == prompt for s in (chosen, rejected))
    if _is_whole(chosen) and _is_whole(rejected) and repeats:
        prompt, chosen, rejected = _common_beginning(chosen, rejected)
    _check_reply(chosen, "chosen")
    _check_reply(rejected, "rejected")
    prompt, tools = _begun(value, prompt), tools_of(value)
    if chosen == rejected:
        raise BadRowError("chosen is equal to rejected")
    check_unicode(prompt, chosen, rejected, tools)
    return Pair(prompt, chosen, rejected, _margin(value.get("margin")), tools)


def judged_of(value: dict[str, Any]) -> Judged | None:
    """The reply of a row and whether it was good; None for a pair or a tie, of which neither is. Raises BadRowError."""
    name = "kto_tag" if "kto_tag" in value else "label"
    if name not in value and ("chosen" in value or "replies" in value):
        return None
    if not isinstance(value.get(name), bool):
        raise BadRowError(f'"{name}" is {value.get(name)!r}, neither true nor false')
    if "completion" in value:
        prompt, reply = _prompt(value), _reply(value, "completion")
    else:
        whole = _turns(value)
        if not whole:
            raise BadRowError('no "completion", "messages" or "conversations"')
        prompt, reply = whole[:-1], whole[-1:]
    _check_reply(reply, "completion")
    prompt, tools = _begun(value, prompt), tools_of(value)
    check_unicode(prompt, reply, tools)
    return Judged(prompt, reply, value[name], tools)


def _is_vote(value: dict[str, Any]) -> bool:
    return isinstance(value.get("label"), bool) or isinstance(value.get("kto_tag"), bool)


def _turns(value: dict[str, Any]) -> list[Message]:
    name = next((name for name in ("messages", "conversations") if name in value), None)
    return turns_of(value, name) if name else []


def _prompt(value: dict[str, Any]) -> list[Message]:
    """What a row gives as the beginning of both replies; empty when it gives none."""
    if value.get("prompt") is not None:
        given = value["prompt"]
        if not isinstance(given, str):
            return turns_of(value, "prompt")
        if not given.startswith(HH):
            return [{"role": "user", "content": given}]
        turns = _hh(given)
        return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} else turns
    return [instruction_of(value)] if "instruction" in value else _turns(value)


def _begun(value: dict[str, Any], prompt: list[Message]) -> list[Message]:
    """The prompt with the `system` of its row. Raises BadRowError where there is none."""
    if not prompt:
        raise BadRowError("no prompt: a reply to nothing")
    return with_system(value, prompt)


def _reply(row: dict[str, Any], name: str) -> list[Message]:
    """Messages of a reply: a string, one turn, a list of turns, or a dialogue in the form of Anthropic's HH."""
    value = row[name]
    if isinstance(value, str):
        if value.startswith(HH):
            return _hh(value)
        in_hh = isinstance(row.get("prompt"), str) and row["prompt"].startswith(HH)  # which ends with "Assistant:"
        return [{"role": "assistant", "content": value.strip() if in_hh else value}]
    if isinstance(value, list):
        return turns_of(row, name)
    if isinstance(value, dict):
        return [one_turn(value)]
    raise BadRowError(f'"{name}" is a {type(value).__name__}, neither text nor turns')


def _hh(text: str) -> list[Message]:
    """Turns of "\\n\\nHuman: ...\\n\\nAssistant: ..."."""
    _, *parts = _HH_TURN.split(text)
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[speaker], "content": said.strip()} for speaker, said in turns]


def _is_whole(reply: list[Message]) -> bool:
    """Whether it begins before any assistant's turn: a whole conversation, not the end of one."""
    return reply[0]["role"] in ("system", "user")


def _common_beginning(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Two conversations as what they begin with, and the rest of each."""
    if chosen == rejected:
        raise BadRowError("chosen is equal to rejected")
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = min(len(chosen), len(rejected)) if shared is None else shared
    if not shared:
        raise BadRowError("chosen and rejected have no beginning in common")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _check_reply(reply: list[Message], name: str) -> None:
    if not reply:
        raise BadRowError(f"{name} is no more than the beginning of the other")
    if reply[-1]["role"] != "assistant":
        raise BadRowError(f"{name} does not end with a turn of the assistant")
    try:
        check_said(reply)
    except BadRowError as error:
        raise BadRowError(f"{name}: {error}") from error


def _margin(value: Any) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise BadRowError(f'"margin" is {value!r}, not a number of 0 or more')
    if value > LARGEST_MARGIN:
        raise BadRowError(f'"margin" is {value!r}, and the largest is {LARGEST_MARGIN}')
    return float(value)
