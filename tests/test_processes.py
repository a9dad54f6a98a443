"""Law: a run of several processes is the run of one: the same losses, and what ends one process ends or resumes all.

The processes meet over the loopback interface, with four emulated devices in all.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kill_campaign import ROOT, records, step_of, story, write_project

import qmax
from errors import UserError
from model.checkpoint.checkpoints import Checkpoints
from sharding.hosts import Hosts, find_hosts
from train.maintenance import metadata_server, notice

CONFIG = '''"""A run of a few seconds over the texts beside this file."""

from pathlib import Path

from configs.run import CheckpointConfig, DataConfig, OptimizerConfig, Run
from model.config import ModelConfig, MoEConfig

HERE = Path(__file__).parent


def run() -> Run:
    return Run(
        model=ModelConfig(
            vocab_size=0, hidden_size=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, intermediate_size=16,
            moe=MoEConfig(num_experts=4, experts_per_token=2, intermediate_size=16), max_positions=64,
        ),
        data=DataConfig(
            sources=(str(HERE / "a.jsonl"),), validation_fraction=0.1,
            tokenizer=str(HERE / "tokenizer"), sequence_length=32, batch_size=8, cache=str(HERE / "cache"),
        ),
        optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=4),
        checkpoint=CheckpointConfig(every=20),
        steps=200, validation_batches=1,
    )
'''
STEPS, EVERY = 24, 4
MESH = ("--mesh.data", "2", "--mesh.fsdp", "2")
WORDS = ("--steps", str(STEPS), "--checkpoint.every", str(EVERY))
PATIENCE_SECONDS = 4
LIMIT_SECONDS = 120


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mixture of experts, whose steps are short and few."""
    path = write_project(tmp_path_factory.mktemp("project")).with_name("few.py")
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def alone(config: Path) -> Path:
    """The run in one process that nobody disturbed."""
    out = config.parent / "alone"
    assert qmax.main(["train", str(config), "--out", str(out), *WORDS, *MESH]) == 0
    return out


def start(
    config: Path,
    out: Path,
    count: int,
    *words: str,
    mesh: Sequence[str] = MESH,
    only: int | None = None,
    address: str = "",
    **environment: str,
) -> list[Any]:
    """`qmax train` in `count` processes, which have four devices together; or `only` one of these."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ["XLA_FLAGS"])
    address = address or f"127.0.0.1:{free_port()}"
    command = [sys.executable, str(ROOT / "qmax.py"), "train", str(config), "--out", str(out), *WORDS, *mesh, *words]
    settings = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={4 // count}",
        "QMAX_HEARTBEAT_SECONDS": str(PATIENCE_SECONDS),
        **environment,
    }
    return [
        subprocess.Popen(
            [*command, "--coordinator", address, "--processes", str(count), "--process", str(index)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=settings,
        )
        for index in (range(count) if only is None else (only,))
    ]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def finish(processes: Sequence[Any]) -> list[tuple[int, str]]:
    """Exit code and stderr of each process, once all have ended; nobody waits for ever."""
    try:
        said = [process.communicate(timeout=LIMIT_SECONDS)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, words) for process, words in zip(processes, said, strict=True)]


def wait_for(processes: Sequence[Any], out: Path, step: int) -> None:
    """Returns when metrics.jsonl tells of `step`."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while step_of(out) < step:
        assert all(process.poll() is None for process in processes), finish(processes)
        assert time.monotonic() < deadline
        time.sleep(0.005)


def losses(out: Path) -> np.ndarray:
    """The loss of each step, each step once."""
    assert [record["step"] for record in records(out)] == list(range(1, STEPS + 1))
    return np.array([record["loss"] for record in records(out)])


def resume(config: Path, out: Path, *words: str) -> int:
    """Goes on in this process."""
    return qmax.main(["train", str(config), "--out", str(out), *WORDS, "--resume", *words])


def test_two_processes_give_the_losses_of_one(config: Path, alone: Path, tmp_path: Path) -> None:
    out, result = tmp_path / "two", tmp_path / "two.json"
    ended = finish(start(config, out, 2, "--json", str(result)))
    assert [code for code, _ in ended] == [0, 0], ended
    np.testing.assert_allclose(losses(out), losses(alone), rtol=1e-6)  # the sums of one process run in another order
    assert [record["tokens"] for record in records(out)] == [record["tokens"] for record in records(alone)]
    held_out = [[r["validation_loss"] for r in records(run) if "validation_loss" in r] for run in (out, alone)]
    np.testing.assert_allclose(*held_out, rtol=1e-6)
    assert Checkpoints(out / "checkpoints", keep=2).latest_good(pytest.fail) == STEPS
    assert len(list((out / "tensorboard").iterdir())) == 1
    assert json.loads(result.read_text())["last"]["loss"] == losses(out)[-1]
    assert f"{STEPS}/{STEPS}" in ended[0][1]
    assert all(line.startswith("[Gloo]") for line in ended[1][1].splitlines()), "process 0 speaks for all"


@pytest.mark.full
def test_reward_in_two_processes_gives_the_steps_of_one(config: Path, tmp_path: Path) -> None:
    rows = [{"prompt": word, "answer": word * 2} for word in ("the", "a", "cat", "sat", "on", "mat", "dog", "ran")]
    (tmp_path / "words.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("--objective", "rl", "--rl.tasks", f"jsonl:{tmp_path / 'words.jsonl'}?grader=chrf", "--data.sources=")
    words += ("--data.sequence-length", "64", "--rl.prompts", "4", "--rl.samples", "4", "--rl.max-new-tokens", "6")
    words += ("--rl.validation-problems", "4", "--steps", "2", "--checkpoint.every", "2")
    for count in (1, 2):
        for code, said in finish(start(config, tmp_path / str(count), count, *words)):
            assert code == 0, said
    one, two = ([story(record) for record in records(tmp_path / name)] for name in ("1", "2"))
    assert [record["step"] for record in two] == [0, 1, 2]
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_allclose(b[key], a[key], rtol=1e-5, atol=1e-5, err_msg=key)
        assert b.get("logprob_gap_max", 0) < 1e-4, "what was sampled over both is what both learn from"


@pytest.mark.full
def test_four_processes_give_the_bits_of_two(config: Path, tmp_path: Path) -> None:
    for count in (2, 4):
        for code, said in finish(start(config, tmp_path / str(count), count)):
            assert code == 0, said
    assert [story(record) for record in records(tmp_path / "4")] == [
        story(record) for record in records(tmp_path / "2")
    ]


@pytest.mark.full
def test_asked_killed_and_resumed_in_other_numbers(config: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stopped = stop_one(config, out, 4, signal.SIGTERM)
    # More slices and fewer read on at the same place of the data.
    for mesh in (("--mesh.data", "4", "--mesh.fsdp", "2"), ("--mesh.data", "1", "--mesh.fsdp", "2")):
        again = tmp_path / "-".join(mesh)
        shutil.copytree(out, again)
        assert resume(config, again, *mesh) == 0
        np.testing.assert_allclose(losses(again), losses(alone), rtol=1e-5)
    processes = start(config, out, 2, "--resume")
    kill_one(processes, 1, out, stopped + 2)
    assert resume(config, out, *MESH) == 0
    np.testing.assert_allclose(losses(out), losses(alone), rtol=1e-6)


def stop_one(config: Path, out: Path, count: int, number: signal.Signals) -> int:
    """A run of which one process is asked to stop; returns the step at which all stopped."""
    processes = start(config, out, count, "--stopped-code", "75")
    wait_for(processes, out, 2)
    processes[1].send_signal(number)
    ended = finish(processes)
    assert [code for code, _ in ended] == [75] * count, ended
    stopped = step_of(out)
    assert 2 <= stopped < STEPS
    name = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
    assert f"stopped by {name} of process 1 at step {stopped} of {STEPS}; it is saved" in ended[0][1]
    assert Checkpoints(out / "checkpoints", keep=2).latest_good(pytest.fail) == stopped
    return stopped


def kill_one(processes: Sequence[Any], victim: int, out: Path, step: int) -> None:
    """Kills a process of a run past a step; the others end by themselves, and say why."""
    wait_for(processes, out, step)
    processes[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    ended = finish(processes)
    assert time.monotonic() - killed < PATIENCE_SECONDS + 15
    assert ended.pop(victim)[0] == -signal.SIGKILL
    for code, said in ended:
        assert code == 1, said
        assert f"qmax: process {victim} of {len(processes)} is lost: nothing was heard of it for 4 s" in said, said
        assert "Traceback" not in said
    assert step_of(out) < STEPS


@pytest.mark.full
def test_one_killed_and_fewer_go_on(config: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    kill_one(start(config, out, 4), 2, out, EVERY + 2)
    for code, said in finish(start(config, out, 2, "--resume")):
        assert code == 0, said
    np.testing.assert_allclose(losses(out), losses(alone), rtol=1e-6)


@pytest.mark.full
def test_all_killed_and_more_go_on(config: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    processes = start(config, out, 2)
    wait_for(processes, out, EVERY + 2)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    finish(processes)
    assert step_of(out) < STEPS
    for code, said in finish(start(config, out, 4, "--resume")):
        assert code == 0, said
    np.testing.assert_allclose(losses(out), losses(alone), rtol=1e-6)


@pytest.mark.full
def test_ctrl_c_in_one_stops_all(config: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    stop_one(config, out, 2, signal.SIGINT)
    assert resume(config, out, *MESH) == 0
    np.testing.assert_allclose(losses(out), losses(alone), rtol=1e-6)


def test_what_fails_in_one_is_told_by_all(config: Path, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    words: tuple[tuple[str, ...], ...] = ((), ("--optimizer.beta1", "0.5"))
    processes = [start(config, tmp_path / "run", 2, *words[i], only=i, address=address) for i in range(2)]
    ended = finish([*processes[0], *processes[1]])
    assert [code for code, _ in ended] == [2, 2], ended
    sentence = "process 1 was started with optimizer.beta1 = 0.5 and process 0 with 0.9; give all processes"
    assert f"qmax: {sentence}" in ended[1][1]
    assert f"qmax: process 1 of 2 failed, and this run with it: {sentence}" in ended[0][1]


def test_a_process_that_never_comes_is_one_sentence(config: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    [(code, said)] = finish(start(config, tmp_path / "run", 2, only=0, QMAX_JOIN_SECONDS="3"))
    assert code == 2, said
    assert time.monotonic() - began < 60
    assert re.fullmatch(
        r"qmax: not all 2 processes of this run came within 3 s: this is process 0 of 2, with the coordinator at "
        r"127\.0\.0\.1:\d+; start all of them[^\n]*\n",
        said,
    ), said
    assert not (tmp_path / "run").exists()


@pytest.mark.full
@pytest.mark.parametrize("mesh", [("--mesh.data", "2", "--mesh.tensor", "2"), ("--mesh.expert", "4")], ids=str)
def test_rows_that_several_processes_hold(mesh: tuple[str, ...], config: Path, alone: Path, tmp_path: Path) -> None:
    for code, said in finish(start(config, tmp_path / "run", 4, mesh=mesh)):
        assert code == 0, said
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(alone), rtol=1e-5)


@pytest.mark.full
def test_the_first_killed_ends_all(config: Path, alone: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    processes = start(config, out, 4)
    wait_for(processes, out, EVERY + 2)
    processes[0].send_signal(signal.SIGKILL)
    assert all(code for code, _ in finish(processes)), "jax itself ends those that lost process 0"
    for code, said in finish(start(config, out, 2, "--resume")):
        assert code == 0, said
    np.testing.assert_allclose(losses(out), losses(alone), rtol=1e-6)


# ---- options and environment ------------------------------------------------
@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (("h:1", "2", None), "--coordinator needs --process too"),
        ((None, None, "1"), "--process needs --coordinator and --processes too"),
        (("h", "2", "0"), "--coordinator='h' is not of the form HOST:PORT"),
        (("h:99999", "2", "0"), "--coordinator='h:99999' is not of the form HOST:PORT"),
        (("h:1", "two", "0"), "--processes='two' must be a whole number of at least 1"),
        (("h:1", "0", "0"), "--processes='0' must be a whole number of at least 1"),
        (("h:1", "2", "-1"), "--process='-1' must be a whole number of at least 0"),
        (("h:1", "2", "2"), "--process=2 must be below --processes=2"),
    ],
)
def test_bad_options_are_one_sentence(
    asked: tuple[str | None, str | None, str | None], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError) as caught:
        find_hosts(asked)
    assert str(caught.value).startswith(sentence)
    if asked[2] and asked[1]:
        variables = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        for name, value in zip(variables, asked, strict=True):
            monkeypatch.setenv(name, value or "")
        with pytest.raises(UserError, match=r"^JAX_"):
            find_hosts()


def test_options_win_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_hosts() is None
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "[::1]:8476")
    assert find_hosts() is None
    monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    assert find_hosts() == Hosts("[::1]:8476", 3, 2)
    assert find_hosts(("a.b:1", "2", "0")) == Hosts("a.b:1", 2, 0)


@pytest.mark.parametrize("code", ["x", "256", "-1"])
def test_a_bad_exit_code_is_refused(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert qmax.main(["train", "configs/tiny.py", f"--stopped-code={code}"]) == 2
    assert "--stopped-code" in capsys.readouterr().err


# ---- maintenance ------------------------------------------------------------
@contextmanager
def server(*answers: dict[str, str]) -> Iterator[str]:
    """A metadata server that gives these answers in turn, the last one for ever."""
    turns = itertools.count()

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = answers[min(next(turns) // 2, len(answers) - 1)]
            text = known.get(self.path.removeprefix("/v1/instance/"), "")
            self.send_response(200 if text and self.headers["Metadata-Flavor"] == "Google" else 404)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    with HTTPServer(("127.0.0.1", 0), Answer) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}/v1"
        http.shutdown()


QUIET = {"preempted": "FALSE", "maintenance-event": "NONE"}
TERMINATED = {"preempted": "FALSE", "maintenance-event": "TERMINATE_ON_HOST_MAINTENANCE"}


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        (QUIET, ""),
        ({}, ""),
        ({"preempted": "FALSE", "maintenance-event": "MIGRATE_ON_HOST_MAINTENANCE"}, ""),
        ({"preempted": "TRUE"}, "the preemption of this machine"),
        (TERMINATED, "a maintenance notice (TERMINATE_ON_HOST_MAINTENANCE)"),
    ],
)
def test_notices(answers: dict[str, str], words: str) -> None:
    with server(answers, answers) as address:
        assert notice(address) == words
    assert notice(address) == "", "nobody answers any more"


def test_who_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QMAX_METADATA", "off")
    assert metadata_server() is None
    monkeypatch.setenv("QMAX_METADATA", "http://a/b/")
    assert metadata_server() == "http://a/b"
    monkeypatch.setenv("QMAX_METADATA", "a")
    with pytest.raises(UserError, match="QMAX_METADATA='a' is no address"):
        metadata_server()


def test_a_notice_saves_and_stops(
    config: Path, alone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr("train.maintenance.heed_maintenance.__wrapped__.__defaults__", (0.05,))
    with server(QUIET, QUIET, TERMINATED) as address:
        monkeypatch.setenv("QMAX_METADATA", address)
        assert qmax.main(["train", str(config), "--out", str(out), *WORDS, *MESH]) == 0
    said = capfd.readouterr().err
    monkeypatch.setenv("QMAX_METADATA", "off")
    found = re.search(r"stopped by a maintenance notice \(TERMINATE_ON_HOST_MAINTENANCE\) at step (\d+)", said)
    assert found, said
    if int(found[1]):
        assert Checkpoints(out / "checkpoints", keep=2).latest_good(pytest.fail) == int(found[1])
    assert resume(config, out, *MESH) == 0
    np.testing.assert_array_equal(losses(out), losses(alone))
