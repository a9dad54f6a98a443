"""Packing loses no token and mixes no documents: every (token, next token) pair of every document is in a row once.

And permutations are permutations, and mixtures keep their proportions, at any position and without memory.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data.order import derive, interleave, permute, shares
from train.data.packing import WINDOW, Mode, Pieces, build_index, materialize, pack

LENGTHS = st.lists(st.integers(0, 60), max_size=80)


def _rows(pieces: Pieces) -> list[list[tuple[int, int, int]]]:
    listed = list(zip(pieces.doc.tolist(), pieces.start.tolist(), pieces.length.tolist(), strict=True))
    return [listed[a:b] for a, b in zip(pieces.row_offsets[:-1], pieces.row_offsets[1:], strict=True)]


@given(LENGTHS, st.integers(1, 40))
def test_split_has_every_pair_once_and_fills_every_row_but_the_last(lengths: list[int], length: int) -> None:
    rows = _rows(pack(np.array(lengths, np.int64), length, "split"))
    seen = Counter((doc, start + i) for row in rows for doc, start, count in row for i in range(count))
    assert seen == Counter((doc, i) for doc, n in enumerate(lengths) for i in range(n - 1))
    filled = [sum(count for _, _, count in row) for row in rows]
    assert all(n == length for n in filled[:-1])
    assert all(0 < n <= length for n in filled[-1:])


@given(LENGTHS, st.integers(1, 40))
def test_whole_keeps_documents_in_one_piece_and_counts_those_it_shortens(lengths: list[int], length: int) -> None:
    packed = pack(np.array(lengths, np.int64), length, "whole")
    rows = _rows(packed)
    pieces = sorted(piece for row in rows for piece in row)
    assert pieces == [(doc, 0, min(n - 1, length)) for doc, n in enumerate(lengths) if n > 1]
    assert packed.cut == sum(n - 1 > length for n in lengths)
    filled = [sum(count for _, _, count in row) for row in rows]
    assert all(0 < n <= length for n in filled)
    # Best fit leaves no two rows that would have fitted into one.
    assert sum(sorted(filled)[:2]) > length or len(filled) < 2


def test_best_fit_wastes_little() -> None:
    lengths = np.random.default_rng(0).integers(2, 2000, 3 * WINDOW)
    packed = pack(lengths, 2048, "whole")
    assert (lengths - 1).sum() / (packed.rows * 2048) > 0.99


@pytest.mark.parametrize("mode", ["split", "whole"])
def test_the_index_on_disk_is_what_pack_says(tmp_path: Path, mode: Mode) -> None:
    lengths = np.random.default_rng(1).integers(0, 300, WINDOW + 5000)
    expected = pack(lengths, 512, mode)
    ids = np.arange(len(lengths))

    def windows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for i in range(0, len(ids), WINDOW):
            yield ids[i : i + WINDOW], lengths[i : i + WINDOW]

    index = build_index(windows(), 512, mode, tmp_path / "deep" / "index")
    assert len(index) == expected.rows
    assert index.pairs == int(expected.length.sum())
    rows = _rows(expected)
    for row in (0, 1, len(rows) // 2, len(rows) - 1):
        assert index[row] == rows[row]
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["index"]
    again = build_index(iter(()), 512, mode, tmp_path / "deep" / "index")  # what is there is not made again
    assert pickle.loads(pickle.dumps(again))[7] == rows[7]


def test_an_index_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def windows() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        yield np.arange(5), np.full(5, 9)
        raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        build_index(windows(), 4, "split", tmp_path / "index")
    assert not any(tmp_path.iterdir())


def test_an_index_without_a_row_is_one(tmp_path: Path) -> None:
    index = build_index(iter([(np.arange(3), np.ones(3, np.int64))]), 4, "split", tmp_path / "index")
    assert len(index) == 0
    assert json.loads((tmp_path / "index" / "index.json").read_text())["pairs"] == 0


@given(
    LENGTHS.filter(lambda lengths: max(lengths, default=0) > 1), st.integers(1, 40), st.sampled_from(["split", "whole"])
)
def test_rows_keep_documents_apart(lengths: list[int], length: int, mode: Mode) -> None:
    """Token i of document d is 1000 d + i, so a row tells where each of its numbers comes from."""

    def fetch(doc: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = 1000 * doc + np.arange(start, min(stop, lengths[doc]), dtype=np.int32)
        return tokens, tokens % 3 == 0

    for row in _rows(pack(np.array(lengths), length, mode)):
        arrays = materialize(row, fetch, length)
        assert {name: array.dtype for name, array in arrays.items()} == {
            "tokens": np.int32,
            "targets": np.int32,
            "weights": np.float32,
            "positions": np.int32,
            "segments": np.int32,
        }
        real = arrays["segments"] > 0
        tokens, targets, segments = arrays["tokens"], arrays["targets"], arrays["segments"]
        assert (targets[real] == tokens[real] + 1).all()
        assert (targets[real] // 1000 == tokens[real] // 1000).all()
        assert (arrays["weights"][real] == (targets[real] % 3 == 0)).all()
        assert all(not arrays[name][~real].any() for name in arrays)
        new = np.diff(segments[real], prepend=0) > 0
        assert (arrays["positions"][real][new] == 0).all()
        assert (np.diff(arrays["positions"][real])[~new[1:]] == 1).all()
        assert segments[real].max() == len(row)


@given(st.integers(1, 5000), st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation(n: int, key: int) -> None:
    assert sorted(permute(np.arange(n), n, key).tolist()) == list(range(n))


def test_permute_answers_far_out_and_differs_by_key() -> None:
    n = 10**12
    far = np.array([0, 1, n // 2, n - 1])
    assert (permute(far, n, 1) < n).all()
    assert (permute(far, n, 1) >= 0).all()
    assert (permute(far, n, 1) != permute(far, n, 2)).any()
    # The bits never change, or runs could not be resumed.
    assert permute(np.arange(4), 10, derive(0, "rows", 0, 0)).tolist() == [4, 5, 8, 2]
    assert permute(np.arange(4), n, 7).tolist() == [878728095401, 747141343091, 72282947803, 406027759760]


def test_permutations_of_small_sets_are_all_equally_likely() -> None:
    seen = Counter(tuple(permute(np.arange(4), 4, derive(key)).tolist()) for key in range(2400))
    assert len(seen) == 24
    assert max(seen.values()) < 150
    assert min(seen.values()) > 60


@given(st.lists(st.floats(0, 100), min_size=1, max_size=6).filter(lambda w: sum(w) > 1e-3), st.integers(0, 2**41))
def test_a_mixture_counts_every_source_through_and_keeps_its_share(weights: list[float], start: int) -> None:
    parts = shares(weights)
    k = np.arange(start, start + 2000)
    source, item = interleave(k, parts)
    for number, weight in enumerate(weights):
        mine = item[source == number]
        assert (np.diff(mine) == 1).all()
        assert weight > 0 or not len(mine)
        assert abs(len(mine) - 2000 * parts[number] / sum(parts)) <= len(weights)
