"""Law: each measurement of serving runs, compares like with like, and has its row in the table."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from bench import __main__ as bench
from bench import serve, serving
from bench.context import Bench
from bench.processes import run_job
from bench.serving_http import PAUSE, crowd, processor_seconds, server
from bench.shapes import TOY


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.engine.CHUNKS", {"other": ((1, 64),)})  # one program for prompts instead of three


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("models") / "toy"
    assert serving.write(TOY, str(folder))["bytes"] == 4 * TOY.model.parameters_total
    return str(folder)


def test_the_steps_alone_are_those_of_the_engine() -> None:
    vocab = TOY.model.vocab_size
    engine = serving.Engine(serving.random_model(TOY.model), serving.Words(vocab), slots=4)
    decoding = serving.Decoding(engine, vocab, 4)
    assert decoding.run(9) > 0
    sent = list(decoding.steps)
    assert decoding.drawn >= 4 * 4 and all(not shape.tokens for shape, _ in sent)
    assert decoding.again() > 0 and decoding.steps == sent
    assert 0 < decoding.host(9) < 1
    assert engine.generate(decoding.prompts, serving.SamplingParams(max_tokens=2, seed=0)), "the device is itself again"


def test_requests_at_random_times_are_all_answered(model: str) -> None:
    prompts = [[token] * 8 for token in (5, 6)]
    found = serving.arrivals(model, prompts, [0.0, 0.3], 6, 1)
    assert [len(reply) for reply in found["replies"]] == [6, 6]
    assert found["samples"]["rate"][0] <= 12 / 0.3, "the last one has to come first"
    assert 0 < found["samples"]["latency"][0] <= 12 / found["samples"]["rate"][0]


def test_a_shared_beginning_is_read_once() -> None:
    found = serving.prefix(TOY, repeats=1, shared=128, linear=True)
    assert len(found["samples"]["first"]) == len(found["samples"]["second"]) == 1


def test_all_streams_are_whole(model: str) -> None:
    with server([sys.executable, "-m", "bench.serving_http"], model, 3) as (process, address):
        seconds, count = asyncio.run(crowd(address, [[5] * 8] * 3, 6))
        assert count == 3 * 6 and seconds > 5 * PAUSE
        assert processor_seconds(process) > 0


def test_the_report_has_a_row_for_everything(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    canned: dict[str, dict[str, list[float]]] = {
        "scheduling": {"engine 1": [1.0], "bare 1": [2.0], "engine 2": [3.0], "bare 2": [4.0], "host": [0.001]},
        "arrivals": {"rate": [10.0], "latency": [0.5]},
        "prefix": {"first": [0.3], "second": [0.1]},
        "reward": {"draws": [8.0], "draws alone": [10.0], "update": [2.0], "sft": [1.0], "handover share": [0.01]},
        "http": {"http": [5.0], "engine": [10.0], "server": [0.002], "added": [0.002]},
        "int8": {"int8 bytes": [25.0], "same bytes": [100.0]}
        | {f"{kind} {rows}": [1.0] for kind in ("int8", "same") for rows in (1, 16)},
    }
    peer = {"rate, who waits": [4.0], "rate, all": [5.0], "latency, who waits": [1.0], "latency, all": [2.0]}

    def ours(self: Bench, job: dict[str, Any], devices: int = 1) -> dict[str, Any]:
        if job["what"] == "limits":
            return {"flops": 1.0, "bandwidth": 1.0, "device": "cpu", "versions": {}}
        return {"samples": canned[job.get("job", job)["what"]], "replies": [[1]], "other_cpu": 0.5}

    def theirs(self: Bench, job: dict[str, Any]) -> list[dict[str, Any]]:
        return [{"samples": peer if job["what"] == "arrivals" else {"import": [9.0]}, "replies": [[1]]}]

    once = cache(
        lambda: run_job([sys.executable, "-m", "bench.first_token", model, repr(time.monotonic()), "8"], {}, {})
    )
    monkeypatch.setattr(serve, "run_job", lambda *_: once())
    monkeypatch.setattr(serve, "ROWS", (1, 2))
    monkeypatch.setattr(Bench, "ours", ours)
    monkeypatch.setattr(Bench, "transformers_if_there", theirs)
    monkeypatch.setattr(Bench, "model", lambda self, shape: model)
    files = {name: tmp_path / name for name in ("json", "markdown", "html")}
    words = [word for name, file in files.items() for word in (f"--{name}", str(file))]
    measured = ["--shape", "toy", "--rounds", "1", "--repeats", "1", "--what", ",".join(serve.WHAT)]
    assert bench.main([*measured, "--peer-python", sys.executable, *words]) == 0
    page, rows = files["markdown"].read_text(), json.loads(files["json"].read_text())["compared"]
    assert "16 at random times, toy: transformers, a batch of all: 2" in files["html"].read_text()
    toy = f"{serve.COMING} at random times | toy"
    for line in (
        "| ~ decode 2 | toy | tokens/s | 3 (0%) | its steps alone | 4 (0%) | 0.75 (0%) | 0.95 times |",
        f"| ~ {toy} | completed tokens/s | 10 (0%) | transformers, a batch of all | 5 (0%) | 2.00 (0%) | 1.5 times |",
        f"| ~ {toy} | s on average | 0.5 (0%) | transformers, a batch of who waits | 1 (0%) | 2.00 (0%) |",
        "| reward: drawing | toy | tokens/s | 8 (0%) | the engine alone | 10 (0%) | 0.80 (0%) | 0.8 times |",
        "| reward: update | toy | s | 2 (0%) | plain training | 1 (0%) | 0.50 (0%) | 0.8 times |",
        "| 2 streams | toy | tokens/s | 5 (0%) | the engine alone | 10 (0%) | 0.50 (0%) |  |",
        "| int8 weights | toy | bytes | 25 B | float32 | 100 B | 4.00 (0%) | 3.33 times |",
    ):
        assert line in page, page
    parts = [row for row in rows if row["what"].startswith("- ")]
    (whole,) = (row for row in rows if row["what"] == "first token of a new process")
    assert sum(row["ours"][0] for row in parts) == pytest.approx(whole["ours"][0])
