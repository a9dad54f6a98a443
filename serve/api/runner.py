"""The engine in a thread of its own, and its replies as events of an asyncio loop."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field

from serve.api.errors import ApiError
from serve.engine import Engine
from serve.request import Request, TopTokens

log = logging.getLogger("qmax.serve")

IDLE_SECONDS = 1.0
"""Other processes wait for word no longer than this."""


@dataclass(frozen=True)
class Event:
    """A token of one of the replies, or its end without one."""

    index: int
    token: int
    logprob: float
    top: TopTokens
    finished: str | None


@dataclass(eq=False)
class Listener:
    """Somebody who waits for replies to some requests."""

    requests: Sequence[Request]
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)

    @property
    def unfinished(self) -> int:
        """Replies that have not ended."""
        return sum(request.finish_reason is None for request in self.requests)


class Runner:
    """Steps the engine while there is work.

    Args:
        queue: requests that may wait for a slot; further ones are refused.
    """

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, queue: int):
        self.engine, self._loop, self._queue = engine, loop, queue
        self._listeners: dict[int, tuple[Listener, int]] = {}
        self._heard: list[tuple[Request, Event]] = []
        self._wake = threading.Event()
        self._stopping = False
        self.failed: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return len(self.engine.scheduler.running)

    @property
    def unfinished(self) -> int:
        """Requests that have not ended, running or waiting."""
        return len(self._listeners)

    def check_room(self, count: int) -> None:
        """ApiError 429 when too many requests wait already, 500 when nobody answers them."""
        if self.failed is not None:
            raise ApiError(500, "the engine has failed; the server's log says why")
        if self.unfinished + count > self.engine.limits.slots + self._queue:
            raise ApiError(
                429,
                "too many requests are waiting; try again in a moment",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    def submit(self, requests: Sequence[Request]) -> Listener:
        """Starts requests; the replies come as events. ApiError as `check_room`."""
        self.check_room(len(requests))
        listener = Listener(requests)
        for index, request in enumerate(requests):
            self._listeners[id(request)] = listener, index
            request.on_token = self._hear
            self.engine.submit(request)
        self._wake.set()
        return listener

    def abort(self, requests: Sequence[Request]) -> None:
        """Ends requests that nobody waits for any more; their slots are free in the next step."""
        for request in requests:
            if self._listeners.pop(id(request), None) is not None:
                self.engine.abort(request)
        self._wake.set()

    async def events(self, listener: Listener) -> AsyncGenerator[Event]:
        """The events of these requests until all have ended; leaving early aborts the rest."""
        left = set(range(len(listener.requests)))
        try:
            while left:
                event = await listener.events.get()
                if isinstance(event, Exception):
                    raise event
                if event.index in left:
                    if event.finished is not None:
                        left.discard(event.index)
                    yield event
        finally:
            self.abort(listener.requests)

    def close(self) -> None:
        """Stops stepping."""
        self._stopping = True
        self._wake.set()
        self._thread.join(timeout=10)

    # ---- in the engine's thread -------------------------------------------
    def _hear(self, request: Request, token: int, logprob: float) -> None:
        top = request.top[-1] if request.sampling.top_logprobs else []
        self._heard.append((request, Event(0, token, logprob, top, request.finish_reason)))

    def _run(self) -> None:
        while not self._stopping:
            self._wake.wait(IDLE_SECONDS if self.engine.device.led else None)
            self._wake.clear()
            try:
                while not self._stopping and self.engine.step():
                    self._tell()
                self._tell()
            except Exception as error:
                log.exception("the engine has failed")
                self.failed = error
                self._loop.call_soon_threadsafe(self._fail)
                return
        self.engine.device.stop()

    def _tell(self) -> None:
        if self._heard:
            heard, self._heard = self._heard, []
            self._loop.call_soon_threadsafe(self._deliver, heard)

    # ---- in the loop's thread ---------------------------------------------
    def _deliver(self, heard: Sequence[tuple[Request, Event]]) -> None:
        for request, event in heard:
            found = self._listeners.get(id(request))
            if found is None:
                continue
            listener, index = found
            if event.finished is not None:
                del self._listeners[id(request)]
            listener.events.put_nowait(Event(index, event.token, event.logprob, event.top, event.finished))

    def _fail(self) -> None:
        error = ApiError(500, "the engine has failed; the server's log says why")
        for listener, _ in self._listeners.values():
            listener.events.put_nowait(error)
        self._listeners.clear()
