"""Law: clients that others have written work as they are: the official one of Node, and LangChain's."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import operator
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from serve.api.app import Settings
from tests.serving import ROOT, Served, serving

CLIENTS = ROOT / "tests" / "clients"
CACHE = ROOT / ".pytest_cache" / "clients"
KEY = "secret-of-the-tests"
NO_NETWORK = (
    "ENOTFOUND|EAI_AGAIN|ENETUNREACH|EHOSTUNREACH|ECONNREFUSED|ECONNRESET|ETIMEDOUT|ENOTCACHED|ERR_SOCKET_TIMEOUT"
)
"""What npm says when it cannot reach its registry."""


@pytest.fixture(scope="module")
def shared() -> Iterator[Served]:
    with serving(Served(Settings(keys=(KEY,)))) as served:
        yield served


# ---- Node ---------------------------------------------------------------------------
NODE_CHECKS = (
    "models",
    "chat",
    "streamed chat",
    "forced call",
    "json schema",
    "completions",
    "unknown model",
    "bad field",
    "no key",
)


def installed() -> Path:
    """A folder with the scripts and what they import; installed once, seen by others when it is whole."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not on this machine")
    package = (CLIENTS / "package.json").read_bytes()
    folder = CACHE / hashlib.sha256(package).hexdigest()[:16]
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    made = Path(tempfile.mkdtemp(dir=CACHE))
    try:
        (made / "package.json").write_bytes(package)
        words = ["npm", "install", "--no-package-lock", "--ignore-scripts", "--no-audit", "--no-fund"]
        env = {**os.environ, "npm_config_fetch_retries": "0", "npm_config_prefer_offline": "true"}
        done = subprocess.run(words, cwd=made, env=env, capture_output=True, text=True, timeout=300)
        unreachable = re.search(NO_NETWORK, done.stderr)
        if done.returncode and unreachable:
            pytest.skip(f"npm cannot reach its registry ({unreachable.group()})")
        assert done.returncode == 0, done.stderr
        with contextlib.suppress(OSError):  # another process was first
            made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return folder


@pytest.fixture(scope="module")
def seen_by_node(shared: Served) -> dict[str, str | None]:
    """What went wrong in each check of clients/openai.mjs."""
    script = shutil.copy(CLIENTS / "openai.mjs", installed())
    done = subprocess.run(["node", script, shared.address, KEY], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert tuple(found) == NODE_CHECKS
    return found


@pytest.mark.parametrize("name", NODE_CHECKS)
def test_the_official_client_of_node(seen_by_node: dict[str, str | None], name: str) -> None:
    assert seen_by_node[name] is None, seen_by_node[name]


# ---- LangChain ----------------------------------------------------------------------
def talking(shared: Served, **more: Any) -> ChatOpenAI:
    """LangChain's client of the server; thoughts are off, unless `more` says otherwise."""
    asked = {"temperature": 0, "max_completion_tokens": 300, "extra_body": {"enable_thinking": False}, **more}
    return ChatOpenAI(model="tiny", base_url=f"{shared.address}/v1", api_key=SecretStr(KEY), max_retries=0, **asked)


def joined(pieces: Iterator[Any]) -> AIMessage:
    """The message that the pieces of a stream make."""
    return functools.reduce(operator.add, pieces)


def test_langchain_gets_a_reply_whole_and_streamed(shared: Served) -> None:
    model = talking(shared, max_completion_tokens=12, stream_usage=True)
    whole = model.invoke([("system", "Be brief."), ("user", "Hello")])
    assert whole.response_metadata["finish_reason"] == "length"
    assert whole.response_metadata["model_name"] == "tiny"
    total = joined(model.stream([("system", "Be brief."), ("user", "Hello")]))
    assert total.content == whole.content != ""
    assert whole.usage_metadata is not None and total.usage_metadata is not None
    assert whole.usage_metadata["output_tokens"] == 12
    for name in ("input_tokens", "output_tokens", "total_tokens"):
        assert total.usage_metadata[name] == whole.usage_metadata[name]


def weather(city: Literal["Rome", "Paris"]) -> str:
    """The weather in a city."""
    return f"It rains in {city}."


def test_langchain_calls_a_tool_and_answers_with_what_it_said(shared: Served) -> None:
    model = talking(shared, temperature=1, seed=3)
    asked: list[Any] = [HumanMessage("Does it rain?")]
    for choice in ("weather", "any"):
        bound = model.bind_tools([weather], tool_choice=choice, strict=True, parallel_tool_calls=False)
        reply = bound.invoke(asked)
        (call,) = reply.tool_calls
        assert call["name"] == "weather" and call["args"]["city"] in ("Rome", "Paris")
        total = joined(bound.stream(asked))
        assert [one["args"] for one in total.tool_calls] == [call["args"]], "the same seed, the same call"
        result = ToolMessage(weather(**call["args"]), tool_call_id=call["id"])
        again = talking(shared, max_completion_tokens=8).bind_tools([weather]).invoke([*asked, reply, result])
        assert again.usage_metadata is not None and reply.usage_metadata is not None
        assert again.usage_metadata["input_tokens"] > reply.usage_metadata["input_tokens"]


class Person(BaseModel):
    """Who somebody is."""

    name: Literal["Ada", "Bob"]
    age: int


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain_gets_what_fits_a_schema(shared: Served, method: Any) -> None:
    for seed in range(2):
        model = talking(shared, temperature=1, seed=seed)
        found = model.with_structured_output(Person, method=method, strict=True).invoke("Who is it?")
        assert isinstance(found, Person) and found.name in ("Ada", "Bob")
