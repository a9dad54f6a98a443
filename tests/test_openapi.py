"""Law: /openapi.json is true: whatever is sent, the answer has a status and a body that are written there."""

from __future__ import annotations

import copy
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from serve.api.app import Settings
from serve.api.documents import ANSWERS
from serve.feedback import Feedback
from tests.serving import Served, serving

KEY = "secret-of-the-tests"
HEADERS = {"Authorization": f"Bearer {KEY}"}
EXAMPLES = 150 if os.environ.get("QMAX_FULL") == "1" else 15
SLOW = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
CHECKS: list[Any] = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]
WORDS = {"type": "string", "maxLength": 20}
FEW = {"enum": [1, 2, 4]}
IDS = {"type": "array", "items": {"enum": [1, 7, 99]}}
OBJECT = {"type": "object", "additionalProperties": False}
MESSAGE = {"role": {"enum": ["system", "user", "assistant"]}, "content": WORDS}
MESSAGES = {
    "type": "array",
    "minItems": 1,
    "maxItems": 3,
    "items": {**OBJECT, "properties": MESSAGE, "required": list(MESSAGE)},
}
FUNCTION = {"name": {"enum": ["look", "go"]}, "parameters": {"const": {"type": "object"}}}
TOOL = {"type": {"const": "function"}, "function": {**OBJECT, "properties": FUNCTION, "required": ["name"]}}
NARROWED: dict[str, Any] = {
    "model": {"const": "tiny"},
    "messages": MESSAGES,
    "max_tokens": FEW,
    "max_completion_tokens": FEW,
    "thinking_budget": FEW,
    "min_tokens": {"enum": [0, 1]},
    "n": {"enum": [1, 2]},
    "seed": {"enum": [None, 5]},
    "logit_bias": {**OBJECT, "properties": {"5": {"type": "number", "minimum": -100, "maximum": 100}}},
    "stop_token_ids": {**IDS, "maxItems": 4},
    "tokens": IDS,
    "tools": {"type": "array", "items": {**OBJECT, "properties": TOOL, "required": list(TOOL)}, "maxItems": 2},
    "chat_template_kwargs": {**OBJECT, "properties": {"enable_thinking": {"type": "boolean"}}},
}
"""What random data would seldom hit, or what would take long."""
SIDE = {**OBJECT, "properties": {"model": {"const": "tiny"}, "reply": WORDS}, "required": ["model", "reply"]}
OWN = {
    "ChatBody": {"logprobs": {"const": True}},
    "CompletionBody": {"prompt": {"anyOf": [WORDS, IDS]}, "logprobs": {"enum": [0, 2]}},
    "VoteBody": {"prompt": MESSAGES},
    "CorrectionBody": {"prompt": MESSAGES, "better": {"const": "better"}, "reply": {"enum": ["", "worse"]}},
    "ArenaBody": {"prompt": MESSAGES, "a": SIDE, "b": SIDE, "winner": {"const": "tie"}},
}
"""The same for fields that are something else in each body."""
ALWAYS = {"logprobs", "stream", "good", "better"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    feedback = Feedback(tmp_path_factory.mktemp("feedback") / "rows.jsonl")
    with serving(Served(Settings(keys=(KEY,), max_body=50_000), feedback=feedback), queue=8) as served:
        yield served


@pytest.fixture(scope="module")
def written(shared: Served) -> dict[str, Any]:
    """What the server writes of itself."""
    return httpx.get(f"{shared.address}/openapi.json", headers=HEADERS, timeout=120).json()


@pytest.fixture(scope="module")
def past(shared: Served) -> list[str]:
    """Responses that the server has kept."""
    asked = {"model": "tiny", "input": "The sun", "max_output_tokens": 2}
    made = [httpx.post(f"{shared.address}/v1/responses", json=asked, headers=HEADERS, timeout=120) for _ in range(2)]
    return [one.json()["id"] for one in made]


def narrowed(written: dict[str, Any], past: list[str], *, stream: bool) -> dict[str, Any]:
    """The same with requests that more often make sense, and that ask for streams or do not."""
    found = copy.deepcopy(written)
    for name, part in found["components"]["schemas"].items():
        if name.endswith("Body"):
            narrow = {**NARROWED, **OWN.get(name, {}), "stream": {"const": stream}}
            part["properties"] |= {field: narrow[field] for field in part["properties"].keys() & narrow.keys()}
            part["required"] = [*part.get("required", ()), *sorted(part["properties"].keys() & ALWAYS)]
    kept, gone = past
    names = {
        "/v1/models/{name}": {"get": ["tiny", "tin"]},
        "/v1/responses/{name}": {"get": [kept, "resp"], "delete": [gone, "resp"]},
        "/v1/responses/{name}/input_items": {"get": [kept, "resp"]},
    }
    for path, methods in names.items():
        for method, known in methods.items():
            found["paths"][path][method]["parameters"][0]["schema"] = {"enum": known}
    return found


CASES = [
    *((endpoint, "whole") for endpoint in ANSWERS),
    *((endpoint, "stream") for endpoint, answers in ANSWERS.items() if answers.piece is not None),
    *((endpoint, "wrong") for endpoint in ANSWERS if endpoint.startswith("POST")),
]


@pytest.mark.parametrize(("endpoint", "how"), CASES)
def test_answers_are_as_they_are_written(
    shared: Served, written: dict[str, Any], past: list[str], endpoint: str, how: str
) -> None:
    method, path = endpoint.split()
    wrong = how == "wrong"
    schema = schemathesis.openapi.from_dict(written if wrong else narrowed(written, past, stream=how == "stream"))
    operation: Any = schema[path][method]
    mode = schemathesis.GenerationMode.NEGATIVE if wrong else schemathesis.GenerationMode.POSITIVE
    seen: Counter[tuple[int, bool]] = Counter()

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=SLOW, derandomize=True)
    def check(case: Any) -> None:
        answer = case.call_and_validate(base_url=shared.address, headers=HEADERS, checks=CHECKS)
        seen[answer.status_code, "text/event-stream" in answer.headers["content-type"][0]] += 1

    check()
    assert seen[400 if wrong else 200, how == "stream"], f"the answers were {seen}"


LONG = {"model": "tiny", "prompt": "The sun", "max_tokens": 500, "ignore_eos": True}
REFUSED: list[tuple[int, dict[str, Any], dict[str, Any], dict[str, Any]]] = [
    (401, {}, {}, {"headers": {}}),
    (404, {"model": "tin"}, {}, {}),
    (408, {}, {"settings": Settings(keys=(KEY,), timeout=0.01)}, {}),
    (200, {"stream": True}, {"settings": Settings(keys=(KEY,), timeout=0.01)}, {}),
    (413, {"prompt": "x" * 60_000}, {}, {}),
    (429, {"n": 20}, {}, {}),
    (503, {}, {"services": {}}, {}),
]
"""Status; what else is in the body; what the server has instead; how it is asked."""


@pytest.mark.parametrize(("status", "more", "has", "how"), REFUSED, ids=[str(one[0]) for one in REFUSED])
def test_refusals_are_as_they_are_written(
    shared: Served, written: dict[str, Any], monkeypatch: pytest.MonkeyPatch, status: int, more: Any, has: Any, how: Any
) -> None:
    operation: Any = schemathesis.openapi.from_dict(written)["/v1/completions"]["POST"]
    case = operation.Case(body={**LONG, **more}, media_type="application/json")
    for name, value in has.items():
        monkeypatch.setattr(shared, name, value)
    conform = [check for check in CHECKS if check is not not_a_server_error]
    answer = case.call_and_validate(base_url=shared.address, checks=conform, **{"headers": HEADERS, **how})
    assert answer.status_code == status
    if status == 200:
        assert '"type":"timeout_error"' in answer.text.replace(" ", ""), "an event of the stream says what went wrong"


HALF = "\ud834"
"""The first half of a character beyond U+FFFF: JSON may hold it, UTF-8 may not."""
ASK = {"model": "tiny", "messages": [{"role": "user", "content": HALF}], "max_tokens": 3}
VOTE = {"consent": True, "kind": "vote", "model": "tiny", "prompt": ASK["messages"], "reply": HALF, "good": True}
EXTREME: list[tuple[str, dict[str, Any], int]] = [
    *(
        ("POST /v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 3, **more}, status)
        for more, status in (
            ({"stop_token_ids": [10**12]}, 400),
            ({"stop_token_ids": [-1]}, 400),
            ({"min_tokens": 10**12}, 200),
            ({"max_tokens": 10**30, "stop": "e"}, 200),
            ({"top_k": 10**30}, 200),
            ({"priority": 10**30}, 200),
            ({"seed": -(2**63)}, 200),
            ({"temperature": 1e-300, "top_p": 1e-300, "repetition_penalty": 1e-300, "logprobs": 2}, 200),
            ({"logit_bias": {"5" * 5000: 1}}, 400),
            ({"logit_bias": {"٣": 1}}, 400),
            ({"prompt": HALF, "echo": True}, 200),
            ({"model": HALF}, 404),
        )
    ),
    ("POST /v1/chat/completions", ASK, 200),
    ("POST /v1/chat/completions", {**ASK, "messages": [{"role": HALF, "content": "x"}]}, 400),
    ("POST /v1/feedback", VOTE, 200),
    ("POST /tokenize", {"prompt": HALF}, 200),
]


@pytest.mark.parametrize(("endpoint", "body", "status"), EXTREME)
def test_nothing_that_is_asked_stops_the_server(
    shared: Served, written: dict[str, Any], endpoint: str, body: dict[str, Any], status: int
) -> None:
    method, path = endpoint.split()
    operation: Any = schemathesis.openapi.from_dict(written)[path][method]
    case = operation.Case(body=body, media_type="application/json")
    answer = case.call_and_validate(base_url=shared.address, headers=HEADERS, checks=CHECKS)
    assert answer.status_code == status, answer.text
    usual = {"model": "tiny", "prompt": "The sun", "max_tokens": 2}
    assert httpx.post(f"{shared.address}/v1/completions", json=usual, headers=HEADERS, timeout=120).status_code == 200
