"""Law: what is given out for a reply, put together, does not depend on where its text was cut; nothing raises."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from model.tokenizer import Tokenizer
from serve.parsing import Call, Piece, ReplyParser, joined
from serve.text import ReplyText

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "days": {"type": "integer"}, "fine": {"type": "boolean"}},
            },
        },
    }
]


def parse(pieces: Sequence[str], *, thinking: bool = False, thoughts: bool = True, tools: bool = True) -> list[Piece]:
    parser = ReplyParser(thinking=thinking, thoughts=thoughts, tools=TOOLS if tools else ())
    found = [piece for text in pieces for piece in parser.push(text)]
    return joined([*found, *parser.finish()])


def thought(text: str) -> Piece:
    return Piece("thought", text)


def words(text: str) -> Piece:
    return Piece("words", text)


def call(name: str, **arguments: object) -> Piece:
    return Piece("call", call=Call(name, json.dumps(arguments)))


HERMES = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
CODER = (
    "<tool_call>\n<function=weather>\n<parameter=city>\nRome\nand\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
    "<parameter=fine>\nTrue\n</parameter>\n</function>\n</tool_call>"
)
REPLIES = [
    ("Hello there", [words("Hello there")]),
    ("", []),
    (" \n", []),
    ("<think>\nLet me see.\n</think>\n\nYes.", [thought("Let me see."), words("Yes.")]),
    ("<think>\n\n</think>\n\nYes.", [words("Yes.")]),
    ("<think>for ever", [thought("for ever")]),
    ("Hello <think> there", [words("Hello <think> there")]),
    (HERMES, [call("weather", city="Rome")]),
    (f"I look.\n{HERMES}\n{HERMES}", [words("I look."), *[call("weather", city="Rome")] * 2]),
    (f"<think>so</think>{CODER}", [thought("so"), call("weather", city="Rome\nand", days=3, fine=True)]),
    (f"<think>I may call {HERMES}</think>No.", [thought(f"I may call {HERMES}"), words("No.")]),
    (HERMES.removesuffix("</tool_call>"), [call("weather", city="Rome")]),
    ("<tool_call>{not json}</tool_call> so", [words("<tool_call>{not json}</tool_call> so")]),
    ("<tool_call>\n<function=weather>\n<parameter=city>\nRome", [call("weather", city="Rome")]),
    ("a < b, a <t b, </tool_call> <", [words("a < b, a <t b, </tool_call> <")]),
    ('<tool_call>{"name": "x", "arguments": "raw"}</tool_call>', [Piece("call", call=Call("x", "raw"))]),
]


@pytest.mark.parametrize(("text", "expected"), REPLIES)
def test_replies_are_taken_apart(text: str, expected: list[Piece]) -> None:
    assert parse([text]) == expected


@pytest.mark.parametrize(("text", "expected"), REPLIES)
def test_every_cut_gives_the_same(text: str, expected: list[Piece]) -> None:
    assert parse(list(text)) == expected
    for at in range(len(text)):
        assert parse([text[:at], text[at:]]) == expected


def test_a_prompt_may_have_begun_the_thought() -> None:
    assert parse(["so\n</think>\n\nYes"], thinking=True) == [thought("so"), words("Yes")]


def test_marks_are_words_where_nothing_is_marked() -> None:
    assert parse([HERMES], tools=False) == [words(HERMES)]
    assert parse(["<think>x</think>"], thoughts=False) == [words("<think>x</think>")]


FRAGMENTS = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "</tool_call>", "<function=weather>", "</function>", "<parameter=city>",
     "</parameter>", '{"name": "weather", "arguments": {"city": 1}}', "{", "}", '"', "\n", " ", "<", ">", "x", "é"]
)  # fmt: skip


@given(st.lists(FRAGMENTS, max_size=12), st.lists(st.integers(0, 200), max_size=6), st.booleans())
@settings(max_examples=400, deadline=None)
def test_whatever_is_written(fragments: list[str], cuts: list[int], thinking: bool) -> None:
    text = "".join(fragments)
    places = sorted({min(cut, len(text)) for cut in cuts})
    pieces = [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]
    whole = parse([text], thinking=thinking)
    assert parse(pieces, thinking=thinking) == whole
    assert parse(list(text), thinking=thinking) == whole


@given(st.text(max_size=60), st.lists(st.text(min_size=1, max_size=4), max_size=4))
@settings(max_examples=200, deadline=None)
def test_stop_strings_wherever_tokens_end(text: str, stop: list[str]) -> None:
    tokenizer = Tokenizer.load(Path(__file__).resolve().parent.parent / "configs" / "demo_data" / "tiny_tokenizer")
    tokens = tokenizer.encode(text)
    plain = tokenizer.decode(tokens, skip_specials=True)
    reply = ReplyText(tokenizer, (), stop)
    said = "".join(reply.push(token) for token in tokens) + reply.finish()
    ends = [(plain.index(one) + len(one), plain.index(one), one) for one in stop if one in plain]
    _, first, by = min(ends, default=(0, len(plain), None))
    assert said == plain[:first] and reply.stopped_by == by
