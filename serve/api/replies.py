"""Replies as they come from the engine: their text, their log-probabilities, how they end."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

from model.tokenizer import Tokenizer
from serve.api.runner import Event, Listener
from serve.api.service import Service
from serve.request import Request, TopTokens
from serve.text import ReplyText


def usage(prompt_tokens: int, prompts: Sequence[Request], replies: Sequence[Request]) -> dict[str, Any]:
    """What OpenAI calls usage."""
    generated = sum(len(request.tokens) for request in replies)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": generated,
        "total_tokens": prompt_tokens + generated,
        "prompt_tokens_details": {"cached_tokens": sum(request.cached_tokens for request in prompts)},
    }


class Choice:
    """One of the replies to a body.

    logprobs: how many alternatives to give beside each token; None: no log-probabilities at all. with_end: the token
    that ends the reply has one too, though it has no text. as_ids: tokens are written as `token_id:` and their number,
    for text does not tell all of them apart.
    """

    as_ids = False

    def __init__(
        self, index: int, text: ReplyText, tokenizer: Tokenizer, logprobs: int | None, *, with_end: bool = False
    ):
        self.index, self._text, self._tokenizer, self.logprobs = index, text, tokenizer, logprobs
        self._with_end = with_end
        self.written = ""
        self.finished: str | None = None
        self.tokens: list[tuple[int, float | None, TopTokens | None]] = []
        self._given = self._offset = 0

    def take(self, event: Event) -> str:
        """The text that is certain after one more token."""
        ended = event.finished == "stop"
        if not ended or self._with_end:
            self.tokens.append((event.token, event.logprob, event.top))
        text = "" if ended else self._text.push(event.token)
        if self._text.stopped_by is not None:
            self.finished = "stop"
        elif event.finished is not None:
            text += self._text.finish()
            self.finished = "stop" if self._text.stopped_by is not None else event.finished
        self.written += text
        return text

    @property
    def stopped_by(self) -> str | None:
        """The stop string that ended it, if one did."""
        return self._text.stopped_by

    def echo(self, prompt: Sequence[int], scored: tuple[list[float | None], list[TopTokens | None]] | None) -> None:
        """Puts a prompt in front."""
        self.written = self._tokenizer.decode(prompt) + self.written
        if scored is not None:
            self.tokens = [*zip(prompt, *scored, strict=True), *self.tokens]

    def _word(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self.as_ids else self._word(token)

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        return {"token": raw.decode("utf-8", "replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}

    def chat_logprobs(self, *, fresh: bool = False) -> dict[str, Any] | None:
        """In the form of /v1/chat/completions; with `fresh` those that were not given yet."""
        if self.logprobs is None:
            return None
        found = self._next(fresh)
        return {
            "content": [
                {
                    **self._entry(token, logprob or 0.0),
                    "top_logprobs": [self._entry(*one) for one in (top or [])[: self.logprobs]],
                }
                for token, logprob, top in found
            ],
            "refusal": None,
        }

    def completion_logprobs(self, *, fresh: bool = False) -> dict[str, Any] | None:
        """In the form of /v1/completions; with `fresh` those that were not given yet."""
        if self.logprobs is None:
            return None
        found, offsets = self._next(fresh), []
        start = self._offset if fresh else 0
        for token, _, _ in found:
            offsets.append(start)
            start += len(self._word(token))
        self._offset = start
        tops = [self._top(token, logprob, top) for token, logprob, top in found]
        return {
            "tokens": [self._name(token) for token, _, _ in found],
            "token_logprobs": [logprob for _, logprob, _ in found],
            "top_logprobs": tops,
            "text_offset": offsets,
        }

    def _top(self, token: int, logprob: float | None, top: TopTokens | None) -> dict[str, float] | None:
        """The alternatives by their text, the likeliest of those that read alike, and the token itself."""
        if logprob is None:
            return None
        found: dict[str, float] = {}
        for one, value in [*(top or [])[: self.logprobs], (token, logprob)]:
            found.setdefault(self._name(one), value)
        return found

    def _next(self, fresh: bool) -> list[tuple[int, float | None, TopTokens | None]]:
        start, self._given = (self._given if fresh else 0), len(self.tokens)
        return self.tokens[start:]


class Collector:
    """Reads the events of some replies into their choices, and counts."""

    def __init__(self, service: Service, listener: Listener, choices: Sequence[Choice]):
        self._service, self._listener, self._choices = service, listener, choices

    async def run(self) -> None:
        """Until all have ended."""
        async for _ in self.pieces():
            pass

    async def pieces(self) -> AsyncIterator[tuple[Choice, str]]:
        """Each choice with the text that has become certain."""
        metrics, started = self._service.metrics, time.monotonic()
        last: dict[int, float] = {}
        for request in self._listener.requests:
            metrics.prompt_tokens.inc(len(request.prompt))
        async with aclosing(self._service.runner.events(self._listener)) as events:
            async for event in events:
                now, choice = time.monotonic(), self._choices[event.index]
                if choice.finished:
                    continue
                (metrics.first_token if event.index not in last else metrics.between_tokens).observe(
                    now - last.get(event.index, started)
                )
                last[event.index] = now
                metrics.generated_tokens.inc()
                text = choice.take(event)
                if choice.finished:
                    metrics.finished.labels(choice.finished).inc()
                    metrics.cached_tokens.inc(self._listener.requests[event.index].cached_tokens)
                    if event.finished is None:  # a stop string: the engine does not know it yet
                        self._service.runner.abort([self._listener.requests[event.index]])
                yield choice, text
                if all(one.finished for one in self._choices):
                    return
