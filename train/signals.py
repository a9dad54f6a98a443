"""Ends a run politely: the first signal asks, a second Ctrl-C insists."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from sharding.peers import Peers, peers


class StopRequest:
    """Whether somebody asked the run to stop, and how.

    Args:
        others: the other processes of the run, who are asked to stop as well.
    """

    def __init__(self, others: Peers | None = None) -> None:
        self.reason = ""
        self._others = others

    def ask(self, reason: str) -> None:
        """Asks the run to stop after a step."""
        self.reason = self.reason or reason
        if self._others is not None:
            self._others.stop(reason)

    def agreed(self, step: int) -> bool:
        """Whether the run ends after `step`; every process is told the same. Call it once after each step."""
        if self._others is None:
            return bool(self.reason)
        if not self._others.stops_after(step):
            return False
        self.reason = self._others.asked
        return True

    def take(self, number: int) -> None:
        """Notes the first signal; leaves at once on a second Ctrl-C (the last checkpoint is whole either way)."""
        if self.reason and number == signal.SIGINT:
            os._exit(130)
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        insist = "another Ctrl-C" if number == signal.SIGINT else "Ctrl-C"
        self.ask(name)
        print(f"\n{name}: saving after this step; {insist} leaves at once", file=sys.stderr, flush=True)


@contextmanager
def stop_on_signal() -> Iterator[StopRequest]:
    """SIGTERM and SIGINT set the request while the block runs; the previous handlers come back after it.

    A thread listens: Python runs handlers in the main thread alone, and that may sit in a compilation for minutes.
    """
    request = StopRequest(peers())
    numbers = (signal.SIGTERM, signal.SIGINT)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def listen() -> None:
        while heard := os.read(reader, 1):
            if heard[0] in numbers:
                request.take(heard[0])
        os.close(reader)

    threading.Thread(target=listen, name="signals", daemon=True).start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    previous = [signal.signal(number, lambda *_: None) for number in numbers]
    try:
        yield request
    finally:
        for number, handler in zip(numbers, previous, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(writer)
