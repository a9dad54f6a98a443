"""Law: whoever comes, ends, is left or put back, a row reads its own tokens and nobody's else, and all is given back.

The device is played here by lists: what each page, slot and snapshot holds is the tokens that made it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from serve.pages import PagePool, Snapshots, page_keys
from serve.request import Place, Request
from serve.sampling_params import SamplingParams
from serve.scheduler import Chunk, Limits, Scheduler

PAGE = 4


@dataclass
class Device:
    """What the scheduler's work makes of memory; `sent` are tokens that the host has not read yet."""

    limits: Limits
    pages: list[list[list[int]]]
    snapshots: list[list[list[int]]]
    slots: dict[int, list[int]] = field(default_factory=dict)
    last: dict[int, int] = field(default_factory=dict)
    sent: list[tuple[Request, Place, int]] = field(default_factory=list)

    def check(self, request: Request, tokens: list[int]) -> Place:
        """The row holds these tokens, in its pages and in its slot."""
        place = request.place
        assert place is not None
        shard = place.slot // self.limits.slots_of_shard
        held = [self.pages[shard][place.pages[i // PAGE]][i % PAGE] for i in range(len(tokens))]
        assert held == tokens
        if self.limits.snapshot_every:
            assert self.slots[place.slot] == tokens
        return place

    def write(self, place: Place, start: int, tokens: list[int]) -> None:
        shard = place.slot // self.limits.slots_of_shard
        for index, token in enumerate(tokens, start):
            self.pages[shard][place.pages[index // PAGE]][index % PAGE] = token
        self.slots[place.slot] += tokens

    def read(self, chunk: Chunk, rng: random.Random) -> None:
        request, place = chunk.request, chunk.request.place
        assert place is not None
        shard, known = place.slot // self.limits.slots_of_shard, request.known
        if chunk.first:
            linear = self.limits.snapshot_every > 0
            assert linear or chunk.load is None
            loaded = [] if chunk.load is None else list(self.snapshots[shard][chunk.load])
            self.slots[place.slot] = loaded if linear else known[: chunk.start]
        self.check(request, known[: chunk.start])
        self.write(place, chunk.start, known[chunk.start : chunk.end])
        if chunk.save is not None:
            self.snapshots[shard][chunk.save] = list(self.slots[place.slot])
        if chunk.last:
            assert chunk.end == len(known)
            self.draw(request, place, rng)

    def go_on(self, request: Request, rng: random.Random) -> None:
        place = request.place
        assert place is not None
        start = place.length - 1
        self.write(place, start, [self.last[place.slot]])
        self.draw(request, place, rng)

    def draw(self, request: Request, place: Place, rng: random.Random) -> None:
        self.last[place.slot] = rng.randrange(3)
        self.sent.append((request, place, self.last[place.slot]))


def simulate(limits: Limits, pages: int, seed: int, requests: int) -> list[Request]:
    rng = random.Random(seed)
    snapshots = 3 if limits.snapshot_every else 0
    scheduler = Scheduler(
        limits,
        [PagePool(pages) for _ in range(limits.shards)],
        [Snapshots(snapshots) for _ in range(limits.shards)],
    )
    device = Device(
        limits,
        [[[-1] * PAGE for _ in range(pages)] for _ in range(limits.shards)],
        [[[]] * snapshots for _ in range(limits.shards)],
    )
    most = min(limits.width, pages) * PAGE
    asked: list[Request] = []
    shapes: dict[tuple[int, int], tuple[int, int]] = {}
    for _ in range(3000):
        if len(asked) < requests and rng.random() < 0.5:
            beginning = [rng.randrange(2) for _ in range(3)] * rng.randrange(6)  # of few kinds: they are shared
            prompt = (beginning + [rng.randrange(3) for _ in range(rng.randrange(1, 9))])[: most - 1]
            room = rng.randrange(1, most - len(prompt) + 1)
            request = Request(prompt, SamplingParams(), (2,) if rng.random() < 0.5 else (), room, rng.randrange(2))
            asked.append(request)
            scheduler.add(request)
        if asked and rng.random() < 0.05:
            left = rng.choice(asked)
            if left.finish_reason is None:
                left.finish_reason = "abort"
                scheduler.remove(left)
        received, device.sent = device.sent, []
        work = scheduler.next()
        for request in work.rows:
            device.go_on(request, rng)
        for chunk in work.chunks:
            device.read(chunk, rng)
            if limits.deterministic:
                where = chunk.start, len(chunk.request.known)
                assert shapes.setdefault(where, work.shape) == work.shape, "a piece's program is its own matter alone"
        counts = [r.place.slot for r in (*work.rows, *(c.request for c in work.chunks)) if r.place]
        assert len(set(counts)) == len(counts), "a row takes one step in a turn"
        for request, place, token in received:
            if request.place is place:
                request.take(token, 0.0)
                if request.finish_reason is not None:
                    scheduler.remove(request)
        if len(asked) == requests and not scheduler.busy and not device.sent:
            break
    assert all(request.finish_reason is not None for request in asked), "nobody waits for ever"
    assert all(pool.held == 0 for pool in scheduler.pools)
    assert not scheduler.busy
    return asked


@given(
    seed=st.integers(0, 2**32),
    shards=st.sampled_from([1, 2]),
    slots=st.sampled_from([1, 3]),
    pages=st.sampled_from([8, 11, 40]),
    linear=st.booleans(),
    deterministic=st.booleans(),
)
@example(seed=4862498, shards=2, slots=3, pages=40, linear=False, deterministic=False)
@settings(max_examples=300, deadline=None)
def test_rows_read_their_own_tokens(
    seed: int, shards: int, slots: int, pages: int, linear: bool, deterministic: bool
) -> None:
    chunks = ((1, 4), (3, 4), (1, 12))
    every = 12 if linear else 0
    limits = Limits(slots * shards, shards, PAGE, 8, chunks, every, deterministic)
    simulate(limits, pages, seed, 25)


def test_priorities_go_first() -> None:
    limits = Limits(1, 1, PAGE, 4, ((1, 4),))
    scheduler = Scheduler(limits, [PagePool(4)])
    late, soon = (Request([1, 2], SamplingParams(), (), 1, priority) for priority in (1, 0))
    scheduler.add(late)
    scheduler.add(soon)
    assert [chunk.request for chunk in scheduler.next().chunks] == [soon]
    assert scheduler.waiting == 1


@pytest.mark.parametrize("deterministic", [False, True])
def test_only_what_nobody_has_read_decides_on_the_program(deterministic: bool) -> None:
    limits = Limits(2, 1, PAGE, 16, ((1, 4), (1, 16)), 0, deterministic)
    scheduler = Scheduler(limits, [PagePool(40)])
    for turn in range(2):
        request = Request([*range(32), turn, turn], SamplingParams(), (), 1, 0)
        scheduler.add(request)
        shapes = []
        while (work := scheduler.next()).chunks:
            shapes.append(work.shape)
        request.finish_reason = "length"
        scheduler.remove(request)
        assert shapes == ([(1, 4)] if turn else [(1, 16), (1, 16), (1, 4)])


def test_keys_stand_for_everything_before() -> None:
    one = page_keys([1, 2, 3, 4, 5, 6, 7, 8, 9], PAGE)
    assert len(one) == 2
    assert page_keys([1, 2, 3, 4, 5, 6, 7, 8], PAGE, known=one[:1]) == one
    assert page_keys([0, 2, 3, 4, 5, 6, 7, 8], PAGE)[1] != one[1]
    assert page_keys([1, 2, 3, 4], PAGE, salt=b"adapter") != one[:1]


def test_pages_are_taken_in_order_of_use() -> None:
    pool = PagePool(3)
    first, second = pool.take(1), pool.take(2)
    assert first and second and pool.take(1) is None
    for page, key in zip(first + second, (b"a", b"b", b"c"), strict=True):
        pool.publish(page, key)
    pool.drop(second)
    pool.drop(first)
    assert pool.find([b"b", b"c"]) == second, "they are idle, not gone"
    pool.hold(pool.find([b"b"]))
    assert pool.take(1) == [second[1]], "the end of the row that was given back first"
    assert pool.find([b"c"]) == [] and pool.find([b"a"]) == first
    pool.drop([second[0]])
    with pytest.raises(AssertionError, match="twice"):
        pool.drop([second[0]])
