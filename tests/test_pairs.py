"""Rows of pairs and judged replies: no pair is parted and no token lost, a pair's two sequences stand side by side.

The same rows in processes and on several hosts; what is too long is cut, left out or refused as the config says.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.run import DataConfig, Run
from errors import UserError
from tests.test_data import digest, take
from tests.text_fixtures import byte_tokenizer, write_jsonl
from train.data.loader import DataSets, open_data
from train.data.packing import TooLong, pack
from train.data.pairs import Cut, materialize_pairs, mismatch
from train.data.rows import Batch

TOKENIZER = byte_tokenizer()
Document = tuple[np.ndarray, np.ndarray]


def made(kind: str, documents: Sequence[tuple[int, int, int, int]]) -> list[Document]:
    """Documents of so many tokens of prompt, chosen and rejected, and a label.

    Token i of side s of document d is 1000 (d + 1) + 200 s + i.
    """
    found: list[Document] = []
    for number, (prompt, *replies, label) in enumerate(documents):
        sides = replies if kind == "preference" else replies[:1]
        tokens = [1000 * (number + 1) + 200 * s + np.arange(prompt + reply) for s, reply in enumerate(sides)]
        masks = [np.arange(prompt + reply) >= prompt for reply in sides]
        header = [len(tokens[0]), label] if kind == "preference" else [label % 2]
        words = np.concatenate([header, *tokens]).astype(np.int32)
        found.append((words, np.concatenate([np.zeros(len(header), bool), *masks])))
    return found


def packed(kind: str, documents: list[Document], length: int, too_long: TooLong) -> tuple[list[Batch], int, int]:
    """Rows, and how many documents were cut and left out."""
    cut = Cut(kind, length, too_long == "cut_left")

    def fetch(doc: int, start: int, stop: int) -> Document:
        return documents[doc][0][start:stop], documents[doc][1][start:stop]

    lengths = cut.whole(np.array([len(words) for words, _ in documents], np.int64)) + 1
    pieces = pack(lengths, length, "whole", too_long, lambda doc: cut.shortened(doc, fetch))
    listed = list(zip(pieces.doc.tolist(), pieces.start.tolist(), pieces.length.tolist(), strict=True))
    offsets = pieces.row_offsets.tolist()
    rows = [listed[a:b] for a, b in itertools.pairwise(offsets)]
    return [materialize_pairs(row, fetch, cut, len(documents)) for row in rows], pieces.cut, pieces.dropped


def sequences(row: Batch) -> list[dict[str, np.ndarray]]:
    """The arrays of each segment, in their order."""
    numbers = [number for number in dict.fromkeys(row["segments"].tolist()) if number]
    return [{name: array[row["segments"] == number] for name, array in row.items()} for number in numbers]


SIZES = st.lists(
    st.tuples(st.integers(1, 12), st.integers(1, 25), st.integers(1, 25), st.integers(0, 300)), min_size=1, max_size=25
)


@given(SIZES, st.integers(80, 150))
def test_every_pair_is_in_one_row_whole_with_its_sides_next_to_each_other(
    sizes: list[tuple[int, int, int, int]], length: int
) -> None:
    rows, cut, dropped = packed("preference", made("preference", sizes), length, "cut")
    assert (cut, dropped) == (0, 0)
    seen: list[int] = []
    for row in rows:
        found = sequences(row)
        numbers = [one["segments"][0] for one in found]
        assert numbers == list(range(1, len(found) + 1))
        for chosen, rejected in zip(found[::2], found[1::2], strict=True):
            number = int(chosen["tokens"][0]) // 1000 - 1
            seen.append(number)
            prompt, good, bad, margin = sizes[number]
            for side, (one, reply) in enumerate(((chosen, good), (rejected, bad))):
                first = 1000 * (number + 1) + 200 * side
                assert one["tokens"].tolist() == list(range(first, first + prompt + reply - 1))
                assert (one["targets"] == one["tokens"] + 1).all()
                assert one["positions"].tolist() == list(range(prompt + reply - 1))
                assert one["weights"].sum() == reply
                assert not one["weights"][: prompt - 1].any()
                assert (one["labels"] == np.float32(margin / 100)).all()
        padding = row["segments"] == 0
        assert not any(array[padding].any() for array in row.values())
        assert row["labels"].dtype == np.float32
    assert sorted(seen) == list(range(len(sizes)))


@given(SIZES, st.integers(2, 60), st.sampled_from(["cut", "cut_left", "drop"]))
def test_what_is_too_long_keeps_half_a_row_a_side_or_is_left_out(
    sizes: list[tuple[int, int, int, int]], length: int, too_long: TooLong
) -> None:
    rows, cut, dropped = packed("preference", made("preference", sizes), length, too_long)
    pairs = [side for row in rows for side in zip(sequences(row)[::2], sequences(row)[1::2], strict=True)]
    over = {d for d, (prompt, a, b, _) in enumerate(sizes) if 2 * (prompt - 1) + a + b > length}
    assert len(pairs) + dropped == len(sizes)
    assert cut == sum(int(chosen["tokens"][0]) // 1000 - 1 in over for chosen, _ in pairs)
    assert cut + dropped == len(over)
    assert too_long != "drop" or not cut
    for sides in pairs:
        number = int(sides[0]["tokens"][0]) // 1000 - 1
        prompt, *replies, _ = sizes[number]
        for side, (one, reply) in enumerate(zip(sides, replies, strict=True)):
            inputs = prompt + reply - 1
            kept = min(inputs, length // 2) if number in over else inputs
            first = 1000 * (number + 1) + 200 * side + (inputs - kept if too_long == "cut_left" else 0)
            assert one["tokens"].tolist() == list(range(first, first + kept))
            assert one["positions"].tolist() == list(range(kept))
            assert one["weights"].any()


def test_a_cut_pair_by_hand() -> None:
    """A prompt of 3 and replies of 4 and 1 take 6 + 3 inputs; in a row of 6 each side keeps 3."""
    documents = made("preference", [(3, 4, 1, 0)])
    rows, cut, _ = packed("preference", documents, 6, "cut")
    assert cut == 1
    assert rows[0]["tokens"].tolist() == [1000, 1001, 1002, 1200, 1201, 1202]
    assert rows[0]["weights"].tolist() == [0, 0, 1, 0, 0, 1]
    rows, _, _ = packed("preference", documents, 6, "cut_left")
    assert rows[0]["tokens"].tolist() == [1003, 1004, 1005, 1200, 1201, 1202]
    assert rows[0]["weights"].tolist() == [1, 1, 1, 0, 0, 1]
    assert packed("preference", documents, 4, "cut")[1:] == (0, 1)  # 2 inputs a side: only the prompt is left
    assert packed("preference", documents, 9, "cut")[1:] == (0, 0)


@given(SIZES, st.integers(2, 90), st.sampled_from(["cut", "cut_left", "drop"]))
def test_a_judged_reply_stands_beside_its_prompt_with_the_reply_of_the_next(
    sizes: list[tuple[int, int, int, int]], length: int, too_long: TooLong
) -> None:
    rows, cut, dropped = packed("kto", made("kto", sizes), length, too_long)
    count = 0
    for row in rows:
        for own, other in zip(sequences(row)[::2], sequences(row)[1::2], strict=True):
            count += 1
            number = int(own["tokens"][0]) // 1000 - 1
            prompt, reply, _, label = sizes[number]
            words = 1000 * (number + 1) + np.arange(prompt + reply)
            if 2 * (prompt + reply - 1) > length:
                kept = min(prompt + reply, length // 2 + 1)
                words = words[-kept:] if too_long == "cut_left" else words[:kept]
            assert own["tokens"].tolist() == words[:-1].tolist()
            assert own["segments"][0] % 2 == 1
            assert other["segments"][0] == own["segments"][0] + 1
            after = (number + 1) % len(sizes)
            theirs = 1000 * (after + 1) + sizes[after][0] + np.arange(sizes[after][1])
            mine = [word for word in words.tolist() if word % 1000 < prompt]
            mixed = [*mine, *theirs.tolist()][: len(words)]
            assert [*other["tokens"].tolist(), other["targets"][-1]] == mixed
            assert other["weights"].tolist() == [float(i >= len(mine)) for i in range(1, len(mixed))]
            assert other["positions"].tolist() == list(range(len(mixed) - 1))
            assert {*own["labels"].tolist(), *other["labels"].tolist()} == {1.0 if label % 2 else -1.0}
    assert count + dropped == len(sizes)
    assert cut + dropped == sum(2 * (prompt + reply - 1) > length for prompt, reply, _, _ in sizes)


def test_a_mismatch_by_hand() -> None:
    own = np.array([1, 2, 3, 4, 5]), np.array([False, False, True, True, False])
    short = np.array([6, 7, 8]), np.array([False, True, False])
    tokens, mask = mismatch(own, short)
    assert (tokens.tolist(), mask.tolist()) == ([1, 2, 7, 8], [False, False, True, False])
    tokens, mask = mismatch(short, own)
    assert (tokens.tolist(), mask.tolist()) == ([6, 3, 4], [False, True, True])


# ---------------------------------------------------------------------------------------------------------------------
# From files to batches


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with pairs.jsonl and votes.jsonl."""
    place = tmp_path_factory.mktemp("pairs")
    texts = [(f"question {i}", f"GOOD {i} " * (1 + i % 4), f"BAD {i}") for i in range(40)]
    pairs = [{"prompt": q, "chosen": a, "rejected": b, "margin": i % 3} for i, (q, a, b) in enumerate(texts)]
    write_jsonl(place / "pairs.jsonl", pairs)
    votes = [{"prompt": q, "completion": a, "label": i % 2 == 0} for i, (q, a, _) in enumerate(texts)]
    write_jsonl(place / "votes.jsonl", votes)
    return place


FILES = {"dpo": "pairs.jsonl", "reward": "pairs.jsonl", "kto": "votes.jsonl"}


def opened(place: Path, objective: Any, **data: Any) -> DataSets:
    """The data of a small run."""
    settings = {"sequence_length": 256, "batch_size": 4, "validation_fraction": 0.2, **data}
    run = Run(data=DataConfig(sources=(str(place / FILES[objective]),), **settings), objective=objective)
    return open_data(run, TOKENIZER, place / "cache")


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_workers_and_hosts_change_nothing_and_every_batch_has_the_same_arrays(place: Path, objective: str) -> None:
    data = opened(place, objective)
    expected = take(data, 6)
    for hosts in (1, 2):
        shares = [take(data, 2, start=4, host=host, hosts=hosts) for host in range(hosts)]
        joined = [{k: np.concatenate([share[i][k] for share in shares]) for k in shares[0][i]} for i in range(2)]
        assert digest(joined) == digest(expected[4:])
    if objective == "kto":
        assert digest(take(opened(place, objective, workers=1), 2, start=4)) == digest(expected[4:])
    held_out = list(data.validation_batches())
    assert any(not row.any() for row in held_out[-1]["segments"]), "no padding to look at"
    for batch in (*expected, *held_out):
        assert {name: (array.dtype, array.shape) for name, array in batch.items()} == {
            **dict.fromkeys(("tokens", "targets", "positions", "segments"), (np.int32, (4, 256))),
            **dict.fromkeys(("weights", "labels"), (np.float32, (4, 256))),
        }
    assert data.validation_bytes() == 0


def test_pairs_and_votes_are_what_people_wrote(place: Path) -> None:
    def spelled(ids: np.ndarray) -> str:
        return TOKENIZER.decode(ids.tolist())

    for objective in ("dpo", "kto"):
        for row in (
            sequences({k: v[i] for k, v in b.items()}) for b in take(opened(place, objective), 2) for i in (0, 3)
        ):
            for own, other in zip(row[::2], row[1::2], strict=True):
                learned, beside = (
                    spelled(one["targets"][one["weights"] > 0]).removeprefix("<think>\n\n</think>\n\n")
                    for one in (own, other)
                )
                number = int(learned.split()[1])
                question = f"user\nquestion {number}<|im_end|>"
                assert question in spelled(own["tokens"])
                assert question in spelled(other["tokens"])
                assert learned == f"GOOD {number} " * (1 + number % 4) + "<|im_end|>"
                if objective == "dpo":
                    assert beside == f"BAD {number}<|im_end|>"
                    assert own["labels"][0] == number % 3
                else:
                    assert beside.startswith(f"GOOD {(number + 1) % 40}"[: len(beside)])
                    assert own["labels"][0] == (1 if number % 2 == 0 else -1)


def test_dpo_and_reward_read_the_same_rows_and_kto_others(place: Path, tmp_path: Path) -> None:
    assert digest(take(opened(place, "dpo"), 2)) == digest(take(opened(place, "reward"), 2))
    one = write_jsonl(tmp_path / "votes.jsonl", [{"prompt": "q", "completion": "a", "label": True}])
    with pytest.raises(UserError, match="holds one reply"):
        opened(one.parent, "kto")


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_policies_say_what_they_do_before_training(
    place: Path, capsys: pytest.CaptureFixture[str], objective: str
) -> None:
    said: dict[str, str] = {}
    for too_long in ("cut", "cut_left", "drop"):
        opened(place, objective, sequence_length=100, too_long=too_long, validation_fraction=0.0)
        said[too_long] = capsys.readouterr().err
    assert "of 40 conversations" in said["cut"]
    assert "are cut to 100 tokens" in said["cut_left"]
    assert "are left out" in said["drop"]
    assert "cut to" not in said["drop"]
    with pytest.raises(
        UserError, match=r"of 40 conversations of .* are longer than data\.sequence_length=100 \(the long"
    ):
        opened(place, objective, sequence_length=100, too_long="refuse")
    with pytest.raises(UserError, match=r"all are too long for data\.sequence_length"):
        opened(place, objective, sequence_length=20, too_long="drop")


# ---------------------------------------------------------------------------------------------------------------------
# A column of reference


def test_a_reference_made_in_order_comes_with_every_row(place: Path, tmp_path: Path) -> None:
    data = opened(place, "dpo")
    columns = {key: np.full((len(part), 256), np.nan, np.float32) for key, part in data.parts.items()}
    for key, first, batch in data.rows_in_order(4):
        assert batch["tokens"].shape == (4, 256)
        there = min(4, len(columns[key]) - first)
        assert not batch["segments"][there:].any()
        columns[key][first : first + there] = 2.0 * batch["targets"][:there] + batch["segments"][:there]
    assert not any(np.isnan(column).any() for column in columns.values())
    assert len(columns) == 2
    for whole, *halves in zip(data.rows_in_order(4), *(data.rows_in_order(4, host, 2) for host in (0, 1)), strict=True):
        assert [half[:2] for half in halves] == [whole[:2]] * 2
        assert digest([{k: np.concatenate([h[2][k] for h in halves]) for k in whole[2]}]) == digest([whole[2]])
    paths = {key: tmp_path / f"{key}.npy" for key in columns}
    again = opened(place, "dpo", workers=1)
    with pytest.raises(UserError, match="no reference for the rows"):
        again.attach("reference", paths)
    for key, column in columns.items():
        np.save(paths[key], column)
    again.attach("reference", paths)
    batches = [*take(again, 3), *again.validation_batches()]
    for batch, plain in zip(batches, [*take(data, 3), *data.validation_batches()], strict=True):
        reference = batch.pop("reference")
        assert (reference == 2.0 * batch["targets"] + batch["segments"]).all()
        assert reference.dtype == np.float32
        assert digest([batch]) == digest([plain])
    part = next(iter(again.parts.values()))
    part[0]
    assert len(pickle.dumps(part)) < 10_000
    np.save(paths[part.key], np.zeros((1, 2), np.float32))
    with pytest.raises(UserError, match=r"has shape \(1, 2\)"):
        data.attach("reference", paths)


def test_keys_of_parts_are_stable_and_tell_policies_apart(place: Path) -> None:
    keys = [opened(place, "dpo", **data).parts.keys() for data in ({}, {}, {"too_long": "drop"}, {"batch_size": 2})]
    assert keys[0] == keys[1] == keys[3]
    assert not keys[0] & keys[2]
