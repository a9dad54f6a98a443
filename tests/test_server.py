"""Law: the server answers as OpenAI's does; what it cannot do it refuses in OpenAI's words.

The official client talks to it over a socket, and httpx where the client would not let us be wrong.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import httpx
import jax.numpy as jnp
import numpy as np
import openai
import pytest

from model.forward import continuation, forward
from model.tokenizer import Tokenizer
from serve.api.app import Settings, Shared, known_path, make_app
from serve.engine import Engine
from tests.serving import Served, idle, serving, tiny_tokenizer
from train.scoring import Scorer

PUBLIC_PATHS = {"/", "/health", "/ui/{name}", "/ui/page.json"}
KEY = "secret-of-the-tests"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    settings = Settings(keys=(KEY, "another"), max_body=100_000, origins=("https://page.example",))
    with serving(Served(settings), queue=8) as served:
        yield served


@pytest.fixture(scope="module")
def engine(shared: Served) -> Engine:
    return shared.services["tiny"].engine


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


# ---- completions ------------------------------------------------------------
def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "qmax"
    with pytest.raises(openai.NotFoundError, match="there is no model 'tin'"):
        client.models.retrieve("tin")


def test_an_echo_has_the_log_probabilities_of_scoring(
    raw: httpx.Client, client: openai.OpenAI, engine: Engine, tokenizer: Tokenizer
) -> None:
    text = "Once upon a time there was"
    prompt = tokenizer.encode(text)
    reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=12, logprobs=3, temperature=1.0, seed=5)
    (choice,) = reply.choices
    assert choice.logprobs is not None and reply.usage is not None
    assert reply.usage.prompt_tokens == len(prompt)
    # As from OpenAI there is nothing for the first token; the client's types do not allow for it.
    asked = {"model": "tiny", "prompt": text, "max_tokens": 0, "logprobs": 2, "echo": True}
    (again,) = raw.post("/v1/completions", json=asked).json()["choices"]
    assert again["text"] == text
    ((scored, _),) = Scorer(engine.model).score([prompt])
    found, tops = again["logprobs"]["token_logprobs"], again["logprobs"]["top_logprobs"]
    assert found[0] is tops[0] is scored[0] is None
    np.testing.assert_allclose(found[1:], np.asarray(scored[1:], dtype=np.float64), atol=1e-4)
    for logprob, top in zip(found[1:], tops[1:], strict=True):
        assert logprob in top.values() and len(top) in (2, 3)


def test_embeddings_are_means_of_hidden_states(
    raw: httpx.Client, client: openai.OpenAI, engine: Engine, tokenizer: Tokenizer
) -> None:
    texts = ["Once upon a time", "A bird " * 30]
    reply = client.embeddings.create(model="tiny", input=texts, encoding_format="float")
    for text, one in zip(texts, reply.data, strict=True):
        row = jnp.asarray([tokenizer.encode(text)])
        mean = np.asarray(forward(engine.model, continuation(row, jnp.zeros(1, jnp.int32))).hidden_BTD[0]).mean(0)
        np.testing.assert_allclose(one.embedding, mean / np.linalg.norm(mean), atol=1e-5)
    # What the client asks for if one does not say; its strict types do not allow for it.
    asked = {"model": "tiny", "input": tokenizer.encode(texts[0]), "encoding_format": "base64"}
    (packed,) = raw.post("/v1/embeddings", json=asked).json()["data"]
    numbers = np.frombuffer(base64.b64decode(packed["embedding"]), "<f4")
    np.testing.assert_array_equal(numbers, np.asarray(reply.data[0].embedding, np.float32))
    assert reply.usage.total_tokens == sum(len(tokenizer.encode(text)) for text in texts)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"input": ""}, "input holds an empty text"),
        ({"input": []}, "input is empty"),
        ({"input": ["a", ""]}, "input holds an empty text"),
        ({"input": [10**6]}, "holds the id 1000000"),
        ({"input": "a " * 3000}, "this model takes 2048"),
        ({"input": "a", "dimensions": 3}, "dimensions=3"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
    ],
)
def test_what_cannot_be_embedded(raw: httpx.Client, more: dict[str, Any], said: str) -> None:
    answer = raw.post("/v1/embeddings", json={"model": "tiny", **more})
    assert answer.status_code == 400 and said in answer.json()["error"]["message"]


def test_the_token_that_ends_a_text_has_a_log_probability(
    client: openai.OpenAI, engine: Engine, tokenizer: Tokenizer
) -> None:
    prompt, end = tokenizer.encode("The sun"), tokenizer.stop_ids[0]
    reply = client.completions.create(model="tiny", prompt=prompt, max_tokens=4, logprobs=1, logit_bias={str(end): 100})
    (choice,) = reply.choices
    assert choice.finish_reason == "stop" and choice.text == ""
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == [tokenizer.token_bytes(end).decode()]
    ((scored, _),) = Scorer(engine.model).score([[*prompt, end]])
    assert choice.logprobs.token_logprobs == pytest.approx(scored[-1:], abs=1e-4)
    assert choice.logprobs.text_offset == [0]


def test_echo_and_a_reply(client: openai.OpenAI) -> None:
    both = client.completions.create(model="tiny", prompt="The sun", max_tokens=5, echo=True)
    apart = client.completions.create(model="tiny", prompt="The sun", max_tokens=5)
    assert both.choices[0].text == "The sun" + apart.choices[0].text


def test_many_prompts_and_many_replies(client: openai.OpenAI) -> None:
    asked = ["The sun", "A bird", "The sun"]
    reply = client.completions.create(model="tiny", prompt=asked, max_tokens=8, n=2, temperature=1, seed=3)
    texts = [choice.text for choice in sorted(reply.choices, key=lambda choice: choice.index)]
    assert len(texts) == 6
    assert texts[0] == texts[4] and texts[1] == texts[5] != texts[0], "the same prompt and seed, the same text"


def test_a_stream_says_what_the_whole_says(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "prompt": ["The sun", "A"],
        "max_tokens": 20,
        "logprobs": 2,
        "seed": 1,
        "temperature": 1,
    }
    whole = client.completions.create(**asked)
    texts, tokens = ["", ""], [[], []]
    ends: list[str | None] = [None, None]
    last = None
    # While a reply goes on it has no finish_reason, as from OpenAI; the types of the client do not allow for it.
    loose = client.with_options(_extra_kwargs={"_strict_response_validation": False})
    for piece in loose.completions.create(**asked, stream=True, stream_options={"include_usage": True}):
        last = piece
        for choice in piece.choices:
            texts[choice.index] += choice.text
            ends[choice.index] = choice.finish_reason or ends[choice.index]
            if choice.logprobs is not None:
                tokens[choice.index] += choice.logprobs.tokens or []
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert texts[choice.index] == choice.text
        assert tokens[choice.index] == choice.logprobs.tokens
        assert ends[choice.index] == choice.finish_reason
    assert last is not None and last.usage is not None and whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens


def test_stop_strings_end_a_reply_and_are_no_part_of_it(client: openai.OpenAI, engine: Engine) -> None:
    whole = client.completions.create(model="tiny", prompt="The sun", max_tokens=40).choices[0].text
    stop = whole[7:11]
    reply = client.completions.create(model="tiny", prompt="The sun", max_tokens=40, stop=["nowhere to be found", stop])
    assert reply.choices[0].text == whole[: whole.index(stop)]
    assert reply.choices[0].finish_reason == "stop"
    assert idle(engine)


def test_what_is_asked_again_is_not_read_again(client: openai.OpenAI) -> None:
    prompt = "What was said before is not read again. " * 12
    first, second = (client.completions.create(model="tiny", prompt=prompt, max_tokens=4) for _ in range(2))
    assert second.usage is not None and second.usage.prompt_tokens_details is not None
    assert (second.usage.prompt_tokens_details.cached_tokens or 0) >= 64
    assert first.choices[0].text == second.choices[0].text


# ---- chats ------------------------------------------------------------------
ASK: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def test_a_chat(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": ASK,
        "max_completion_tokens": 12,
        "logprobs": True,
        "top_logprobs": 4,
    }
    reply = client.chat.completions.create(**asked)
    (choice,) = reply.choices
    assert choice.message.role == "assistant" and choice.finish_reason == "length"
    assert choice.logprobs is not None and choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 12
    for one in choice.logprobs.content:
        assert len(one.top_logprobs) == 4 and one.bytes is not None
        assert one.top_logprobs[0].token == one.token, "the default is the most likely"
    text, count = "", 0
    for piece in client.chat.completions.create(**asked, stream=True):
        delta = piece.choices[0].delta
        text += (delta.content or "") + (getattr(delta, "reasoning_content", None) or "")
        count += len((piece.choices[0].logprobs and piece.choices[0].logprobs.content) or [])
    thought = getattr(choice.message, "reasoning_content", None) or ""
    assert text == thought + (choice.message.content or "")
    assert count == 12


def test_json_that_fits_a_schema(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["Ada", "Bob"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    for seed in range(3):
        reply = client.chat.completions.create(
            model="tiny",
            messages=ASK,
            temperature=1.0,
            seed=seed,
            response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
            max_completion_tokens=300,
            extra_body={"enable_thinking": False},
        )
        assert reply.choices[0].finish_reason == "stop"
        found = json.loads(reply.choices[0].message.content or "")
        assert found["name"] in ("Ada", "Bob") and 0 <= found["age"] <= 99


@pytest.mark.parametrize(
    ("wanted", "fits"),
    [({"regex": "[ab]{3}-[0-9]{2}"}, r"[ab]{3}-[0-9]{2}"), ({"choice": ["yes", "no", "may be"]}, "yes|no|may be")],
)
def test_texts_that_fit(client: openai.OpenAI, wanted: dict[str, Any], fits: str) -> None:
    import re

    reply = client.completions.create(
        model="tiny", prompt="So:", temperature=1.0, max_tokens=50, extra_body={"structured_outputs": wanted}
    )
    assert re.fullmatch(fits, reply.choices[0].text)


def test_thoughts_end_with_their_budget(raw: httpx.Client, tokenizer: Tokenizer) -> None:
    think = tokenizer.token_id("<think>")
    asked = {
        "model": "tiny", "messages": ASK, "thinking_budget": 5, "temperature": 1.0, "seed": 1, "logprobs": True,
        "logit_bias": {think: 100}, "structured_outputs": {"choice": ["yes", "no"]},
    }  # fmt: skip
    (choice,) = raw.post("/v1/chat/completions", json=asked).json()["choices"]
    tokens = [one["token"] for one in choice["logprobs"]["content"]]
    assert tokens[0] == "<think>" and tokens.index("</think>") <= 6
    assert choice["message"]["content"] in ("yes", "no")
    assert choice["message"]["reasoning_content"] == choice["message"]["reasoning"]
    asked |= {"reasoning_effort": "none"}
    (choice,) = raw.post("/v1/chat/completions", json=asked).json()["choices"]
    assert choice["message"]["content"] in ("yes", "no") and "reasoning" not in choice["message"]


TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Paris"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("weather", "time")
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("choice", "end"), [("required", "tool_calls"), ({"type": "function", "function": {"name": "time"}}, "stop")]
)
def test_calls_that_are_required(client: openai.OpenAI, choice: Any, end: str, stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": "tiny", "messages": ASK, "tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False,
        "temperature": 1.0, "max_completion_tokens": 300, "extra_body": {"enable_thinking": False},
    }  # fmt: skip
    if stream:
        deltas = [piece.choices[0] for piece in client.chat.completions.create(**asked, stream=True)]
        calls: list[Any] = [call for one in deltas for call in one.delta.tool_calls or []]
        reason = deltas[-1].finish_reason
    else:
        reply = client.chat.completions.create(**asked)
        calls, reason = list(reply.choices[0].message.tool_calls or []), reply.choices[0].finish_reason
    (call,) = calls
    assert call.type == "function" and call.id
    assert call.function.name in (("time",) if isinstance(choice, dict) else ("time", "weather"))
    assert json.loads(call.function.arguments)["city"] in ("Rome", "Paris")
    assert reason == end


# ---- what is refused --------------------------------------------------------
@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/completions", {"model": "tiny"}, 400, "prompt is missing"),
        ("/v1/completions", {"prompt": "x"}, 400, "model is missing"),
        ("/v1/completions", {"model": "tiny", "prompt": ""}, 200, ""),
        ("/v1/completions", {"model": "tiny", "prompt": []}, 400, "prompt is empty"),
        ("/v1/completions", {"model": "tiny", "prompt": [1, 10**6]}, 400, "holds the id 1000000"),
        ("/v1/completions", {"model": "tiny", "prompt": [5] * 2100}, 400, "2100 tokens, but"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "temprature": 1}, 400, "did you mean 'temperature'"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "temperature": 3}, 400, "temperature: input should be"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "temperature": "1"}, 400, "temperature: "),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "logit_bias": {"a": 1}}, 400, "takes ids of tokens"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "logit_bias": {"999999": 1}}, 400, "names the id 999999"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "stop": [""]}, 400, "stop"),
        ("/v1/completions", {"model": "tiny", "prompt": "x", "structured_outputs": {"regex": "("}}, 400, "regex"),
        ("/v1/completions", {"model": "other", "prompt": "x"}, 404, "there is no model 'other'"),
        ("/v1/chat/completions", {"model": "tiny", "messages": []}, 400, "messages"),
        ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "usr", "content": "x"}]}, 400, "'user'"),
        ("/v1/chat/completions", {"model": "tiny", "messages": ASK, "top_logprobs": 2}, 400, "needs logprobs"),
        ("/v1/chat/completions", {"model": "tiny", "messages": ASK, "tool_choice": "required"}, 400, "no tools"),
        ("/v1/nothing", {}, 404, "there is nothing at /v1/nothing"),
        ("/tokenize", {}, 400, "one of prompt and messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused(raw: httpx.Client, path: str, body: Any, status: int, said: str) -> None:
    answer = raw.post(path, json=body)
    assert answer.status_code == status, answer.text
    if status != 200:
        error = answer.json()["error"]
        assert said in error["message"]
        assert set(error) == {"message", "type", "param", "code"}


def test_bodies_that_are_none(raw: httpx.Client) -> None:
    answer = raw.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "not JSON" in answer.json()["error"]["message"]
    assert raw.post("/v1/completions", content=b"x" * 200_000).status_code == 413
    assert raw.post("/v1/completions", content=iter([b"x" * 60_000] * 3)).status_code == 413
    assert raw.get("/v1/completions").status_code == 405


def test_without_a_key_only_public_paths_answer(shared: Served) -> None:
    with httpx.Client(base_url=shared.address) as stranger:
        assert stranger.get("/health").json() == {"status": "ready"}
        paths = {route.path for route in make_app(Shared(Settings())).routes}  # pyright: ignore[reportAttributeAccessIssue]
        for path in [*sorted(paths - PUBLIC_PATHS), "/metrics", "/ui../metrics", "//v1/models", "/health/x"]:
            for method in ("GET", "POST"):
                answer = stranger.request(method, path.replace("{name:path}", "tiny"))
                assert answer.status_code in (401, 404, 405), (path, answer.status_code)
                if answer.status_code == 401:
                    error = answer.json()["error"]
                    assert error["type"] == "authentication_error"
                    assert path.startswith("/v1/messages") or error["code"] == "invalid_api_key"
        wrong = stranger.get("/v1/models", headers={"Authorization": f"Bearer {KEY}x"})
        assert wrong.status_code == 401 and KEY not in wrong.text
        assert stranger.get("/v1/models", headers={"x-api-key": "another"}).status_code == 200


def test_pages_of_other_origins(shared: Served) -> None:
    with httpx.Client(base_url=shared.address) as page:
        asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
        good = page.options("/v1/chat/completions", headers={"Origin": "https://page.example", **asks})
        bad = page.options("/v1/chat/completions", headers={"Origin": "https://evil.example", **asks})
        assert good.headers["access-control-allow-origin"] == "https://page.example"
        assert "access-control-allow-origin" not in bad.headers


def test_who_goes_frees_the_slot(raw: httpx.Client, engine: Engine) -> None:
    long = {"model": "tiny", "prompt": "The sun", "max_tokens": 1900, "ignore_eos": True}
    with raw.stream("POST", "/v1/completions", json={**long, "stream": True}) as answer:
        next(answer.iter_lines())
        assert engine.scheduler.busy
    assert idle(engine)
    with pytest.raises(httpx.ReadTimeout):
        raw.post("/v1/completions", json={**long, "n": 3}, timeout=0.05)
    assert idle(engine)


def test_too_many_are_told_to_come_back(raw: httpx.Client, engine: Engine) -> None:
    answer = raw.post("/v1/completions", json={"model": "tiny", "prompt": "x", "n": 20, "max_tokens": 2})
    assert answer.status_code == 429
    assert answer.headers["retry-after"]
    assert answer.json()["error"]["type"] == "rate_limit_error"
    assert idle(engine)


def test_tokens_of_text_and_back(raw: httpx.Client, tokenizer: Tokenizer) -> None:
    found = raw.post("/tokenize", json={"prompt": "Hello world"}).json()
    assert found["tokens"] == tokenizer.encode("Hello world") and found["count"] == len(found["tokens"])
    assert raw.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"prompt": "Hello world"}
    beyond = raw.post("/detokenize", json={"tokens": [*found["tokens"], tokenizer.vocab_size]})
    assert beyond.status_code == 400 and beyond.json()["error"]["param"] == "tokens"
    chat = raw.post("/tokenize", json={"messages": ASK}).json()["tokens"]
    assert chat == tokenizer.encode_chat(ASK, add_generation_prompt=True)


def test_metrics_come_back_to_nothing(raw: httpx.Client, engine: Engine) -> None:
    assert idle(engine)
    text = raw.get("/metrics").text
    for name in ("qmax_running", "qmax_unfinished", "qmax_pages_held"):
        assert f"\n{name} 0.0\n" in text
    assert "qmax_generated_tokens_total" in text


def test_paths_are_told_without_what_callers_made_up() -> None:
    assert known_path("/v1/responses/resp_1/input_items") == "/v1/responses/{id}"
    assert known_path("/v1/models/a") == "/v1/models/{name}"
    assert known_path("/v1/models") == "/v1/models"
    assert known_path("/secret") == "other"
