"""What each endpoint answers, for /openapi.json."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve.api.answers import (
    ChatPiece,
    ChatReply,
    CompletionPiece,
    CompletionReply,
    EmbeddingReply,
    ErrorReply,
    FeedbackKept,
    Health,
    MessageError,
    MessageEvent,
    MessageReply,
    ModelCard,
    ModelList,
    ResponseDeleted,
    ResponseEvent,
    ResponseItems,
    ResponseReply,
    Standings,
    Text,
    Tokens,
    TokensCounted,
)


# ---- which endpoint answers what ----------------------------------------------------
@dataclass(frozen=True)
class Answers:
    """What an endpoint answers.

    whole: with status 200; None for plain text. piece: an event of its stream, where it has one. refusals: statuses
    with `error`, beside those that every endpoint has. states: statuses that have the body of 200. named: events have
    names, and none says that the stream is over.
    """

    whole: type[BaseModel] | None
    piece: type[BaseModel] | None = None
    refusals: tuple[int, ...] = ()
    states: tuple[int, ...] = ()
    error: type[BaseModel] = ErrorReply
    named: bool = False

    @property
    def models(self) -> Iterator[type[BaseModel]]:
        """All that is named."""
        yield from (one for one in (self.whole, self.piece, self.error) if one is not None)


GENERATION = (400, 404, 408, 429, 503)
"""How requests to a model may be refused."""

ANSWERS = {
    "POST /v1/chat/completions": Answers(ChatReply, ChatPiece, GENERATION),
    "POST /v1/completions": Answers(CompletionReply, CompletionPiece, GENERATION),
    "POST /v1/responses": Answers(ResponseReply, ResponseEvent, GENERATION, named=True),
    "GET /v1/responses/{name}": Answers(ResponseReply, refusals=(400, 404)),
    "DELETE /v1/responses/{name}": Answers(ResponseDeleted, refusals=(404,)),
    "GET /v1/responses/{name}/input_items": Answers(ResponseItems, refusals=(400, 404)),
    "POST /v1/messages": Answers(MessageReply, MessageEvent, GENERATION, error=MessageError, named=True),
    "POST /v1/messages/count_tokens": Answers(TokensCounted, refusals=(400, 404, 503), error=MessageError),
    "POST /v1/embeddings": Answers(EmbeddingReply, refusals=(400, 404, 408, 503)),
    "GET /v1/models": Answers(ModelList, refusals=(503,)),
    "GET /v1/models/{name}": Answers(ModelCard, refusals=(404, 503)),
    "POST /tokenize": Answers(Tokens, refusals=(400, 404, 503)),
    "POST /detokenize": Answers(Text, refusals=(400, 404, 503)),
    "POST /v1/feedback": Answers(FeedbackKept, refusals=(400, 404)),
    "GET /v1/arena": Answers(Standings, refusals=(404,)),
    "GET /health": Answers(Health, states=(503,)),
    "GET /metrics": Answers(None),
}
"""By method and path. Every endpoint has a line."""

EVERYWHERE = (413, 500)

WORDS = {
    200: "What was asked for",
    400: "Something in the request cannot be done; the body names it",
    401: "The API key is missing or wrong",
    404: "There is no such thing or model here",
    408: "It took longer than the server allows",
    413: "The body is too large",
    429: "Too many wait already; come back after Retry-After seconds",
    500: "The server failed",
    503: "The server is not ready",
}

COME_BACK = {"Retry-After": {"required": True, "schema": {"type": "integer"}, "description": "Seconds to wait"}}
SCHEMES = {"key": {"type": "http", "scheme": "bearer"}, "x-api-key": {"type": "apiKey", "in": "header"}}
SCHEMES["x-api-key"]["name"] = "x-api-key"
DONE = "[DONE]"
"""The last event of a stream whose events have no names."""


def document(app: FastAPI, public: tuple[str, ...], *, keys: bool) -> None:
    """Makes /openapi.json say what `ANSWERS` says; `keys`: all paths but `public` ask for one."""
    app.openapi_version = "3.2.0"  # the first that knows events of streams
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            found = plain()
            parts = found.setdefault("components", {}).setdefault("schemas", {})
            for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which are never sent
                parts.pop(name, None)
            every = {model: None for answers in ANSWERS.values() for model in answers.models}
            _, defined = models_json_schema([(one, "validation") for one in every], ref_template=REFERENCE)
            parts |= defined["$defs"]
            if keys:
                found["components"]["securitySchemes"] = SCHEMES
            for path, operations in found["paths"].items():
                asks = keys and path not in public
                for method, operation in operations.items():
                    operation["responses"] = responses(ANSWERS[f"{method.upper()} {path}"], asks=asks)
                    if asks:
                        operation["security"] = [{name: []} for name in SCHEMES]
        return app.openapi_schema or {}

    app.openapi = openapi


REFERENCE = "#/components/schemas/{model}"


def responses(answers: Answers, *, asks: bool) -> dict[str, Any]:
    """The responses of an endpoint; with `asks` it asks for a key."""

    def schema(model: type[BaseModel]) -> dict[str, Any]:
        return {"$ref": REFERENCE.format(model=model.__name__)}

    def said(model: type[BaseModel]) -> dict[str, Any]:
        return {"type": "string", "contentMediaType": "application/json", "contentSchema": schema(model)}

    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if answers.whole is not None:
        content = {"application/json": {"schema": schema(answers.whole)}}
    found: dict[str, Any] = {"200": {"description": WORDS[200], "content": content}}
    found |= {str(status): {"description": WORDS[status], "content": content} for status in answers.states}
    if answers.piece is not None:
        data = {"anyOf": [*([] if answers.named else [{"const": DONE}]), said(answers.piece), said(answers.error)]}
        parts = {"data": data, **({"event": {"type": "string"}} if answers.named else {})}
        event = {"type": "object", "properties": parts, "required": list(parts)}
        found["200"]["content"] = {**content, "text/event-stream": {"itemSchema": event}}
    for status in sorted({*answers.refusals, *EVERYWHERE, *((401,) if asks else ())}):
        found[str(status)] = {
            "description": WORDS[status],
            "content": {"application/json": {"schema": schema(answers.error)}},
            **({"headers": COME_BACK} if status in (429, 503) else {}),
        }
    return dict(sorted(found.items()))
