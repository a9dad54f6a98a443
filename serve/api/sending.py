"""Answers on their way to the client: whole, or as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from fastapi import Request
from starlette.responses import Response, StreamingResponse

from serve.api.errors import ApiError, Json
from serve.api.service import Service

T = TypeVar("T")

# Some clients take U+2028 and its like for the end of a line: everything beyond ASCII is escaped.
encode = json.JSONEncoder(separators=(",", ":")).encode


class Answer(Protocol):
    """What an endpoint has made of a body, not started yet.

    named_events: whether the events of its stream carry their type as a name and no `[DONE]` follows.
    """

    named_events: bool

    @property
    def service(self) -> Service:
        """The model that answers."""
        ...

    @property
    def requests(self) -> Sequence[Any]:
        """What the engine is asked."""
        ...

    async def whole(self) -> dict[str, Any]:
        """The answer at once."""
        ...

    def stream(self) -> AsyncIterator[dict[str, Any]]:
        """The answer in pieces."""
        ...

    def failure(self, error: ApiError) -> dict[str, Any]:
        """What a stream ends with when something goes wrong."""
        ...


async def unless_gone(request: Request, work: Coroutine[Any, Any, T], timeout: float) -> T:
    """The result of `work`; it is cancelled when the client goes, or after `timeout` seconds."""
    task = asyncio.ensure_future(work)

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    watcher = asyncio.ensure_future(watch())
    try:
        await asyncio.wait({task, watcher}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if watcher.done():
            raise ApiError(499, "the client has gone")
        raise ApiError(408, f"the request took more than {timeout:g} seconds", code="timeout")
    finally:
        for one in (task, watcher):
            one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def events(made: Answer, timeout: float) -> AsyncIterator[str]:
    """Server-sent events; an error after the first is one of them."""

    def line(piece: dict[str, Any]) -> str:
        data = f"data: {encode(piece)}\n\n"
        return f"event: {piece['type']}\n{data}" if made.named_events else data

    try:
        async with asyncio.timeout(timeout):
            async for piece in made.stream():
                yield line(piece)
    except ApiError as error:
        yield line(made.failure(error))
    except TimeoutError:
        error = ApiError(408, f"the request took more than {timeout:g} seconds", code="timeout")
        yield line(made.failure(error))
    if not made.named_events:
        yield "data: [DONE]\n\n"


async def send(request: Request, made: Answer, timeout: float, *, stream: bool) -> Response:
    """The response to a request."""
    if not stream:
        return Json(await unless_gone(request, made.whole(), timeout))
    # What cannot be queued is refused with its status, before anything is sent.
    made.service.runner.check_room(len(made.requests))
    return StreamingResponse(
        events(made, timeout),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
    )
