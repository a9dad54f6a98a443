"""What the endpoints answer, for /openapi.json. The models describe replies; nothing runs through them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import models_json_schema


class Answer(BaseModel):
    """What all replies have in common: a field that is not named here is never sent."""

    model_config = ConfigDict(extra="forbid")


class ErrorDetail(Answer):
    """What went wrong, in one sentence, and which parameter it is about."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Answer):
    """A refusal."""

    error: ErrorDetail


class Health(Answer):
    """How the server is."""

    status: Literal["loading", "ready", "draining", "failed"]


class ModelCard(Answer):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(Answer):
    """All models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


class PromptDetails(Answer):
    """Tokens of the prompt that had been read before."""

    cached_tokens: int


class Usage(Answer):
    """Tokens read and generated."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptDetails


class Reply(Answer):
    """What begins every reply of a model."""

    id: str
    created: int
    model: str


# ---- conversations ------------------------------------------------------------------
ChatEnd = Literal["stop", "length", "tool_calls"]


class FunctionCalled(Answer):
    """A function and its arguments, as JSON in a text."""

    name: str
    arguments: str


class ToolCalled(Answer):
    """A call that the model asks for."""

    id: str
    type: Literal["function"]
    function: FunctionCalled


class ToolCalledPiece(ToolCalled):
    """A call in a stream; it comes whole."""

    index: int


class LikelyToken(Answer):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatToken(LikelyToken):
    """A token of the reply, with the likeliest ones in its place."""

    top_logprobs: list[LikelyToken]


class ChatLogprobs(Answer):
    """Log-probabilities of a reply, thoughts and calls included."""

    content: list[ChatToken]
    refusal: None


class ChatMessage(Answer):
    """What the model says. Thoughts have both names that are in use, and are left out where there are none."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCalled] = Field(default_factory=list)


class ChatChoice(Answer):
    """One of the replies."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnd


class ChatReply(Reply):
    """A conversation's next message."""

    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(Answer):
    """What a piece adds to the message."""

    role: Literal["assistant"] = "assistant"
    content: str = ""
    reasoning_content: str = ""
    reasoning: str = ""
    tool_calls: list[ToolCalledPiece] = Field(default_factory=list)


class ChatPieceChoice(Answer):
    """A piece of one of the replies; its last one says how it ended."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatEnd | None


class ChatPiece(Reply):
    """A piece of a conversation's next message. Usage comes last, if it was asked for."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatPieceChoice]
    usage: Usage | None = None


# ---- completions --------------------------------------------------------------------
CompletionEnd = Literal["stop", "length"]


class CompletionLogprobs(Answer):
    """Log-probabilities of a text; None for the first token of all, before which there is nothing."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(Answer):
    """One of the texts."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: CompletionEnd


class CompletionReply(Reply):
    """How texts go on."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage


class CompletionPieceChoice(Answer):
    """A piece of one of the texts; its last one says how it ended."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: CompletionEnd | None


class CompletionPiece(Reply):
    """A piece of how texts go on. Usage comes last, if it was asked for."""

    object: Literal["text_completion"]
    choices: list[CompletionPieceChoice]
    usage: Usage | None = None


# ---- tokens and feedback ------------------------------------------------------------
class Tokens(Answer):
    """A text as tokens, and how many a request may have."""

    tokens: list[int]
    count: int
    max_model_len: int


class Text(Answer):
    """Tokens as text."""

    prompt: str


class FeedbackKept(Answer):
    """What was said of a reply has been written down."""

    object: Literal["feedback"]
    kept: Literal[True]


# ---- which endpoint answers what ----------------------------------------------------
@dataclass(frozen=True)
class Answers:
    """What an endpoint answers.

    whole: with status 200; None for plain text. piece: an event of its stream, where it has one. refusals: statuses
    with `error`, beside those that every endpoint has. states: statuses that have the body of 200.
    """

    whole: type[BaseModel] | None
    piece: type[BaseModel] | None = None
    refusals: tuple[int, ...] = ()
    states: tuple[int, ...] = ()
    error: type[BaseModel] = ErrorReply

    @property
    def models(self) -> Iterator[type[BaseModel]]:
        """All that is named."""
        yield from (one for one in (self.whole, self.piece, self.error) if one is not None)


GENERATION = (400, 404, 408, 429, 503)
"""How requests to a model may be refused."""

ANSWERS = {
    "POST /v1/chat/completions": Answers(ChatReply, ChatPiece, GENERATION),
    "POST /v1/completions": Answers(CompletionReply, CompletionPiece, GENERATION),
    "GET /v1/models": Answers(ModelList, refusals=(503,)),
    "GET /v1/models/{name}": Answers(ModelCard, refusals=(404, 503)),
    "POST /tokenize": Answers(Tokens, refusals=(400, 404, 503)),
    "POST /detokenize": Answers(Text, refusals=(400, 404, 503)),
    "POST /v1/feedback": Answers(FeedbackKept, refusals=(400, 404)),
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
"""The last event of every stream."""


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
        data = {"anyOf": [{"const": DONE}, said(answers.piece), said(answers.error)]}
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        found["200"]["content"] = {**content, "text/event-stream": {"itemSchema": event}}
    for status in sorted({*answers.refusals, *EVERYWHERE, *((401,) if asks else ())}):
        found[str(status)] = {
            "description": WORDS[status],
            "content": {"application/json": {"schema": schema(answers.error)}},
            **({"headers": COME_BACK} if status in (429, 503) else {}),
        }
    return dict(sorted(found.items()))
