"""A prepared store holds every document of its sources, and is the same bytes however often it was killed.

Memory does not grow with the corpus; what does not belong together is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from errors import UserError
from tests.text_fixtures import byte_tokenizer, chats, sentences, texts_of, write_form, write_jsonl
from train.data import prepare as preparing
from train.data.prepare import prepare
from train.data.prepare_verb import prepare_main
from train.data.sources import expand
from train.data.store import RECORD_TOKENS, Store, make_split, split


def tree_hash(directory: Path) -> dict[str, str]:
    """Content of every file of a directory."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def test_long_documents_are_read_in_part_and_whole(tmp_path: Path) -> None:
    texts = ["x", "é" * (RECORD_TOKENS + 7), "end"]
    store = prepare([write_jsonl(tmp_path / "a.jsonl", texts)], byte_tokenizer(), tmp_path / "store", shard_tokens=9)
    assert len(store.meta["shards"]) == 2
    assert texts_of(store) == texts
    whole = store[1].tokens
    for start, stop in ((0, 5), (RECORD_TOKENS - 2, RECORD_TOKENS + 2), (3, 2 * RECORD_TOKENS + 9), (7, 7)):
        assert store.read(1, start, stop).tokens.tolist() == whole[start:stop].tolist()
    with pytest.raises(IndexError):
        store[3]


def test_loss_falls_on_the_assistant_alone(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    store = prepare([write_jsonl(tmp_path / "c.jsonl", chats(9))], tokenizer, tmp_path / "store", objective="sft")
    for i in range(len(store)):
        mask = store[i].loss_mask
        assert mask is not None
        own = tokenizer.decode(store[i].tokens[mask].tolist(), skip_specials=True)
        other = tokenizer.decode(store[i].tokens[~mask].tolist(), skip_specials=True)
        assert own.count("ANSWER") == 1 + i % 3
        assert "ANSWER" not in other
        assert "question" not in own


# ---------------------------------------------------------------------------------------------------------------------
# Killed and resumed


@pytest.fixture
def corpus(tmp_path: Path) -> list[Path]:
    """Three files of different forms; some rows malformed."""
    rows: list[Any] = [text if i % 40 else {"no": "text"} for i, text in enumerate(sentences(120))]
    return [
        write_jsonl(tmp_path / "a.jsonl", rows),
        write_jsonl(tmp_path / "b.jsonl.gz", sentences(90)),
        write_form(tmp_path, ".parquet", sentences(100)),
    ]


def test_interrupted_anywhere_it_resumes_to_the_same_bytes(
    tmp_path: Path, corpus: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(out: Path) -> Store:
        return prepare(corpus, byte_tokenizer(), out, shard_tokens=2500)

    run(tmp_path / "whole")
    expected = tree_hash(tmp_path / "whole")
    assert sum(name.endswith(".arrayrecord") for name in expected) > 5
    real: Callable[[Path, Path], None] = preparing.commit
    for moment in range(0, 16, 3):
        calls = 0

        def interrupted(temporary: Path, path: Path, moment: int = moment) -> None:
            nonlocal calls
            calls += 1
            if calls > moment:
                raise KeyboardInterrupt
            real(temporary, path)

        out = tmp_path / f"interrupted{moment}"
        with monkeypatch.context() as patch:
            patch.setattr(preparing, "commit", interrupted)
            with pytest.raises(KeyboardInterrupt):
                run(out)
        assert not (out / "meta.json").exists()
        with pytest.raises(UserError, match="is not finished"):
            expand([str(out)])
        run(out)
        assert tree_hash(out) == expected


def test_killed_with_nine_it_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "a.jsonl", sentences(6000))
    prepare([file], byte_tokenizer(), tmp_path / "whole", shard_tokens=20_000)
    program = (
        "import sys; from pathlib import Path; from tests.text_fixtures import byte_tokenizer;"
        "from train.data.prepare import prepare;"
        "prepare([Path(sys.argv[1])], byte_tokenizer(), Path(sys.argv[2]), shard_tokens=20_000)"
    )
    out = tmp_path / "killed"
    command = [sys.executable, "-c", program, str(file), str(out)]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (out / "shard-00003.json").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert not (out / "meta.json").exists()
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True, check=True)
    assert "resuming" in done.stderr
    assert tree_hash(out) == tree_hash(tmp_path / "whole")


def test_processes_change_nothing(tmp_path: Path, corpus: list[Path], capfd: pytest.CaptureFixture[str]) -> None:
    prepare(corpus, byte_tokenizer(), tmp_path / "one", shard_tokens=2500, workers=0)
    said = capfd.readouterr().err
    prepare(corpus, byte_tokenizer(), tmp_path / "two", shard_tokens=2500, workers=2)
    assert tree_hash(tmp_path / "one") == tree_hash(tmp_path / "two")
    assert capfd.readouterr().err == said


def test_another_order_is_refused_not_mixed_in(tmp_path: Path, corpus: list[Path]) -> None:
    out = tmp_path / "store"
    prepare(corpus, byte_tokenizer(), out)
    with pytest.raises(UserError, match="prepared with another tokenizer"):
        prepare(corpus, byte_tokenizer("<x>"), out)
    with pytest.raises(UserError, match="objective 'pretrain' instead of 'sft'"):
        prepare(corpus, byte_tokenizer(), out, objective="sft")
    with pytest.raises(UserError, match="other sources, or they have changed"):
        prepare(corpus[:2], byte_tokenizer(), out)
    with pytest.raises(UserError, match="not empty and not a prepared store"):
        prepare(corpus, byte_tokenizer(), tmp_path)
    with pytest.raises(UserError, match="is prepared already"):
        prepare([out], byte_tokenizer(), tmp_path / "again")
    store = Store.open(out)
    with pytest.raises(UserError, match="the tokenizer does not match"):
        store.check(byte_tokenizer("<x>"), "pretrain")
    with pytest.raises(UserError, match="prepared for pretrain, not for sft"):
        store.check(byte_tokenizer(), "sft")


def test_loss_masks_of_an_earlier_version_are_refused(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "chats.jsonl", chats(3))
    store = prepare([file], byte_tokenizer(), tmp_path / "store", objective="sft")
    store.check(byte_tokenizer(), "sft")
    del store.meta["masks"]
    with pytest.raises(UserError, match="loss masks of an earlier version"):
        store.check(byte_tokenizer(), "sft")


def test_a_damaged_store_is_named(tmp_path: Path, corpus: list[Path]) -> None:
    out = tmp_path / "store"
    prepare(corpus, byte_tokenizer(), out)
    shard = out / "shard-00000.arrayrecord"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match=f"instead of {len(data)}"):
        Store.open(out)
    shard.write_bytes(data.replace(b"\x00", b"\x01"))
    with pytest.raises(UserError, match="is damaged"):
        [Store.open(out)[i] for i in range(5)]
    (out / "meta.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        Store.open(out)
    with pytest.raises(UserError, match="is not a prepared store"):
        Store.open(tmp_path)


def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    line = json.dumps({"text": "some words of a text " * 100}) + "\n"
    file = tmp_path / "large.jsonl"
    file.write_text(line * 8_000)
    assert file.stat().st_size > 16_000_000

    class Lengths:
        """A tokenizer that is quick and keeps nothing."""

        fingerprint, vocab_size, document_end_id = "lengths", 300, 299

        def encode(self, text: str) -> list[int]:
            return [len(text) % 256] * 20

    tracemalloc.start()
    try:
        prepare([file], Lengths(), tmp_path / "store", shard_tokens=100_000)  # pyright: ignore[reportArgumentType]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3_000_000


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.999])
@pytest.mark.parametrize("count", [1, 2, 300])
def test_the_split_leaves_something_on_both_sides(tmp_path: Path, count: int, fraction: float) -> None:
    store = prepare([write_jsonl(tmp_path / "a.jsonl", sentences(count))], byte_tokenizer(), tmp_path / "store")
    train, held_out = split(store, fraction, 0)
    assert sorted([*train, *held_out]) == list(range(count))
    assert len(train) >= 1
    assert (len(held_out) >= 1) == (fraction > 0 and count > 1)
    if count == 300 and fraction == 0.3:
        assert 60 < len(held_out) < 120
        assert (make_split(store, fraction, 1).held_out(np.arange(300)) != np.isin(np.arange(300), held_out)).any()


# ---------------------------------------------------------------------------------------------------------------------
# The verb


def test_the_verb_prepares_prints_and_says_when_there_is_nothing_to_do(
    tmp_path: Path, corpus: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer().save(tmp_path / "tok")
    out, report = tmp_path / "out", tmp_path / "report.json"
    argv = [*map(str, corpus), "--tokenizer", str(tmp_path / "tok"), "--out", str(out), "--json", str(report)]
    assert prepare_main(argv) == 0
    printed = capsys.readouterr()
    result = json.loads(report.read_text())
    assert result["documents"] == 307
    assert result["bad_rows"] == 3
    assert result["shards"] == 1
    assert result["tokens"] == result["source_bytes"] + 307
    assert f"{result['tokens']:,}" in printed.out
    assert prepare_main(argv) == 0
    assert "was finished already" in capsys.readouterr().err
    with pytest.raises(UserError, match="--shard-tokens 0 must be at least 1"):
        prepare_main([*argv, "--shard-tokens", "0"])
    with pytest.raises(SystemExit) as ended:
        prepare_main(["--help"])
    assert ended.value.code == 0
    assert "--objective sft" in capsys.readouterr().out


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from train.data.prepare_verb import prepare_main\n"
        "try: prepare_main(['--help'])\n"
        "except SystemExit: print(sorted({'numpy', 'jax', 'grain', 'rich', 'pyarrow'} & set(sys.modules)))"
    )
    root = Path(__file__).parent.parent
    shown = subprocess.run(
        [sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True, env={**os.environ}
    )
    assert shown.stdout.splitlines()[-1] == "[]"
