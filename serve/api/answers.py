"""Replies of the endpoints, for /openapi.json. The models describe them; nothing runs through them."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


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


class Standing(Answer):
    """A model's rating with its interval, and its votes."""

    model: str
    rating: float
    low: float
    high: float
    votes: int
    wins: int
    losses: int
    ties: int


class Standings(Answer):
    """Which models people prefer, the strongest first."""

    object: Literal["arena"]
    votes: int
    models: list[Standing]


# ---- embeddings ---------------------------------------------------------------------
class Embedding(Answer):
    """One text's: numbers, or the base64 of their 4 bytes each."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Answer):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingReply(Answer):
    """The means of the last hidden states of texts, of length 1."""

    object: Literal["list"]
    model: str
    data: list[Embedding]
    usage: EmbeddingUsage


# ---- responses ----------------------------------------------------------------------
class ResponseReply(BaseModel):
    """A response; `output` holds its items."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    error: dict[str, Any] | None
    incomplete_details: dict[str, Any] | None
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any] | None


class ResponseEvent(BaseModel):
    """An event of a response: its `type` says what is beside it."""

    type: str
    sequence_number: int


class ResponseDeleted(Answer):
    """It is forgotten."""

    id: str
    object: Literal["response"]
    deleted: Literal[True]


class ResponseItems(Answer):
    """What a response was an answer to."""

    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str
    last_id: str
    has_more: bool


# ---- messages -----------------------------------------------------------------------
class MessageUsage(Answer):
    """Tokens read, those apart that had been read before, and generated."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    output_tokens_details: dict[str, int]


class MessageReply(Answer):
    """The next message; `content` holds its blocks."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"] | None
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(BaseModel):
    """An event of a message: its `type` says what is beside it."""

    type: str


class MessageErrorDetail(Answer):
    """What went wrong, in one sentence."""

    type: str
    message: str


class MessageError(Answer):
    """A refusal, as Anthropic's clients read it."""

    type: Literal["error"]
    error: MessageErrorDetail


class TokensCounted(Answer):
    """How many tokens a conversation has."""

    input_tokens: int
