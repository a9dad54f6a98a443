"""Law: bad input is one sentence and exit code 2, before anything is compiled or written."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest
from kill_campaign import assert_same, write_project
from text_fixtures import byte_tokenizer

import qmax
from model.checkpoint.checkpoints import Checkpoints

TINY = str(Path(__file__).resolve().parent.parent / "configs" / "demo_data" / "tiny_tokenizer")
COMPILED: list[str] = []
"""Every compilation of this process, from the first use of `place` on."""

TRAIN = [
    ("--data.sources PLACE/nothing.jsonl --data.weights=", r"no file or directory matches 'PLACE/nothing.jsonl'"),
    ("--data.sources PLACE/chat.jsonl --data.weights=", r"chat.jsonl'; did you mean 'chats.jsonl'\?"),
    ("--data.sources PLACE/a.jsonl PLACE/nothing/*.txt", r"no file or directory matches 'PLACE/nothing/\*.txt'"),
    ("--data.validation PLACE/nothing.jsonl", r"no file or directory matches"),
    ("--data.sources= --data.weights=", r"data.sources is empty|no source of text is named"),
    ("--data.sources PLACE/empty.jsonl --data.weights=", r"no document in .*empty.jsonl; the corpus is empty"),
    ("--data.sources PLACE/blank.txt --data.weights=", r"no document in .*blank.txt; the corpus is empty"),
    ("--data.sources PLACE/small.py --data.weights=", r"small.py is none of .txt, .jsonl"),
    ("--data.sources PLACE/notes --data.weights=", r"notes is a directory but not a prepared one"),
    ("--data.sources PLACE/torn.jsonl.gz --data.weights= --data.max-bad-rows 0", r"torn.jsonl.gz"),
    (
        "--data.sources PLACE/broken.jsonl --data.weights= --data.max-bad-rows 0",
        r"broken.jsonl:2: .*; that is 1 malformed rows and max_bad_rows allows 0",
    ),
    ("--data.sources PLACE/store --data.weights=", r"tokenizer does not match PLACE/store.*264 tokens; given: 263"),
    ("--data.sources PLACE/chat_store --data.weights=", r"chat_store .*sft.*pretrain|chat_store .*objective"),
    ("--data.weights 1", r"data.weights has 1 numbers for 2 data.sources"),
    ("--optimizer.learing-rate 1", r"no field --optimizer.learing-rate; did you mean '--optimizer.learning-rate'\?"),
    ("--steps many", r"--steps takes int, not 'many'"),
    ("--steps 0", r"steps=0 must be at least 1"),
    (
        "--objective sftt",
        r"--objective takes pretrain\|sft\|dpo\|reward\|kto\|rl\|distill, not 'sftt'; did you mean 'sft'\?",
    ),
    ("--data.too-long drop", r"data.too_long=drop is about conversations; objective=pretrain goes on"),
    ("--objective dpo --data.train-on last", r"data.train_on=last goes with objective=sft or distill, not dpo"),
    ("--out", r"--out takes str, and no value follows it"),
    ("--model.num-heads 6 --model.num-kv-heads 4", r"num_heads=6 is not a multiple of model.num_kv_heads=4"),
    ("--mesh.tensor 8", r"4 heads do not divide over mesh.tensor=8"),
    ("--mesh.tensor 4", r"2 key/value heads do not divide over mesh.tensor=4"),
    ("--mesh.expert 8 --data.batch-size 16", r"4 experts do not divide over mesh.expert=8"),
    ("--mesh.tensor 2 --model.moe.intermediate-size 33", r"33 channels of an expert do not divide"),
    ("--mesh.fsdp 4 --model.hidden-size 34", r"34 channels .* do not divide over mesh.fsdp=4"),
    ("--accumulate 3", r"data.batch_size=8 does not divide by accumulate=3"),
    ("--mesh.fsdp 8", r"4 rows of a micro-batch do not divide over data x fsdp x expert = 8"),
    ("--mesh.data 16 --data.batch-size 32", r"16 devices are asked for"),
    ("--data.sequence-length 256", r"data.sequence_length=256 is longer than model.max_positions=128"),
    ("--model.vocab-size 256", r"tokenizer has 263 tokens and model.vocab_size is 256"),
    ("--model.vocab-size 265 --mesh.tensor 2", r"265 rows of the vocabulary do not divide over mesh.tensor=2"),
    ("--data.tokenizer PLACE/nothing", r"tokenizer directory PLACE/nothing does not exist"),
    ("--data.tokenizer PLACE/notes", r"notes holds neither tokenizer.model nor tokenizer.json"),
    ("--data.tokenizer PLACE/torn_json", r"torn_json/tokenizer.json is"),
    ("--data.tokenizer PLACE/torn_model", r"torn_model/tokenizer.model is not a sentencepiece model"),
    ("--data.tokenizer=", r"data.tokenizer names no tokenizer; make one"),
    ("--init-from PLACE/nothing", r"init_from: PLACE/nothing does not exist; name a run"),
    ("--init-from PLACE/notes", r"init_from: PLACE/notes holds neither a run nor"),
    ("--init-from PLACE/unsaved", r"init_from: PLACE/unsaved has no complete checkpoint"),
    (
        "--init-from PLACE/run --init-model source",
        r"init_model=source takes the sizes of PLACE/run, and the config sets",
    ),
    ("--init-how upcycle", r"init_how=upcycle needs init_from"),
    ("--init-from PLACE/run --init-how upcycle", r"PLACE/run is a mixture of experts already"),
    ("--upcycle-fresh 2", r"upcycle_fresh=2.0 must lie in \[0, 1\]"),
    ("--data.reference PLACE/nothing.jsonl", r"no file or directory matches"),
    ("--init-from PLACE/run --model.hidden-size 64", r"PLACE/run is of another architecture .* \d+ arrays differ"),
    ("--init-from PLACE/run --data.tokenizer TINY", r"tokens of TINY are not those that init_from=PLACE/run"),
    (
        "--out PLACE/run --resume --steps 9 --model.hidden-size 64",
        r"the run in PLACE/run is of another architecture .* \d+ arrays .* is .*32.* there and .*64.* here",
    ),
    ("--out PLACE/run --resume --steps 9 --optimizer.name muon", r"another architecture or optimizer"),
    (
        "--out PLACE/run --resume --steps 9 --data.tokenizer PLACE/other_tokenizer",
        r"PLACE/run was trained with another tokenizer than PLACE/other_tokenizer",
    ),
    ("--out PLACE/run", r"PLACE/run already holds a run at step 2; add --resume"),
    ("--out PLACE/a.jsonl", r"PLACE/a.jsonl is a file; choose another directory with --out"),
    ("--out PLACE/a.jsonl/run", r"PLACE/a.jsonl is a file; choose another directory with --out"),
    ("--data.cache PLACE/a.jsonl", r"PLACE/a.jsonl is a file; choose another directory with data.cache"),
    ("--checkpoint.every 0", r"checkpoint.every=0 must be at least 1"),
    ("--validate-every -1", r"validate_every=-1 must be at least 0"),
    ("--max-bad-steps 0", r"max_bad_steps=0 must be at least 1"),
    ("--data.workers -1", r"data.workers=-1 must be at least 0"),
    ("--data.max-bad-rows -1", r"data.max_bad_rows=-1 must be at least 0"),
    ("--optimizer.learning-rate inf", r"optimizer.learning_rate=inf must be positive and finite"),
    ("--optimizer.warmup-steps -3", r"optimizer.warmup_steps=-3 must be at least 0"),
    ("--optimizer.beta1 1", r"optimizer.beta1=1.0 must lie in \[0, 1\)"),
    ("--optimizer.decay-fraction 2", r"optimizer.decay_fraction=2.0 must lie in \[0, 1\]"),
    ("--model.moe.every 0", r"model.moe.every=0 must be positive"),
    ("--model.moe.num-groups 0", r"model.moe.num_groups=0 must be positive"),
    ("--model.moe.shared-intermediate-size -3", r"shared_intermediate_size=-3 must not be negative"),
    ("--model.intermediate-size 0", r"model.intermediate_size=0 must be positive for the dense layers"),
    ("--model.rope.theta 0", r"model.rope.theta=0.0 must be positive"),
    ("--checkpoint.keep 0", r"checkpoint.keep=0 must be at least 1"),
]
"""Words after `qmax train small.py --out OUT`, and what must be found in the sentence that refuses them."""

VERBS = [
    ("trian", r"there is no verb 'trian'; did you mean 'train'\?"),
    ("train", r"name a config"),
    ("train tiny steps 3", r"what is 'steps'\?"),
    ("train tinny", r"there is no config 'tinny'; did you mean 'tiny'\?"),
    ("train PLACE/nothing.py", r"there is no config 'PLACE/nothing.py'"),
    ("train PLACE/raises.py", r"raises.py line 2 fails with ZeroDivisionError: division by zero"),
    ("train PLACE/syntax.py", r"syntax.py line 1 fails with SyntaxError"),
    ("train PLACE/without.py", r"without.py defines no function run\(\)"),
    ("train PLACE/number.py", r"run\(\) in .*number.py returns int"),
    ("train PLACE/refused.py", r"steps=-1 must be at least 1 \(in .*refused.py line 3\)"),
    ("generate PLACE/nothing --prompt x", r"PLACE/nothing does not exist; name a run"),
    ("generate PLACE/a.jsonl --prompt x", r"PLACE/a.jsonl is a file of an unknown kind"),
    ("generate PLACE/notes --prompt x", r"PLACE/notes holds neither a run nor"),
    ("generate PLACE/unsaved --prompt x", r"PLACE/unsaved has no complete checkpoint"),
    ("generate PLACE/torn_config --prompt x", r"PLACE/torn_config/config.json is damaged"),
    ("generate PLACE/list_config --prompt x", r"PLACE/list_config/config.json is damaged"),
    ("generate PLACE/typed_config --prompt x", r"PLACE/typed_config/config.json is damaged"),
    ("generate PLACE/larger_config --prompt x", r"larger_config is of another architecture"),
    ("generate PLACE/torn_tokenizer --prompt x", r"torn_tokenizer/tokenizer/tokenizer.json is"),
    ("chat PLACE/notes", r"PLACE/notes holds neither a run nor"),
    ("chat PLACE/torn_config", r"PLACE/torn_config/config.json is damaged"),
    ("report PLACE/nothing", r"PLACE/nothing"),
    ("report PLACE/notes", r"PLACE/notes is not a run"),
    ("report PLACE/torn_config", r"PLACE/torn_config/config.json"),
    ("report PLACE/list_config", r"PLACE/list_config is not a run"),
    ("tokenizer PLACE/nothing.txt --vocab-size 400 --out OUT", r"no file or directory matches"),
    ("tokenizer PLACE/empty.jsonl --vocab-size 400 --out OUT", r"the corpus is empty"),
    ("tokenizer PLACE/a.jsonl --vocab-size 90000 --out OUT", r"90,?000"),
    ("tokenizer PLACE/a.jsonl --vocab-size 20 --out OUT", r"20"),
    ("tokenizer PLACE/a.jsonl --out OUT", r"required: --vocab-size"),
    ("prepare PLACE/a.jsonl --out OUT", r"required: --tokenizer"),
    ("prepare PLACE/a.jsonl --tokeniser x --tokenizer y --out OUT", r"no option --tokeniser"),
    ("prepare PLACE/a.jsonl --tokenizer TINY --out OUT --objective sfd", r"sfd"),
    ("prepare PLACE/nothing.jsonl --tokenizer TINY --out OUT", r"no file or directory matches"),
    ("prepare PLACE/empty.jsonl --tokenizer TINY --out OUT", r"the corpus is empty"),
    ("prepare PLACE/a.jsonl --tokenizer PLACE/torn_model --out OUT", r"not a sentencepiece model"),
    ("prepare PLACE/a.jsonl --tokenizer TINY --out PLACE/notes", r"notes is not empty and not a prepared"),
    ("prepare PLACE/a.jsonl --tokenizer TINY --out PLACE/a.jsonl", r"a.jsonl is a file"),
    ("prepare PLACE/a.jsonl --tokenizer TINY --out PLACE/a.jsonl/x", r"may not write to .*a.jsonl/x"),
    ("prepare PLACE/a.jsonl --tokenizer TINY --out PLACE/store", r"store was prepared with another"),
]
"""Words after `qmax`, and what must be found in the sentence that refuses them."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with a run of two steps, and beside it everything that can be wrong."""
    place = tmp_path_factory.mktemp("project")
    config = write_project(place)
    assert qmax.main(["train", str(config), "--out", str(place / "run"), "--steps", "2"]) == 0
    make_bad_texts(place)
    make_bad_runs(place)
    for name, text in {
        "raises": "def run():\n    return 1 / 0\n",
        "syntax": "def run(:\n",
        "without": "steps = 3\n",
        "number": "def run():\n    return 3\n",
        "refused": "from configs.run import Run\ndef run():\n    return Run(steps=-1)\n",
    }.items():
        (place / f"{name}.py").write_text(text)
    jax.monitoring.register_event_duration_secs_listener(note_compilation)
    return place


def note_compilation(event: str, duration_secs: float, **_: object) -> None:
    """Listens to jax."""
    del duration_secs
    if "backend_compile" in event:
        COMPILED.append(event)


def make_bad_texts(place: Path) -> None:
    """Sources and tokenizers that are refused."""
    (place / "empty.jsonl").touch()
    (place / "blank.txt").write_text("\n \n")
    (place / "broken.jsonl").write_text('{"text": "fine"}\n{"text": \n' + '{"text": "fine"}\n' * 3)
    whole = (place / "b.jsonl.gz").read_bytes()
    (place / "torn.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    (place / "notes").mkdir()
    (place / "notes" / "todo.txt").write_text("buy bread")
    byte_tokenizer("<|more|>").save(place / "other_tokenizer")
    for kind, name in (("json", "torn_json"), ("model", "torn_model")):
        (place / name).mkdir()
        (place / name / f"tokenizer.{kind}").write_bytes((place / "tokenizer" / "tokenizer.json").read_bytes()[:500])
    other = ["--tokenizer", str(place / "other_tokenizer"), "--out", str(place / "store")]
    assert qmax.main(["prepare", str(place / "a.jsonl"), *other]) == 0
    own = ["--tokenizer", str(place / "tokenizer"), "--out", str(place / "chat_store"), "--objective", "sft"]
    assert qmax.main(["prepare", str(place / "chats.jsonl"), *own]) == 0


def make_bad_runs(place: Path) -> None:
    """Copies of the run in which one thing is wrong."""
    text = (place / "run" / "config.json").read_text()
    larger, typed = json.loads(text), json.loads(text)
    larger["run"]["model"]["hidden_size"] = 64
    typed["run"]["model"]["hidden_size"] = "32"
    for name, config in {
        "unsaved": text,
        "torn_tokenizer": text,
        "torn_config": text[:100],
        "list_config": "[]",
        "typed_config": json.dumps(typed),
        "larger_config": json.dumps(larger),
    }.items():
        shutil.copytree(place / "run", place / name)
        (place / name / "config.json").write_text(config)
    shutil.rmtree(place / "unsaved" / "checkpoints" / "2")
    os.truncate(place / "torn_tokenizer" / "tokenizer" / "tokenizer.json", 500)


def listing(directory: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file and directory; locks may be made."""
    found = {}
    for path in directory.rglob("*"):
        if path.name != ".lock":
            stat = path.stat()
            found[str(path)] = (stat.st_size, stat.st_mtime_ns) if path.is_file() else (0, 0)
    return found


def refused(words: str, place: Path, out: Path, capfd: pytest.CaptureFixture[str]) -> str:
    """Calls qmax and returns its one sentence, after seeing that nothing else happened."""
    names = {"PLACE": str(place), "OUT": str(out), "TINY": TINY}
    before, compiled = listing(place), len(COMPILED)
    capfd.readouterr()
    code = qmax.main([re.sub("PLACE|OUT|TINY", lambda found: names[found[0]], word) for word in words.split()])
    said, told = capfd.readouterr()
    assert code == 2, told
    assert said == ""
    assert told.startswith("qmax: ")
    assert len(told.splitlines()) == 1, told
    assert len(COMPILED) == compiled, "something was compiled"
    assert listing(place) == before, "something was written"
    assert not out.exists(), "something was left behind"
    for name, value in names.items():
        told = told.replace(value, name)
    return told.removeprefix("qmax: ").rstrip("\n")


@pytest.mark.parametrize(("words", "sentence"), TRAIN)
def test_train_refuses(
    words: str, sentence: str, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = words if "--out" in words else f"--out OUT {words}"
    told = refused(f"train PLACE/small.py {given}", place, tmp_path / "out", capfd)
    assert re.search(sentence, told), told


@pytest.mark.parametrize(("words", "sentence"), VERBS)
def test_verbs_refuse(
    words: str, sentence: str, place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    told = refused(words, place, tmp_path / "out", capfd)
    assert re.search(sentence, told), told


def test_an_empty_second_source_leaves_no_run(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What was prepared of the first source is whole and stays; there is no run around it."""
    out = tmp_path / "out"
    words = ["--data.sources", str(place / "a.jsonl"), str(place / "empty.jsonl"), "--data.cache="]
    assert qmax.main(["train", str(place / "small.py"), "--out", str(out), *words]) == 2
    assert "the corpus is empty" in capfd.readouterr().err
    assert [path.name for path in out.iterdir()] == ["data"]
    stores = [path for path in (out / "data").iterdir() if path.name != "index"]
    assert all((store / "meta.json").is_file() for store in stores)


def test_malformed_rows_up_to_the_limit_are_named(
    place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "store"
    words = ["prepare", str(place / "broken.jsonl"), "--tokenizer", str(place / "tokenizer"), "--out", str(out)]
    assert qmax.main(words) == 0
    assert re.search(r"broken.jsonl:2: .*; skipped \(1 of at most 100\)", capfd.readouterr().err)
    assert json.loads((out / "meta.json").read_text())["bad_rows"] == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written(place: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    try:
        told = refused("train PLACE/small.py --out OUT", place, tmp_path / "out", capfd)
    finally:
        tmp_path.chmod(0o700)
    assert "may not write to" in told


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/sys is where even root may make no directory")
def test_a_file_system_that_takes_no_directory(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    told = refused("train PLACE/small.py --out OUT", place, Path("/sys/qmax"), capfd)
    assert "may not write to" in told


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3M", "qmax-test", str(disk)]
    try:
        done = subprocess.run(command, capture_output=True, check=False)
    except OSError:
        pytest.skip("there is no mount here")
    if done.returncode:
        pytest.skip("this user may not mount a file system")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.mark.parametrize("noticed", ["before the save", "while it is written"])
def test_a_full_disk_leaves_the_last_checkpoint(
    noticed: str,
    place: Path,
    small_disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out, whole = small_disk / "run", tmp_path / "whole"
    words = ["train", str(place / "small.py"), "--steps", "4", "--checkpoint.every", "2", "--resume", "--out"]
    assert qmax.main([*words, str(whole)]) == 0
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints" / "4")
    with open(small_disk / "filler", "wb") as filler:
        filler.write(bytes(shutil.disk_usage(small_disk).free - 300_000))
    capfd.readouterr()
    with monkeypatch.context() as patch:
        if noticed == "while it is written":
            patch.setattr("model.checkpoint.checkpoints.demand_space", lambda *_: None)
        assert qmax.main([*words, str(out)]) == 2
        gc.collect()  # asyncio complains of what nobody asked for when it is collected
    told = capfd.readouterr().err
    sentences = [line for line in told.splitlines() if line.startswith("qmax: ")]
    assert len(sentences) == 1
    assert "the disk is full; the last good checkpoint is step 2; free some space and resume" in sentences[0]
    assert "Traceback" not in told
    assert os.listdir(out / "checkpoints" / "2")
    assert Checkpoints(out / "checkpoints", keep=1).latest_good(pytest.fail) == 2

    (small_disk / "filler").unlink()
    assert qmax.main([*words, str(out)]) == 0
    assert_same(out, whole)
