"""Conversations as text: checks messages, and renders a Jinja template so that no message can forge its structure.

A template joins structure ("<|im_start|>user") and words of strangers into one string, in which a message that says
"<|im_end|>" would look like structure. So before rendering, the first character of every possible control token ("<")
is exchanged, in all that strangers wrote, for a lone surrogate: a code point that no valid text holds. Whatever control
token is found in the rendered string was then written by the template; `unmark` gives the words back afterwards.
"""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from errors import UserError, did_you_mean
from model.tokenizer_backends import MARKUP

ROLES = ("system", "user", "assistant", "tool")
ASSISTANT_MARKUP = MARKUP[:4]
"""Control tokens that an assistant's own text may hold: its notation for thoughts and calls."""

FOREIGN_BASE = 0xD800
ASSISTANT_BASE = 0xD900
SPAN_OPEN, SPAN_CLOSE = "\udffe", "\udfff"
SURROGATE = re.compile("[\ud800-\udfff]")


def default_template() -> str:
    """The template of models that bring none: ChatML as Qwen3 reads it."""
    return Path(__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")


def clean(text: str) -> str:
    """`text` with lone surrogates, which no UTF-8 can hold, as U+FFFD."""
    return SURROGATE.sub("\ufffd", text)


# ---------------------------------------------------------------------------------------------------------------------
# Messages


def check_messages(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Copies of `messages` whose contents are plain strings; UserError naming the first malformed one.

    Contents given as a list of text parts are joined. An assistant that only calls tools may have no content.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise UserError(f"messages must be a list of objects with role and content, not {type(messages).__name__}")
    if not messages:
        raise UserError("messages is empty; give at least one object with role and content")
    return [_check_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def check_tools(tools: Sequence[Mapping[str, Any]] | None) -> list[Mapping[str, Any]] | None:
    """`tools` as a list, None when there are none; UserError naming the first that is not an object."""
    if not tools:
        return None
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise UserError(f"tools must be a list of JSON objects, not {type(tools).__name__}")
    for i, tool in enumerate(tools):
        if not isinstance(tool, Mapping):
            raise UserError(f"tools[{i}] must be a JSON object, not {type(tool).__name__}")
    return list(tools)


def _check_message(message: Any, where: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise UserError(f"{where} must be an object with role and content, not {type(message).__name__}")
    role = message.get("role")
    if role not in ROLES:
        hint = did_you_mean(role, ROLES) if isinstance(role, str) else ""
        raise UserError(f"{where} has role {role!r}; use one of {', '.join(ROLES)}{hint}")
    checked = dict(message)
    calls = message.get("tool_calls")
    if calls and role == "assistant":
        checked["tool_calls"] = _check_calls(calls, where)
    else:
        checked.pop("tool_calls", None)
    reasoning = message.get("reasoning_content")
    if reasoning is not None and not isinstance(reasoning, str):
        raise UserError(f"{where}.reasoning_content must be a string, not {type(reasoning).__name__}")
    optional = role == "assistant" and bool(calls or reasoning)
    checked["content"] = _check_content(message.get("content"), where, optional)
    return checked


def _check_content(content: Any, where: str, optional: bool) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        if optional:
            return ""
        raise UserError(f"{where} has no content; give a string")
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise UserError(f"{where}.content must be a string or a list of text parts, not {type(content).__name__}")
    texts: list[str] = []
    for j, part in enumerate(content):
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise UserError(f'{where}.content[{j}] is not {{"type": "text", "text": ...}}; only text can be read')
        texts.append(text)
    return "".join(texts)


def _check_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if isinstance(calls, str | bytes) or not isinstance(calls, Sequence):
        raise UserError(f"{where}.tool_calls must be a list, not {type(calls).__name__}")
    checked: list[dict[str, Any]] = []
    for j, call in enumerate(calls):
        function = (call.get("function") or call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}.tool_calls[{j}] needs a function with a name and arguments")
        arguments = function.get("arguments")
        if not isinstance(arguments, str | Mapping | None):
            kind = type(arguments).__name__
            raise UserError(f"{where}.tool_calls[{j}].arguments must be an object or JSON text, not {kind}")
        function = dict(function) | {"arguments": {} if arguments is None else arguments}
        checked.append(dict(call) | {"function": function} if "function" in call else function)
    return checked


# ---------------------------------------------------------------------------------------------------------------------
# Words of strangers


class Marked(str):
    """Text in which first characters of control tokens are exchanged by `table`.

    Templates look into contents (`'</think>' in content`, `content.split(...)`): what they look for is exchanged by the
    same table, so that they find what they would find in the original. The exchange is one character for one. (Names
    with an underscore are out of a template's reach.)
    """

    _table: dict[int, str]

    def _derive(self, value: Any) -> Any:
        """`value`, made from this text, as text of the same origin."""
        if type(value) is str:
            derived = Marked(value)
            derived._table = self._table
            return derived
        if isinstance(value, list | tuple):
            return type(value)(self._derive(item) for item in value)
        return value

    def _exchange(self, value: Any) -> Any:
        """What a template looks for, in the characters of this text."""
        if type(value) is str:
            return value.translate(self._table)
        return tuple(self._exchange(item) for item in value) if isinstance(value, tuple) else value

    def __str__(self) -> str:
        return self

    def __radd__(self, before: str) -> str:
        return self._derive(before + str.__str__(self))


def _looking_inside(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def call(self: Marked, *args: Any, **kwargs: Any) -> Any:
        exchanged = {key: self._exchange(value) for key, value in kwargs.items()}
        return self._derive(method(self, *map(self._exchange, args), **exchanged))

    return call


def _keeping_origin(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def call(self: Marked, *args: Any) -> Any:
        return self._derive(method(self, *args))

    return call


for _name in ("split", "rsplit", "partition", "rpartition", "strip", "lstrip", "rstrip", "startswith", "endswith"):
    setattr(Marked, _name, _looking_inside(_name))
for _name in ("find", "rfind", "index", "count", "replace", "removeprefix", "removesuffix", "__contains__"):
    setattr(Marked, _name, _looking_inside(_name))
for _name in ("__add__", "__getitem__", "__mul__", "splitlines"):
    setattr(Marked, _name, _keeping_origin(_name))


def _concat(parts: Iterable[str]) -> str:
    """What jinja joins the output of a template or macro with: the origin of its parts survives."""
    parts = list(parts)
    text = "".join(parts)
    return next((part._derive(text) for part in parts if isinstance(part, Marked)), text)


# ---------------------------------------------------------------------------------------------------------------------
# Rendering


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: a template's own word on what the assistant produces."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares it so)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_enclose"), [], [], body).set_lineno(line)

    def _enclose(self, caller: Callable[[], str]) -> str:
        return SPAN_OPEN + caller() + SPAN_CLOSE


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    concat = staticmethod(_concat)


def _environment() -> jinja2.Environment:
    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


class ChatTemplate:
    """A compiled template, run in a sandbox: it comes with a model, from strangers.

    `controls` are the control tokens that contents must not forge; `variables` (bos_token and the like) are given to
    the template as they are; `origin` names it in errors.
    """

    def __init__(self, source: str, controls: Collection[str], variables: Mapping[str, str], origin: str) -> None:
        self.origin = origin
        self._variables = dict(variables)
        firsts = sorted({control[0] for control in controls})
        self._foreign = {ord(first): chr(FOREIGN_BASE + i) for i, first in enumerate(firsts)}
        self._assistant = {ord(first): chr(ASSISTANT_BASE + i) for i, first in enumerate(firsts)}
        back = {ord(mark): chr(char) for table in (self._foreign, self._assistant) for char, mark in table.items()}
        self._unmark: dict[int, str | None] = {**back, ord(SPAN_OPEN): None, ord(SPAN_CLOSE): None}
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise UserError(f"the chat template of {origin} is not valid, line {error.lineno}: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        enable_thinking: bool = True,
    ) -> str:
        """The conversation as marked text: see `unmark`, and SPAN_OPEN/SPAN_CLOSE of generation tags.

        UserError for malformed messages and for whatever the template refuses.
        """
        checked, tools = check_messages(messages), check_tools(tools)
        try:
            text = self._template.render(
                **self._variables,
                messages=[self._mark_message(message) for message in checked],
                tools=self._mark(tools, self._foreign),
                documents=None,
                add_generation_prompt=add_generation_prompt,
                enable_thinking=enable_thinking,
            )
            return str.__str__(text)  # no `Marked`: from here on, what is looked for is structure
        except Exception as error:  # the template is a stranger's program: anything can come out of it
            raise UserError(f"the chat template of {self.origin} refused the conversation: {error}") from error

    def unmark(self, text: str) -> str:
        """Marked text as the words that were meant."""
        return text.translate(self._unmark)

    def pattern(self, control: str) -> str:
        """Regular expression of `control` in marked text where it is structure."""
        if control not in ASSISTANT_MARKUP:
            return re.escape(control)
        return f"(?:{re.escape(control[0])}|{self._assistant[ord(control[0])]}){re.escape(control[1:])}"

    def _mark_message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        own = ("content", "reasoning_content") if message["role"] == "assistant" else ()
        return {
            name: self._mark(value, self._assistant if name in own else self._foreign)
            for name, value in message.items()
        }

    def _mark(self, value: Any, table: dict[int, str]) -> Any:
        if isinstance(value, str):
            cleaned = clean(value)
            text = cleaned.translate(table)
            if text == cleaned:
                return text
            marked = Marked(text)
            marked._table = table
            return marked
        if isinstance(value, Mapping):
            return {self._mark(key, table): self._mark(item, table) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._mark(item, table) for item in value]
        return value
