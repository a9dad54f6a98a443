"""Safetensors files, read where they lie and written as a stream.

A model directory is untrusted: every header is checked against its file before anything is read, and no name leads
out of the directory. The format: eight bytes with the header's length, a JSON header, the tensors' bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LARGEST_HEADER = 100 << 20
"""Bytes; the format's own limit."""

DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class Directory:
    """All tensors of a directory's safetensors files.

    Raises:
        UserError: none are there, a file is damaged or truncated, or the index does not fit them.
    """

    def __init__(self, path: Path, name: str = SINGLE):
        self.path, self._name = path, name
        self.entries: dict[str, Entry] = {}
        for file, names in self._files().items():
            found = read_header(file)
            for name in names if names is not None else found:
                if name not in found:
                    raise UserError(f"{file} lacks the tensor {name}, which {INDEX} says is there")
                self.entries[name] = found[name]
        self._maps: dict[Path, np.memmap] = {}

    def _files(self) -> dict[Path, list[str] | None]:
        """Files with the tensors to take from each; None for all."""
        index = self.path / INDEX
        if not index.is_file():
            single = self.path / self._name
            if single.is_file():
                return {single: None}
            others = sorted(self.path.glob("pytorch_model*.bin"))
            hint = "; its .bin files are pickles, which are not read: convert them to safetensors" if others else ""
            raise UserError(f"{self.path} holds neither {self._name} nor {INDEX}{hint}")
        try:
            where = json.loads(index.read_text())["weight_map"]
            assert isinstance(where, dict) and all(isinstance(file, str) for file in where.values())
        except (ValueError, KeyError, AssertionError, OSError) as exc:
            raise UserError(f"{index} is damaged: it holds no weight_map of names and files") from exc
        found: dict[Path, list[str]] = {}
        for name, file in where.items():
            if Path(file).name != file or not file.endswith(".safetensors"):
                raise UserError(f"{index} names the file {file!r} for {name}; only .safetensors beside it are read")
            found.setdefault(self.path / file, []).append(name)
        missing = [file.name for file in found if not file.is_file()]
        if missing:
            raise UserError(f"{self.path} lacks {', '.join(missing[:5])}, which {INDEX} names; download it again")
        return dict(found)

    @cached_property
    def bytes(self) -> int:
        """Size of all tensors."""
        return sum(prod(e.shape) * e.dtype.itemsize for e in self.entries.values())

    def view(self, name: str) -> np.ndarray:
        """A tensor as it lies in its file; nothing is read until its numbers are."""
        entry = self.entries[name]
        if entry.file not in self._maps:
            self._maps[entry.file] = np.memmap(entry.file, np.uint8, "r")
        size = prod(entry.shape) * entry.dtype.itemsize
        raw = self._maps[entry.file][entry.offset : entry.offset + size]
        return np.ndarray(entry.shape, entry.dtype, buffer=raw.data) if size else np.zeros(entry.shape, entry.dtype)


def read_header(file: Path) -> dict[str, Entry]:
    """The tensors of one file. UserError naming the file, and the tensor, where something does not fit."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or length > min(size - 8, LARGEST_HEADER):
                raise UserError(f"{file} is truncated or no safetensors file")
            header = json.loads(stream.read(length))
    except (OSError, ValueError) as exc:
        raise UserError(f"{file} cannot be read as safetensors: {exc}") from exc
    found: dict[str, Entry] = {}
    start = 8 + length
    for name, value in header.items() if isinstance(header, dict) else ():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = np.dtype(DTYPES[value["dtype"]]), tuple(map(int, value["shape"]))
            begin, end = map(int, value["data_offsets"])
        except (KeyError, TypeError, ValueError) as exc:
            raise UserError(f"{file} describes the tensor {name} in a way that is not known") from exc
        if min(shape, default=0) < 0 or begin < 0 or end - begin != prod(shape) * dtype.itemsize:
            raise UserError(f"{file} is damaged: the tensor {name} has not the bytes that its shape {shape} needs")
        if start + end > size:
            raise UserError(f"{file} is truncated: the tensor {name} ends after the file does; download it again")
        found[name] = Entry(file, dtype, shape, start + begin)
    return found


# ---- writing -------------------------------------------------------------------
def header_of(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    """What stands before the tensors' bytes, for tensors in this order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape) in tensors.items():
        size = prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def write_tensor(stream: BinaryIO, array: np.ndarray) -> None:
    """The bytes of one tensor."""
    stream.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def shards(sizes: Mapping[str, int], largest: int) -> list[list[str]]:
    """Names in their order, cut into files of at most `largest` bytes (a larger tensor has one of its own)."""
    found: list[list[str]] = [[]]
    room = largest
    for name, size in sizes.items():
        if size > room and found[-1]:
            found.append([])
            room = largest
        found[-1].append(name)
        room -= size
    return found


def sync(paths: Iterable[Path]) -> None:
    """Forces files, and then their directory, onto the disk."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
