"""POST /v1/completions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

from errors import UserError
from serve.api.errors import ApiError
from serve.api.replies import Choice, Collector, usage
from serve.api.runner import Listener
from serve.api.schemas import CompletionBody
from serve.api.service import Service
from serve.request import Request, TopTokens
from serve.text import ReplyText


def prompts_of(service: Service, given: Any, where: str) -> list[list[int]]:
    """Texts, or lists of tokens, one or several, as tokens. ApiError 400 where there is none."""
    if isinstance(given, str) or (given and isinstance(given[0], int)):
        given = [given]
    if not given:
        raise ApiError(400, f"{where} is empty; give at least one", param=where, code="invalid_value")
    try:
        found = [service.tokenizer.encode(one, specials=True) if isinstance(one, str) else list(one) for one in given]
    except UserError as error:
        raise ApiError(400, str(error), param=where, code="invalid_value") from error
    # A model of documents begins where none has begun: at the end of the one before.
    return [tokens or [service.tokenizer.document_end_id] for tokens in found]


class Completions:
    """The replies to one body."""

    named_events = False

    def __init__(self, service: Service, body: CompletionBody, prompts: list[list[int]]):
        self.service, self.body, self.prompts = service, body, prompts
        self.id, self.created = f"cmpl-{uuid4().hex}", int(time.time())
        n = body.n or 1
        most = None if body.max_tokens is None else max(1, body.max_tokens)
        params = service.sampling(body, most, body.logprobs)
        self.requests: list[Request] = []
        self.choices: list[Choice] = []
        for prompt in prompts:
            for one in params.variants(n):
                constraint = service.constraint(body.structured_outputs)
                self.requests.append(service.request(prompt, one, constraint, body.priority))
                text = ReplyText(service.tokenizer, prompt, body.stops)
                # Who scores prompts by `echo` and one more token counts on that one, whichever it is.
                choice = Choice(len(self.choices), text, service.tokenizer, body.logprobs, with_end=True)
                choice.as_ids = body.return_tokens_as_token_ids
                self.choices.append(choice)
        self.generates = body.max_tokens is None or body.max_tokens > 0

    def start(self) -> Listener | None:
        """Sends the requests to the engine, if anything is to be generated."""
        return self.service.runner.submit(self.requests) if self.generates else None

    async def echo(self) -> None:
        """Puts the prompts in front of the replies, with their log-probabilities if those are asked for."""
        n = self.body.n or 1
        for number, prompt in enumerate(self.prompts):
            scored: tuple[list[float | None], list[TopTokens | None]] | None = None
            if self.body.logprobs is not None:
                asked = prompt, self.body.logprobs, self.service.adapter
                scored = await asyncio.to_thread(self.service.prompts.logprobs, *asked)
            for choice in self.choices[number * n : (number + 1) * n]:
                choice.echo(prompt, scored)

    def chunk(self, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        """A response, or a piece of one."""
        head = {"id": self.id, "object": "text_completion", "created": self.created, "model": self.service.name}
        return {**head, "choices": choices, **more}

    def failure(self, error: ApiError) -> dict[str, Any]:
        """What a stream ends with when something goes wrong."""
        return error.body

    def usage(self) -> dict[str, Any]:
        """Tokens read and generated."""
        n = self.body.n or 1
        return usage(sum(map(len, self.prompts)), self.requests[::n], self.requests if self.generates else [])

    async def whole(self) -> dict[str, Any]:
        """The response at once."""
        listener = self.start()
        if self.body.echo:
            await self.echo()
        if listener is not None:
            await Collector(self.service, listener, self.choices).run()
        choices = [
            {
                "index": choice.index,
                "text": choice.written,
                "logprobs": choice.completion_logprobs(),
                "finish_reason": choice.finished or "length",
            }
            for choice in self.choices
        ]
        return self.chunk(choices, usage=self.usage())

    async def stream(self) -> AsyncIterator[dict[str, Any]]:
        """The response in pieces."""
        listener = self.start()
        with_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        more: dict[str, Any] = {"usage": None} if with_usage else {}

        def piece(choice: Choice, text: str, finished: str | None) -> dict[str, Any]:
            logprobs = choice.completion_logprobs(fresh=True)
            one = {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": finished}
            return self.chunk([one], **more)

        if self.body.echo:
            await self.echo()
            for choice in self.choices:
                yield piece(choice, choice.written, None if listener else "length")
        if listener is not None:
            async for choice, text in Collector(self.service, listener, self.choices).pieces():
                if text or choice.finished:
                    yield piece(choice, text, choice.finished)
        if with_usage:
            yield self.chunk([], usage=self.usage())


async def make(service: Service, body: CompletionBody) -> Completions:
    """The replies to a body, not started yet. ApiError for one that cannot be answered."""
    return Completions(service, body, prompts_of(service, body.prompt, "prompt"))
