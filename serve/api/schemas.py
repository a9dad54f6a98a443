"""The bodies of requests. What is not named here and would change the answer is refused, not ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from serve.feedback import Winner
from serve.sampling_params import MAX_SEED

MAX_CHOICES = 128


class Body(BaseModel):
    """What all bodies have in common: fields are refused where they are unknown, and numbers are not read from text."""

    model_config = ConfigDict(extra="forbid", strict=True)


class StreamOptions(Body):
    """What a stream has beside the reply."""

    include_usage: bool = False
    include_obfuscation: bool = False


class StructuredOutputs(Body):
    """What the reply must look like; one of them."""

    model_config = ConfigDict(populate_by_name=True)

    json_schema: dict[str, Any] | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None


class JsonSchema(Body):
    """A named schema."""

    model_config = ConfigDict(populate_by_name=True)

    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """Text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


Temperature = Annotated[float, Field(ge=0, le=2)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Stop = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)] | Annotated[str, Field(min_length=1)]


class Drawing(Body):
    """How replies are drawn, whatever protocol asks; None takes the model's own default."""

    model: str
    temperature: Temperature | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: Annotated[int, Field(ge=-MAX_SEED, lt=MAX_SEED)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=4)] | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    ignore_eos: bool = False
    stream: bool | None = None
    priority: int = 0


class Sampling(Drawing):
    """What completions and chats have in common."""

    stop: Stop | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: StructuredOutputs | None = None
    user: str | None = None

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    return_tokens_as_token_ids: bool = False


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    enable_thinking: bool | None = None
    thinking_budget: Annotated[int, Field(ge=0)] | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    continue_final_message: bool = False
    store: Literal[False] | None = None
    metadata: dict[str, str] | None = None
    service_tier: Literal["auto", "default"] | None = None


class FlatFormat(Body):
    """Text, any JSON object, or JSON that fits a schema, as /v1/responses has them."""

    model_config = ConfigDict(populate_by_name=True)

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class TextOptions(Body):
    """What the words of a response look like."""

    format: FlatFormat | None = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Body):
    """Whether a response begins with a thought."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: None = None


class ResponseStreamOptions(Body):
    """What a stream of /v1/responses has beside the reply."""

    include_obfuscation: Literal[False] = False


class ResponsesBody(Drawing):
    """POST /v1/responses. Items of `input` and `tools` are looked at by serve/api/response_items.py."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    include: list[Literal["message.output_text.logprobs"]] | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    thinking_budget: Annotated[int, Field(ge=0)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    metadata: Annotated[dict[str, str], Field(max_length=16)] | None = None
    service_tier: Literal["auto", "default"] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None


class ThinkingOptions(Body):
    """Whether a message begins with a thought, and of how many tokens at most."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Annotated[int, Field(ge=1)] | None = None


class JsonOutput(Body):
    """JSON that fits a schema, as /v1/messages has it."""

    model_config = ConfigDict(populate_by_name=True)

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """What the words of a message look like."""

    format: JsonOutput | None = None


class ToolChoice(Body):
    """Whether tools are called, as /v1/messages has it."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool = False


class MessageMetadata(Body):
    """Who asks; nothing is made of it."""

    user_id: str | None = None


class CountBody(Body):
    """POST /v1/messages/count_tokens. Blocks and `tools` are looked at by serve/api/message_blocks.py."""

    model: str
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: ToolChoice | None = None
    thinking: ThinkingOptions | None = None
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = None


class MessagesBody(CountBody, Drawing):
    """POST /v1/messages."""

    max_tokens: Annotated[int, Field(ge=1)]
    temperature: Annotated[float, Field(ge=0, le=1)] | None = None
    stop_sequences: Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=16)] | None = None
    metadata: MessageMetadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


class EmbeddingBody(Body):
    """POST /v1/embeddings."""

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None


class Judged(Body):
    """What a person says after a conversation, who has agreed that it is kept."""

    consent: Literal[True]
    prompt: Annotated[list[dict[str, Any]], Field(min_length=1)]


class VoteBody(Judged):
    """A reply was good, or not."""

    kind: Literal["vote"]
    model: str
    reply: str
    good: bool


class CorrectionBody(Judged):
    """What a reply should have been."""

    kind: Literal["correction"]
    model: str
    reply: str
    better: Annotated[str, Field(min_length=1)]

    @field_validator("better")
    @classmethod
    def _differs(cls, better: str, given: ValidationInfo) -> str:
        if better == given.data.get("reply"):
            raise ValueError("a correction differs from the reply")
        return better


class Contestant(Body):
    """One side of the arena."""

    model: str
    reply: str


class ArenaBody(Judged):
    """Which of two replies is better, if one is."""

    kind: Literal["arena"]
    a: Contestant
    b: Contestant
    winner: Winner

    @field_validator("winner")
    @classmethod
    def _can_win(cls, winner: Winner, given: ValidationInfo) -> Winner:
        sides = [given.data[name].reply for name in ("a", "b") if name in given.data]
        if winner in ("a", "b") and len(sides) == 2:
            if sides[0] == sides[1]:
                raise ValueError("neither of two equal replies is better; it can be tie or both_bad")
            if not sides["ab".index(winner)]:
                raise ValueError("an empty reply cannot be the better one")
        return winner


FeedbackBody = Annotated[VoteBody | CorrectionBody | ArenaBody, Field(discriminator="kind")]
"""POST /v1/feedback."""

FEEDBACK_FIELDS = {
    "vote": VoteBody.model_fields,
    "correction": CorrectionBody.model_fields,
    "arena": ArenaBody.model_fields,
}


class TokenizeBody(Body):
    """POST /tokenize: text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    enable_thinking: bool = True


class DetokenizeBody(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[Annotated[int, Field(ge=0)]]
