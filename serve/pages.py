"""Who has which page of the cache, and which pages hold a beginning that others may share. No jax here."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

Key = bytes
"""Stands for all tokens from a row's first to the end of a page."""


def page_keys(tokens: Sequence[int], page: int, salt: bytes = b"", known: Sequence[Key] = ()) -> list[Key]:
    """The keys of the full pages of a row.

    Args:
        page: positions of a page. salt: what else keys and values depend on, such as an adapter.
        known: the first keys, where they were made before.
    """
    keys = list(known)
    for start in range(len(keys) * page, len(tokens) - page + 1, page):
        before = keys[-1] if keys else salt
        keys.append(
            hashlib.blake2b(before + array("i", tokens[start : start + page]).tobytes(), digest_size=16).digest()
        )
    return keys


class PagePool:
    """The pages of one device.

    A page is free, held by so many rows, or idle: nobody has it, but it holds a beginning that may be asked for again.
    Idle pages are taken when no other is free, the one that was given back first before the others.
    """

    def __init__(self, count: int):
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._holders = [0] * count
        self._keys: list[Key | None] = [None] * count
        self._pages: dict[Key, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that can be taken."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Pages that rows have."""
        return self.count - self.available

    def take(self, count: int) -> list[int] | None:
        """`count` pages for one holder, whatever they held before; None if there are not so many."""
        if count > self.available:
            return None
        return [self._take_one() for _ in range(count)]

    def _take_one(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._idle.popitem(last=False)
            self._forget(page)
        self._holders[page] = 1
        return page

    def find(self, keys: Iterable[Key]) -> list[int]:
        """Pages that hold these keys, one after the other, as far as there are any."""
        found = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            found.append(page)
        return found

    def hold(self, pages: Iterable[int]) -> None:
        """One holder more for pages that `find` gave."""
        for page in pages:
            self._holders[page] += 1
            self._idle.pop(page, None)

    def publish(self, page: int, key: Key) -> None:
        """From now on this page is found by its key, unless another already is."""
        if self._keys[page] is None and key not in self._pages:
            self._keys[page], self._pages[key] = key, page

    def drop(self, pages: Sequence[int]) -> None:
        """One holder less; of what is idle now the row's end is taken before its beginning."""
        for page in reversed(pages):
            self._holders[page] -= 1
            assert self._holders[page] >= 0, f"page {page} was given back twice"
            if self._holders[page] == 0:
                if self._keys[page] is None:
                    self._free.append(page)
                else:
                    self._idle[page] = None

    def clear(self) -> None:
        """Forgets all beginnings: what they were made with has changed."""
        for page in list(self._idle):
            del self._idle[page]
            self._free.append(page)
        for page in range(self.count):
            self._forget(page)

    def _forget(self, page: int) -> None:
        key = self._keys[page]
        if key is not None:
            del self._pages[key]
            self._keys[page] = None


class Snapshots:
    """Places for what linear layers remember at the end of some page; the one used longest ago is written over."""

    def __init__(self, count: int):
        self._free = list(range(count - 1, -1, -1))
        self._places: OrderedDict[Key, int] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._places

    def find(self, key: Key) -> int:
        """The place of this key's snapshot, which counts as used now."""
        self._places.move_to_end(key)
        return self._places[key]

    def take(self, key: Key) -> int | None:
        """A place for this key's snapshot; None if it has one, or there are no places at all."""
        if key in self._places or not (self._free or self._places):
            return None
        place = self._free.pop() if self._free else self._places.popitem(last=False)[1]
        self._places[key] = place
        return place

    def clear(self) -> None:
        """Forgets all of them."""
        self._free += self._places.values()
        self._places.clear()
