"""Laws of runs on preferences: a run begins at its reference, and what that says is the same from a file and from the
model itself; a run that was stopped ends as one that was not; what cannot work is refused before anything compiles."""

from __future__ import annotations

import json
import os
import shutil
import signal
from math import log
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from kill_campaign import hashes, records, story, write_project
from test_resume import interrupt

import qmax
from configs.override import apply_overrides, load_config
from serve.feedback import Feedback
from train import reference
from train.setup import find_start, prepare_job

Words = tuple[str, ...]
STEPS = 4
FULL = pytest.mark.full


def learnt(out: Path) -> list[dict[str, Any]]:
    """The records of steps, without what held-out rows gave before the first."""
    return [record for record in records(out) if record["step"]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with pairs, votes and the run `base`, a mixture of experts of two steps."""
    place = tmp_path_factory.mktemp("preference")
    config = write_project(place)
    sides = [(f"q{i}", f"GOOD {i}" * (1 + i % 2), f"bad {i}") for i in range(40)]
    write_rows(place / "pairs.jsonl", [{"prompt": q, "chosen": a, "rejected": b} for q, a, b in sides])
    votes = [{"prompt": q, "completion": a if i % 2 else b, "label": bool(i % 2)} for i, (q, a, b) in enumerate(sides)]
    write_rows(place / "votes.jsonl", votes)
    assert qmax.main(["train", str(config), "--out", str(place / "base"), "--steps", "2"]) == 0
    return place


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def words_of(place: Path, objective: str, *words: str, file: str = "") -> list[str]:
    """What makes a run of the project one on preferences, from the weights of `base`."""
    file = file or str(place / ("votes.jsonl" if objective == "kto" else "pairs.jsonl"))
    short = ("--steps", str(STEPS), "--checkpoint.every", "2", "--checkpoint.keep", "9", "--validate-every", "2")
    data = ("--data.sources", file, "--data.weights=", "--data.sequence-length", "128", "--objective", objective)
    return [*data, *short, "--init-from", str(place / "base"), "--optimizer.learning-rate", "1e-2", *words]


def train(place: Path, out: Path, objective: str, *words: str, **more: Any) -> int:
    """Exit code of such a run, in this process."""
    return qmax.main(["train", str(place / "small.py"), "--out", str(out), *words_of(place, objective, *words, **more)])


@pytest.fixture(scope="module")
def dpo(place: Path) -> Path:
    """A run that nobody disturbed, with what the reference says read from a file."""
    assert train(place, place / "dpo", "dpo") == 0
    return place / "dpo"


def test_a_run_begins_at_its_reference_and_leaves_it(dpo: Path) -> None:
    first, *_, last = learnt(dpo)
    assert first["loss"] == pytest.approx(log(2), abs=1e-6)
    assert first["reward_margin"] == pytest.approx(0, abs=1e-6) and first["gradient_norm"] > 0
    assert last["loss"] < log(2) - 1e-3 and last["reward_margin"] > 0 and last["accuracy"] > 0.5
    assert {"validation_loss", "validation_accuracy", "validation_reward_margin"} <= last.keys()


def test_a_reference_that_is_asked_says_what_the_file_says(place: Path, dpo: Path, tmp_path: Path) -> None:
    assert train(place, tmp_path / "live", "dpo", "--preference.reference", "live") == 0
    for found, wanted in zip(learnt(tmp_path / "live"), learnt(dpo), strict=True):
        for name in ("loss", "gradient_norm", "reward_margin", "chosen_nll"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-5, abs=1e-6), name
        assert found.get("validation_loss") == pytest.approx(wanted.get("validation_loss"), abs=1e-6)


def test_a_stopped_run_ends_as_one_that_nobody_disturbed(
    place: Path, dpo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "stopped"
    with monkeypatch.context() as patched:
        interrupt(patched, signal.SIGTERM, 2)
        assert train(place, out, "dpo") == 0
    assert 0 < hashes(out)[0] < STEPS
    assert train(place, out, "dpo", "--resume") == 0
    assert hashes(out) == hashes(dpo)
    assert [story(record) for record in records(out)] == [story(record) for record in records(dpo)]


def test_judged_replies_begin_at_one_half(place: Path, tmp_path: Path) -> None:
    assert train(place, tmp_path / "kto", "kto") == 0
    first, *_, last = learnt(tmp_path / "kto")
    assert first["loss"] == pytest.approx(0.5, abs=1e-6) and first["divergence"] == pytest.approx(0, abs=1e-6)
    assert last["loss"] != first["loss"] and np.isfinite(last["validation_loss"])


@pytest.mark.parametrize("how", ["cached", pytest.param("live", marks=FULL)])
@pytest.mark.full
def test_the_reference_of_adapters_is_the_model_without_them(place: Path, tmp_path: Path, how: str) -> None:
    assert train(place, tmp_path / "lora", "dpo", "--lora.rank", "2", "--preference.reference", how) == 0
    first, *_, last = learnt(tmp_path / "lora")
    assert first["loss"] == pytest.approx(log(2), abs=1e-6) and last["loss"] < log(2)


@FULL
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_a_run_on_eight_devices_is_the_run_on_one(place: Path, tmp_path: Path, objective: str) -> None:
    """The reference too is laid over all of them. KTO's divergence is of a micro-batch, so that there is one here."""
    devices = ("--mesh.fsdp", "2", "--mesh.expert", "2", "--mesh.tensor", "2")
    one = ("--accumulate", "1", "--preference.reference", "live")
    assert train(place, tmp_path / "one", objective, *one) == 0
    assert train(place, tmp_path / "eight", objective, *one, *devices) == 0
    for found, wanted in zip(learnt(tmp_path / "eight"), learnt(tmp_path / "one"), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], abs=1e-5)


def test_what_people_said_of_replies_is_trained_on_as_it_is(place: Path, tmp_path: Path) -> None:
    """One file: a correction, verdicts of the arena and votes; each objective takes its own."""
    feedback = Feedback(tmp_path / "feedback.jsonl")
    asked = [{"role": "user", "content": "2+2?"}]
    for i in range(3):
        feedback.vote("m", asked, f"4{i}", i % 2 == 0)
    feedback.correction("m", asked, "5", "4")
    feedback.arena(("m", "n"), asked, ("6", "4"), "b")
    feedback.arena(("m", "n"), asked, ("4", "four"), "tie")
    for objective, begins in (("dpo", log(2)), ("kto", 0.5)):
        words = ("--data.validation-fraction", "0", "--data.max-bad-rows", "0")
        file = str(tmp_path / "feedback.jsonl")
        assert train(place, tmp_path / objective, objective, *words, file=file) == 0
        assert learnt(tmp_path / objective)[0]["loss"] == pytest.approx(begins, abs=1e-6)


# ---- files of a reference ------------------------------------------------------------------
def scored(place: Path, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether a run asks its reference, rather than reading its file; nothing is compiled."""

    class Asked:
        def __init__(self, *_: Any) -> None: ...

        def __call__(self, state: Any, rows: dict[str, Any]) -> np.ndarray:
            del state
            asked.append(len(rows["tokens"]))
            return np.zeros(rows["tokens"].shape, np.float32)

    asked: list[int] = []
    monkeypatch.setattr(reference, "Reference", Asked)
    words = [*words_of(place, "dpo"), "--init-from", str(source), "--out", str(out)]
    run = apply_overrides(load_config(str(place / "small.py")), words)
    job = prepare_job(run, out, *find_start(run, out, resume=False))
    state: Any = None
    with jax.set_mesh(job.mesh):
        assert reference.score_rows(job, state, job.cache) is None
    assert all("reference" in part[0] for part in job.data.parts.values())
    job.data.close()
    return bool(asked)


def test_the_file_is_used_again_until_the_reference_is_another(
    place: Path, dpo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del dpo
    assert not scored(place, place / "base", tmp_path / "a", monkeypatch)
    other = shutil.copytree(place / "base", tmp_path / "other")
    assert scored(place, other, tmp_path / "b", monkeypatch)
    assert not scored(place, other, tmp_path / "c", monkeypatch)
    file = next(path for path in (other / "checkpoints").rglob("*") if path.is_file())
    os.utime(file, (1, 1))
    assert scored(place, other, tmp_path / "d", monkeypatch)
    assert not list((place / "cache" / "reference").glob(".*"))
    before, config = reference.fingerprint(str(other)), other / "config.json"
    os.utime(config, (1, 1))
    assert reference.fingerprint(str(other)) == before
    config.write_text(config.read_text().replace("10000", "20000"))
    assert reference.fingerprint(str(other)) != before


# ---- what is refused -----------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--init-from=",), "preference.reference_model names no model, and the run starts from none"),
        (("--preference.reference-model", "nowhere"), "preference.reference_model: nowhere does not exist"),
        (("--preference.loss", "simpo", "--preference.margin", "-1"), "preference.margin"),
        (("--preference.loss", "hinge"), "sigmoid"),
        (("--preference.loss", "ipo", "--preference.label-smoothing", "0.1"), "preference.label_smoothing"),
        (("--model.num-labels", "1"), "objective=dpo trains a model that writes"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_compiles(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: Words,
    told: str,
) -> None:
    monkeypatch.setattr("train.setup.create_state", lambda *_: pytest.fail("a state is made"))
    assert train(place, tmp_path / "run", "dpo", *words) == 2
    said = capsys.readouterr().err
    assert told in said and "Traceback" not in said and len(said.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_simpo_needs_no_reference_and_a_pair_of_equals_is_passed_over(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": "q", "chosen": "a", "rejected": "a"}, {"prompt": "q", "chosen": "a", "rejected": "bb"}]
    file = write_rows(tmp_path / "equal.jsonl", rows)
    words = ("--init-from=", "--preference.loss", "simpo", "--data.validation-fraction", "0")
    run = apply_overrides(load_config(str(place / "small.py")), words_of(place, "dpo", *words, file=str(file)))
    job = prepare_job(run, tmp_path / "run", *find_start(run, tmp_path / "run", resume=False))
    job.data.close()
    assert f"{file}:1: chosen is equal to rejected; skipped" in capsys.readouterr().err
    state: Any = None
    assert reference.score_rows(job, state, job.cache) is None
    assert job.data.rows_per_epoch == 1 and "reference" not in next(iter(job.data.parts.values()))[0]


@FULL
@pytest.mark.parametrize("loss", ["ipo", "simpo"])
def test_other_losses_fall_too(place: Path, tmp_path: Path, loss: str) -> None:
    assert train(place, tmp_path / "run", "dpo", "--preference.loss", loss, "--preference.sft", "0.1") == 0
    first, *_, last = learnt(tmp_path / "run")
    assert last["loss"] < first["loss"] and last["chosen_nll"] < first["chosen_nll"]
