"""The experts that each token of a reply went to, so that training can send it to the same ones.

What is recorded lies in pages like keys and values do: who shares the beginning of a prompt shares its record.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from model.config import ModelConfig
from serve.request import Place, Request
from serve.scheduler import Limits

Reading = tuple[int, Place, int, int]
"""A row of a step, who is there, and the first and the number of the positions that it reads."""
Located = tuple[int, list[int], int, int]
"""The same with pages, which the place may have given away when the step is done."""


@dataclass
class Sent:
    """Work that was sent to the device and not read yet: its output, who is in which row of it, and what it reads."""

    output: jax.Array
    experts: jax.Array | None
    rows: list[tuple[int, Request, Place]]
    reads: list[Located]


class Recording:
    """The experts of every position of every page, on the host; int16, `[pages, page, L, C]`."""

    def __init__(self, config: ModelConfig, limits: Limits, pages: int):
        self._limits, self._pages = limits, pages // limits.shards
        chosen = (config.num_moe_layers, config.moe.experts_per_token)
        self._chosen_PXLC = np.zeros((pages, limits.page, *chosen), np.int16)

    def pages_of(self, place: Place) -> list[int]:
        """A row's pages among those of all devices."""
        first = place.slot // self._limits.slots_of_shard * self._pages
        return [first + page for page in place.pages]

    def located(self, reads: Sequence[Reading]) -> list[Located]:
        """Where the positions lie that a step reads."""
        return [(row, self.pages_of(place), start, count) for row, place, start, count in reads]

    def write(self, sent: Sent) -> None:
        """Takes down what a step has read; waits for it."""
        chosen: Any = np.asarray(sent.experts)
        for row, pages, start, count in sent.reads:
            positions = np.arange(start, start + count)
            own = np.asarray(pages)[positions // self._limits.page]
            self._chosen_PXLC[own, positions % self._limits.page] = chosen[row, :count]

    def of(self, request: Request) -> np.ndarray:
        """The experts of a request's tokens, of all but the last, which was never read: int16, `[T, L, C]`."""
        assert request.place is not None
        positions = np.arange(len(request.prompt) + len(request.tokens) - 1)
        own = np.asarray(self.pages_of(request.place))[positions // self._limits.page]
        return self._chosen_PXLC[own, positions % self._limits.page]
