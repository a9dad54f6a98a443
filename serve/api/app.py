"""The HTTP server: endpoints, who may use them, and what goes wrong."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from errors import UserError, did_you_mean
from serve.api import chat, completions
from serve.api.documents import document
from serve.api.embeddings import embed
from serve.api.errors import ApiError, from_validation
from serve.api.messages import add_messages
from serve.api.metrics import Metrics
from serve.api.page import add_page
from serve.api.response_store import ResponseStore
from serve.api.responses import add_responses
from serve.api.runner import Runner
from serve.api.schemas import (
    FEEDBACK_FIELDS,
    ChatBody,
    CompletionBody,
    CountBody,
    DetokenizeBody,
    EmbeddingBody,
    MessagesBody,
    ResponsesBody,
    TokenizeBody,
)
from serve.api.sending import Answer, send, unless_gone
from serve.api.service import Service
from serve.feedback import Feedback

log = logging.getLogger("qmax.serve")

PUBLIC = ("/", "/health", "/ui")
"""Paths that need no key, with what is below them for the last."""


@dataclass(frozen=True)
class Settings:
    """How the server behaves.

    keys: any of them opens it; none: everybody may. origins: of pages that may call it. max_body: bytes of a request.
    timeout: seconds that a request may take.
    """

    keys: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    max_body: int = 32 * 2**20
    timeout: float = 600.0


@dataclass
class Shared:
    """What is there while the server runs. services: the models by name, once they are loaded. feedback: where kept.
    responses: past ones, to go on from."""

    settings: Settings
    metrics: Metrics = field(default_factory=Metrics)
    services: dict[str, Service] = field(default_factory=dict)
    feedback: Feedback | None = None
    responses: ResponseStore = field(default_factory=ResponseStore)
    state: str = "loading"
    failure: str = ""

    def ready(self) -> list[Service]:
        """The models; ApiError 503 while they are being loaded."""
        if not self.services:
            message = self.failure or "the model is being loaded; try again in a moment"
            raise ApiError(503, message, code="not_ready", headers={"Retry-After": "2"})
        return list(self.services.values())

    def model(self, name: str | None) -> Service:
        """The model of this name, the first if none is named; ApiError 404 where there is none."""
        first = self.ready()[0]
        if name is None:
            return first
        if name not in self.services:
            known = list(self.services)
            hint = did_you_mean(name, known) or f"; this server has {' and '.join(map(repr, known))}"
            raise ApiError(404, f"there is no model {name!r}{hint}", param="model", code="model_not_found")
        return self.services[name]


class Gate:
    """Looks at every request before it is read: at its key, its size. Notes how it was answered, never what it says."""

    def __init__(self, app: ASGIApp, shared: Shared):
        self._app, self._shared = app, shared

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        name = given if given.isprintable() and 0 < len(given) <= 64 else uuid4().hex
        began, path, status = time.monotonic(), scope["path"], 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name.encode())]
            await send(message)

        try:
            self._check(scope, headers)
            await self._app(scope, await self._read(receive), noted)
        except ApiError as error:
            await error.response(path)(scope, receive, noted)
        finally:
            known = known_path(path)
            self._shared.metrics.requests.labels(known, str(status)).inc()
            seconds = time.monotonic() - began
            log.info(
                json.dumps(
                    {
                        "id": name,
                        "method": scope["method"],
                        "path": known,
                        "status": status,
                        "seconds": round(seconds, 4),
                    }
                )
            )

    async def _read(self, receive: Receive) -> Receive:
        """Reads the body, so that what is too large is refused before anybody looks at it; gives it out again."""
        messages: list[Message] = []
        most, size = self._shared.settings.max_body, 0
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
            size += len(messages[-1].get("body", b""))
            if size > most:
                raise ApiError(413, f"the body has more than the {most:,} bytes that this server takes")

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        return again

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        settings, path = self._shared.settings, scope["path"]
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > settings.max_body:
            raise ApiError(413, f"the body has {int(length):,} bytes; this server takes {settings.max_body:,}")
        if not settings.keys or scope["method"] == "OPTIONS" or path in PUBLIC or path.startswith("/ui/"):
            return
        words = headers.get(b"authorization", b"").split(None, 1)
        given = words[1] if len(words) == 2 and words[0].lower() == b"bearer" else headers.get(b"x-api-key", b"")
        # All are compared, each in constant time: how long it takes tells nothing of any key.
        if not any([hmac.compare_digest(given.strip(), key.encode()) for key in settings.keys]):  # noqa: C419
            raise ApiError(
                401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", code="invalid_api_key"
            )


def make_app(shared: Shared, start: Callable[[Shared], Awaitable[None]] | None = None) -> FastAPI:
    """The application.

    Args:
        start: loads the model; called when the server has begun to listen.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.ensure_future(start(shared)) if start is not None else None
        yield
        if task is not None:
            task.cancel()
        for service in shared.services.values():
            service.runner.close()

    app = FastAPI(title="qmax", version="1", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.shared = shared
    add_errors(app)
    add_models(app, shared)
    add_generation(app, shared)
    add_responses(app, shared)
    add_messages(app, shared)
    add_tokens(app, shared)
    add_page(app, shared)
    document(app, PUBLIC, keys=bool(shared.settings.keys))
    if shared.settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(shared.settings.origins), allow_methods=["*"], allow_headers=["*"]
        )
    app.add_middleware(Gate, shared=shared)
    return app


def add_errors(app: FastAPI) -> None:
    """Everything that goes wrong has the body that the protocol of its path wants."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> Response:
        return error.response(request.url.path)

    @app.exception_handler(UserError)
    async def mistaken(request: Request, error: UserError) -> Response:
        return ApiError(400, str(error)).response(request.url.path)

    @app.exception_handler(RequestValidationError)
    async def malformed(request: Request, error: RequestValidationError) -> Response:
        path = request.url.path
        return from_validation(error.errors(), FIELDS.get(path, {})).response(path)

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        words = {
            400: "the body cannot be read as JSON",
            404: f"there is nothing at {path}",
            405: f"{path} does not take {request.method}",
        }
        said = words.get(error.status_code, str(error.detail))
        return ApiError(error.status_code, said, headers=error.headers).response(path)

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> Response:
        log.error("a request failed", exc_info=error)
        return ApiError(500, "the server failed; its log says why").response(request.url.path)


FIELDS = {
    "/v1/completions": CompletionBody.model_fields,
    "/v1/chat/completions": ChatBody.model_fields,
    "/v1/responses": ResponsesBody.model_fields,
    "/v1/messages": MessagesBody.model_fields,
    "/v1/messages/count_tokens": CountBody.model_fields,
    "/v1/embeddings": EmbeddingBody.model_fields,
    "/tokenize": TokenizeBody.model_fields,
    "/detokenize": DetokenizeBody.model_fields,
    "/v1/feedback": FEEDBACK_FIELDS,
}

KNOWN = (*FIELDS, "/v1/arena", "/v1/models", "/health", "/metrics", "/openapi.json", "/")
BELOW = {"/v1/models/": "{name}", "/v1/responses/": "{id}", "/ui/": "{file}"}


def known_path(path: str) -> str:
    """What logs and metrics call a path: what callers make up is not told, and not counted one by one."""
    if path in KNOWN:
        return path
    return next((start + rest for start, rest in BELOW.items() if path.startswith(start)), "other")


def add_models(app: FastAPI, shared: Shared) -> None:
    """What is served, and how the server is."""

    def card(service: Service) -> dict[str, Any]:
        context = service.engine.context
        return {
            "id": service.name,
            "object": "model",
            "created": service.created,
            "owned_by": "qmax",
            "max_model_len": context,
        }

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [card(service) for service in shared.ready()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        return card(shared.model(name))

    @app.get("/health")
    async def health() -> Response:
        failed = any(service.runner.failed for service in shared.services.values())
        state = "failed" if failed else shared.state
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(shared.metrics.render(), media_type="text/plain; version=0.0.4")


def add_generation(app: FastAPI, shared: Shared) -> None:
    """Completions and chats, in each of the forms that clients speak."""

    async def answer(request: Request, made: Answer, stream: bool | None) -> Response:
        return await send(request, made, shared.settings.timeout, stream=bool(stream))

    @app.post("/v1/completions")
    async def complete(request: Request, body: CompletionBody) -> Response:
        return await answer(request, await completions.make(shared.model(body.model), body), body.stream)

    @app.post("/v1/chat/completions")
    async def converse(request: Request, body: ChatBody) -> Response:
        return await answer(request, await chat.make(shared.model(body.model), body), body.stream)


def add_tokens(app: FastAPI, shared: Shared) -> None:
    """Text to tokens and back, and to embeddings."""

    @app.post("/v1/embeddings")
    async def embeddings(request: Request, body: EmbeddingBody) -> dict[str, Any]:
        return await unless_gone(request, embed(shared.model(body.model), body), shared.settings.timeout)

    @app.post("/tokenize")
    async def tokenize(body: TokenizeBody) -> dict[str, Any]:
        service = shared.model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise ApiError(400, "give one of prompt and messages", param="prompt", code="invalid_value")
        if body.prompt is not None:
            tokens = await asyncio.to_thread(service.tokenizer.encode, body.prompt, specials=True)
        else:
            tokens = await service.encode_chat(
                body.messages,
                tools=body.tools,
                add_generation_prompt=body.add_generation_prompt,
                enable_thinking=body.enable_thinking,
            )
        return {"tokens": tokens, "count": len(tokens), "max_model_len": service.engine.context}

    @app.post("/detokenize")
    async def detokenize(body: DetokenizeBody) -> dict[str, Any]:
        service = shared.model(body.model)
        most = service.tokenizer.vocab_size - 1
        beyond = next((token for token in body.tokens if token > most), None)
        if beyond is not None:
            said = f"tokens holds the id {beyond}, but tokens run from 0 to {most}"
            raise ApiError(400, said, param="tokens", code="invalid_value")
        return {"prompt": service.tokenizer.decode(body.tokens)}


def watch(metrics: Metrics, services: Sequence[Service]) -> None:
    """Gauges of what the engines hold, all of them together."""
    runners = list({id(service.runner): service.runner for service in services}.values())

    def total(name: str, words: str, value: Callable[[Runner], float]) -> None:
        metrics.watch(name, words, lambda: sum(map(value, runners)))

    total("qmax_running", "Requests that have a slot", lambda runner: runner.running)
    total("qmax_unfinished", "Requests that have not ended", lambda runner: runner.unfinished)
    pools = "Pages that rows have", lambda runner: sum(pool.held for pool in runner.engine.scheduler.pools)
    total("qmax_pages_held", *pools)
    total("qmax_pages", "Pages of keys and values", lambda runner: runner.engine.pages)
    preempted = "Rows that were put back for want of pages", lambda runner: runner.engine.scheduler.preemptions
    total("qmax_preemptions", *preempted)
    total("qmax_guesses", "Tokens that steps guessed", lambda runner: runner.engine.guesses_made)
    total("qmax_guesses_kept", "Guesses that came true", lambda runner: runner.engine.guesses_kept)
