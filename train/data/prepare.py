"""Tokenising sources into a store, shard by shard: killed at any moment, the same call goes on at the next shard."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from errors import UserError
from train.data.encoding import POOL_BYTES, Encoded, encoder
from train.data.sources import BadRows, Place, Row, scan
from train.data.store import FORMAT, MASKS, RECORD_TOKENS, Store, pack_record, shard_name
from train.data.system import commit, explain_disk, locked, say, write_atomic

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer
    from train.data.kinds import Kind

SHARD_TOKENS = 1 << 26
"""Tokens after which a shard ends: 130 or 270 MB, some minutes of work lost by a kill."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a preparation stands: finished shards, sources read, malformed rows so far."""

    shards: int = 0
    source: int = 0
    place: Place = dataclasses.field(default_factory=Place)
    bad_rows: int = 0


def source_fingerprint(path: Path) -> str:
    """Changes when the file does: SHA-256 of the content up to 64 MiB; of size, time and samples beyond."""
    stat = path.stat()
    digest = hashlib.sha256(f"{path.name} {stat.st_size}\n".encode())
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} may not be read; change its permissions")
    with path.open("rb") as file:
        if stat.st_size <= 64 << 20:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        else:
            digest.update(str(stat.st_mtime_ns).encode())
            for sample in range(65):
                file.seek(max(0, (stat.st_size - (64 << 10)) * sample // 64))
                digest.update(file.read(64 << 10))
    return digest.hexdigest()


def make_plan(sources: Sequence[Path], tokenizer: Tokenizer, objective: Kind, shard_tokens: int) -> dict[str, Any]:
    """Everything that decides the bytes of a store. `objective`: its kind of rows."""
    return {
        "format": FORMAT,
        "objective": objective,
        **({} if objective == "pretrain" else {"masks": MASKS}),
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "record_tokens": RECORD_TOKENS,
        "shard_tokens": shard_tokens,
        "sources": [
            {"name": path.name, "size": path.stat().st_size, "fingerprint": source_fingerprint(path)}
            for path in sources
        ],
    }


def prepare(
    sources: Sequence[Path],
    tokenizer: Tokenizer,
    out: Path,
    *,
    objective: Kind = "pretrain",
    max_bad_rows: int = 100,
    shard_tokens: int = SHARD_TOKENS,
    progress: bool | None = None,
    workers: int | None = None,
) -> Store:
    """Tokenises files into the store `out`, or goes on where an earlier call was killed, or opens what is finished.

    The store's bytes depend on the sources, the tokenizer, `objective` and `shard_tokens` alone. `progress` None shows
    a bar when stderr is a terminal; `workers` None takes a process per core for large inputs, 0 stays in this process.

    Raises UserError for an empty corpus, too many malformed rows, a full disk, and an `out` that holds something else.
    """
    sources = [Path(path) for path in sources]
    for path in sources:
        if path.is_dir():
            raise UserError(f"{path} is prepared already; give the files of text it was made from")
        if not path.is_file():
            raise UserError(f"{path} does not exist")
    plan = make_plan(sources, tokenizer, objective, shard_tokens)
    out = Path(out)
    made = not out.exists()
    with explain_disk(out, "free some and run the same again, it resumes"):
        _claim(out)
        try:
            with locked(out):
                _check_plan(out, plan)
                if not (out / "meta.json").is_file():
                    _Preparation(sources, tokenizer, out, plan, max_bad_rows).run(progress, workers)
        except UserError:
            if made and not any(out.glob("shard-*.json")):
                shutil.rmtree(out, ignore_errors=True)
            raise
    return Store.open(out)


def _claim(out: Path) -> None:
    """Makes the directory, or sees that it is empty or one of ours."""
    if out.is_dir():
        ours = (out / "prepare.json").is_file() or (out / "meta.json").is_file()
        if not ours and any(path.name != ".lock" for path in out.iterdir()):
            raise UserError(f"{out} is not empty and not a prepared store; choose another --out")
    elif out.exists():
        raise UserError(f"{out} is a file; choose another --out")
    out.mkdir(parents=True, exist_ok=True)


def _check_plan(out: Path, plan: dict[str, Any]) -> None:
    """Sees that what stands in `out` was asked for in the same words; writes the plan when nothing stands there."""
    file = next((path for name in ("meta.json", "prepare.json") if (path := out / name).is_file()), None)
    if file is None:
        write_atomic(out / "prepare.json", _json(plan))
        return
    try:
        earlier = json.loads(file.read_bytes())
    except ValueError as error:
        raise UserError(f"{file} is damaged; delete {out} and prepare again") from error
    words = {"tokenizer": "another tokenizer", "sources": "other sources, or they have changed"}
    for name, value in plan.items():
        if earlier.get(name) != value:
            what = words.get(name, f"{name} {earlier.get(name)!r} instead of {value!r}")
            raise UserError(f"{out} was prepared with {what}; delete it or choose another --out")


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1).encode() + b"\n"


class _Preparation:
    """One call of `prepare` that has something to do."""

    def __init__(
        self, sources: list[Path], tokenizer: Tokenizer, out: Path, plan: dict[str, Any], max_bad_rows: int
    ) -> None:
        self.sources, self.tokenizer, self.out, self.plan = sources, tokenizer, out, plan
        self.objective: Kind = plan["objective"]
        self.entries, self.state = _finished_shards(out)
        self.bad = BadRows(max_bad_rows, self.state.bad_rows)
        self.sizes = [source["size"] for source in plan["sources"]]
        if self.entries:
            tokens = sum(entry["tokens"] for entry in self.entries)
            say(f"resuming {out} after {len(self.entries)} finished shards ({tokens:,} tokens)")

    def run(self, progress: bool | None, workers: int | None) -> None:
        if self.objective == "pretrain":
            self.tokenizer.document_end_id  # noqa: B018  (a tokenizer without one is refused before anything is read)
        if workers is None:
            workers = (os.cpu_count() or 1) if sum(self.sizes) > POOL_BYTES else 0
        with _bar(sum(self.sizes), progress) as advance, encoder(self.tokenizer, self.objective, workers) as encode:
            shard: _Shard | None = None
            try:
                for (source, row), result in encode(self._rows()):
                    if isinstance(result, str):
                        self.bad.report(row.where, result)
                    elif result is not None:
                        shard = shard or _Shard(self.out, len(self.entries))
                        shard.add(result)
                    self.state = Progress(len(self.entries), source, row.after, self.bad.count)
                    advance(sum(self.sizes[:source]) + row.consumed)
                    if shard and shard.tokens >= self.plan["shard_tokens"]:
                        self.entries.append(shard.finish(self.state))
                        shard = None
                if shard:
                    self.entries.append(shard.finish(self.state))
            except BaseException:
                if shard:
                    shard.abandon()
                raise
        self._finish()

    def _rows(self) -> Iterator[tuple[int, Row]]:
        begin = self.state
        for number in range(begin.source, len(self.sources)):
            for row in scan(self.sources[number], begin.place if number == begin.source else Place()):
                yield number, row

    def _finish(self) -> None:
        if not self.entries:
            names = ", ".join(map(str, self.sources[:3])) + (", ..." if len(self.sources) > 3 else "")
            malformed = f" ({self.bad.count} malformed rows)" if self.bad.count else ""
            raise UserError(f"no document in {names}{malformed}; the corpus is empty")
        shards = [{name: entry[name] for name in _Shard.COUNTS} for entry in self.entries]
        counts = [name for name in _Shard.COUNTS if name not in ("records", "size")]
        totals = {name: sum(shard[name] for shard in shards) for name in counts}
        meta = {**self.plan, **totals, "bad_rows": self.bad.count, "shards": shards}
        write_atomic(self.out / "meta.json", _json(meta))


def _finished_shards(out: Path) -> tuple[list[dict[str, Any]], Progress]:
    """Entries of the shards that are whole, and where to go on; what lies beyond them is deleted."""
    entries: list[dict[str, Any]] = []
    while (file := out / f"{shard_name(len(entries))}.json").is_file():
        entries.append(json.loads(file.read_bytes()))
    keep = {f"{shard_name(i)}.{ending}" for i in range(len(entries)) for ending in ("arrayrecord", "npy", "json")}
    for file in itertools.chain(out.glob("shard-*"), out.glob("*.tmp")):
        if file.name not in keep:
            file.unlink()
    if not entries:
        return entries, Progress()
    last = entries[-1]
    place = Place(last["next"]["row"], last["next"]["offset"])
    return entries, Progress(len(entries), last["next"]["source"], place, last["bad_rows"])


class _Shard:
    """A shard being written under temporary names; `finish` makes it appear, its .json last."""

    COUNTS = ("documents", "tokens", "loss_tokens", "records", "source_bytes", "size")

    def __init__(self, out: Path, number: int) -> None:
        from array_record.python.array_record_module import ArrayRecordWriter

        self.path = out / shard_name(number)
        self._temporary = out / f"{shard_name(number)}.arrayrecord.tmp"
        self._writer = ArrayRecordWriter(str(self._temporary), "group_size:1,uncompressed")
        self._table: list[tuple[int, int]] = []
        self.tokens = self.loss_tokens = self.records = self.source_bytes = 0

    def add(self, document: Encoded) -> None:
        count = len(document.tokens)
        self._table.append((count, self.records))
        for start in range(0, count, RECORD_TOKENS):
            part = slice(start, start + RECORD_TOKENS)
            mask = None if document.loss_mask is None else document.loss_mask[part]
            self._writer.write(pack_record(document.tokens[part], mask))
            self.records += 1
        self.tokens += count
        self.loss_tokens += count - 1 if document.loss_mask is None else int(document.loss_mask.sum())
        self.source_bytes += document.source_bytes

    def abandon(self) -> None:
        """Leaves nothing behind."""
        with contextlib.suppress(Exception):
            self._writer.close()
        self._temporary.unlink(missing_ok=True)

    def finish(self, state: Progress) -> dict[str, Any]:
        """Commits the shard and returns its entry."""
        try:
            self._writer.close()
        except Exception as error:  # the writer raises whatever its status maps to: mostly a full disk
            raise UserError(f"{self._temporary} could not be written ({error}); free space and run again") from error
        entry = {
            "documents": len(self._table),
            "tokens": self.tokens,
            "loss_tokens": self.loss_tokens,
            "records": self.records,
            "source_bytes": self.source_bytes,
            "size": self._temporary.stat().st_size,
            "bad_rows": state.bad_rows,
            "next": {"source": state.source, **dataclasses.asdict(state.place)},
        }
        commit(self._temporary, self.path.with_suffix(".arrayrecord"))
        table = self.path.with_suffix(".npy.tmp")
        with table.open("wb") as file:
            np.save(file, np.array(self._table, np.uint32))
        commit(table, self.path.with_suffix(".npy"))
        write_atomic(self.path.with_suffix(".json"), _json(entry))
        return entry


@contextlib.contextmanager
def _bar(total: int, show: bool | None) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes of input; yields the function that takes bytes read so far."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    if not (console.is_terminal if show is None else show):
        yield lambda done: None
        return
    with Progress(
        "preparing", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn(), console=console
    ) as bar:
        task = bar.add_task("preparing", total=total)
        yield lambda done: bar.update(task, completed=done)
