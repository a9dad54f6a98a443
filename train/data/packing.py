"""Which stretches of which documents make a row: a stored index, and the arrays of one row. Pure numpy.

A document of L tokens has L - 1 pairs (token, next token); a piece is a run of pairs of one document, a row is pieces
side by side. Mode "split" (pretraining) lays all documents end to end, in a fixed shuffled order, and cuts at row ends:
every pair is in exactly one piece, and only the last row has padding. Mode "whole" (conversations) never makes several
pieces of a document: it fills rows by best fit, and shortens or leaves out what is longer than a row.
"""

from __future__ import annotations

import bisect
import contextlib
import errno
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np

from train.data.order import derive, mix
from train.data.system import sync_directory

Mode = Literal["split", "whole"]
TooLong = Literal["cut", "cut_left", "drop", "refuse"]
WINDOW = 1 << 15
"""Documents that are packed (in mode "split" also shuffled) together: bounds memory."""
_VERSION = 2  # of the algorithm: an index of another version is not used
_PIECE = np.dtype([("doc", "<i8"), ("start", "<i8"), ("length", "<i4")])


@dataclass(frozen=True, slots=True)
class Pieces:
    """Rows as compressed sparse rows: row r has pieces row_offsets[r] to row_offsets[r + 1] - 1.

    `row_offsets` int64 [rows + 1]; `doc` int64, `start` int64 and `length` int32 [pieces]: a piece's inputs are tokens
    start .. start + length - 1 of the document, its targets start + 1 .. start + length. `cut`: documents shortened;
    `dropped`: documents left out.
    """

    row_offsets: np.ndarray
    doc: np.ndarray
    start: np.ndarray
    length: np.ndarray
    cut: int = 0
    dropped: int = 0

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.row_offsets) - 1


Window = tuple[np.ndarray, np.ndarray]
"""Document numbers, and their lengths in tokens: int64 [documents]."""
Shorten = Callable[[int], int]
"""The pairs that are left of a document which is longer than a row; 0 leaves it out."""


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Pieces and the row of each (ascending), of one window; documents shortened and left out."""

    rows: np.ndarray
    pieces: np.ndarray
    cut: int = 0
    dropped: int = 0


def pack(
    lengths: np.ndarray,
    sequence_length: int,
    mode: Mode,
    too_long: TooLong = "cut",
    shorten: Shorten | None = None,
) -> Pieces:
    """Packs documents of `lengths` tokens (integers [documents]) into rows of `sequence_length` pairs, in memory.

    Mode "whole": `too_long` says what happens to a document that is longer than a row, and `shorten` what is left of
    one that is cut where that is not simply as much as a row holds; its piece then starts at 0.
    """
    ids = np.arange(len(lengths), dtype=np.int64)
    windows = ((ids[i : i + WINDOW], lengths[i : i + WINDOW]) for i in range(0, len(ids), WINDOW))
    chunks = list(_chunks(windows, sequence_length, mode, too_long, shorten))
    rows = np.concatenate([chunk.rows for chunk in chunks] or [np.zeros(0, np.int64)])
    pieces = np.concatenate([chunk.pieces for chunk in chunks] or [np.zeros(0, _PIECE)])
    offsets = np.searchsorted(rows, np.arange(rows[-1] + 2 if len(rows) else 1)).astype(np.int64)
    cut, dropped = sum(chunk.cut for chunk in chunks), sum(chunk.dropped for chunk in chunks)
    return Pieces(offsets, pieces["doc"], pieces["start"], pieces["length"], cut, dropped)


def _chunks(
    windows: Iterable[Window], sequence_length: int, mode: Mode, too_long: TooLong, shorten: Shorten | None
) -> Iterator[_Chunk]:
    """Pieces window by window, with rows numbered through."""
    at = 0  # pairs (split) or rows (whole) so far
    for number, (ids, lengths) in enumerate(windows):
        pairs = np.asarray(lengths, np.int64) - 1
        keep = pairs > 0  # one token predicts nothing
        ids, pairs = ids[keep], pairs[keep]
        if not len(ids):
            continue
        if mode == "split":
            order = np.argsort(_hashes(number, len(ids)), kind="stable")
            yield _cut_at_rows(ids[order], pairs[order], at, sequence_length)
            at += int(pairs.sum())
        else:
            chunk = _whole(ids, pairs, sequence_length, too_long, shorten)
            yield _Chunk(chunk.rows + at, chunk.pieces, chunk.cut, chunk.dropped)
            at += int(chunk.rows[-1]) + 1 if len(chunk.rows) else 0


def _whole(
    ids: np.ndarray, pairs: np.ndarray, sequence_length: int, too_long: TooLong, shorten: Shorten | None
) -> _Chunk:
    """Documents in one piece each, those that are too long shortened or left out."""
    over, left = pairs > sequence_length, pairs.copy()
    if too_long == "drop":
        left[over] = 0
    elif shorten:
        left[over] = [shorten(doc) for doc in ids[over].tolist()]
    else:
        left[over] = sequence_length
    start = pairs - left if too_long == "cut_left" and not shorten else np.zeros_like(pairs)
    there = left > 0
    rows, pieces = _best_fit(ids[there], start[there], left[there], sequence_length)
    return _Chunk(rows, pieces, int((over & there).sum()), int((~there).sum()))


def _hashes(window: int, count: int) -> np.ndarray:
    return mix(np.arange(count, dtype=np.uint64) + np.uint64(derive("documents", window)))


def _cut_at_rows(ids: np.ndarray, pairs: np.ndarray, at: int, sequence_length: int) -> _Chunk:
    """Documents end to end from pair number `at` on, cut wherever a document or a row ends."""
    ends = at + np.cumsum(pairs)
    first_cut = (at // sequence_length + 1) * sequence_length
    stops = np.union1d(ends, np.arange(first_cut, int(ends[-1]), sequence_length))
    starts = np.concatenate([[at], stops[:-1]])
    which = np.searchsorted(ends, starts, side="right")
    pieces = np.empty(len(starts), _PIECE)
    pieces["doc"], pieces["start"], pieces["length"] = ids[which], starts - (ends - pairs)[which], stops - starts
    return _Chunk(starts // sequence_length, pieces)


def _best_fit(
    ids: np.ndarray, start: np.ndarray, pairs: np.ndarray, sequence_length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Longest first, each into the row whose room it leaves least of; rows open by their room, so a step is O(log)."""
    order = np.argsort(-pairs, kind="stable")
    row_of = np.empty(len(ids), np.int64)
    by_room: dict[int, list[int]] = {}  # rows with so much room left
    rooms: list[int] = []  # sorted keys of by_room
    rows = 0
    for item, length in zip(order.tolist(), pairs[order].tolist(), strict=True):
        i = bisect.bisect_left(rooms, length)
        if i < len(rooms):
            room = rooms[i]
            row = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[i]
        else:
            room, row, rows = sequence_length, rows, rows + 1
        row_of[item] = row
        left = room - length
        if left in by_room:
            by_room[left].append(row)
        elif left:
            by_room[left] = [row]
            bisect.insort(rooms, left)
    by_row = np.lexsort((-pairs, row_of))
    pieces = np.zeros(len(ids), _PIECE)
    pieces["doc"], pieces["start"], pieces["length"] = ids[by_row], start[by_row], pairs[by_row]
    return row_of[by_row], pieces


# ---------------------------------------------------------------------------------------------------------------------
# The index on disk


class Index:
    """Rows of a store, memory-mapped. `len(index)` rows; `index[r]` their pieces. Pickles as its path.

    `meta`: rows, pieces, pairs (targets, before any loss mask), cut (documents shortened), dropped (documents left
    out), sequence_length, mode, too_long.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.meta: dict[str, Any] = json.loads((path / "index.json").read_bytes())

    def __reduce__(self) -> tuple[Any, ...]:
        return Index, (self.path,)

    def __len__(self) -> int:
        return self.meta["rows"]

    def __getitem__(self, row: int) -> list[tuple[int, int, int]]:
        """(document, start, length) of each piece of a row."""
        first, last = self._offsets[row : row + 2]
        return self._pieces[first:last].tolist()

    @property
    def pairs(self) -> int:
        """Targets in all rows, before any loss mask."""
        return self.meta["pairs"]

    @functools.cached_property
    def _offsets(self) -> np.ndarray:
        return np.load(self.path / "rows.npy", mmap_mode="r")

    @functools.cached_property
    def _pieces(self) -> np.ndarray:
        return np.load(self.path / "pieces.npy", mmap_mode="r")


def build_index(
    windows: Iterable[Window],
    sequence_length: int,
    mode: Mode,
    path: Path,
    too_long: TooLong = "cut",
    shorten: Shorten | None = None,
) -> Index:
    """The index in directory `path`; when it is not there it is made, atomically and in bounded memory.

    The other arguments are as of `pack`. OSError when `path` cannot be written.
    """
    if not (path / "index.json").is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
        try:
            about = {"sequence_length": sequence_length, "mode": mode, "too_long": too_long}
            _write_index(_chunks(windows, sequence_length, mode, too_long, shorten), about, temporary)
            with contextlib.suppress(OSError):
                temporary.chmod(0o755)
            _rename(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return Index(path)


def index_name(sequence_length: int, mode: Mode, of: str) -> str:
    """Directory name of the index of the part `of` (words that tell splits and policies apart) of a store."""
    return f"{mode}-{sequence_length}-{derive(_VERSION, WINDOW, of):016x}"


def _rename(temporary: Path, path: Path) -> None:
    try:
        temporary.rename(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not (path / "index.json").is_file():
            raise  # somebody else's directory; else another process made the same index first
    sync_directory(path.parent)


def _write_index(chunks: Iterable[_Chunk], about: dict[str, Any], path: Path) -> None:
    meta = {"rows": 0, "pieces": 0, "pairs": 0, "cut": 0, "dropped": 0, **about}
    with (path / "rows.npy").open("wb") as row_file, (path / "pieces.npy").open("wb") as piece_file:
        _header(row_file, np.dtype("<i8"), 0)
        _header(piece_file, _PIECE, 0)
        last_row = -1
        for chunk in chunks:
            new = np.flatnonzero(np.diff(chunk.rows, prepend=last_row))
            row_file.write((new + meta["pieces"]).astype("<i8").tobytes())
            piece_file.write(chunk.pieces.tobytes())
            last_row = int(chunk.rows[-1]) if len(chunk.rows) else last_row
            meta["pieces"] += len(chunk.pieces)
            meta["pairs"] += int(chunk.pieces["length"].sum(dtype=np.int64))
            meta["cut"] += chunk.cut
            meta["dropped"] += chunk.dropped
        meta["rows"] = last_row + 1
        row_file.write(np.int64(meta["pieces"]).astype("<i8").tobytes())
        for file, dtype, count in ((row_file, np.dtype("<i8"), last_row + 2), (piece_file, _PIECE, meta["pieces"])):
            file.seek(0)
            _header(file, dtype, count)
            file.flush()
            os.fsync(file.fileno())
    (path / "index.json").write_text(json.dumps(meta, indent=1) + "\n")


def _header(file: IO[bytes], dtype: np.dtype, count: int) -> None:
    """The header of an .npy file; numpy pads it so that it is as long for any count and can be written over."""
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": (count,)})


# ---------------------------------------------------------------------------------------------------------------------
# The arrays of a row

Fetch = Callable[[int, int, int], tuple[np.ndarray, "np.ndarray | None"]]
"""(document, start, stop) -> tokens start .. stop - 1 (int32) and their loss mask (bool), or None where all count."""


def materialize(pieces: Iterable[tuple[int, int, int]], fetch: Fetch, sequence_length: int) -> dict[str, np.ndarray]:
    """The arrays of one row, each [T]: tokens, targets, positions, segments (int32), weights (float32).

    `segments` counts pieces from 1, 0 is padding; `positions` starts at 0 in each piece; a target weighs 1 where it
    counts in the loss, which is what the mask says of the target, not of the input.
    """
    row = empty_row(sequence_length)
    at = 0
    for number, (doc, start, length) in enumerate(pieces, 1):
        at = put(row, at, number, *fetch(doc, start, start + length + 1))
    return row


def put(row: dict[str, np.ndarray], at: int, segment: int, tokens: np.ndarray, mask: np.ndarray | None) -> int:
    """Writes one sequence (its last token is a target only) into a row from `at` on; returns where it ends."""
    length = len(tokens) - 1
    here = slice(at, at + length)
    row["tokens"][here] = tokens[:-1]
    row["targets"][here] = tokens[1:]
    row["weights"][here] = 1.0 if mask is None else mask[1:]
    row["positions"][here] = np.arange(length)
    row["segments"][here] = segment
    return at + length


def empty_row(sequence_length: int, *, labels: bool = False) -> dict[str, np.ndarray]:
    """A row of padding; `labels` says whether it has labels (float32)."""
    names = ("tokens", "targets", "weights", "positions", "segments", *(["labels"] if labels else []))
    floats = ("weights", "labels")
    return {name: np.zeros(sequence_length, np.float32 if name in floats else np.int32) for name in names}
