"""A server with a small random model, in a thread of this process, on a port of its own."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import jax
import uvicorn

from model.config import ModelConfig, MoEConfig
from model.tokenizer import Tokenizer
from model.transformer import Transformer
from serve.api.app import Shared, make_app, watch
from serve.api.runner import Runner
from serve.api.service import Defaults, Service
from serve.engine import Engine

ROOT = Path(__file__).resolve().parent.parent

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Rome", "Paris"]}},
    "required": ["city"],
    "additionalProperties": False,
}
CHAT_TOOLS = [{"type": "function", "function": {"name": "time", "parameters": SCHEMA}}]
REPLY = (
    "<think>\nWhere is it?\n</think>\n\nI shall look. <tool_call>\n"
    '{"name": "time", "arguments": {"city": "Rome", "high": "\\ud800"}}\n</tool_call>\n'
    '<tool_call>{"name": "time", "arguments": {}}</tool_call> So be it.'
)
"""All that a model may write; half a surrogate pair, which no UTF-8 can hold, among it."""


@dataclass
class Served(Shared):
    """What the server has, and where it listens."""

    address: str = ""


def tiny_tokenizer() -> Tokenizer:
    return Tokenizer.load(ROOT / "configs" / "demo_data" / "tiny_tokenizer")


def tiny_engine(tokenizer: Tokenizer, slots: int = 4, *, deterministic: bool = False) -> Engine:
    moe = MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=16)
    config = ModelConfig(tokenizer.vocab_size, 32, 2, 4, 2, 8, 48, max_positions=2048, moe=moe)
    model = jax.jit(lambda: Transformer(config, jax.random.key(0)))()
    return Engine(model, tokenizer, slots=slots, deterministic=deterministic)


@contextmanager
def serving(
    shared: Served,
    engine: Engine | None = None,
    queue: int = 64,
    models: Mapping[str, Defaults] | None = None,
    tokenizer: Tokenizer | None = None,
) -> Iterator[Served]:
    """The server while the block runs; its replies are the most likely tokens unless a request says otherwise.

    models: names that the one model is served under, with defaults of each. tokenizer: of `engine`.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    models = models or {"tiny": Defaults(temperature=0.0)}
    engine = engine or tiny_engine(tokenizer)

    async def start(shared: Shared) -> None:
        runner = Runner(engine, asyncio.get_running_loop(), queue)
        shared.services = {
            name: Service(name, engine, tokenizer, runner, shared.metrics, own) for name, own in models.items()
        }
        shared.state = "ready"
        watch(shared.metrics, list(shared.services.values()))

    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    shared.address = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = uvicorn.Server(uvicorn.Config(make_app(shared, start), log_config=None))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while shared.state != "ready":
        time.sleep(0.01)
    try:
        yield shared
    finally:
        server.should_exit = True
        thread.join()


def idle(engine: Engine) -> bool:
    """Whether all has been given back, soon."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if not engine.scheduler.busy and engine.scheduler.pools[0].held == 0:
            return True
        time.sleep(0.01)
    return False


@contextmanager
def served_by_verb(model: Path, *words: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`qmax serve` in a process of its own, and its address; it listens, and may still be loading."""
    command = [sys.executable, str(ROOT / "qmax.py"), "serve", str(model), "--port", "0", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            found = re.search(r"http://\S+", process.stderr.readline())
            assert found is not None
            yield process, found.group()
        finally:
            process.kill()
