"""Ends a run politely: the first signal asks, the second Ctrl-C insists."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class StopRequest:
    """Whether somebody asked the run to stop, and how."""

    def __init__(self) -> None:
        self.reason = ""

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Notes the first signal; leaves at once on a second Ctrl-C (the last checkpoint is whole either way)."""
        if self.reason and number == signal.SIGINT:
            os._exit(130)
        self.reason = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        sys.stderr.write(f"\n{self.reason}: saving after this step; Ctrl-C again leaves at once\n")


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """SIGTERM and SIGINT set the request while the block runs; the previous handlers come back after it."""
    request = StopRequest()
    numbers = (signal.SIGTERM, signal.SIGINT)
    previous = [signal.signal(number, request.handle) for number in numbers]
    try:
        yield request
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
