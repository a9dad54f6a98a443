"""Past responses, kept in memory so that a conversation can go on from them; the least used make room for others."""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

from serve.api.errors import ApiError


@dataclass(frozen=True)
class Stored:
    """A past response, and the items that it was made from, those of the responses before it among them."""

    response: dict[str, Any]
    items: list[dict[str, Any]]


class ResponseStore:
    """Past responses by their id.

    Args:
        most: responses that are kept. most_bytes: what all of them may measure, as JSON.
    """

    def __init__(self, most: int = 4096, most_bytes: int = 256 * 2**20):
        self._most, self._most_bytes, self._bytes = most, most_bytes, 0
        self._kept: OrderedDict[str, tuple[Stored, int]] = OrderedDict()

    def put(self, one: Stored) -> None:
        """Keeps a response."""
        size = len(json.dumps(one.response)) + len(json.dumps(one.items))
        self._kept[one.response["id"]] = one, size
        self._bytes += size
        while len(self._kept) > self._most or self._bytes > self._most_bytes:
            _, (_, freed) = self._kept.popitem(last=False)
            self._bytes -= freed

    def get(self, name: str, param: str | None = None) -> Stored:
        """A past response; ApiError 404, about `param`, where it is not kept."""
        self._check(name, param)
        self._kept.move_to_end(name)
        return self._kept[name][0]

    def drop(self, name: str) -> None:
        """Forgets a response; ApiError 404 where it is not kept."""
        self._check(name, None)
        self._bytes -= self._kept.pop(name)[1]

    def _check(self, name: str, param: str | None) -> None:
        if name not in self._kept:
            raise ApiError(
                404,
                f"there is no response {name!r}: it was never kept, or has made room for others",
                param=param,
                code="response_not_found",
            )
