"""Law: /v1/messages is what Anthropic's own client takes it for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import anthropic
import httpx
import pytest
from anthropic.types import RawMessageStreamEvent
from pydantic import TypeAdapter

from serve.api.app import Settings
from serve.api.message_blocks import BlockWriter, input_of, messages_of
from serve.parsing import ReplyParser
from tests.serving import CHAT_TOOLS, REPLY, SCHEMA, Served, idle, serving

KEY = "secret-of-the-tests"
TOOLS: list[Any] = [{"name": name, "input_schema": SCHEMA} for name in ("weather", "time")]
ASK: list[Any] = [{"role": "user", "content": "Hello"}]
EVENT = TypeAdapter[Any](RawMessageStreamEvent)


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    with serving(Served(Settings(keys=(KEY,), max_body=100_000))) as served:
        yield served


@pytest.fixture(scope="module")
def client(shared: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(
        base_url=shared.address, api_key=KEY, max_retries=0, _strict_response_validation=True
    ) as one:
        yield one


@pytest.fixture(scope="module")
def raw(shared: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared.address, headers={"x-api-key": KEY}, timeout=60) as one:
        yield one


# ---- what a model wrote, as blocks and events -----------------------------------------------------------------------
def events_of(texts: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The events and the blocks of a reply that comes in these pieces."""
    parser, writer = ReplyParser(tools=CHAT_TOOLS), BlockWriter()
    events = []
    for text in texts:
        events += writer.push(parser.push(text))
    events += writer.push(parser.finish())
    events += writer.finish()
    return json.loads(json.dumps(events)), writer.blocks


def told(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The blocks as somebody knows them who has only heard the events; each event must be due."""
    blocks: list[dict[str, Any]] = []
    ended, given = True, ""
    for event in events:
        EVENT.validate_python(event, strict=True)
        if event["type"] == "content_block_start":
            assert ended and event["index"] == len(blocks)
            blocks.append(event["content_block"])
            ended, given = False, ""
            continue
        assert not ended and event["index"] == len(blocks) - 1
        block, delta = blocks[-1], event.get("delta", {})
        if event["type"] == "content_block_stop":
            ended = True
            block |= {"input": json.loads(given)} if block["type"] == "tool_use" else {}
        elif delta["type"] == "input_json_delta":
            given += delta["partial_json"]
        else:
            name = delta["type"].removesuffix("_delta")
            block[name] += delta[name]
    assert ended
    return blocks


@pytest.mark.parametrize("size", [1, 2, 7, len(REPLY)])
def test_thoughts_words_and_calls_are_blocks(size: int) -> None:
    events, blocks = events_of([REPLY[at : at + size] for at in range(0, len(REPLY), size)])
    assert told(events) == blocks
    assert [block["type"] for block in blocks] == ["thinking", "text", "tool_use", "tool_use", "text"]
    assert blocks[0]["thinking"] == "Where is it?" and blocks[0]["signature"]
    assert [block["text"] for block in blocks if block["type"] == "text"] == ["I shall look.", "So be it."]
    assert [block["input"] for block in blocks if block["type"] == "tool_use"] == [
        {"city": "Rome", "high": "\ud800"},
        {},
    ]


@pytest.mark.parametrize(
    ("arguments", "given"),
    [
        ('{"a": NaN}', {"a": "NaN"}),
        ("[1]", {"arguments": [1]}),
        ("no JSON", {"arguments": "no JSON"}),
        ("[" * 100_000, {"arguments": "[" * 100_000}),
    ],
)
def test_the_input_of_a_call_is_always_an_object(arguments: str, given: dict[str, Any]) -> None:
    assert input_of(arguments) == given


def test_blocks_are_the_conversation_that_they_were() -> None:
    blocks = events_of([REPLY])[1]
    call = blocks[2]["id"]
    mark = {"cache_control": {"type": "ephemeral"}}
    results = [
        {"type": "tool_result", "tool_use_id": call, "content": [{"type": "text", "text": "noon"}], **mark},
        {"type": "tool_result", "tool_use_id": blocks[3]["id"], "is_error": True, "content": "no clock"},
        {"type": "text", "text": "Well"},
        {"type": "text", "text": "?"},
    ]
    system = [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind.", **mark}]
    said = [*ASK, {"role": "assistant", "content": blocks}, {"role": "user", "content": results}]
    messages = messages_of(said, system)
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool", "tool", "user"]
    assert messages[0]["content"] == "Be brief.\n\nBe kind."
    assert messages[2]["content"] == "I shall look.So be it." and messages[2]["reasoning_content"] == "Where is it?"
    assert [one["id"] for one in messages[2]["tool_calls"]] == [call, blocks[3]["id"]]
    assert [message["content"] for message in messages[3:]] == ["noon", "Error: no clock", "Well?"]


# ---- over a socket --------------------------------------------------------------------------------------------------
def test_a_message_and_its_stream(client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "system": "Be brief.", "max_tokens": 12}
    whole = client.messages.create(**asked)
    (block,) = whole.content
    assert whole.stop_reason == "max_tokens" and whole.role == "assistant" and block.type == "text"
    assert whole.usage.output_tokens == 12
    events = list(client.messages.create(**asked, stream=True))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    with client.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert text == block.text and last.stop_reason == whole.stop_reason and last.content[0].type == "text"
    read = last.usage.input_tokens + (last.usage.cache_read_input_tokens or 0)
    assert read == whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0)
    counted = client.messages.count_tokens(model="tiny", messages=ASK, system="Be brief.")
    assert counted.input_tokens == read


def test_a_stream_has_named_events_and_no_other_end(raw: httpx.Client) -> None:
    asked = {"model": "tiny", "messages": ASK, "max_tokens": 3, "stream": True}
    lines = raw.post("/v1/messages", json=asked).text.split("\n\n")
    assert lines.pop() == ""
    for line in lines:
        name, data = line.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


def test_what_is_asked_again_is_not_read_again(client: anthropic.Anthropic) -> None:
    long: list[Any] = [{"role": "user", "content": "What was said before is not read again. " * 12}]
    first, second = (client.messages.create(model="tiny", messages=long, max_tokens=2) for _ in range(2))
    cached = second.usage.cache_read_input_tokens or 0
    assert cached >= 64 and second.usage.input_tokens + cached == first.usage.input_tokens


def test_stop_sequences_are_named(client: anthropic.Anthropic) -> None:
    def text_of(message: Any) -> str:
        return message.content[0].text

    whole = text_of(client.messages.create(model="tiny", messages=ASK, max_tokens=40))
    stop = whole[7:11]
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK, "max_tokens": 40, "stop_sequences": ["nowhere", stop]}
    reply = client.messages.create(**asked)
    assert reply.stop_reason == "stop_sequence" and reply.stop_sequence == stop
    assert text_of(reply) == whole[: whole.index(stop)]
    with client.messages.stream(**asked) as stream:
        last = stream.get_final_message()
    assert (last.stop_reason, last.stop_sequence, text_of(last)) == ("stop_sequence", stop, text_of(reply))


def test_a_reply_goes_on_where_it_began(client: anthropic.Anthropic) -> None:
    begun: list[Any] = [*ASK, {"role": "assistant", "content": "It is"}]
    count = client.messages.count_tokens(model="tiny", messages=begun).input_tokens
    asked = client.messages.count_tokens(model="tiny", messages=ASK).input_tokens
    assert 0 < count - asked <= len("It is"), "the beginning comes last, and nothing ends it"
    reply = client.messages.create(model="tiny", messages=begun, max_tokens=4)
    assert reply.usage.input_tokens + (reply.usage.cache_read_input_tokens or 0) == count
    assert reply.content[0].type == "text" and not reply.content[0].text.startswith("It is")


def test_a_call_its_result_and_what_follows(client: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": "tiny", "tools": TOOLS, "max_tokens": 200}
    named: Any = {"type": "tool", "name": "time", "disable_parallel_tool_use": True}
    reply = client.messages.create(**asked, messages=ASK, tool_choice=named)
    (call,) = reply.content
    assert reply.stop_reason == "tool_use" and call.type == "tool_use" and call.name == "time"
    assert call.input["city"] in ("Rome", "Paris")
    with client.messages.stream(**asked, messages=ASK, tool_choice=named) as stream:
        (streamed,) = stream.get_final_message().content
    assert streamed.type == "tool_use" and streamed.input == call.input
    any_: Any = {"type": "any", "disable_parallel_tool_use": True}
    either = client.messages.create(**asked, messages=ASK, tool_choice=any_)
    assert either.stop_reason == "tool_use" and len(either.content) == 1
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "noon"}
    said: list[Any] = [*ASK, {"role": "assistant", "content": reply.content}, {"role": "user", "content": [result]}]
    asked["max_tokens"] = 4
    after = client.messages.create(**asked, messages=said, tool_choice={"type": "none"})
    assert after.stop_reason == "max_tokens"


def test_json_that_fits_a_schema(client: anthropic.Anthropic) -> None:
    reply = client.messages.create(
        model="tiny", messages=ASK, max_tokens=200,
        extra_body={"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}, "seed": 1, "top_k": 40},
    )  # fmt: skip
    (block,) = reply.content
    assert reply.stop_reason == "end_turn" and block.type == "text"
    assert json.loads(block.text)["city"] in ("Rome", "Paris")


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_are_blocks_of_their_own(shared: Served, client: anthropic.Anthropic, stream: bool) -> None:
    think = shared.services["tiny"].tokenizer.token_id("<think>")
    more = {"logit_bias": {think: 100}, "temperature": 1, "seed": 1}
    asked: dict[str, Any] = {
        "model": "tiny", "messages": ASK, "max_tokens": 200,
        "thinking": {"type": "enabled", "budget_tokens": 5},
        "extra_body": more | {"output_config": {"format": {"type": "json_schema", "schema": SCHEMA}}},
    }  # fmt: skip
    if stream:
        with client.messages.stream(**asked) as events:
            message: Any = events.get_final_message()
    else:
        message = client.messages.create(**asked)
    thought, words = message.content
    assert thought.type == "thinking" and thought.signature
    assert json.loads(words.text)["city"] in ("Rome", "Paris")
    assert 2 <= message.usage.output_tokens_details.thinking_tokens <= 7
    asked["thinking"] = {"type": "disabled"}
    (only,) = client.messages.create(**asked).content
    assert only.type == "text"


def test_thinking_is_asked_for(client: anthropic.Anthropic) -> None:
    def read(**more: Any) -> int:
        return client.messages.count_tokens(model="tiny", messages=ASK, **more).input_tokens

    on = read(thinking={"type": "adaptive"})
    assert on == read(thinking={"type": "enabled", "budget_tokens": 2048})
    assert on < read() == read(thinking={"type": "disabled"}), "the prompt holds a thought that is over"


def test_a_stream_that_fails_says_so(shared: Served, client: anthropic.Anthropic) -> None:
    usual, shared.settings = shared.settings, Settings(keys=(KEY,), timeout=0.3)
    try:
        asked: Any = {"model": "tiny", "messages": ASK, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}
        with pytest.raises(anthropic.APIStatusError, match="the request took more than") as failed:
            list(client.messages.create(**asked, stream=True))
    finally:
        shared.settings = usual
    assert isinstance(failed.value.body, dict) and failed.value.body["error"]["type"] == "timeout_error"
    assert idle(shared.services["tiny"].engine)


def test_who_goes_frees_the_slot(shared: Served, raw: httpx.Client) -> None:
    asked = {"model": "tiny", "messages": ASK, "max_tokens": 1900, "ignore_eos": True, "stream": True}
    with raw.stream("POST", "/v1/messages", json=asked) as answer:
        next(answer.iter_lines())
        assert shared.services["tiny"].engine.scheduler.busy
    assert idle(shared.services["tiny"].engine)


RESULT = {"type": "tool_result", "tool_use_id": "x", "content": ""}


@pytest.mark.parametrize(
    ("more", "status", "kind", "said"),
    [
        ({"model": "other"}, 404, "not_found_error", "there is no model 'other'"),
        ({"max_tokens": None}, 400, "invalid_request_error", "max_tokens"),
        ({"messages": []}, 400, "invalid_request_error", "messages: "),
        ({"messages": [{"role": "usr", "content": "x"}]}, 400, "invalid_request_error", "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, 400, "invalid_request_error", "'image'"),
        ({"messages": [{"role": "user", "content": [RESULT]}]}, 400, "invalid_request_error", "no tool_use before"),
        ({"messages": [{"role": "user", "content": []}]}, 400, "invalid_request_error", "messages[0].content is empty"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_request_error", "somebody must speak"),
        ({"system": [{"type": "image"}]}, 400, "invalid_request_error", "system[0].type"),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, 400, "invalid_request_error", "tools[0].type"),
        ({"tools": [{"name": "w"}]}, 400, "invalid_request_error", "tools[0].input_schema is missing"),
        ({"tool_choice": {"type": "any"}}, 400, "invalid_request_error", "no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool", "name": "tim"}}, 400, "invalid_request_error", "'time'"),
        ({"tools": TOOLS, "tool_choice": {"type": "tool"}}, 400, "invalid_request_error", "tool_choice.name"),
        ({"thinking": {"type": "enabled"}}, 400, "invalid_request_error", "thinking.budget_tokens is missing"),
        ({"thinking": {"type": "enabled", "budget_tokens": 9}}, 400, "invalid_request_error", "less than max_tokens"),
        ({"thinking": {"type": "disabled", "budget_tokens": 9}}, 400, "invalid_request_error", "budget_tokens"),
        ({"temperature": 1.5}, 400, "invalid_request_error", "temperature: "),
        ({"stop_sequence": "x"}, 400, "invalid_request_error", "did you mean 'stop_sequences'"),
        ({"output_config": {"effort": "low"}}, 400, "invalid_request_error", "output_config.effort"),
        ({"messages": [{"role": "user", "content": "x" * 200_000}]}, 413, "request_too_large", "bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(
    raw: httpx.Client, more: dict[str, Any], status: int, kind: str, said: str
) -> None:
    answer = raw.post("/v1/messages", json={"model": "tiny", "messages": ASK, "max_tokens": 9, **more})
    assert answer.status_code == status, answer.text
    found = answer.json()
    assert found["type"] == "error" and set(found["error"]) == {"type", "message"}
    assert found["error"]["type"] == kind and said in found["error"]["message"]


def test_other_errors_have_the_same_body(shared: Served, raw: httpx.Client) -> None:
    assert raw.get("/v1/messages").json()["error"]["type"] == "invalid_request_error"
    assert raw.post("/v1/messages/batches", json={}).json()["error"]["type"] == "not_found_error"
    with anthropic.Anthropic(base_url=shared.address, api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(anthropic.AuthenticationError, match="API key"):
            stranger.messages.create(model="tiny", messages=ASK, max_tokens=1)
        with pytest.raises(anthropic.AuthenticationError):
            stranger.messages.count_tokens(model="tiny", messages=ASK)


def test_openapi_knows_the_body(raw: httpx.Client) -> None:
    found = raw.get("/openapi.json").json()
    wanted = found["paths"]["/v1/messages"]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert "stop_sequences" in found["components"]["schemas"][wanted.rpartition("/")[2]]["properties"]
