"""GGUF files: the metadata, and tensors read where they lie.

A file is untrusted: every length is checked against the file before anything is read or allocated. The format
(ggml's docs/gguf.md): magic, version, counts, key-value pairs, descriptions of tensors, padding, the tensors' bytes.
"""

from __future__ import annotations

import mmap
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from errors import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
LARGEST_RANK = 4
CHUNK = 1 << 18
"""Elements that are dequantised at a time: temporary arrays stay small beside the tensor."""
WORKERS = 8
"""Most chunks that are dequantised at the same time."""

SCALARS: dict[int, Any] = {
    0: np.uint8,
    1: np.int8,
    2: np.uint16,
    3: np.int16,
    4: np.uint32,
    5: np.int32,
    6: np.float32,
    7: np.bool_,
    10: np.uint64,
    11: np.int64,
    12: np.float64,
}
STRING, ARRAY = 8, 9

PLAIN: dict[str, Any] = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
QUANTISED = ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K")


@dataclass(frozen=True)
class Tensor:
    """Where one tensor lies. shape: slowest dimension first, as in numpy. size: in bytes."""

    kind: str
    shape: tuple[int, ...]
    offset: int
    size: int


class GGUFFile:
    """The metadata and the tensors of a file.

    `metadata` holds Python numbers and strings, lists of strings, and numpy arrays.

    Raises:
        UserError: it is no GGUF file, of a version or with types of tensors that are not read, truncated or damaged.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with path.open("rb") as stream:
                self._data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as exc:
            raise UserError(f"{path} is empty") from exc
        except OSError as exc:
            raise UserError(f"cannot read {path}: {exc.strerror}") from exc
        cursor = _Cursor(self._data, path)
        tensors, pairs = self._counts(cursor)
        self.metadata: dict[str, Any] = {}
        for _ in range(pairs):
            cursor.inside = "its metadata"
            name = cursor.string()
            cursor.inside = f"the value of {name}"
            if name in self.metadata:
                raise UserError(f"{path} is damaged: it holds {name} twice")
            self.metadata[name] = cursor.value(cursor.number(np.uint32))
        self._check_split()
        self.tensors = self._tensors(cursor, tensors)

    def _counts(self, cursor: _Cursor) -> tuple[int, int]:
        if self._data[:4] != MAGIC:
            raise UserError(f"{self.path} is no GGUF file: it does not begin with the letters GGUF")
        cursor.take(4)
        version = cursor.number(np.uint32)
        if version not in VERSIONS:
            swapped = " (of big-endian byte order)" if version >> 16 else ""
            raise UserError(f"{self.path} has GGUF version {version}{swapped}; versions 2 and 3 are read")
        return cursor.number(np.uint64), cursor.number(np.uint64)

    def _check_split(self) -> None:
        parts = self.metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            raise UserError(
                f"{self.path} is one of {parts} parts of a model; join them first with `llama-gguf-split --merge`"
            )

    def _tensors(self, cursor: _Cursor, count: int) -> dict[str, Tensor]:
        found: dict[str, tuple[str, tuple[int, ...], int]] = {}
        unread: dict[str, str] = {}
        kinds = _kinds()
        for _ in range(count):
            cursor.inside = "the list of its tensors"
            name = cursor.string()
            cursor.inside = f"the description of the tensor {name}"
            rank = cursor.number(np.uint32)
            if name in found or not 0 < rank <= LARGEST_RANK:
                what = "it is there twice" if name in found else f"it has {rank} dimensions"
                raise UserError(f"{self.path} is damaged at the tensor {name}: {what}")
            shape = tuple(cursor.number(np.uint64) for _ in range(rank))[::-1]
            kind = kinds.get(number := cursor.number(np.uint32), f"number {number}")
            if kind not in PLAIN and kind not in QUANTISED:
                unread.setdefault(kind, name)
            found[name] = kind, shape, cursor.number(np.uint64)
        if unread:
            some = ", ".join(f"{kind} (such as {name})" for kind, name in unread.items())
            raise UserError(
                f"{self.path} holds tensors of the type {some}; the types that are read are "
                f"{', '.join([*PLAIN, *QUANTISED])}"
            )
        start = self._align(cursor.at)
        return {name: self._place(name, start, *entry) for name, entry in found.items()}

    def _align(self, position: int) -> int:
        alignment = self.metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise UserError(f"{self.path} is damaged: general.alignment is {alignment}, no power of two")
        return -(-position // alignment) * alignment

    def _place(self, name: str, start: int, kind: str, shape: tuple[int, ...], offset: int) -> Tensor:
        """A tensor whose bytes are known to be inside the file."""
        elements, bytes_each = _block(kind)
        if 0 in shape or shape[-1] % elements:
            raise UserError(f"{self.path} is damaged at the tensor {name}: {kind} with the shape {shape}")
        size = prod(shape) // elements * bytes_each
        if start + offset + size > len(self._data):
            raise UserError(
                f"{self.path} is truncated: the tensor {name} ends at byte {start + offset + size:,} and the file at "
                f"{len(self._data):,}; download it again"
            )
        return Tensor(kind, shape, start + offset, size)

    def read(self, name: str) -> np.ndarray:
        """A tensor: a view of the file for F32, F16 and BF16, otherwise a new float32 array."""
        tensor = self.tensors[name]
        raw = np.frombuffer(self._data, np.uint8, tensor.size, tensor.offset)
        if tensor.kind in PLAIN:
            return raw.view(PLAIN[tensor.kind]).reshape(tensor.shape)
        return dequantised(raw, tensor.kind).reshape(tensor.shape)


def dequantised(raw: np.ndarray, kind: str) -> np.ndarray:
    """The float32 numbers `[elements]` of the blocks in `raw` (uint8)."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    elements, bytes_each = _block(kind)
    blocks = raw.reshape(-1, bytes_each)
    out = np.empty((len(blocks), elements), np.float32)
    step = max(1, CHUNK // elements)

    def fill(at: int) -> None:
        part = blocks[at : at + step].reshape(1, -1)
        # A damaged scale may overflow; that is no reason to warn.
        with np.errstate(all="ignore"):
            out[at : at + step] = dequantize(part, GGMLQuantizationType[kind]).reshape(-1, elements)

    # numpy lets go of the interpreter while it computes.
    with ThreadPoolExecutor(min(WORKERS, os.cpu_count() or 1)) as pool:
        list(pool.map(fill, range(0, len(blocks), step)))
    return out.reshape(-1)


def _kinds() -> dict[int, str]:
    """Names of the types of tensors by the numbers that stand in files."""
    from gguf import GGMLQuantizationType

    return {kind.value: kind.name for kind in GGMLQuantizationType}


def _block(kind: str) -> tuple[int, int]:
    """Elements of a block of some type, and its bytes."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    return GGML_QUANT_SIZES[GGMLQuantizationType[kind]]


class _Cursor:
    """Reads numbers and strings one after the other, never beyond the end. `inside` says where it is, for errors."""

    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path = data, path
        self.at, self.inside = 0, "its header"

    def take(self, count: int) -> bytes:
        """The next `count` bytes."""
        if count > len(self.data) - self.at:
            raise UserError(f"{self.path} is truncated or damaged: it ends inside {self.inside}; download it again")
        self.at += count
        return self.data[self.at - count : self.at]

    def number(self, dtype: Any) -> Any:
        """The next number, as a Python number."""
        return np.frombuffer(self.take(np.dtype(dtype).itemsize), dtype)[0].item()

    def string(self) -> str:
        """The next string: its length in bytes, then UTF-8."""
        (length,) = struct.unpack("<Q", self.take(8))
        try:
            return self.take(length).decode()
        except UnicodeDecodeError as exc:
            raise UserError(f"{self.path} is damaged: {self.inside} holds text that is not UTF-8") from exc

    def value(self, kind: int) -> Any:
        """The next value of a metadata type."""
        if kind == STRING:
            return self.string()
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind != ARRAY:
            raise UserError(f"{self.path} is damaged: {self.inside} has the unknown type {kind}")
        inner, count = self.number(np.uint32), self.number(np.uint64)
        if inner == STRING:
            return [self.string() for _ in range(count)]
        if inner not in SCALARS:
            raise UserError(f"{self.path} is damaged: {self.inside} is a list of the type {inner}")
        return np.frombuffer(self.take(count * np.dtype(SCALARS[inner]).itemsize), SCALARS[inner])
