"""Law: a run that was stopped, killed, moved to another mesh or damaged ends as one that nobody disturbed.

Same hash of every array (weights, optimizer, counters) and each step once in metrics.jsonl; on another mesh 1e-5.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from kill_campaign import assert_same, campaign, finish, hashes, records, start, step_of, write_project

import qmax
from model.checkpoint.checkpoints import Checkpoints
from train.setup import Job

STEPS, EVERY = 12, 4
SHORT = ("--steps", str(STEPS), "--checkpoint.every", str(EVERY), "--checkpoint.keep", "9", "--validate-every", "6")
MESH = ("--mesh.fsdp", "2", "--mesh.expert", "2", "--mesh.tensor", "2")
Words = tuple[str, ...]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mixture of experts, two weighted sources, two micro-batches."""
    return write_project(tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def pretrained(config: Path) -> Path:
    """A run of the config that nobody disturbed."""
    out = config.parent / "pretrained"
    assert train(config, out) == 0
    return out


@pytest.fixture(scope="module")
def sft(config: Path, pretrained: Path) -> Words:
    """The words that make an SFT run of the config, from the weights of `pretrained`."""
    chats = str(config.parent / "chats.jsonl")
    return "--objective", "sft", "--init-from", str(pretrained), "--data.sources", chats, "--data.weights="


@pytest.fixture(scope="module")
def tuned(config: Path, sft: Words) -> Path:
    """An SFT run that nobody disturbed."""
    out = config.parent / "tuned"
    assert train(config, out, *sft) == 0
    return out


def train(config: Path, out: Path, *words: str) -> int:
    """Exit code of `qmax train CONFIG --out OUT ...`, in this process."""
    return qmax.main(["train", str(config), "--out", str(out), *SHORT, *words])


def interrupt(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, at_batch: int) -> None:
    """Sends this process a signal as it is about to use a batch, once."""
    place, seen = Job.place, 0

    def placed(self: Job, rows: dict[str, np.ndarray]) -> object:
        nonlocal seen
        seen += 1
        if seen == at_batch:
            os.kill(os.getpid(), number)
            time.sleep(0.1)
        return place(self, rows)

    monkeypatch.setattr(Job, "place", placed)


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and bytes of every file."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def copy_until(run: Path, step: int, out: Path) -> Path:
    """A copy of a run as it was when the checkpoint of `step` was the newest."""
    shutil.copytree(run, out)
    for later in Checkpoints(out / "checkpoints", keep=1).steps():
        if later > step:
            shutil.rmtree(out / "checkpoints" / str(later))
    return out


@pytest.mark.parametrize(("objective", "number"), [("pretrain", signal.SIGTERM), ("sft", signal.SIGINT)])
def test_stopped_and_resumed_is_undisturbed(
    objective: str,
    number: signal.Signals,
    config: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    undisturbed: Path = request.getfixturevalue("pretrained" if objective == "pretrain" else "tuned")
    words: Words = request.getfixturevalue("sft") if objective == "sft" else ()
    out = tmp_path / "run"
    capfd.readouterr()
    with monkeypatch.context() as patch:
        interrupt(patch, number, at_batch=6)
        assert train(config, out, *words, "--resume") == 0
    said = capfd.readouterr().err
    stopped = records(out)[-1]["step"]
    name = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
    assert f"nothing to resume in {out}: starting afresh" in said
    assert f"stopped by {name} at step {stopped} of {STEPS}; it is saved: go on with --resume" in said
    assert 5 <= stopped < STEPS
    assert hashes(out)[0] == stopped

    assert train(config, out, *words, "--resume") == 0
    assert f"resuming {out} at step {stopped}\n" in capfd.readouterr().err
    assert_same(out, undisturbed)


def test_another_mesh_goes_on_alike(config: Path, pretrained: Path, tmp_path: Path) -> None:
    out = copy_until(pretrained, EVERY, tmp_path / "run")
    assert train(config, out, "--resume", *MESH) == 0
    mine, wanted = Checkpoints(out / "checkpoints", keep=1), Checkpoints(pretrained / "checkpoints", keep=1)
    template = wanted.leaves(STEPS)
    found, expected = mine.restore(STEPS, template), wanted.restore(STEPS, template)
    for name in template:
        if name.startswith(("params.", "extra.")):
            np.testing.assert_allclose(np.asarray(found[name]), np.asarray(expected[name]), rtol=0, atol=1e-5)
    steps = {record["step"]: record["loss"] for record in records(out)}
    assert list(steps) == list(range(1, STEPS + 1))
    np.testing.assert_allclose(list(steps.values()), [r["loss"] for r in records(pretrained)], rtol=0, atol=1e-5)


def test_a_truncated_checkpoint_is_named_and_passed_over(
    config: Path, pretrained: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    shutil.copytree(pretrained, out)
    state = out / "checkpoints" / str(STEPS) / "state"
    victim = max((path for path in state.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    os.truncate(victim, victim.stat().st_size // 2)
    capfd.readouterr()
    assert train(config, out, "--resume") == 0
    said = capfd.readouterr().err
    assert said.count(f"checkpoint {STEPS} in {out / 'checkpoints'} is damaged and is passed over") == 1
    assert victim.name in said
    assert f"resuming {out} at step {STEPS - EVERY}\n" in said
    assert_same(out, pretrained)


def test_a_finished_run_is_left_alone(config: Path, pretrained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = contents(pretrained)
    capfd.readouterr()
    assert train(config, pretrained, "--resume") == 0
    said = capfd.readouterr().err
    assert said == f"the run in {pretrained} is finished, at step 12 of 12; a larger --steps goes on with it\n"
    assert contents(pretrained) == before


def test_a_run_is_not_overwritten(config: Path, pretrained: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = contents(pretrained)
    capfd.readouterr()
    assert train(config, pretrained) == 2
    said = capfd.readouterr().err
    assert said.startswith(f"qmax: {pretrained} already holds a run at step {STEPS}; add --resume")
    assert len(said.splitlines()) == 1
    assert contents(pretrained) == before


def test_ctrl_c_in_a_terminal(config: Path, pretrained: Path, tmp_path: Path) -> None:
    """The terminal tells the whole process group, data workers too. A second Ctrl-C leaves at once."""
    out = tmp_path / "run"
    first = start(config, out, *SHORT, "--data.workers", "2")
    deadline = time.monotonic() + 120
    while step_of(out) < 1 and first.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.killpg(first.pid, signal.SIGINT)
    said = finish(first)
    stopped = records(out)[-1]["step"]
    assert "Ctrl-C: saving after this step" in said
    assert f"stopped by Ctrl-C at step {stopped} of {STEPS}; it is saved" in said
    assert "Traceback" not in said
    assert hashes(out)[0] == stopped < STEPS

    said = ""
    # More steps than it can do before it is told to stop, however late that is.
    with start(config, out, *SHORT, "--steps", "100000", "--resume") as second:
        assert second.stderr is not None
        for line in second.stderr:
            said += line
            if "resuming" in line or "saving after this step" in line:
                os.killpg(second.pid, signal.SIGINT)
    assert second.returncode == 130, said
    damaged: list[str] = []
    assert Checkpoints(out / "checkpoints", keep=9).latest_good(damaged.append) == stopped
    assert not damaged

    assert train(config, out, "--resume") == 0
    assert_same(out, pretrained)


@pytest.mark.parametrize(
    ("kills", "during_saves", "steps"), [(3, 1, 60), pytest.param(10, 3, 200, marks=pytest.mark.full)]
)
def test_killed_again_and_again(kills: int, during_saves: int, steps: int, config: Path, tmp_path: Path) -> None:
    words = "--steps", str(steps)
    assert qmax.main(["train", str(config), "--out", str(tmp_path / "undisturbed"), *words]) == 0
    done = campaign(config, tmp_path / "killed", steps=steps, kills=kills, during_saves=during_saves)
    assert len(done) >= kills
    assert sum(bool(kill.torn) for kill in done) >= during_saves
    assert_same(tmp_path / "killed", tmp_path / "undisturbed")
