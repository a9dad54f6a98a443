"""Law: an engine over several processes gives the replies of one, led by process 0 or asked by all alike."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from typing import Any

import httpx
import numpy as np
import pytest
from test_processes import ROOT, finish, free_port

from tests.engine_process import MODEL, WORDS, replies


def start(*command: str, device_count: int) -> subprocess.Popen[str]:
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    settings = {**os.environ, "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={device_count}"}
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings, cwd=ROOT
    )


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return replies(None, led=False)


@pytest.mark.parametrize("kind", ["led", pytest.param("alike", marks=pytest.mark.full)])
def test_two_processes_reply_as_one(alone: dict[str, Any], kind: str) -> None:
    address = f"127.0.0.1:{free_port()}"
    words = ("-m", "tests.engine_process", address, "2")
    started = [start(*words, str(index), kind, device_count=2) for index in range(2)]
    said = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    found = [json.loads(out.splitlines()[-1]) for out, _ in said]
    assert (found[1] == {}) if kind == "led" else (found[1] == found[0])
    assert found[0]["tokens"] == alone["tokens"]
    for name in ("logprobs", "scored"):
        for one, other in zip(found[0][name], alone[name], strict=True):
            np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.full
def test_a_server_of_two_processes(alone: dict[str, Any]) -> None:
    """They serve as one, and the second ends when the first is told to."""
    hosts = ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2", "--process"]
    words = ["qmax.py", "serve", str(MODEL), "--mesh.tensor", "2", "--slots", "2", "--port", "0", *hosts]
    first, second = (start(*words, str(index), device_count=1) for index in range(2))
    try:
        assert first.stderr is not None
        address = re.search(r"http://\S+", first.stderr.readline())
        assert address is not None
        with httpx.Client(base_url=address.group(), timeout=120) as client:
            while client.get("/health").json()["status"] != "ready":
                time.sleep(0.1)
            asked = {"model": MODEL.name, "prompt": WORDS[0], "max_tokens": 20, "temperature": 0}
            text = client.post("/v1/completions", json=asked).json()["choices"][0]["text"]
            second.send_signal(signal.SIGTERM)
            assert client.post("/v1/completions", json=asked).json()["choices"][0]["text"] == text
        assert text and len(text) > 20
        first.send_signal(signal.SIGTERM)
    finally:
        ended = finish([first, second])
    assert [code for code, _ in ended] == [0, 0], ended
