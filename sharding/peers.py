"""What the processes of a run tell each other beside the arrays: that they live, that they failed, when to stop.

A thread in each process writes and reads short notes in the key-value store of process 0, about once a second. The
step itself never waits for it. A process that ends or is lost ends all: without it the others would wait for ever
in the next exchange of arrays.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any

from errors import UserError
from sharding.hosts import Hosts

ALIVE, NOTICE, BEGUN, FIRST = "qmax/alive/", "qmax/notice/", "qmax/begun/", "qmax/first/"
"""Keys: beats of each process; what concerns all; the step that each has begun; what process 0 hands over."""
PERIOD_SECONDS = 1.0
"""How often notes are looked at, or a tenth of the patience where that is less."""
PART_SECONDS = 600.0
"""How long a process that is done waits for the others to be done too."""
BROKEN = ("gloo", "closed by peer", "connection reset", "unavailable", "deadline_exceeded", "aborted:", "barrier")
"""Words of errors that another process may have caused by dying."""

_HERE: Peers | None = None


def peers() -> Peers | None:
    """The other processes of this run; None where this one is alone."""
    return _HERE


def meet(hosts: Hosts, patience: float) -> None:
    """Starts to exchange notes; called once, by `join_hosts`."""
    global _HERE
    from jax._src import distributed  # the only way to the key-value store; Orbax goes it too

    _HERE = Peers(distributed.global_state.client, hosts.process, hosts.processes, patience)
    _HERE.start()


class Peers:
    """The other processes of a run, as this one knows them.

    Args:
        client: jax's client of the key-value store.
        index, count: which process this is, and of how many.
        patience: seconds of silence after which a process is taken for lost.
    """

    def __init__(self, client: Any, index: int, count: int, patience: float) -> None:
        self.index, self.count, self.patience = index, count, patience
        self.period = min(PERIOD_SECONDS, patience / 10)
        self.asked = ""
        """Why all are to stop; empty while nobody asked."""
        self._client = client
        self._changed = threading.Condition()
        self._begun = 0
        self._last: int | None = None
        self._heard: dict[int, tuple[str, float]] = {}
        self._looked = time.monotonic()
        self._parted = threading.Event()
        self._failing = False
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)

    def start(self) -> None:
        """Begins to watch."""
        self._thread.start()

    # ---- stopping together --------------------------------------------------
    def stop(self, reason: str) -> None:
        """Asks all processes to stop after the same step."""
        with contextlib.suppress(RuntimeError):  # somebody asked before
            self._client.key_value_set(f"{NOTICE}stop", f"{reason} of process {self.index}")

    def stops_after(self, step: int) -> bool:
        """Whether all processes stop after `step`; where not, this one is about to begin the next.

        Once somebody asked, each process tells which step it has begun, and stands still until it knows what all
        have told (a second or two): the last step is the largest of them, which nobody has passed.
        """
        with self._changed:
            while self.asked and self._last is None:
                self._changed.wait()
            if self._last is not None and step >= self._last:
                return True
            self._begun = step + 1
            return False

    def _agree(self, reason: str) -> None:
        with self._changed:
            self.asked = self.asked or reason  # from here on, `_begun` stays as it is
        if self._last is None:
            self._client.key_value_set(f"{BEGUN}{self.index}", str(self._begun), allow_overwrite=True)
            told = self._client.key_value_dir_get(BEGUN)
            if len(told) == self.count:
                with self._changed:
                    self._last = max(int(step) for _, step in told)
                    self._changed.notify_all()

    # ---- the first and the others -------------------------------------------
    def from_first(self, name: str, text: str = "") -> str:
        """What process 0 hands over under a name, once it does; its own `text` in process 0."""
        if self.index == 0:
            self._client.key_value_set(FIRST + name, text or "-", allow_overwrite=True)
            return text
        while True:
            with contextlib.suppress(RuntimeError):  # its time is up; the watching thread knows whether to go on
                return self._client.blocking_key_value_get(FIRST + name, 10_000)

    # ---- ending -------------------------------------------------------------
    def fail(self, exc: BaseException) -> None:
        """Tells the others that this process ends by `exc`, so that they end too."""
        words = "".join(traceback.format_exception(exc)).lower()
        if any(word in words for word in BROKEN):
            # Most likely somebody died. Who it was is known when its silence has lasted, and then we end in _watch.
            time.sleep(self.patience + 5 * self.period)
        self._failing = True
        code = 2 if isinstance(exc, UserError) else 130 if isinstance(exc, KeyboardInterrupt) else 1
        said = " ".join(str(exc).split())[:500] or "it was interrupted"
        said = said if isinstance(exc, UserError) else f"{type(exc).__name__}: {said}"
        with contextlib.suppress(RuntimeError):
            self._client.key_value_set(f"{NOTICE}failed/{self.index}", f"{code} {said}")
        self._let_them_read()

    def part(self) -> None:
        """Waits until the others are done as well, and ends the acquaintance: arrays cannot be exchanged after it."""
        global _HERE
        import jax

        with contextlib.suppress(RuntimeError):
            self._client.wait_at_barrier("qmax/part", int(PART_SECONDS * 1000))
        self._parted.set()
        self._thread.join()
        with contextlib.suppress(RuntimeError):
            jax.distributed.shutdown()
        _HERE = None

    def _end(self, code: int, sentence: str) -> None:
        """Ends this process from the watching thread: the main one sits in an exchange that will never end."""
        print(f"qmax: {sentence}", file=sys.stderr, flush=True)
        self._let_them_read()
        os._exit(code)

    def _let_them_read(self) -> None:
        """The notes are kept by process 0 and go with it."""
        if self.index == 0:
            time.sleep(3 * self.period)

    # ---- watching -----------------------------------------------------------
    def _watch(self) -> None:
        beats = 0
        while not self._parted.wait(self.period):
            beats += 1
            # Where process 0 is gone, jax itself ends this process at once.
            with contextlib.suppress(RuntimeError):
                self._client.key_value_set(f"{ALIVE}{self.index}", str(beats), allow_overwrite=True)
                if self.index == 0:
                    self._look_for_lost()
                for key, value in self._client.key_value_dir_get(NOTICE):
                    self._heed(key.removeprefix(NOTICE), value)

    def _look_for_lost(self) -> None:
        now = time.monotonic()
        if now - self._looked > self.patience / 2:  # this process was asleep itself
            self._heard.clear()
        self._looked = now
        told = dict(self._client.key_value_dir_get(ALIVE))
        for index in range(1, self.count):
            beat = told.get(f"{ALIVE}{index}", "")
            before, since = self._heard.get(index, (None, now))
            if beat != before:
                self._heard[index] = beat, now
            elif now - since > self.patience:
                self._client.key_value_set(f"{NOTICE}lost/{index}", f"{self.patience:g}", allow_overwrite=True)

    def _heed(self, notice: str, value: str) -> None:
        kind, _, index = notice.partition("/")
        if kind == "stop":
            self._agree(value)
        elif kind == "lost":
            self._end(
                1,
                f"process {index} of {self.count} is lost: nothing was heard of it for {value} s; this run has ended, "
                "start all of its processes again with --resume",
            )
        elif kind == "failed" and not self._failing:
            code, _, said = value.partition(" ")
            self._end(int(code), f"process {index} of {self.count} failed, and this run with it: {said}")


def check_alike(asked: dict[str, Any]) -> None:
    """Refuses a process that was started with another config than process 0: neither would get on."""
    others = peers()
    if others is None:
        return

    def flat(part: Any, path: str = "") -> dict[str, str]:
        if not isinstance(part, dict):
            return {path: json.dumps(part)}
        return {k: v for name, value in part.items() for k, v in flat(value, f"{path}.{name}".strip(".")).items()}

    mine, first = flat(asked), flat(json.loads(others.from_first("config", json.dumps(asked))))
    for name in sorted(mine.keys() | first.keys()):
        if mine.get(name) != first.get(name):
            raise UserError(
                f"process {others.index} was started with {name} = {mine.get(name)} and process 0 with "
                f"{first.get(name)}; give all processes of a run the same command"
            )


@contextlib.contextmanager
def together() -> Iterator[None]:
    """The whole of what processes do together: where it fails in one, the others end too; else all end together."""
    try:
        yield
    except BaseException as exc:
        if _HERE is not None:
            _HERE.fail(exc)
        raise
    if _HERE is not None:
        _HERE.part()


@contextlib.contextmanager
def first_alone(turn: str) -> Iterator[None]:
    """Process 0 goes through the block before the others do: what it writes to a shared disk is there for them."""
    if _HERE is not None and _HERE.index:
        _HERE.from_first(turn)
    yield
    if _HERE is not None and not _HERE.index:
        _HERE.from_first(turn)
