"""Law: the verbs are a promise, `qmax --help` is instant, and every mistake is one sentence with exit code 2."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import qmax
import terminal
from errors import UserError
from tests.pages import in_shell
from tests.words import TRAIN, parser_of, understand
from train.main import USAGE

ROOT = Path(__file__).resolve().parent.parent
VERBS = {
    "demo",
    "tokenizer",
    "prepare",
    "train",
    "generate",
    "chat",
    "serve",
    "score",
    "eval",
    "convert",
    "plan",
    "report",
    "doctor",
}
HEAVY = ("jax", "jaxlib", "numpy", "flax", "optax", "orbax", "grain", "sentencepiece", "tokenizers", "rich", "jinja2")


def call(*words: str, **extra_environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "qmax.py"), *words],
        capture_output=True,
        text=True,
        env={**os.environ, **extra_environment},
        check=False,
    )


def test_verbs_are_frozen() -> None:
    assert {verb.name for verb in qmax.VERBS} == VERBS


@pytest.mark.parametrize("words", [["--help"], ["help"], [], ["--version"], ["trian"]])
def test_front_door_imports_nothing_heavy(words: list[str]) -> None:
    code = f"import sys, qmax; qmax.main({words}); print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_every_verb() -> None:
    done = call("--help")
    assert done.returncode == 0
    assert all(f"  {verb.name} " in done.stdout and verb.help in done.stdout for verb in qmax.VERBS)


@pytest.mark.parametrize("name", sorted(VERBS))
def test_help_of_a_verb_shows_examples_that_it_understands(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    done = call(name, "--help")
    assert done.returncode == 0, done.stderr
    usage, _, rest = done.stdout.partition("\n")
    assert usage.startswith(f"usage: qmax {name}")
    examples = list(in_shell(rest.partition("examples:\n")[2], Path(name), 1, marked=False))
    assert any(example.words[0] == name for example in examples), "no example"
    monkeypatch.chdir(ROOT)
    for example in examples:
        understand(list(example.words), monkeypatch)


@pytest.mark.parametrize("name", sorted(VERBS - {"train"}))
def test_every_option_is_explained(name: str) -> None:
    silent = [action.dest for action in parser_of(name)._actions if not action.help]
    assert not silent, f"qmax {name} does not explain {silent}"


def test_options_of_train_are_explained() -> None:
    """Those that are no fields; of fields a test of the layout sees that each has a sentence."""
    for option in (TRAIN | {"--json", "--help"}) - {"--field"}:
        assert re.search(rf"^  (-h, )?{option}( [A-Z:]+)?  +\w+ \w+", USAGE, re.MULTILINE), option


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["trian"], "qmax: there is no verb 'trian'; did you mean 'train'?"),
        (["--debgu", "train"], "qmax: there is no verb '--debgu'; qmax --help lists the verbs"),
        (["doctor", "--jsn", "x"], "qmax: qmax doctor has no option --jsn; did you mean '--json'?"),
        (["doctor", "x"], "qmax: qmax doctor takes no further word 'x'; qmax doctor --help shows its arguments"),
        (["doctor", "--json"], "qmax: --json: expected one argument; qmax doctor --help shows the arguments"),
    ],
)
def test_mistakes_are_one_sentence(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert qmax.main(words) == 2
    assert capsys.readouterr() == ("", sentence + "\n")


@pytest.mark.parametrize("name", sorted(VERBS))
def test_an_unknown_option_is_refused_by_every_verb(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [name, "configs/tiny.py"] if name == "train" else [name]
    assert qmax.main([*words, "--no-such-option"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize(
    ("exception", "code", "words"),
    [
        (UserError("no corpus at a.txt"), 2, "qmax: no corpus at a.txt"),
        (KeyboardInterrupt(), 130, ""),
        (MemoryError(), 1, "qmax: out of memory; lower data.batch_size"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 2147483648 bytes."), 1, "(asked for 2.0 GiB)"),
        (RuntimeError("Out of memory while trying to allocate 12.50GiB."), 1, "(asked for 12.5 GiB)"),
        (RuntimeError("RESOURCE_EXHAUSTED: XLA: Used 21.5G of 15.48G hbm."), 1, "(asked for 21.5 GiB)"),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x"), 1, "the disk is full while writing runs/x"),
        (ModuleNotFoundError("No module named 'flax'", name="flax"), 2, "'flax' is not installed"),
        (ValueError("shape\nmismatch"), 1, "unexpected ValueError: shape mismatch; run it again with --debug"),
    ],
)
def test_exceptions_become_sentences(
    exception: BaseException,
    code: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(_: list[str]) -> int:
        raise exception

    monkeypatch.setattr("train.doctor.doctor_main", fail)
    assert qmax.main(["doctor"]) == code
    error = capsys.readouterr().err
    assert words in error
    assert len(error.splitlines()) == (1 if words else 0)
    for place in (["--debug", "doctor"], ["doctor", "--debug"]):
        assert qmax.main(place) == code
        assert "Traceback" in capsys.readouterr().err


def test_words_after_two_dashes_are_left_alone() -> None:
    assert qmax._take_debug(["a", "--debug", "b", "--", "--debug"]) == (["a", "b", "--", "--debug"], True)
    assert qmax._take_debug(["a", "--", "--debug"]) == (["a", "--", "--debug"], False)


def test_a_closed_pipe_is_quiet() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(ROOT / "qmax.py"), "--help"]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_doctor_tells_the_machine(tmp_path: Path) -> None:
    done = call("doctor", "--json", str(tmp_path / "d.json"))
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "d.json").read_text())
    assert facts["dtype"] == "float32"
    assert len(facts["devices"]) == 8
    assert any("only a CPU" in line for line in facts["warnings"])
    assert any("8 emulated CPU devices" in line for line in facts["warnings"])


def test_doctor_finds_a_jax_that_does_not_start() -> None:
    done = call("doctor", JAX_PLATFORMS="tpu")
    assert done.returncode == 1
    assert "jax does not start" in done.stdout


def test_json_is_written_whole_and_without_nan(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.json"
    terminal.write_json(path, {"a": (1, float("nan")), "é": 1.5})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, None], "é": 1.5}
    assert [file.name for file in path.parent.iterdir()] == ["a.json"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        terminal.write_json(tmp_path / "file" / "a.json", {})


def test_tables_align_wide_characters(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_table([("中文", 1), ("abc", 1234), ("é", None)], header=("text", "n"))
    assert capsys.readouterr().out.splitlines() == [
        "text      n",
        "----  -----",
        "中文      1",
        "abc   1,234",
        "é         -",
    ]


def test_progress_in_a_log_is_lines(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(terminal, "LINE_SECONDS", 0.0)
    with terminal.progress_bar("train", 3, unit="steps", done=1) as bar:
        bar.advance(note="loss 2.5")
        bar.print("saved")
        bar.advance()
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0].startswith("train: 2/3 steps | ")
    assert lines[0].endswith("loss 2.5")
    assert lines[1] == "saved"
    assert lines[-1].startswith("train: 3/3 steps")
