"""Law: `qmax serve` says at once what is wrong with what it was given, tells how far it is, and ends politely."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import qmax
from serve.feedback import Feedback
from tests.serving import ROOT, served_by_verb

MODEL = ROOT / "tests" / "data" / "stories260K.bin"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("nowhere", "nowhere does not exist"),
        ("MODEL --host 0.0.0.0", "no API key; put keys into QMAX_API_KEYS"),
        ("MODEL --api-key-file EMPTY", "holds no API key"),
        ("MODEL --api-key-file nowhere", "cannot read API keys from nowhere"),
        ("MODEL --port TAKEN", "cannot listen at 127.0.0.1"),
        ("MODEL --host nowhere.invalid --allow-anyone", "cannot listen at nowhere.invalid"),
        ("MODEL --feedback /proc/no/rows.jsonl", "cannot write feedback to /proc/no/rows.jsonl"),
        ("MODEL MODEL", "two models are called"),
        ("MODEL MODEL --name one", "2 models came with 1 names"),
        ("MODEL --slot 4", "did you mean '--slots'"),
        ("MODEL --slots 0", "slots=0 must be 1 or more"),
        ("MODEL --pages -1", "pages=-1 must be 1 or more"),
    ],
)
def test_what_cannot_be_served_is_one_sentence(
    words: str, said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QMAX_API_KEYS", raising=False)
    (tmp_path / "keys").write_text("# none\n\n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        places = {"MODEL": str(MODEL), "EMPTY": str(tmp_path / "keys"), "TAKEN": str(taken.getsockname()[1])}
        given = [places.get(word, word) for word in words.split()]
        given += [] if "--port" in given else ["--port", "0"]
        assert qmax.main(["serve", *given]) == 2
    told = capfd.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("qmax: ") and said in told


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server of its own process, and its address."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QMAX_API_KEYS", "one,two")
        with served_by_verb(MODEL, "--name", "stories") as found:
            yield found


def test_it_tells_how_far_it_is_and_ends_politely(server: tuple[subprocess.Popen[str], str]) -> None:
    process, address = server
    with httpx.Client(base_url=address, headers={"x-api-key": "two"}, timeout=120) as client:
        states = []
        while not states or states[-1] != "ready":
            answer = client.get("/health")
            states.append(answer.json()["status"])
            assert answer.status_code == (200 if states[-1] == "ready" else 503)
            if states[-1] == "loading":
                refused = client.post("/v1/completions", json={"model": "stories", "prompt": "x"})
                assert refused.status_code in (200, 503)
            time.sleep(0.05)
        assert states[0] == "loading"
        asked = {"model": "stories", "prompt": "Once", "max_tokens": 400, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/completions", json=asked) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]" and '"finish_reason":"length"' in rest[-2], "what had begun was finished"
    assert process.stderr is not None
    said = process.stderr.read()
    assert process.wait(timeout=60) == 0
    assert "Once" not in said, "prompts are not in the log"
    assert "stopping" in said and "Traceback" not in said


def test_rows_of_feedback_are_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"cut off')
    feedback = Feedback(path)
    prompt = [{"role": "user", "content": "é" * 1000}]
    threads = [
        threading.Thread(target=lambda: [feedback.vote("m", prompt, "r", True) for _ in range(20)]) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first, *rest = path.read_text(encoding="utf-8").splitlines()
    assert first == '{"cut off' and len(rest) == 80 and len(set(rest)) <= 80
    Feedback(tmp_path / "new.jsonl")
    assert (tmp_path / "new.jsonl").stat().st_mode & 0o077 == 0, "what people said is theirs"
