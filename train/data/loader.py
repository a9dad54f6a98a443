"""Batches as a pure function of (config, seed, step), read ahead by grain in threads or processes.

    rows of step s, batch B:   stream[s * B + i]                         i = 0 .. B - 1
    one source:                stream[k] = row permutation(seed, k // rows)[k % rows]
    weighted sources:          position k belongs to source `interleave(k)`, as the j-th of it: its stream[j]

Without weights all sources are one: their rows shuffled together. No state is kept, so none is saved.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from errors import UserError
from train.data.kinds import LABELLED, SPELLED, kind_of_rows
from train.data.order import derive
from train.data.packing import Index, Mode, Shorten, Window, build_index, index_name
from train.data.pairs import Cut
from train.data.prepare import SHARD_TOKENS, make_plan, prepare
from train.data.rows import Batch, Part, Rows, TrainingBatches, ValidationBatches, stack
from train.data.sources import expand, is_prepared
from train.data.store import Split, Store, make_split
from train.data.system import explain_disk, say, serve_parent

if TYPE_CHECKING:
    import grain

    from configs.run import Run
    from model.tokenizer import Tokenizer

VALIDATION, REFERENCE = "validation", "reference"
"""Sets of held-out rows."""
PREFETCH = 4
"""Batches read ahead."""


def host_rows(batch_size: int, host_index: int, host_count: int) -> tuple[int, int]:
    """First row and end of a host's share of a batch; UserError when it does not divide."""
    if batch_size % host_count:
        raise UserError(f"data.batch_size={batch_size} does not divide over {host_count} hosts")
    share = batch_size // host_count
    return host_index * share, (host_index + 1) * share


def make_dataset(
    streams: Sequence[Rows],
    weights: Sequence[float],
    *,
    seed: int,
    batch_size: int,
    host_index: int = 0,
    host_count: int = 1,
) -> grain.MapDataset[Batch]:
    """The endless training dataset: item s is the host's share [B / hosts, T] of the batch of step s.

    One stream and no weights, or streams with their weights; a stream of weight 0 is never read.
    """
    import grain

    rows = host_rows(batch_size, host_index, host_count)
    return grain.MapDataset.source(TrainingBatches(streams, weights or (1.0,), seed, batch_size, rows))


class Batches(Iterator[Batch]):
    """Items `start` to `stop` - 1 of a dataset, read ahead; `close` (or `with`) ends threads and processes."""

    def __init__(
        self,
        dataset: grain.MapDataset[Batch],
        *,
        start: int = 0,
        stop: int | None = None,
        workers: int = 0,
        prefetch: int = PREFETCH,
    ) -> None:
        import absl.flags
        import grain

        if start or stop is not None:
            dataset = dataset.slice(slice(start, stop))
        threads = grain.ReadOptions(num_threads=min(2, prefetch), prefetch_buffer_size=prefetch)
        plan = dataset.to_iter_dataset(threads)
        if workers:
            if not absl.flags.FLAGS.is_parsed():
                absl.flags.FLAGS.mark_as_parsed()  # grain asks its flags, which only absl's own main would have parsed
            ahead = grain.MultiprocessingOptions(workers, max(1, prefetch // workers))
            plan = plan.mp_prefetch(ahead, worker_init_fn=_start_worker)
        self._copies = workers > 0
        self._reader: Any = iter(plan)
        self._reader.start_prefetch()

    def __next__(self) -> Batch:
        if self._reader is None:
            raise StopIteration
        try:
            batch: Batch = next(self._reader)
        except StopIteration:
            self.close()
            raise
        # A worker's arrays lie in shared memory that goes with them; whoever keeps a view must not lose it.
        return {name: np.array(array) for name, array in batch.items()} if self._copies else batch

    def close(self) -> None:
        """Ends reading ahead; safe to call twice."""
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _start_worker(index: int, count: int) -> None:
    del index, count
    serve_parent()


# ---------------------------------------------------------------------------------------------------------------------
# From a Run to its data


class DataSets:
    """The data of a run. Iterators it gave out are closed by `close`."""

    def __init__(
        self,
        run: Run,
        tokenizer: Tokenizer,
        streams: Sequence[Rows],
        weights: Sequence[float],
        held_out: Mapping[str, Rows],
    ) -> None:
        self._data, self._seed, self._tokenizer = run.data, run.seed, tokenizer
        self._spells = kind_of_rows(run) in SPELLED
        self._streams, self._weights, self._held_out = list(streams), tuple(weights), dict(held_out)
        self._open: list[Batches] = []
        self._bytes: dict[tuple[int, str], int] = {}

    @property
    def tokens_per_epoch(self) -> int:
        """Targets (before any loss mask) in one pass over the training rows of all sources."""
        return sum(rows.pairs for rows in self._streams)

    @property
    def rows_per_epoch(self) -> int:
        """Training rows of all sources."""
        return sum(map(len, self._streams))

    @property
    def validation_rows(self) -> int:
        """Held-out rows, without those of the reference."""
        return len(self._held_out[VALIDATION])

    def train_batches(self, start_step: int, host_index: int = 0, host_count: int = 1) -> Batches:
        """The host's share [B / hosts, T] of every batch from step `start_step` on, without end."""
        dataset = make_dataset(
            self._streams,
            self._weights,
            seed=self._seed,
            batch_size=self._data.batch_size,
            host_index=host_index,
            host_count=host_count,
        )
        return self._keep(Batches(dataset, start=start_step, workers=self._data.workers))

    def validation_batches(
        self, n: int | None = None, host_index: int = 0, host_count: int = 1, which: str = VALIDATION
    ) -> Batches:
        """The host's share of the first `n` batches of held-out rows (None: all); the same ones at every call.

        which: validation or reference.
        """
        import grain

        rows = host_rows(self._data.batch_size, host_index, host_count)
        held_out = self._held_out[which]
        source = ValidationBatches(held_out, self._data.batch_size, rows)
        return self._keep(Batches(grain.MapDataset.source(source), stop=self._clip(n, which)))

    def validation_bytes(self, n: int | None = None, which: str = VALIDATION) -> int:
        """UTF-8 bytes that the weighted targets of those batches spell, over all hosts (ends of documents spell none).

        The sum of their losses, in bits, over this number is exactly bits per byte. 0 for pairs and judged replies,
        whose loss is not that of predicting text.
        """
        if not self._spells:
            return 0
        n = self._clip(n, which)
        if (n, which) not in self._bytes:
            total = 0
            with self.validation_batches(n, which=which) as batches:
                for batch in batches:
                    total += int(self._spelled[batch["targets"][batch["weights"] > 0]].sum())
            self._bytes[n, which] = total
        return self._bytes[n, which]

    @functools.cached_property
    def parts(self) -> dict[str, Part]:
        """Every part that is read in training or validation, by its key."""
        weights = self._weights or (1.0,) * len(self._streams)
        read = [rows for rows, weight in zip(self._streams, weights, strict=True) if weight > 0]
        parts = (part for rows in (*read, *self._held_out.values()) for part in rows.parts)
        return {part.key: part for part in parts if len(part)}

    def rows_in_order(
        self, batch_size: int, host_index: int = 0, host_count: int = 1
    ) -> Iterator[tuple[str, int, Batch]]:
        """(key of the part, its row that is the batch's first, the host's share of the batch) over all rows of `parts`.

        The same order at every call; no batch holds rows of two parts, and the last one of each ends with empty rows.
        """
        first, end = host_rows(batch_size, host_index, host_count)
        for key, part in self.parts.items():
            for start in range(0, len(part), batch_size):
                there = range(start + first, min(start + end, len(part)))
                padding = [part.empty()] * (end - first - len(there))
                yield key, start, stack([*(part[row] for row in there), *padding])

    def attach(self, name: str, paths: Mapping[str, Path]) -> None:
        """Gives every row an array `name` [T, ...], of the .npy file [rows, T, ...] that stands for its part's key.

        For batches that are asked for afterwards. UserError when a file is missing or of another shape.
        """
        weights = self._weights or (1.0,) * len(self._streams)
        read = zip(self._streams, weights, strict=True)
        self._streams = [rows.attach(name, paths) if weight > 0 else rows for rows, weight in read]
        self._held_out = {which: rows.attach(name, paths) for which, rows in self._held_out.items()}
        self.__dict__.pop("parts", None)

    def close(self) -> None:
        """Ends all threads and worker processes."""
        while self._open:
            self._open.pop().close()

    def _keep(self, batches: Batches) -> Batches:
        self._open = [other for other in self._open if other._reader is not None] + [batches]
        return batches

    def _clip(self, n: int | None, which: str) -> int:
        batches = -(-len(self._held_out[which]) // self._data.batch_size)
        return batches if n is None else min(n, batches)

    @functools.cached_property
    def _spelled(self) -> np.ndarray:
        """Bytes that each token spells, int64 [V]."""
        lengths = [len(self._tokenizer.token_bytes(i)) for i in range(self._tokenizer.vocab_size)]
        lengths[self._tokenizer.document_end_id] = 0
        return np.array(lengths, np.int64)


def open_data(run: Run, tokenizer: Tokenizer, cache_dir: Path) -> DataSets:
    """The data that `run.data` describes; text is tokenised into `cache_dir` first, unless it is there already.

    Raises UserError for a missing, empty or malformed source, a store of another tokenizer or objective, and sources
    too small to give a row.
    """
    data = run.data
    if run.draws:  # its rows come from tasks
        return DataSets(run, tokenizer, [], (), {VALIDATION: Rows([]), REFERENCE: Rows([])})
    held_out: list[Part] = []
    sources: list[Rows] = []
    for pattern in data.sources:
        parts: list[Part] = []
        for store in _stores(pattern, run, tokenizer, cache_dir):
            fraction = 0.0 if data.validation else data.validation_fraction
            # The seed is fixed: what is held out does not change with the run, so runs can be compared and continued.
            split = make_split(store, fraction, seed=0)
            parts.append(_part(store, run, cache_dir, split, "train"))
            if split.threshold:
                held_out.append(_part(store, run, cache_dir, split, "held out"))
        sources.append(Rows([part for part in parts if len(part)]))
        if not len(sources[-1]):
            raise UserError(f"{pattern} holds no document that gives a row; {_mend(parts)}")
    if not sources:
        raise UserError("data.sources is empty; name files, globs or prepared directories")
    held_out += _whole(data.validation, run, tokenizer, cache_dir)
    reference = _whole(data.reference, run, tokenizer, cache_dir)
    streams = sources if data.weights else [Rows([part for rows in sources for part in rows.parts])]
    found = {VALIDATION: held_out, REFERENCE: reference}
    held = {name: Rows([part for part in parts if len(part)]) for name, parts in found.items()}
    return DataSets(run, tokenizer, streams, data.weights, held)


def _mend(parts: Sequence[Part]) -> str:
    if any(part.index.meta["dropped"] for part in parts):
        return "all are too long for data.sequence_length: raise it"
    return "documents of two tokens or more are needed to train on: add text"


def _whole(patterns: Sequence[str], run: Run, tokenizer: Tokenizer, cache_dir: Path) -> list[Part]:
    """Sources that are held out as they are."""
    stores = (store for pattern in patterns for store in _stores(pattern, run, tokenizer, cache_dir))
    return [_part(store, run, cache_dir, make_split(store, 0.0, seed=0), "train") for store in stores]


def _stores(pattern: str, run: Run, tokenizer: Tokenizer, cache_dir: Path) -> list[Store]:
    """The prepared directories that a source names, and its files as one store in the cache."""
    paths, kind = expand([pattern]), kind_of_rows(run)
    stores = [Store.open(path) for path in paths if is_prepared(path)]
    files = [path for path in paths if not path.is_dir()]
    if files:
        plan = make_plan(files, tokenizer, kind, SHARD_TOKENS)
        name = f"{files[0].name.split('.')[0]}-{derive(repr(plan)):016x}"
        stores.append(prepare(files, tokenizer, cache_dir / name, objective=kind, max_bad_rows=run.data.max_bad_rows))
    for store in stores:
        store.check(tokenizer, kind)
        if kind == "kto" and len(store) < 2:
            raise UserError(
                f"{store.path} holds one reply, and kto compares it with a reply to another prompt; add some"
            )
    return stores


def _part(store: Store, run: Run, cache_dir: Path, split: Split, which: Literal["train", "held out"]) -> Part:
    """Rows of the documents of one side of a split; their index stays beside the store, or else in the cache."""
    mode: Mode = "split" if store.objective == "pretrain" else "whole"
    length, too_long = run.data.sequence_length, run.data.too_long
    cut = Cut(store.objective, length, too_long == "cut_left") if store.objective in LABELLED else None

    def fetch(doc: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray | None]:
        document = store.read(doc, start, stop)
        return document.tokens, document.loss_mask

    def windows() -> Iterator[Window]:
        longer, longest = 0, 0
        for first, words in store.windows(1 << 15):
            lengths = cut.whole(words) + 1 if cut else words
            longer, longest = longer + int((lengths > length + 1).sum()), max(longest, int(lengths.max()) - 1)
            ids = np.arange(first, first + len(lengths), dtype=np.int64)
            mine = split.held_out(ids) == (which == "held out")
            yield ids[mine], lengths[mine]
        if longer and too_long == "refuse":
            raise UserError(
                f"{longer:,} of {len(store):,} conversations of {store.path} are longer than data.sequence_length="
                f"{length} (the longest takes {longest:,}); raise it, or set data.too_long to cut, cut_left or drop"
            )

    policy = "" if mode == "split" else f" {too_long}"
    name = index_name(length, mode, f"{which} {split.name} {store.fingerprint}{policy}")
    shorten: Shorten | None = functools.partial(cut.shortened, fetch=fetch) if cut else None
    places = [store.path / "index" / name, cache_dir / "index" / name]
    index = _index(lambda path: build_index(windows(), length, mode, path, too_long, shorten), places)
    if which == "train":
        left_out = f"left out: too long for rows of {length} tokens"
        for count, what in ((index.meta["cut"], f"cut to {length} tokens"), (index.meta["dropped"], left_out)):
            if count:
                say(f"{count:,} of {len(store):,} conversations of {store.path} are {what}")
    return Part(store, index)


def _index(build: Callable[[Path], Index], places: Sequence[Path]) -> Index:
    """The index at the first of `places` that may be written; a store shared by many may be read-only."""
    *others, last = places
    for path in others:
        try:
            return build(path)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise
    with explain_disk(last, "free some and run again"):
        return build(last)
