"""What all endpoints share: the model that is served, its defaults, and requests made of bodies."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from errors import UserError
from model.tokenizer import Tokenizer
from serve.api.errors import ApiError
from serve.api.metrics import Metrics
from serve.api.runner import Runner
from serve.api.schemas import Drawing, StructuredOutputs
from serve.constraints import Grammars, Thinking
from serve.engine import Engine
from serve.parsing import END_THINK, THINK
from serve.prompts import Prompts
from serve.request import Constraint, Request
from serve.sampling_params import MAX_SEED, MAX_STOP_IDS, SamplingParams

MAX_DIGITS = 18
"""Of an id: Python refuses to read numbers of thousands of digits."""


@dataclass(frozen=True)
class Defaults:
    """What generation_config.json says for what a request leaves open."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    stop_ids: tuple[int, ...] = ()

    @classmethod
    def of(cls, config: dict[str, Any]) -> Defaults:
        """From the file's contents; what it does not say is left as it is."""
        names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
        found = {name: config[name] for name in names if isinstance(config.get(name), int | float)}
        if config.get("do_sample") is False:
            found = {"temperature": 0.0, "repetition_penalty": found.get("repetition_penalty", 1.0)}
        ends = config.get("eos_token_id")
        ends = [ends] if isinstance(ends, int) else ends
        stops = tuple(one for one in ends if isinstance(one, int)) if isinstance(ends, list) else ()
        return cls(**found, stop_ids=stops)


@dataclass
class Service:
    """One served model.

    name: as requests call it. created: when it was loaded, in seconds since 1970. adapter: of the engine's; 0: none.
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer
    runner: Runner
    metrics: Metrics
    defaults: Defaults = field(default_factory=Defaults)
    created: int = field(default_factory=lambda: int(time.time()))
    adapter: int = 0

    def __post_init__(self) -> None:
        self.prompts = Prompts(self.engine.device)
        self.grammars = Grammars(self.tokenizer, self.stop_ids)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a reply."""
        found = dict.fromkeys((*self.tokenizer.stop_ids, *self.defaults.stop_ids))
        return tuple(one for one in found if one < self.tokenizer.vocab_size)[:MAX_STOP_IDS]

    def sampling(self, body: Drawing, max_tokens: int | None, top_logprobs: int | None) -> SamplingParams:
        """How a body asks for its replies to be drawn; ApiError 400 where it cannot be."""

        def given(value: Any, default: Any) -> Any:
            return default if value is None else value

        own, room = self.defaults, self.engine.context
        stops = () if body.ignore_eos else self.stop_ids
        stops = tuple(dict.fromkeys((*(body.stop_token_ids or ()), *stops)))
        seed = secrets.randbelow(MAX_SEED) if body.seed is None else body.seed % MAX_SEED
        try:
            return SamplingParams(
                temperature=given(body.temperature, own.temperature),
                top_p=given(body.top_p, own.top_p),
                top_k=max(0, given(body.top_k, own.top_k)),
                min_p=given(body.min_p, own.min_p),
                presence_penalty=given(body.presence_penalty, 0.0),
                frequency_penalty=given(body.frequency_penalty, 0.0),
                repetition_penalty=given(body.repetition_penalty, own.repetition_penalty),
                logit_bias=self._bias(body.logit_bias),
                seed=seed,
                max_tokens=room if max_tokens is None else max_tokens,
                min_tokens=given(body.min_tokens, 0),
                stop_ids=stops[:MAX_STOP_IDS],
                top_logprobs=top_logprobs or 0,
            )
        except UserError as error:
            raise ApiError(400, str(error), param=str(error).partition("=")[0], code="invalid_value") from error

    def _bias(self, given: dict[str, float] | None) -> tuple[tuple[int, float], ...]:
        found = []
        for token, by in (given or {}).items():
            if not (token.isascii() and token.isdecimal() and len(token) <= MAX_DIGITS):
                raise ApiError(400, f"logit_bias names {token!r}; it takes ids of tokens", param="logit_bias")
            found.append((int(token), by))
        return tuple(found)

    def request(
        self, prompt: Sequence[int], sampling: SamplingParams, constraint: Constraint | None, priority: int
    ) -> Request:
        """A request of the engine; ApiError 400 where the prompt cannot be read."""
        try:
            more = {"priority": priority, "constraint": constraint, "adapter": self.adapter}
            return self.engine.request(prompt, sampling, **more)
        except UserError as error:
            code = "context_length_exceeded" if "positions" in str(error) else "invalid_value"
            said = str(error).replace("stop_ids", "stop_token_ids")  # as requests call it
            name, names, _ = said.partition(" names ")
            raise ApiError(400, said, param=name if names else None, code=code) from error

    def constraint(self, wanted: StructuredOutputs | None, param: str = "structured_outputs") -> Constraint | None:
        """What a reply must look like; ApiError 400, about `param`, if it makes no sense."""
        try:
            return None if wanted is None else self.grammars.make(wanted.json_schema, wanted.regex, wanted.choice)
        except UserError as error:
            raise ApiError(400, str(error), param=param, code="invalid_value") from error

    def after_thought(self, after: Constraint | None, budget: int | None, *, within: bool) -> Constraint | None:
        """`after` for what follows a thought of at most `budget` tokens, if the reply has one."""
        begin, end = (self.tokenizer.token_id(mark) for mark in (THINK, END_THINK))
        if begin is None or end is None or (after is None and budget is None):
            return after
        return Thinking(self.tokenizer.vocab_size, (begin, end), budget, after, within=within)

    async def encode_chat(self, *args: Any, param: str = "messages", **kwargs: Any) -> list[int]:
        """The tokens of a conversation; ApiError 400, about `param`, for one that is malformed."""
        try:
            return await asyncio.to_thread(self.tokenizer.encode_chat, *args, **kwargs)
        except UserError as error:
            raise ApiError(400, str(error), param=param, code="invalid_value") from error
