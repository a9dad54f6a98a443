"""The chat page, the feedback that it sends, and the ranking that comes of it."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.responses import FileResponse, Response

from errors import UserError
from model.chat_template import check_messages
from serve.api.errors import ApiError
from serve.api.schemas import ArenaBody, FeedbackBody, VoteBody
from serve.feedback import Feedback
from serve.parsing import END_THINK
from serve.ranking import rank

if TYPE_CHECKING:
    from serve.api.app import Shared
    from serve.api.service import Service

UI = Path(__file__).resolve().parent.parent / "ui"

KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Nothing from elsewhere runs in the page, whatever a model writes."""


def add_page(app: FastAPI, shared: Shared) -> None:
    """The page, its files, what it has to know, feedback, and the ranking."""

    def file(name: str) -> Response:
        path = UI / name
        return FileResponse(path, media_type=f"{KINDS[path.suffix]}; charset=utf-8", headers=HEADERS)

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return file("index.html")

    @app.get("/ui/page.json", include_in_schema=False)
    async def about() -> dict[str, Any]:
        def card(service: Service) -> dict[str, Any]:
            own = service.defaults
            defaults = {"temperature": own.temperature, "top_p": own.top_p, "top_k": own.top_k, "enable_thinking": True}
            thinks = service.tokenizer.token_id(END_THINK) is not None
            return {"name": service.name, "defaults": defaults, "thinks": thinks}

        return {"models": [card(one) for one in shared.services.values()], "feedback": shared.feedback is not None}

    @app.get("/ui/{name}", include_in_schema=False)
    async def part(name: str) -> Response:
        if name not in FILES:
            raise ApiError(404, f"there is nothing at /ui/{name}")
        return file(name)

    def feedback() -> Feedback:
        if shared.feedback is None:
            raise ApiError(404, "this server keeps no feedback; start it with --feedback FILE")
        return shared.feedback

    @app.post("/v1/feedback")
    async def keep(body: FeedbackBody) -> dict[str, Any]:
        kept = feedback()
        try:
            prompt = check_messages(body.prompt)
        except UserError as error:
            raise ApiError(400, str(error), param="prompt", code="invalid_value") from error
        if isinstance(body, ArenaBody):
            models, replies = (body.a.model, body.b.model), (body.a.reply, body.b.reply)
            for name in models:  # they are ranked by name
                shared.model(name)
            await asyncio.to_thread(kept.arena, models, prompt, replies, body.winner)
        elif isinstance(body, VoteBody):
            await asyncio.to_thread(kept.vote, body.model, prompt, body.reply, body.good)
        else:
            await asyncio.to_thread(kept.correction, body.model, prompt, body.reply, body.better)
        return {"object": "feedback", "kept": True}

    @app.get("/v1/arena")
    async def arena() -> dict[str, Any]:
        kept = feedback()
        found = await asyncio.to_thread(lambda: rank(kept.verdicts()))
        # Every vote is one of both its models.
        votes = sum(one.votes for one in found) // 2
        return {"object": "arena", "votes": votes, "models": [asdict(one) for one in found]}


FILES = frozenset(path.name for path in UI.iterdir() if path.suffix in KINDS)
