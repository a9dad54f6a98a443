"""Files of text as streams of rows: .txt, .jsonl(.gz|.zst), .parquet, .arrayrecord. Memory stays bounded by one row."""

from __future__ import annotations

import contextlib
import glob
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from errors import UserError, did_you_mean
from train.data.conversations import BadRowError, row_text
from train.data.system import say

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrayrecord")
TEXT_BYTES = 64 << 10
"""A .txt file is one document up to this size; a larger one is cut at blank lines. (.jsonl rows are never cut.)"""
ROW_BYTES = 64 << 20
"""A longer row is malformed: it would not fit the memory that the pipeline promises to stay within."""
COLUMNS = ("text", "messages", "conversations", "tools", "system", "instruction", "input", "output", "prompt")
COLUMNS += ("chosen", "rejected", "margin", "completion", "label", "kto_tag", "replies")


@dataclass(frozen=True, slots=True)
class Place:
    """A position in a file: rows (or lines) before it, and bytes after decompression before it, where known."""

    row: int = 0
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its fields, where it stands (`file:line`), where the next begins, bytes of the file read so far."""

    value: dict[str, Any]
    where: str
    after: Place = field(default_factory=Place)
    consumed: int = 0
    problem: str = ""
    """Why the row is malformed, or empty."""


class BadRows:
    """Counts malformed rows, reports each on stderr, and refuses the input when there are more than `limit`."""

    def __init__(self, limit: int, count: int = 0) -> None:
        self.limit, self.count = limit, count

    def report(self, where: str, problem: str) -> None:
        """Raises UserError for the first row beyond the limit."""
        self.count += 1
        if self.count > self.limit:
            raise UserError(
                f"{where}: {problem}; that is {self.count} malformed rows and max_bad_rows allows {self.limit}: "
                "mend the file or raise the limit"
            )
        say(f"{where}: {problem}; skipped ({self.count} of at most {self.limit})")


def suffix_of(path: Path) -> str:
    """The supported ending of a file's name, or an empty string."""
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if path.name.endswith(s)), "")


def is_prepared(path: Path) -> bool:
    """Whether `path` is a finished store."""
    return (path / "meta.json").is_file()


def expand(patterns: Sequence[str]) -> list[Path]:
    """Files and prepared directories that `patterns` (names, globs, directories) stand for, in order, each once.

    Raises UserError for a pattern that matches nothing, a file of another kind, a directory that is not prepared.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        if path.exists():
            matches = [path]
        else:
            matches = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
        if not matches:
            siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f"no file or directory matches {pattern!r}{did_you_mean(path.name, siblings)}")
        for match in matches:
            _check_readable(match)
            found[match] = None
    if not found:
        raise UserError("no source of text is named; give files, globs or prepared directories")
    return list(found)


def _check_readable(path: Path) -> None:
    if path.is_dir():
        if is_prepared(path):
            return
        if (path / "prepare.json").is_file():
            raise UserError(f"{path} is not finished; run the same `qmax prepare` again, it resumes")
        raise UserError(f"{path} is a directory but not a prepared one; name its files, such as '{path}/*.jsonl'")
    if not suffix_of(path):
        raise UserError(f"{path} is none of {', '.join(SUFFIXES)}; convert it or name the files more narrowly")


def read_rows(path: Path, start: Place | None = None, bad: BadRows | None = None) -> Iterator[Row]:
    """Rows of one file from `start` on; malformed ones are reported to `bad` (None tolerates none) and skipped."""
    bad = bad or BadRows(0)
    for row in scan(path, start):
        if row.problem:
            bad.report(row.where, row.problem)
        else:
            yield row


def scan(path: Path, start: Place | None = None) -> Iterator[Row]:
    """All rows of one file from `start` on, malformed ones too (`row.problem` says why)."""
    start = start or Place()
    kind = suffix_of(path)
    try:
        if kind == ".txt":
            yield from _scan_text(path, start)
        elif kind == ".parquet":
            yield from _scan_parquet(path, start)
        elif kind == ".arrayrecord":
            yield from _scan_arrayrecord(path, start)
        else:
            yield from _scan_lines(path, kind, start)
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist") from error
    except PermissionError as error:
        raise UserError(f"{path} may not be read; change its permissions") from error


def read_documents(paths: Sequence[str], max_bad_rows: int) -> Iterator[str]:
    """Every text of `paths` (as `expand` takes them), conversations as the text of their turns. For tokenizer training.

    Raises UserError when there is none, and for more than `max_bad_rows` malformed rows.
    """
    bad = BadRows(max_bad_rows)
    files = expand(paths)
    count = 0
    for path in files:
        if path.is_dir():
            raise UserError(f"{path} is tokenised already; name the files of text it was made from")
        for row in read_rows(path, bad=bad):
            try:
                text = row_text(row.value)
            except BadRowError as error:
                bad.report(row.where, str(error))
                continue
            if text.strip():
                count += 1
                yield text
    if not count:
        raise UserError(f"no document in {', '.join(map(str, files))}; the corpus is empty")


@contextlib.contextmanager
def _opened(path: Path, kind: str) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The file, and the stream of its decompressed bytes."""
    with path.open("rb") as raw:
        if kind.endswith(".gz"):
            with gzip.GzipFile(fileobj=raw) as unzipped:
                yield raw, io.BufferedReader(unzipped, 1 << 20)
        elif kind.endswith(".zst"):
            import zstandard

            reader = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True, closefd=False)
            yield raw, io.BufferedReader(reader, 1 << 20)  # pyright: ignore[reportArgumentType]
        else:
            yield raw, raw


def _damage() -> tuple[type[BaseException], ...]:
    """What the decompressors raise for a file that is cut off or altered."""
    import zstandard

    return (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


def _seek(stream: IO[bytes], offset: int) -> None:
    """Passes over `offset` bytes: at once in a plain file, by reading in a compressed one."""
    if isinstance(stream, io.BufferedReader) and isinstance(stream.raw, io.FileIO):
        stream.seek(offset)
        return
    while offset > 0:
        chunk = stream.read(min(offset, 1 << 20))
        if not chunk:
            return
        offset -= len(chunk)


def _scan_lines(path: Path, kind: str, start: Place) -> Iterator[Row]:
    line_number, offset = start.row, start.offset
    with _opened(path, kind) as (raw, stream):
        try:
            _seek(stream, offset)
            while line := stream.readline(ROW_BYTES):
                size = len(line)
                whole = size < ROW_BYTES or line.endswith(b"\n")
                while not whole:
                    rest = stream.readline(1 << 20)
                    size += len(rest)
                    whole = not rest or rest.endswith(b"\n")
                line_number, offset = line_number + 1, offset + size
                where, after = f"{path}:{line_number}", Place(line_number, offset)
                if size > ROW_BYTES:
                    yield Row({}, where, after, raw.tell(), f"the row has {size} bytes, more than {ROW_BYTES}")
                elif line.strip():
                    value, problem = parse_object(line.removeprefix(b"\xef\xbb\xbf") if line_number == 1 else line)
                    yield Row(value, where, after, raw.tell(), problem)
        except _damage() as error:
            raise UserError(f"{path} is damaged after line {line_number} ({error}); fetch it again") from error


def parse_object(data: bytes) -> tuple[dict[str, Any], str]:
    """The JSON object that `data` holds, and what is wrong with it (empty when nothing is)."""
    try:
        value = json.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return {}, f"not UTF-8 at byte {error.start + 1} of the row"
    except json.JSONDecodeError as error:
        return {}, f"not JSON ({error.msg} at column {error.colno})"
    except (ValueError, RecursionError) as error:
        return {}, f"not usable JSON ({error})"
    if not isinstance(value, dict):
        return {}, f"a JSON {type(value).__name__}, not an object with fields"
    return value, ""


def _scan_text(path: Path, start: Place) -> Iterator[Row]:
    """One document a file, or pieces of TEXT_BYTES to twice that, cut after a blank line where there is one.

    Where a piece ends depends on its own bytes alone, so that reading from the middle gives the same pieces.
    """
    line_number, offset = start.row, start.offset
    with path.open("rb") as stream:
        stream.seek(offset)
        piece, first_line = bytearray(), line_number + 1
        while True:
            line = stream.readline(2 * TEXT_BYTES - len(piece))
            piece += line
            line_number += line.endswith(b"\n")
            full = len(piece) >= 2 * TEXT_BYTES
            if line and not full and (line.strip() or len(piece) < TEXT_BYTES):
                continue
            data = bytes(piece[: _whole_characters(piece)] if line else piece)
            offset += len(data)
            if len(data) < len(piece):
                stream.seek(offset)
            if data.strip():
                yield _text_row(data, f"{path}:{first_line}", Place(line_number, offset))
            if not line:
                return
            piece, first_line = bytearray(), line_number + 1


def _whole_characters(data: bytearray) -> int:
    """Bytes of `data` without the last UTF-8 character where that is incomplete."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte & 0xC0 != 0x80:
            length = 1 if byte < 0x80 else 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(data) - back if length > back else len(data)
    return len(data)


def _text_row(data: bytes, where: str, after: Place) -> Row:
    try:
        return Row({"text": data.removeprefix(b"\xef\xbb\xbf").decode("utf-8")}, where, after, after.offset)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        file, first = where.rsplit(":", 1)
        return Row({}, f"{file}:{int(first) + line}", after, after.offset, "not UTF-8")


def _scan_parquet(path: Path, start: Place) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    size = path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path, memory_map=True, pre_buffer=False) as file:
            columns = [name for name in COLUMNS if name in file.schema_arrow.names]
            if not columns:
                raise UserError(f"{path} has no column {' or '.join(COLUMNS)}; it has {file.schema_arrow.names}")
            rows, group = 0, 0
            while group < file.num_row_groups and rows + file.metadata.row_group(group).num_rows <= start.row:
                rows += file.metadata.row_group(group).num_rows
                group += 1
            for batch in file.iter_batches(64, row_groups=list(range(group, file.num_row_groups)), columns=columns):
                for i in range(max(0, start.row - rows), batch.num_rows):
                    value, problem = _parquet_value(batch.slice(i, 1))
                    after = Place(rows + i + 1)
                    consumed = size * after.row // max(1, file.metadata.num_rows)
                    yield Row(value, f"{path}:{after.row}", after, consumed, problem)
                rows += batch.num_rows
    except (pyarrow.ArrowInvalid, OSError) as error:
        if isinstance(error, (FileNotFoundError, PermissionError)):
            raise
        raise UserError(f"{path} is not a readable parquet file ({str(error).splitlines()[0]})") from error


def _parquet_value(batch: Any) -> tuple[dict[str, Any], str]:
    try:
        return {name: value for name, value in batch.to_pylist()[0].items() if value is not None}, ""
    except UnicodeDecodeError:
        return {}, "not UTF-8"


def _scan_arrayrecord(path: Path, start: Place) -> Iterator[Row]:
    """Records are UTF-8: a JSON object, or else the text itself."""
    from array_record.python.array_record_module import ArrayRecordReader

    size = path.stat().st_size
    try:
        reader = ArrayRecordReader(str(path))
        if not reader.ok():
            reader.close()  # raises what is wrong
        total = reader.num_records()
    except Exception as error:  # the reader raises whatever its status maps to
        raise UserError(f"{path} is not a readable ArrayRecord file ({str(error).splitlines()[0]})") from error
    with contextlib.closing(reader):
        for first in range(start.row, total, 64):
            last = min(first + 64, total)
            try:
                records = reader.read(first, last)
            except Exception as error:
                raise UserError(f"{path} is damaged between records {first + 1} and {last}; fetch it again") from error
            for number, record in enumerate(records, first + 1):
                value, problem = parse_object(record)
                if problem and not record.lstrip().startswith(b"{"):
                    row = _text_row(record, f"{path}:{number}", Place(number))
                    value, problem = row.value, row.problem
                yield Row(value, f"{path}:{number}", Place(number), size * number // total, problem)
