"""The prepared store: tokenised documents in ArrayRecord shards, any stretch of any document at random.

meta.json              what it holds, from what, for which tokenizer; written last: with it the store is finished
prepare.json           what was asked for; a resumed run compares
shard-00000.arrayrecord   records of at most RECORD_TOKENS tokens of one document
shard-00000.npy        uint32 [documents, 2]: tokens of each document, and its first record in the shard
shard-00000.json       counts of the shard, and where in the sources the next one starts
"""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from errors import UserError
from train.data.order import derive, mix
from train.data.system import raise_open_files

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer
    from train.data.kinds import Kind

FORMAT = 1
MASKS = 3
"""Version of the rules by which tokens of conversations are learned."""
RECORD_TOKENS = 1 << 14
"""Tokens in a record: a row of a long document is read without the rest of it."""
_HEADER = struct.Struct("<BBxxI")  # bytes of a token, whether a loss mask follows, tokens


@dataclass(frozen=True, slots=True)
class Document:
    """Tokens of a document (int32 [n]) and, for conversations, which of them count in the loss (bool [n])."""

    tokens: np.ndarray
    loss_mask: np.ndarray | None = None


def shard_name(number: int) -> str:
    """File name of a shard, without its ending."""
    return f"shard-{number:05d}"


def pack_record(tokens: np.ndarray, loss_mask: np.ndarray | None) -> bytes:
    """A record: header, tokens (uint16 or uint32, as their array is), mask as bits."""
    header = _HEADER.pack(tokens.itemsize, loss_mask is not None, len(tokens))
    bits = b"" if loss_mask is None else np.packbits(loss_mask).tobytes()
    return header + tokens.tobytes() + bits


def unpack_record(record: bytes) -> Document:
    """Inverse of `pack_record`."""
    width, masked, count = _HEADER.unpack_from(record)
    tokens = np.frombuffer(record, f"<u{width}", count, _HEADER.size).astype(np.int32)
    if not masked:
        return Document(tokens)
    bits = np.frombuffer(record, np.uint8, offset=_HEADER.size + width * count)
    return Document(tokens, np.unpackbits(bits, count=count).astype(bool))


class Store:
    """A finished store. `len(store)` documents; `store[i]` a whole one, `store.read` a part. Pickles as its path."""

    def __init__(self, path: Path, meta: dict[str, Any]) -> None:
        self.path, self.meta = path, meta
        self._first = [0, *itertools.accumulate(shard["documents"] for shard in meta["shards"])]
        self._first_record = [0, *itertools.accumulate(shard["records"] for shard in meta["shards"])]

    @classmethod
    def open(cls, path: str | Path) -> Store:
        """The store in a directory; UserError when it is none, unfinished, of another format, or a shard is damaged."""
        path = Path(path)
        try:
            meta = json.loads((path / "meta.json").read_bytes())
            shards = meta["shards"]
            if meta["format"] != FORMAT:
                raise UserError(f"{path} has format {meta['format']}, this program reads {FORMAT}; prepare it again")
        except FileNotFoundError as error:
            raise UserError(f"{path} is not a prepared store (no meta.json); run `qmax prepare`") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}/meta.json is damaged; prepare it again") from error
        for number, shard in enumerate(shards):
            file = path / f"{shard_name(number)}.arrayrecord"
            size = file.stat().st_size if file.is_file() else 0
            if size != shard["size"]:
                raise UserError(f"{file} has {size} bytes instead of {shard['size']}; prepare {path} again")
        return cls(path, meta)

    def __reduce__(self) -> tuple[Any, ...]:
        return Store, (self.path, self.meta)

    def __len__(self) -> int:
        return self._first[-1]

    def __getitem__(self, i: int) -> Document:
        if not 0 <= i < len(self):
            raise IndexError(f"document {i} of {len(self)}")
        return self.read(i, 0, self._entry(i)[0])

    @property
    def objective(self) -> Kind:
        """Its kind of rows."""
        return self.meta["objective"]

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return self.meta["tokens"]

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of what the store says of itself."""
        return hashlib.sha256(json.dumps(self.meta, sort_keys=True).encode()).hexdigest()

    def check(self, tokenizer: Tokenizer, kind: Kind) -> None:
        """UserError unless the store was made by this tokenizer, of this kind of rows."""
        if self.meta["tokenizer"] != tokenizer.fingerprint:
            raise UserError(
                f"the tokenizer does not match {self.path}, which was prepared with another one "
                f"({self.meta['vocab_size']} tokens; given: {tokenizer.vocab_size}); prepare it again"
            )
        if self.objective != kind:
            raise UserError(
                f"{self.path} was prepared for {self.objective}, not for {kind}; run `qmax prepare --objective {kind}`"
            )
        if self.meta.get("masks", MASKS) != MASKS or (kind != "pretrain" and "masks" not in self.meta):
            raise UserError(f"{self.path} has loss masks of an earlier version; delete it and prepare it again")

    def windows(self, size: int) -> Iterator[tuple[int, np.ndarray]]:
        """(first document, tokens of each document: int64) for consecutive documents, at most `size` at a time."""
        for number, first in enumerate(self._first[:-1]):
            table = self._table(number)
            for start in range(0, len(table), size):
                yield first + start, table[start : start + size, 0].astype(np.int64)

    def read(self, i: int, start: int, stop: int) -> Document:
        """Tokens start..stop-1 of document `i`; reads only the records that hold them."""
        tokens, record = self._entry(i)
        stop = min(stop, tokens)
        parts: list[Document] = []
        for block in range(start // RECORD_TOKENS, -(-stop // RECORD_TOKENS)):
            part = self._record(record + block)
            cut = slice(max(0, start - block * RECORD_TOKENS), stop - block * RECORD_TOKENS)
            parts.append(Document(part.tokens[cut], None if part.loss_mask is None else part.loss_mask[cut]))
        if len(parts) == 1:
            return parts[0]
        masks = [part.loss_mask for part in parts if part.loss_mask is not None]
        ids = [part.tokens for part in parts] or [np.zeros(0, np.int32)]
        return Document(np.concatenate(ids), np.concatenate(masks) if masks else None)

    def _entry(self, i: int) -> tuple[int, int]:
        """Tokens of document `i`, and its first record in the store."""
        number = bisect.bisect_right(self._first, i) - 1
        tokens, record = self._table(number)[i - self._first[number]]
        return int(tokens), self._first_record[number] + int(record)

    def _record(self, key: int) -> Document:
        try:
            return unpack_record(self._records[key])
        except Exception as error:  # the reader raises whatever its status maps to
            number = bisect.bisect_right(self._first_record, key) - 1
            where = f"{self.path / shard_name(number)}.arrayrecord: record {key - self._first_record[number]}"
            raise UserError(f"{where} is damaged; prepare the store again") from error

    def _table(self, number: int) -> np.ndarray:
        if number not in self._tables:
            if len(self._tables) >= 256:
                self._tables.clear()  # a map holds a file open
            self._tables[number] = np.load(self.path / f"{shard_name(number)}.npy", mmap_mode="r")
        return self._tables[number]

    @functools.cached_property
    def _tables(self) -> dict[int, np.ndarray]:
        return {}

    @functools.cached_property
    def _records(self) -> Any:
        import grain

        raise_open_files(len(self.meta["shards"]) + 512)
        shards = enumerate(self.meta["shards"])
        paths = [f"{self.path / shard_name(number)}.arrayrecord[0:{shard['records']}]" for number, shard in shards]
        return grain.sources.ArrayRecordDataSource(paths)


@dataclass(frozen=True)
class Split:
    """Which documents of a store are held out: those whose hash is below `threshold`. Needs no memory."""

    key: int
    threshold: int

    def held_out(self, ids: np.ndarray) -> np.ndarray:
        """bool [n] for document numbers [n]."""
        return mix(ids.astype(np.uint64) + np.uint64(self.key)) < np.uint64(self.threshold)

    @property
    def name(self) -> str:
        """Tells this split from others of the same store."""
        return f"{self.key:016x}{self.threshold:016x}"


def make_split(store: Store, fraction: float, seed: int) -> Split:
    """Holds out about `fraction` of the documents by a hash of their number.

    At least one is held out when fraction > 0 and there are two, and at least one is not.
    """
    key = derive(seed, "held out")
    if fraction <= 0 or len(store) < 2:
        return Split(key, 0)
    low, high = (1 << 64) - 1, 0
    for start in range(0, len(store), 1 << 20):
        ids = np.arange(start, min(start + (1 << 20), len(store)), dtype=np.uint64)
        hashes = mix(ids + np.uint64(key))
        low, high = min(low, int(hashes.min())), max(high, int(hashes.max()))
    return Split(key, min(max(int(fraction * 2.0**64), low + 1), high))


def split(store: Store, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training ids, held-out ids), int64, of `make_split`. For stores whose ids fit in memory."""
    ids = np.arange(len(store), dtype=np.int64)
    held_out = make_split(store, fraction, seed).held_out(ids)
    return ids[~held_out], ids[held_out]
