"""Batches are a pure function of (config, seed, step): whatever the workers, hosts and starting step, the same bytes.

Each epoch has every row once; mixtures keep their shares; held-out documents are never trained on.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs.run import DataConfig, Run
from errors import UserError
from tests.text_fixtures import byte_tokenizer, chats, sentences, write_jsonl
from train.data import loader
from train.data.loader import DataSets, open_data
from train.data.prepare import prepare
from train.data.rows import Batch, TrainingBatches

TOKENIZER = byte_tokenizer()
A_TEXTS = [f"A{text}" for text in sentences(300)]
B_TEXTS = [f"B{text}".upper() for text in sentences(40)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with three sources: a.jsonl and b.jsonl.gz of texts, chats.jsonl."""
    place = tmp_path_factory.mktemp("data")
    write_jsonl(place / "a.jsonl", A_TEXTS)
    write_jsonl(place / "b.jsonl.gz", B_TEXTS)
    write_jsonl(place / "chats.jsonl", chats(60))
    return place


def run_of(place: Path, *sources: str, seed: int = 0, **data: Any) -> Run:
    """A small run over sources of `place`."""
    objective = "sft" if "chats.jsonl" in sources else "pretrain"
    names = tuple(str(place / source) for source in sources)
    settings = {"sequence_length": 64, "batch_size": 8, "validation_fraction": 0.1, **data}
    return Run(data=DataConfig(sources=names, **settings), objective=objective, seed=seed)


def opened(place: Path, *sources: str, seed: int = 0, **data: Any) -> DataSets:
    """The data of a small run."""
    return open_data(run_of(place, *sources, seed=seed, **data), TOKENIZER, place / "cache")


def take(data: DataSets, n: int, start: int = 0, host: int = 0, hosts: int = 1) -> list[Batch]:
    """The first `n` batches from step `start` on."""
    with data.train_batches(start, host, hosts) as batches:
        return [next(batches) for _ in range(n)]


def digest(batches: Iterable[Batch]) -> str:
    """A hash over names, types and bytes."""
    sha = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            sha.update(f"{name} {batch[name].dtype} {batch[name].shape}".encode() + batch[name].tobytes())
    return sha.hexdigest()


def pieces(batches: Iterable[Batch]) -> list[tuple[bytes, bytes]]:
    """(inputs, targets) of every piece, as the bytes they spell; ends of documents spell nothing."""

    def spelled(ids: np.ndarray) -> bytes:
        return b"".join(TOKENIZER.token_bytes(i) for i in ids.tolist() if i != TOKENIZER.document_end_id)

    found: list[tuple[bytes, bytes]] = []
    for batch in batches:
        for tokens, targets, segments in zip(batch["tokens"], batch["targets"], batch["segments"], strict=True):
            for segment in range(1, segments.max() + 1):
                found.append((spelled(tokens[segments == segment]), spelled(targets[segments == segment])))
    return found


def test_workers_hosts_and_the_starting_step_change_nothing(place: Path) -> None:
    sources, weights = ("a.jsonl", "b.jsonl.gz"), (0.7, 0.3)
    plain = opened(place, *sources, weights=weights)
    expected = take(plain, 20)
    assert take(plain, 1)[0]["tokens"].shape == (8, 64)
    assert digest(take(plain, 20)) == digest(expected)
    assert digest(take(plain, 8, start=12)) == digest(expected[12:])
    for hosts in (1, 2, 4):
        shares = [take(plain, 5, start=3, host=host, hosts=hosts) for host in range(hosts)]
        joined = [
            {name: np.concatenate([share[i][name] for share in shares]) for name in shares[0][i]} for i in range(5)
        ]
        assert digest(joined) == digest(expected[3:8])
    several = opened(place, *sources, weights=weights, workers=2)
    assert digest(take(several, 5, start=3)) == digest(expected[3:8])


def test_another_seed_is_another_order_of_the_same_rows(place: Path) -> None:
    one, two = opened(place, "a.jsonl"), opened(place, "a.jsonl", seed=1)
    assert digest(take(one, 1)) != digest(take(two, 1))
    assert one.rows_per_epoch == two.rows_per_epoch
    assert digest(one.validation_batches()) == digest(two.validation_batches())


def test_an_epoch_is_every_token_once_and_the_next_is_shuffled_afresh(place: Path) -> None:
    data = opened(place, "a.jsonl", "b.jsonl.gz", validation_fraction=0.0, batch_size=1)
    rows = data.rows_per_epoch
    first, second = take(data, rows), take(data, rows, start=rows)
    assert Counter(digest([row]) for row in first) == Counter(digest([row]) for row in second)
    assert digest(first) != digest(second)
    texts = A_TEXTS + B_TEXTS
    learned = sum(len(targets) for _, targets in pieces(first))
    assert learned == sum(len(text.encode()) - 1 for text in texts)
    assert data.tokens_per_epoch == learned + len(texts)
    assert sum(int(batch["weights"].sum()) for batch in first) == data.tokens_per_epoch
    whole = "\n".join(texts).encode()
    for inputs, targets in pieces(first):
        assert (inputs[:1] + targets if inputs else targets) in whole
        assert targets.startswith(inputs[1:])


def test_segments_are_documents_and_positions_start_again(place: Path) -> None:
    for batch in take(opened(place, "a.jsonl"), 3):
        for segments, positions, weights in zip(batch["segments"], batch["positions"], batch["weights"], strict=True):
            starts = np.flatnonzero(np.diff(segments, prepend=0))
            assert (positions[starts] == 0).all()
            assert (np.diff(positions)[np.diff(segments) == 0] == 1).all()
            assert ((weights == 1) == (segments > 0)).all()


def test_a_mixture_keeps_its_shares_and_repeats_each_source_in_a_new_order(place: Path) -> None:
    data = opened(place, "a.jsonl", "b.jsonl.gz", weights=(0.75, 0.25), validation_fraction=0.0)
    streams = data._streams
    source = TrainingBatches(streams, (0.75, 0.25), 0, 8, (0, 8))
    rows = [len(stream) for stream in streams]
    epochs = [source.rows_of(1, np.arange(e * rows[1], (e + 1) * rows[1])).tolist() for e in range(5)]
    assert all(sorted(epoch) == list(range(rows[1])) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 5
    # b is smaller, so it is repeated, and still a quarter of every batch.
    of_b = {digest([{"tokens": streams[1][row]["tokens"]}]) for row in range(rows[1])}
    batches = take(data, 40)
    counts = [sum(digest([{"tokens": row}]) in of_b for row in batch["tokens"]) for batch in batches]
    assert counts == [2] * 40
    assert sum(counts) > rows[1]


def test_a_source_of_weight_zero_is_never_read(place: Path) -> None:
    data = opened(place, "a.jsonl", "b.jsonl.gz", weights=(0.0, 2.0))
    letters = {inputs[:1] for inputs, _ in pieces(take(data, 10)) if inputs[1:2].isdigit()}
    assert b"A" not in letters


def test_held_out_documents_are_never_trained_on(place: Path) -> None:
    data = opened(place, "a.jsonl", batch_size=1)
    trained, held_out = take(data, data.rows_per_epoch), list(data.validation_batches())
    numbers = [set(_document_numbers(batches)) for batches in (trained, held_out)]
    assert not numbers[0] & numbers[1]
    assert 10 <= len(numbers[1]) <= 60
    everything = opened(place, "a.jsonl", validation_fraction=0.0).tokens_per_epoch
    assert sum(int(batch["weights"].sum()) for batch in trained + held_out) == everything


def _document_numbers(batches: Iterable[Batch]) -> list[str]:
    starts = [inputs.decode("utf-8", "ignore") for inputs, _ in pieces(batches)]
    return [text.split(":")[0] for text in starts if text[:1] == "A" and ":" in text]


def test_validation_batches_pad_the_last_and_count_their_bytes_exactly(place: Path) -> None:
    data = opened(place, "a.jsonl", "b.jsonl.gz")
    batches = list(data.validation_batches())
    assert len(batches) == -(-data.validation_rows // 8)
    padding = [row for batch in batches for row in batch["segments"] if not row.any()]
    assert len(padding) == len(batches) * 8 - data.validation_rows
    assert not batches[-1]["weights"][-1].any() or not padding
    assert len(list(data.validation_batches(2))) == 2
    assert digest(data.validation_batches(2)) == digest(batches[:2])
    shares = [list(data.validation_batches(2, host, 2)) for host in range(2)]
    joined = [{k: np.concatenate([share[i][k] for share in shares]) for k in shares[0][i]} for i in range(2)]
    assert digest(joined) == digest(batches[:2])
    for n in (1, 2, None):
        assert data.validation_bytes(n) == sum(len(targets) for _, targets in pieces(batches[:n]))


def test_held_out_sources_replace_the_split(place: Path) -> None:
    data = opened(place, "a.jsonl", validation=(str(place / "b.jsonl.gz"),), validation_fraction=0.5)
    assert data.validation_bytes() == sum(len(text.encode()) - 1 for text in B_TEXTS)
    everything = opened(place, "a.jsonl", validation_fraction=0.0)
    assert data.tokens_per_epoch == everything.tokens_per_epoch
    assert list(everything.validation_batches()) == []
    assert everything.validation_bytes(8) == 0


def test_conversations_are_whole_and_weigh_the_assistant_alone(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = opened(place, "chats.jsonl", sequence_length=256, validation_fraction=0.0)
    assert "cut" not in capsys.readouterr().err
    batches = take(data, 1)
    names = ("tokens", "targets", "weights", "segments")
    for tokens, targets, weights, segments in zip(*(batches[0][name] for name in names), strict=True):
        for segment in range(1, segments.max() + 1):
            here = segments == segment
            text = TOKENIZER.decode([tokens[here][0], *targets[here]])
            assert text.startswith("<|im_start|>user\nquestion")
            assert text.endswith("<|im_end|>\n")
        learned = TOKENIZER.decode(targets[weights > 0].tolist())
        assert "ANSWER" in learned
        assert "question" not in learned
        assert set(weights.tolist()) <= {0.0, 1.0}
    opened(place, "chats.jsonl", sequence_length=64)
    assert "conversations of" in capsys.readouterr().err


def test_a_prepared_directory_gives_the_batches_of_its_sources(place: Path) -> None:
    store = prepare([place / "a.jsonl"], TOKENIZER, place / "prepared")
    assert digest(take(opened(place, "prepared"), 4)) == digest(take(opened(place, "a.jsonl"), 4))
    with pytest.raises(UserError, match="the tokenizer does not match"):
        open_data(run_of(place, "prepared"), byte_tokenizer("<x>"), place / "cache")
    with pytest.raises(UserError, match="prepared for pretrain, not for sft"):
        open_data(replace(run_of(place, "prepared"), objective="sft"), TOKENIZER, place / "cache")
    assert list((store.path / "index").iterdir())


def test_a_store_that_may_not_be_written_keeps_its_index_in_the_cache(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare([place / "b.jsonl.gz"], TOKENIZER, tmp_path / "shared")
    real: Callable[..., Any] = loader.build_index

    def refusing(windows: Any, length: int, mode: Any, path: Path, *more: Any) -> Any:
        if "shared" in path.parts:
            raise PermissionError(13, "Permission denied")
        return real(windows, length, mode, path, *more)

    monkeypatch.setattr(loader, "build_index", refusing)
    data = open_data(run_of(tmp_path, "shared"), TOKENIZER, tmp_path / "cache")
    assert digest(take(data, 2)) == digest(take(opened(place, "b.jsonl.gz"), 2))
    assert not (tmp_path / "shared" / "index").exists()


def test_changed_text_is_prepared_again_and_unchanged_text_is_not(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", sentences(50))
    before = opened(tmp_path, "a.jsonl").tokens_per_epoch
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrayrecord")}
    opened(tmp_path, "a.jsonl", seed=3, batch_size=2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.arrayrecord")} == made
    write_jsonl(tmp_path / "a.jsonl", sentences(60))
    assert opened(tmp_path, "a.jsonl").tokens_per_epoch > before


def test_data_that_cannot_be_used_is_one_sentence(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.sources is empty"):
        opened(place)
    with pytest.raises(UserError, match="no file or directory matches"):
        opened(place, "missing.jsonl")
    data = opened(place, "a.jsonl")
    with pytest.raises(UserError, match=r"data\.batch_size=8 does not divide over 3 hosts"):
        data.train_batches(0, 0, 3)
    with pytest.raises(UserError, match="malformed rows"):
        opened(place, "chats.jsonl", "a.jsonl", max_bad_rows=5)


def test_a_host_reads_its_share_in_processes_and_closing_ends_them(place: Path) -> None:
    def readers() -> list[Any]:
        threads = [thread for thread in threading.enumerate() if "grain-prefetch" in thread.name]
        return threads + multiprocessing.active_children()

    data = opened(place, "a.jsonl", workers=2)
    batches = data.train_batches(3, 3, 4)
    share = [{name: array[6:] for name, array in batch.items()} for batch in take(opened(place, "a.jsonl"), 3, start=3)]
    assert digest([next(batches) for _ in range(3)]) == digest(share)
    data.validation_batches()
    assert readers()
    data.close()
    batches.close()
    with pytest.raises(StopIteration):
        next(batches)
    deadline = time.monotonic() + 10
    while readers() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not readers()
