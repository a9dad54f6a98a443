"""The server beside its own engine: the same requests as streams over HTTP, and without it; what the host needs alone.

`python -m bench.serving_http ARGUMENTS` is `qmax serve ARGUMENTS` on a device that takes a fixed time and does nothing,
so that the processor's time is the server's own; and so is what a step takes longer than that time.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from bench.ours import FIRST_TOKEN, Result
from serve.engine import Engine
from serve.programs import Shape as Program
from serve.sampling_params import SamplingParams
from sharding.runtime import with_huge_pages

ROOT = Path(__file__).resolve().parent.parent

PAUSE = 0.02
"""Seconds of a step of the device that does nothing; like any device it begins one when the one before has ended."""

LONGER = 6
"""Times as many tokens, so that how replies begin does not count beside how they go on."""


@contextmanager
def server(words: Sequence[str], model: str, slots: int) -> Iterator[tuple[int, str]]:
    """A server of its own process: its id and address, ready."""
    command = [*words, "serve", model, "--port", "0", "--name", "model", "--slots", str(slots)]
    environment = {**os.environ, "GLIBC_TUNABLES": with_huge_pages()}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    with process:
        try:
            address, said = "", ""
            for said in process.stderr:
                found = re.search(r"listening at (http://\S+)", said)
                address = found.group(1) if found else address
                if said.startswith("serving "):
                    break
            else:
                raise RuntimeError(f"qmax serve ended: {said.strip()}")
            threading.Thread(target=process.stderr.read, daemon=True).start()  # or its log would fill the pipe
            yield process.pid, address
        finally:
            process.kill()


async def stream(address: str, prompt: Sequence[int], tokens: int, seed: int) -> int:
    """One streamed reply; its tokens as the server counts them. The bytes are read and not looked at before the end:
    the clients are on the machine that is measured."""
    where = urlsplit(address)
    reader, writer = await asyncio.open_connection(where.hostname, where.port)
    asked = {"model": "model", "prompt": list(prompt), "max_tokens": tokens, "seed": seed, "temperature": 1.0}
    body = json.dumps({**asked, "ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}})
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Connection: close\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    answer = (await reader.read()).decode()
    writer.close()
    counts = re.findall(r'"completion_tokens": ?(\d+)', answer)
    assert answer.startswith("HTTP/1.1 200") and "[DONE]" in answer and counts, answer[:500]
    return int(counts[-1])


async def crowd(address: str, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[float, int]:
    """Seconds of all replies at the same time, and their tokens."""
    start = time.perf_counter()
    counts = await asyncio.gather(*(stream(address, one, tokens, seed) for seed, one in enumerate(prompts)))
    return time.perf_counter() - start, sum(counts)


def http(model: str, repeats: int, tokens: int, rows: int, prompt: int) -> Result:
    """Tokens per second of `rows` replies at the same time, from sending to the last end: of `qmax serve`, and of the
    engine alone. On a device that takes no processor: processor seconds of a step of the server (`server`), and seconds
    that a step takes longer than the device needs (`added`)."""
    from model.load import load_model

    weights, tokenizer = load_model(model)
    engine = Engine(weights, tokenizer, slots=rows)
    engine.warm_up()
    prompts = np.random.default_rng(0).integers(FIRST_TOKEN, tokenizer.vocab_size, (rows, prompt)).tolist()
    sampling = SamplingParams(max_tokens=tokens, stop_ids=(), seed=0).variants(rows)
    samples: dict[str, list[float]] = {"http": [], "engine": [], "server": [], "added": []}
    with server([sys.executable, "qmax.py"], model, rows) as (pid, address):
        settle(pid)
        for turn in range(repeats + 1):
            seconds, count = asyncio.run(crowd(address, prompts, tokens))
            assert count == rows * tokens, f"{count} tokens came where {rows * tokens} were asked for"
            start = time.perf_counter()
            engine.generate(prompts, sampling)
            alone = time.perf_counter() - start
            if turn:
                samples["http"].append(count / seconds)
                samples["engine"].append(count / alone)
    with server([sys.executable, "-m", "bench.serving_http"], model, rows) as (pid, address):
        for turn in range(repeats + 1):
            before = processor_seconds(pid)
            short, count = asyncio.run(crowd(address, prompts, tokens))
            used = processor_seconds(pid) - before
            long, _ = asyncio.run(crowd(address, prompts, LONGER * tokens))
            if turn:
                samples["server"].append(used * rows / count)
                samples["added"].append((long - short) / ((LONGER - 1) * tokens) - PAUSE)
    return {"samples": samples}


def settle(pid: int) -> None:
    """Waits until a server has compiled what it compiles behind the first requests."""
    before = processor_seconds(pid) - 1
    while (now := processor_seconds(pid)) - before > 0.05:
        before = now
        time.sleep(0.5)


def processor_seconds(pid: int) -> float:
    """What a process has used so far."""
    import psutil

    times = psutil.Process(pid).cpu_times()
    return times.user + times.system


def hollow(argv: list[str]) -> int:
    """`qmax` on a device that draws token 4 for everybody, `PAUSE` seconds after it was asked."""
    import qmax
    from serve.device import Device

    class Drawn:
        free_at = 0.0

        def __init__(self, words: np.ndarray):
            self._words, self._ready = words, max(time.monotonic(), Drawn.free_at) + PAUSE
            Drawn.free_at = self._ready

        def copy_to_host_async(self) -> None:
            pass

        def __array__(self, *args: Any, **more: Any) -> np.ndarray:
            time.sleep(max(0.0, self._ready - time.monotonic()))
            return self._words

    def step(self: Device, shape: Program, *arrays: np.ndarray) -> Any:
        words = np.zeros((shape.rows, 2), np.int32)
        words[:, 0] = FIRST_TOKEN
        return Drawn(words), None

    def unmade(self: Device, shape: Program) -> Any:
        """What is not run need not be compiled."""

    Device.step = step
    Device._compile = unmade
    return qmax.main(argv)


if __name__ == "__main__":
    sys.exit(hollow(sys.argv[1:]))
