"""Law: /v1/responses is what OpenAI's own client takes it for; a conversation comes whole or goes on from its past."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from serve.api.app import Settings
from serve.api.errors import ApiError
from serve.api.response_items import ItemWriter, items_of, messages_of
from serve.api.response_store import ResponseStore, Stored
from serve.parsing import ReplyParser
from tests.serving import CHAT_TOOLS, REPLY, SCHEMA, Served, idle, serving

KEY = "secret-of-the-tests"
TOOLS: list[Any] = [{"type": "function", "name": name, "parameters": SCHEMA} for name in ("weather", "time")]
EVENT = TypeAdapter[Any](ResponseStreamEvent)


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    with serving(Served(Settings(keys=(KEY,)))) as served:
        yield served


@pytest.fixture(scope="module")
def client(shared: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{shared.address}/v1", api_key=KEY, max_retries=0, _strict_response_validation=True
    ) as one:
        yield one


@pytest.fixture(scope="module")
def raw(shared: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=shared.address, headers={"Authorization": f"Bearer {KEY}"}, timeout=60) as one:
        yield one


def without_ids(value: Any) -> Any:
    """A response without what is never the same twice."""
    if isinstance(value, dict):
        own = ("id", "call_id", "item_id", "created_at", "completed_at")
        return {name: without_ids(one) for name, one in value.items() if name not in own}
    return [without_ids(one) for one in value] if isinstance(value, list) else value


# ---- what a model wrote, as items and events ------------------------------------------------------------------------
def events_of(texts: Sequence[str], *, complete: bool = True) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The events and the items of a reply that comes in these pieces."""
    parser, writer = ReplyParser(tools=CHAT_TOOLS), ItemWriter()
    events = []
    for text in texts:
        events += writer.push(parser.push(text))
    events += writer.push(parser.finish())
    events += writer.finish(complete=complete)
    return json.loads(json.dumps(events)), writer.items


def told(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The items as somebody knows them who has only heard the events; each event must be due."""
    items: list[dict[str, Any]] = []
    ended = True
    for number, event in enumerate(events):
        EVENT.validate_python(event | {"sequence_number": number}, strict=True)
        kind, at = event["type"].removeprefix("response."), event["output_index"]
        if kind == "output_item.added":
            assert ended and at == len(items)
            items.append(event["item"])
            ended = False
            continue
        assert not ended and at == len(items) - 1
        item = items[at]
        assert event.get("item_id", item["id"]) == item["id"]
        if kind == "content_part.added":
            item["content"] = [event["part"]]
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            item["content"][0]["text"] += event["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert item["content"][0]["text"] == event["text"]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += event["delta"]
        elif kind == "function_call_arguments.done":
            assert item["arguments"] == event["arguments"]
        elif kind == "output_item.done":
            item["status"] = event["item"]["status"]
            assert item == event["item"]
            ended = True
        else:
            assert kind == "content_part.done" and event["part"] == item["content"][0]
    assert ended
    return items


def test_thoughts_words_and_calls_are_items() -> None:
    events, items = events_of([REPLY])
    assert told(events) == items
    assert [item["type"] for item in items] == ["reasoning", "message", "function_call", "function_call", "message"]
    assert items[0]["content"] == [{"type": "reasoning_text", "text": "Where is it?"}]
    assert [item["content"][0]["text"] for item in items if item["type"] == "message"] == [
        "I shall look.",
        "So be it.",
    ]
    assert json.loads(items[2]["arguments"]) == {"city": "Rome", "high": "\ud800"} and items[3]["arguments"] == "{}"
    assert {item["status"] for item in items} == {"completed"}
    assert len({item["id"] for item in items}) == len(items)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_items_do_not_depend_on_where_a_reply_was_cut(size: int) -> None:
    events, items = events_of([REPLY[at : at + size] for at in range(0, len(REPLY), size)])
    assert told(events) == items
    assert without_ids(items) == without_ids(events_of([REPLY])[1])


@pytest.mark.parametrize(
    ("text", "complete", "kinds", "last"),
    [
        ("", True, ["message"], "completed"),
        ("", False, [], None),
        ("<think>So", False, ["reasoning"], "incomplete"),
        ("<think>So</think>", True, ["reasoning", "message"], "completed"),
        ("So", False, ["message"], "incomplete"),
        ('<tool_call>{"name": "ti', False, ["message"], "incomplete"),
    ],
)
def test_replies_that_are_cut_short(text: str, complete: bool, kinds: list[str], last: str | None) -> None:
    events, items = events_of([text], complete=complete)
    assert told(events) == items
    assert [item["type"] for item in items] == kinds
    assert [item["status"] for item in items][-1:] == ([last] if last else [])


def test_items_are_the_conversation_that_they_were() -> None:
    items = items_of(
        [
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "input_text", "text": "Wh"}, {"type": "input_text", "text": "ere?"}]},
        ]
    )
    items += events_of([REPLY])[1]
    call = items[4]["call_id"]
    items += items_of([{"type": "function_call", "call_id": "a", "name": "time", "arguments": "{}"}])
    result = {"type": "function_call_output", "call_id": call, "output": "noon"}
    messages = messages_of([*items, *items_of([result])], "You know the time.")
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "tool"]
    assert messages[0]["content"] == "You know the time.\n\nBe brief." and messages[1]["content"] == "Where?"
    assert messages[2]["content"] == "I shall look.So be it." and messages[2]["reasoning_content"] == "Where is it?"
    assert [one["id"] for one in messages[2]["tool_calls"][:1]] == [call] and len(messages[2]["tool_calls"]) == 3
    assert messages[3] == {"role": "tool", "tool_call_id": call, "content": "noon"}
    said_twice = messages_of(items_of([{"role": "assistant", "content": "One."}] * 2), None)
    assert [message["content"] for message in said_twice] == ["One.", "One."]


def test_the_store_holds_what_fits() -> None:
    store = ResponseStore(most=2)
    for name in "ab":
        store.put(Stored({"id": name}, []))
    store.get("a")
    store.put(Stored({"id": "c"}, []))
    with pytest.raises(ApiError, match="there is no response 'b'"):
        store.get("b")
    assert store.get("a").response == {"id": "a"}
    small = ResponseStore(most_bytes=50)
    for name in "abc":
        small.put(Stored({"id": name}, [{"text": "x" * 15}]))
    with pytest.raises(ApiError):
        small.get("b")
    small.drop("c")
    with pytest.raises(ApiError):
        small.drop("c")


# ---- over a socket --------------------------------------------------------------------------------------------------
ASKED: dict[str, Any] = {
    "model": "tiny", "instructions": "Be brief.", "input": "Hello", "max_output_tokens": 12,
    "include": ["message.output_text.logprobs"], "top_logprobs": 2, "metadata": {"a": "b"},
}  # fmt: skip


def test_a_response_and_its_stream(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASKED)
    assert whole.status == "incomplete" and whole.incomplete_details is not None
    assert whole.incomplete_details.reason == "max_output_tokens"
    assert whole.instructions == "Be brief." and whole.metadata == {"a": "b"} and whole.temperature == 0
    assert whole.usage is not None and whole.usage.output_tokens == 12
    events = [event.model_dump() for event in client.responses.create(**ASKED, stream=True)]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    assert events[0]["response"]["output"] == [] and events[0]["response"]["status"] == "in_progress"
    assert events[-1]["type"] == "response.incomplete"
    assert without_ids(events[-1]["response"]["output"]) == without_ids(whole.model_dump()["output"])
    deltas = [event for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(event["delta"] for event in deltas) == whole.output_text
    (message,) = whole.output
    assert message.type == "message" and message.content[0].type == "output_text"
    logprobs = message.content[0].logprobs or []
    assert len(logprobs) == 12 and all(len(one.top_logprobs) == 2 for one in logprobs)
    (done,) = [event for event in events if event["type"] == "response.output_text.done"]
    streamed = [one["token"] for one in done["logprobs"]]
    assert streamed == [one.token for one in logprobs]


def test_the_stream_helper_of_the_client(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="tiny", input="Hello", max_output_tokens=6)
    with client.responses.stream(model="tiny", input="Hello", max_output_tokens=6) as stream:
        texts = [event.delta for event in stream if event.type == "response.output_text.delta"]
    assert "".join(texts) == whole.output_text


def test_a_stream_has_named_events_and_no_other_end(raw: httpx.Client) -> None:
    asked = {"model": "tiny", "input": "Hello", "max_output_tokens": 3, "stream": True}
    lines = raw.post("/v1/responses", json=asked).text.split("\n\n")
    assert lines.pop() == ""
    for line in lines:
        name, data = line.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


def test_a_conversation_goes_on_from_its_past(client: openai.OpenAI) -> None:
    first = client.responses.create(model="tiny", input="Hello", max_output_tokens=8)
    more: dict[str, Any] = {"model": "tiny", "max_output_tokens": 8, "instructions": "Be brief."}
    second = client.responses.create(**more, input="And?", previous_response_id=first.id)
    third = client.responses.create(**more, input="So?", previous_response_id=second.id)
    said: list[Any] = [{"role": "user", "content": "Hello"}, *first.output, {"role": "user", "content": "And?"}]
    said += [*second.output, {"role": "user", "content": "So?"}]
    whole = client.responses.create(**more, input=said)
    assert without_ids(whole.model_dump()["output"]) == without_ids(third.model_dump()["output"])
    assert whole.usage is not None and third.usage is not None
    assert whole.usage.input_tokens == third.usage.input_tokens
    plain = [(item["role"], item["content"]) for item in said if isinstance(item, dict)]
    assert plain == [("user", "Hello"), ("user", "And?"), ("user", "So?")]
    items = list(client.responses.input_items.list(third.id, order="asc", limit=2))
    assert [item.id for item in items][1:4:2] == [first.output[0].id, second.output[0].id] and len(items) == 5
    assert client.responses.retrieve(first.id).output == first.output


def test_what_is_not_kept_cannot_be_gone_on_from(client: openai.OpenAI) -> None:
    gone = client.responses.create(model="tiny", input="Hello", max_output_tokens=2, store=False)
    kept = client.responses.create(model="tiny", input="Hello", max_output_tokens=2)
    client.responses.delete(kept.id)
    for name in (gone.id, kept.id, "resp_nothing"):
        with pytest.raises(openai.NotFoundError, match=f"there is no response '{name}'"):
            client.responses.create(model="tiny", input="And?", previous_response_id=name)
        with pytest.raises(openai.NotFoundError):
            client.responses.retrieve(name)
        with pytest.raises(openai.NotFoundError):
            client.responses.delete(name)


def test_json_that_fits_a_schema(client: openai.OpenAI) -> None:
    format_: Any = {"type": "json_schema", "name": "place", "schema": SCHEMA, "strict": True}
    reply = client.responses.create(
        model="tiny", input="Hello", text={"format": format_}, max_output_tokens=200, reasoning={"effort": "none"}
    )
    assert reply.status == "completed" and json.loads(reply.output_text)["city"] in ("Rome", "Paris")
    assert reply.text is not None and reply.text.format is not None and reply.text.format.type == "json_schema"


def test_thoughts_are_items_of_their_own(shared: Served, raw: httpx.Client) -> None:
    think = shared.services["tiny"].tokenizer.token_id("<think>")
    asked = {
        "model": "tiny", "input": "Hello", "logit_bias": {think: 100}, "thinking_budget": 5, "seed": 1,
        "text": {"format": {"type": "json_schema", "name": "place", "schema": SCHEMA}}, "temperature": 1.0,
        "include": ["message.output_text.logprobs"],
    }  # fmt: skip
    reply = raw.post("/v1/responses", json=asked).json()
    assert [item["type"] for item in reply["output"]] == ["reasoning", "message"]
    part = reply["output"][1]["content"][0]
    assert json.loads(part["text"])["city"] in ("Rome", "Paris")
    assert "".join(one["token"] for one in part["logprobs"]).strip() == part["text"]
    assert 2 <= reply["usage"]["output_tokens_details"]["reasoning_tokens"] <= 7


def test_a_call_its_result_and_what_follows(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "tools": TOOLS, "max_output_tokens": 200, "reasoning": {"effort": "none"},
        "parallel_tool_calls": False,
    }  # fmt: skip
    named: Any = {"type": "function", "name": "time"}
    first = client.responses.create(**asked, input="Hello", tool_choice=named)
    (call,) = first.output
    assert first.status == "completed" and call.type == "function_call" and call.name == "time"
    assert json.loads(call.arguments)["city"] in ("Rome", "Paris")
    streamed = list(client.responses.create(**asked, input="Hello", tool_choice=named, stream=True))
    parts = [event.delta for event in streamed if event.type == "response.function_call_arguments.delta"]
    assert "".join(parts) == call.arguments
    result: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "noon"}
    asked["max_output_tokens"] = 8
    after = client.responses.create(**asked, input=[result], previous_response_id=first.id)
    question: Any = {"role": "user", "content": "Hello"}
    whole = client.responses.create(**asked, input=[question, call, result])  # pyright: ignore[reportArgumentType]
    assert after.output_text == whole.output_text and after.output_text


def test_a_stream_that_fails_says_so(shared: Served, raw: httpx.Client) -> None:
    usual, shared.settings = shared.settings, Settings(keys=(KEY,), timeout=0.3)
    try:
        asked = {"model": "tiny", "input": "Hello", "ignore_eos": True, "max_output_tokens": 1900, "stream": True}
        lines = raw.post("/v1/responses", json=asked).text.split("\n\n")[:-1]
    finally:
        shared.settings = usual
    events = [EVENT.validate_python(json.loads(line.partition("data: ")[2])) for line in lines]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[-1].type == "response.failed" and events[-1].response.status == "failed"
    assert "more than 0.3 seconds" in events[-1].response.error.message
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert events[-1].response.output_text == said
    assert idle(shared.services["tiny"].engine)
    assert raw.get(f"/v1/responses/{events[-1].response.id}").status_code == 404, "what failed is not kept"


@pytest.mark.parametrize(
    ("more", "status", "param", "said"),
    [
        ({"model": "other"}, 404, "model", "there is no model 'other'"),
        ({"input": []}, 400, "input", "at least one item"),
        ({"input": [{"role": "usr", "content": "x"}]}, 400, "input[0].role", "'user'"),
        ({"input": [{"type": "web_search_call"}]}, 400, "input[0].type", "'web_search_call'"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, 400, "input[0].content.0.type", "input_"),
        ({"input": [{"type": "function_call_output", "call_id": "x", "output": ""}]}, 400, "input", "call_id 'x'"),
        ({"tools": [{"type": "web_search"}]}, 400, "tools[0].type", "no tools of its own"),
        ({"tools": [{"type": "function"}]}, 400, "tools[0].name", "missing"),
        ({"tools": [{"type": "function", "name": "\ud800"}]}, 400, "tools[0].name", "tools[0].name"),
        ({"tool_choice": "required"}, 400, "tool_choice", "no tools"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "tim"}}, 400, "tool_choice", "'time'"),
        ({"tools": TOOLS, "tool_choice": {"type": "web_search"}}, 400, "tool_choice", "none, auto, required"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, 400, "text.format.schema", "missing"),
        ({"text": {"format": {"type": "json_schema", "name": "x", "schema": {"type": 1}}}}, 400, "text.format", "JSON"),
        ({"text": {"verbosity": "low"}}, 400, "text.verbosity", "medium"),
        ({"reasoning": {"summary": "auto"}}, 400, "reasoning.summary", "None"),
        ({"include": ["reasoning.encrypted_content"]}, 400, "include.0", "include"),
        ({"top_logprobs": 2}, 400, "top_logprobs", "in include"),
        ({"truncation": "auto"}, 400, "truncation", "disabled"),
        ({"background": True}, 400, "background", "background"),
        ({"previous_respons_id": "x"}, 400, "previous_respons_id", "did you mean 'previous_response_id'"),
        ({"max_output_tokens": 0}, 400, "max_output_tokens", "greater"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(
    raw: httpx.Client, more: dict[str, Any], status: int, param: str, said: str
) -> None:
    answer = raw.post(
        "/v1/responses",
        content=json.dumps({"model": "tiny", "input": "Hello", **more}),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["param"] == param and said in error["message"]


def test_half_a_surrogate_pair_comes_back(raw: httpx.Client) -> None:
    body = json.dumps({"model": "tiny", "input": "\ud800", "instructions": "\ud800", "max_output_tokens": 2})
    answer = raw.post("/v1/responses", content=body, headers={"Content-Type": "application/json"})
    assert answer.json()["instructions"] == "\ud800"


def test_without_a_key_nothing_is_told(shared: Served) -> None:
    with openai.OpenAI(base_url=f"{shared.address}/v1", api_key="wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError):
            stranger.responses.create(model="tiny", input="Hello")
        with pytest.raises(openai.AuthenticationError):
            stranger.responses.retrieve("resp_x")


def test_openapi_knows_the_body(raw: httpx.Client) -> None:
    found = raw.get("/openapi.json").json()
    wanted = found["paths"]["/v1/responses"]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
    assert "previous_response_id" in found["components"]["schemas"][wanted.rpartition("/")[2]]["properties"]
