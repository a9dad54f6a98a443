"""Which rows take which step next. No jax here: it can be read, and tested, without a model."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field

from serve.pages import Key, PagePool, Snapshots, page_keys
from serve.request import Place, Request


@dataclass
class Chunk:
    """Tokens `start` to `end` of a row that are to be read.

    first: whether these are the first that are read since it has a slot. last: whether the next token is sampled after
    them. load, save: snapshots of linear layers to begin with and to keep, if any.
    """

    request: Request
    start: int
    end: int
    first: bool
    last: bool
    load: int | None = None
    save: int | None = None


@dataclass
class Work:
    """What the device is to do next: read these chunks in one program of this shape, then go on with these rows."""

    shape: tuple[int, int] = (0, 0)
    chunks: list[Chunk] = field(default_factory=list)
    rows: list[Request] = field(default_factory=list)


@dataclass(frozen=True)
class Limits:
    """Sizes that the scheduler works with.

    slots: rows at a time, and `shards`: parts that these and the pages are cut into. page: positions of one.
    width: pages of the longest row. chunks: (rows, tokens) of each part that one program reads, from small to large.
    snapshot_every: tokens between snapshots of linear layers; 0 where there are none of these.
    deterministic: what a request is given depends on nobody else.
    """

    slots: int
    shards: int
    page: int
    width: int
    chunks: tuple[tuple[int, int], ...]
    snapshot_every: int = 0
    deterministic: bool = False

    @property
    def slots_of_shard(self) -> int:
        """Rows of one part."""
        return self.slots // self.shards


class Scheduler:
    """Requests that wait, and those that run.

    In each turn every running row takes a step and, beside that, one batch of chunks of prompts is read. A request
    starts when it has a slot and the pages for its tokens so far; where the pages run out later, the request that
    started last among those of least priority gives its own back and waits, at the front, to be read again.
    """

    def __init__(self, limits: Limits, pools: Sequence[PagePool], snapshots: Sequence[Snapshots] = ()):
        self.limits, self.pools, self.snapshots = limits, list(pools), list(snapshots)
        self.running: list[Request] = []
        self._waiting: list[tuple[int, int, Request]] = []
        self._order = 0
        own = limits.slots_of_shard
        self._slots = [list(range((shard + 1) * own - 1, shard * own - 1, -1)) for shard in range(limits.shards)]
        self.preemptions = 0

    # ---- coming and going -------------------------------------------------
    @property
    def waiting(self) -> int:
        """Requests that have not started, or were put back."""
        return sum(request.finish_reason is None for _, _, request in self._waiting)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.running or self._waiting)

    def add(self, request: Request) -> None:
        """Queues a request behind those of its priority."""
        self._order += 1
        heapq.heappush(self._waiting, (request.priority, self._order, request))

    def forget(self) -> None:
        """Drops what is kept of prompts; with nobody running all is as in the beginning."""
        for one in (*self.pools, *self.snapshots):
            one.clear()
        for slots in self._slots:
            slots.sort(reverse=True)

    def remove(self, request: Request) -> None:
        """Gives back what a request has: it has ended. One that waits is dropped when its turn comes."""
        if request.place is not None:
            self.running.remove(request)
            self._release(request)

    def _release(self, request: Request) -> None:
        place, limits = request.place, self.limits
        assert place is not None
        shard = place.slot // limits.slots_of_shard
        pool = self.pools[shard]
        # The last token may not have been written; pages from decoding alone do not have the bits of read ones.
        filled = min(place.length, len(request.prompt) + len(request.tokens) - 1)
        filled = 0 if limits.deterministic or not place.started else filled
        place.keys = page_keys(request.known[:filled], limits.page, request.salt, place.keys)
        for page, key in zip(place.pages, place.keys[: filled // limits.page], strict=False):
            pool.publish(page, key)
        pool.drop(place.pages)
        self._slots[shard].append(place.slot)
        request.place = None

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._release(request)
        self.preemptions += 1
        heapq.heappush(self._waiting, (request.priority, -self._order - self.preemptions, request))

    # ---- a turn -----------------------------------------------------------
    def next(self) -> Work:
        """What to do now; everything in it counts as done from here on."""
        rows = self._rows()
        self._start_waiting()
        shape, chunks = self._chunks()
        return Work(shape, chunks, rows)

    def _rows(self) -> list[Request]:
        """Running rows that have another token to sample, each with a page to put the last one in."""
        ready = []
        for request in sorted(self.running, key=lambda r: r.priority):
            place = request.place
            if place is None or place.reading or place.sampled >= request.max_tokens:
                continue  # without a place: it was put back for another one's sake just now
            if self._grow(request):
                ready.append(request)
        ready = [request for request in ready if request.place is not None]
        for request in ready:
            assert request.place is not None
            request.place.length += 1
            request.place.sampled += 1
        return ready

    def _grow(self, request: Request) -> bool:
        """Whether the row has a page for its next position, even at the cost of another row."""
        place, limits = request.place, self.limits
        assert place is not None
        if place.length < len(place.pages) * limits.page:
            return True
        shard = place.slot // limits.slots_of_shard
        while (more := self.pools[shard].take(1)) is None:
            rivals = [r for r in self.running if r.place and r.place.slot // limits.slots_of_shard == shard]
            victim = max(rivals, key=lambda r: (r.priority, self.running.index(r)))
            self._preempt(victim)
            if victim is request:
                return False
        place.pages += more
        return True

    def _start_waiting(self) -> None:
        while self._waiting:
            _, _, request = self._waiting[0]
            if request.finish_reason is None and not self._start(request):
                return
            heapq.heappop(self._waiting)

    def _start(self, request: Request) -> bool:
        """Gives a request a slot; its pages come with its first chunk."""
        limits = self.limits
        shards = [shard for shard, slots in enumerate(self._slots) if slots]
        if not shards:
            return False
        shard = max(shards, key=lambda s: (self.pools[s].available - self._promised(s), len(self._slots[s])))
        if self.pools[shard].available - self._promised(shard) < self._need(request):
            return False
        target = len(request.prompt) + len(request.tokens)
        request.place = Place(self._slots[shard].pop(), target, len(request.tokens))
        request.place.keys = page_keys(request.known, limits.page, request.salt)
        self.running.append(request)
        return True

    def _need(self, request: Request) -> int:
        """Pages that a request needs before it starts: for its tokens so far and one more."""
        most = request.max_tokens if self.limits.deterministic else len(request.tokens) + 1
        return -(-(len(request.prompt) + most) // self.limits.page)

    def _promised(self, shard: int) -> int:
        """Pages that requests which have started will still take."""
        limits = self.limits
        places = [(r, r.place) for r in self.running if r.place and r.place.slot // limits.slots_of_shard == shard]
        return sum(max(0, self._need(r) - len(p.pages)) for r, p in places if p.reading or limits.deterministic)

    # ---- prompts ----------------------------------------------------------
    def _chunks(self) -> tuple[tuple[int, int], list[Chunk]]:
        """A batch of chunks, and the shape of the program that reads it; requests that started first go first."""
        limits = self.limits
        reading = [r for r in self.running if r.place and r.place.reading]
        if not reading:
            return (0, 0), []
        first = reading[0]
        rows, tokens = self._shape(first, reading)
        counts, chunks, being_read = [0] * limits.shards, [], set[Key]()
        for request in reading:
            place = request.place
            assert place is not None
            shard = place.slot // limits.slots_of_shard
            alone = limits.deterministic and self._tokens(request) != tokens
            if counts[shard] == rows or alone:
                continue
            first = not place.started
            load = self._reuse(request) if first else None
            coming = place.keys[place.length // limits.page : -(-(place.length + tokens) // limits.page)]
            if first and being_read.intersection(coming[:1]):
                self._begin_later(place)  # it will find in the next turn what is read in this one
                continue
            if not self._take_pages(request):
                continue
            place.started = True
            being_read.update(coming)
            counts[shard] += 1
            chunks.append(self._chunk(request, tokens, first, load))
        return (rows * limits.shards, tokens), chunks

    def _shape(self, first: Request, reading: Sequence[Request]) -> tuple[int, int]:
        """The program that reads most of what there is to read in one go: rows of each part, and tokens."""
        limits = self.limits
        if limits.deterministic:
            return 1, self._tokens(first)
        left = [self._left(request) for request in reading]

        def worth(shape: tuple[int, int]) -> tuple[float, int]:
            rows, tokens = shape
            useful = sum(sorted((min(n, tokens) for n in left), reverse=True)[: rows * limits.shards])
            padded = rows * tokens * limits.shards
            # A program's time has a part that does not depend on its size: reading the weights.
            return useful / (padded + limits.chunks[0][1]), -padded

        return max(limits.chunks, key=worth)

    def _tokens(self, request: Request) -> int:
        """Tokens of the smallest one-row program that reads the rest of a prompt, or else of the largest."""
        left, sizes = self._left(request), sorted(tokens for rows, tokens in self.limits.chunks if rows == 1)
        return next((size for size in sizes if size >= left), sizes[-1])

    def _left(self, request: Request) -> int:
        """Tokens of a row that are still to be read; of one that has not begun, without those that others have read."""
        place = request.place
        assert place is not None
        had = place.length if place.started else len(self._known(place)) * self.limits.page
        return place.target - had

    def _known(self, place: Place) -> list[int]:
        """Pages that hold the first tokens of a row that has not begun, as far as it can go on from there."""
        limits, shard = self.limits, place.slot // self.limits.slots_of_shard
        # At least one token has to be read, so that there is something to sample from.
        found = self.pools[shard].find(place.keys[: (place.target - 1) // limits.page])
        if limits.deterministic:
            largest = max(tokens for rows, tokens in limits.chunks if rows == 1)
            found = found[: len(found) * limits.page // largest * largest // limits.page]
        while limits.snapshot_every and found and place.keys[len(found) - 1] not in self.snapshots[shard]:
            found.pop()
        return found

    def _reuse(self, request: Request) -> int | None:
        """Begins a row with pages that hold its first tokens already; gives the snapshot to load, if it needs one."""
        place = request.place
        assert place is not None
        shard, found = place.slot // self.limits.slots_of_shard, self._known(place)
        load = self.snapshots[shard].find(place.keys[len(found) - 1]) if self.limits.snapshot_every and found else None
        self.pools[shard].hold(found)
        place.pages = found
        place.length = len(found) * self.limits.page
        request.cached_tokens = min(place.length, len(request.prompt))
        return load

    def _begin_later(self, place: Place) -> None:
        """Undoes `_reuse`."""
        self.pools[place.slot // self.limits.slots_of_shard].drop(place.pages)
        place.pages, place.length = [], 0

    def _take_pages(self, request: Request) -> bool:
        """Whether the row has the pages that it needs until its next token is sampled."""
        place, limits = request.place, self.limits
        assert place is not None
        more = self.pools[place.slot // limits.slots_of_shard].take(max(0, self._need(request) - len(place.pages)))
        if more is None:  # rows that grow have taken what was promised: it waits for them, or is put back
            self._preempt(request)
            return False
        place.pages += more
        return True

    def _chunk(self, request: Request, tokens: int, first: bool, load: int | None) -> Chunk:
        """The next chunk of a prompt; its full pages can be found by others from now on."""
        place, limits = request.place, self.limits
        assert place is not None
        start, end, save = place.length, min(place.length + tokens, place.target), None
        if limits.snapshot_every:
            end, save = self._to_snapshot(place, start, end)
        shareable = end // limits.page
        if limits.deterministic:  # only whole chunks have the same bits whatever comes after them
            shareable = shareable if end - start == tokens == max(t for r, t in limits.chunks if r == 1) else 0
        pool = self.pools[place.slot // limits.slots_of_shard]
        for index in range(start // limits.page, shareable):
            pool.publish(place.pages[index], place.keys[index])
        last = end == place.target
        place.length = end
        place.sampled += last
        return Chunk(request, start, end, first, last, load, save)

    def _to_snapshot(self, place: Place, start: int, end: int) -> tuple[int, int | None]:
        """Where to end a chunk so that what linear layers remember there can be kept, and the place to keep it in."""
        limits = self.limits
        regular = (start // limits.snapshot_every + 1) * limits.snapshot_every
        whole = (place.target - 1) // limits.page * limits.page  # the last full page before the prompt's end
        for stop in sorted((regular, whole)):
            if start < stop <= end and stop % limits.page == 0:
                key = place.keys[stop // limits.page - 1]
                return stop, self.snapshots[place.slot // limits.slots_of_shard].take(key)
        return end, None
