"""A model at an OpenAI-compatible endpoint: replies by chat completions, log-probabilities by completions that echo."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, TypeVar

import httpx

from errors import UserError
from train.asking import Endpoint
from train.evaluation.answerer import Ask, Reply, Settings, Tell
from train.tasks.likelihood import Continuation, Likelihood

SECONDS = 1800.0
"""That a reply may take: a model may think for long."""
TRIES = 6
"""Times that a request is made before the evaluation stops; what has come until then is kept."""
MENDABLE = (408, 409, 425, 429)
"""Refusals that another try may mend."""

T = TypeVar("T")


class Remote:
    """An endpoint's answers.

    Args:
        url: with the version, such as http://host/v1. model: its name there; empty: the first.
        workers: requests at the same time. client: to ask with, for tests.
    """

    def __init__(self, url: str, model: str = "", *, workers: int = 16, client: httpx.Client | None = None):
        self._endpoint, self._workers = Endpoint(url, "model", model, client, SECONDS), workers
        self.name = f"{model or 'the first model'} at {url}"
        self.fingerprint: str = f"{url} {model}"

    def replies(self, asked: Sequence[Ask], settings: Settings) -> Iterator[tuple[int, Reply]]:
        """As `Answerer` has it. What a server has parsed into calls and thoughts is written back into the text."""
        yield from self._each(asked, lambda one: self._reply(one, settings))

    def likelihoods(self, asked: Sequence[Continuation], tell: Tell) -> list[Likelihood]:
        """As `Answerer` has it."""
        found: dict[int, Likelihood] = {}
        for index, one in self._each(asked, self._likelihood):
            found[index] = one
            tell(1)
        return [found[index] for index in range(len(asked))]

    def _each(self, asked: Sequence[Any], answer: Callable[[Any], T]) -> Iterator[tuple[int, T]]:
        with self._endpoint, ThreadPoolExecutor(self._workers) as pool:
            waiting: dict[Future[T], int] = {}
            left = iter(enumerate(asked))
            try:
                while True:
                    for index, one in left:
                        waiting[pool.submit(answer, one)] = index
                        if len(waiting) >= 2 * self._workers:
                            break
                    if not waiting:
                        return
                    done, _ = wait(waiting, return_when=FIRST_COMPLETED)
                    for future in done:
                        yield waiting.pop(future), future.result()
            finally:
                for future in waiting:
                    future.cancel()

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        def once() -> Any:
            try:
                return self._endpoint.post(path, body)
            except httpx.HTTPStatusError as error:
                code = error.response.status_code
                if 400 <= code < 500 and code not in MENDABLE:
                    said = error.response.text[:300]
                    raise UserError(f"the endpoint refuses a request to /{path} with {code}: {said}") from error
                raise

        found = self._endpoint.until(once, TRIES)
        if found is None:
            raise UserError(
                f"the endpoint has not answered {TRIES} times; what has come is kept: run the same command again later"
            )
        return found

    def _reply(self, one: Ask, settings: Settings) -> Reply:
        body: dict[str, Any] = {
            "messages": one.messages(settings),
            "temperature": settings.temperature,
            "top_p": settings.top_p,
            "max_completion_tokens": settings.max_tokens,
            "seed": one.seed,
        }
        if one.problem.tools:
            body["tools"] = one.problem.tools
        if not settings.thinking:
            body["chat_template_kwargs"] = {"enable_thinking": False}
        found = self._post("chat/completions", body)
        choice = found["choices"][0]
        return Reply(
            text_of(choice["message"]),
            cut=choice.get("finish_reason") == "length",
            tokens=(found.get("usage") or {}).get("completion_tokens", 0),
        )

    def _likelihood(self, one: Continuation) -> Likelihood:
        context, text = one
        if not context:
            raise UserError("an endpoint cannot be asked for whole texts: it does not say what it puts before them")
        body = {"prompt": context + text, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
        said = self._post("completions", body)["choices"][0]["logprobs"]
        start, end = len(context.rstrip()), len(context) + len(text)
        total, greedy = 0.0, True
        for offset, logprob, top in zip(said["text_offset"], said["token_logprobs"], said["top_logprobs"], strict=True):
            if start <= offset < end and logprob is not None:
                total += logprob
                greedy &= not top or logprob >= max(top.values()) - 1e-9
        return Likelihood(total, greedy)


def text_of(message: dict[str, Any]) -> str:
    """A message as the model wrote it: thoughts in `<think>`, calls in `<tool_call>`, as Hermes has them."""
    thoughts = message.get("reasoning_content") or message.get("reasoning") or ""
    parts = [f"<think>\n{thoughts}\n</think>\n\n"] if thoughts else []
    parts.append(message.get("content") or "")
    for call in message.get("tool_calls") or ():
        try:
            arguments = json.loads(call["function"]["arguments"])
        except ValueError:
            arguments = call["function"]["arguments"]
        written = json.dumps({"name": call["function"]["name"], "arguments": arguments}, ensure_ascii=False)
        parts.append(f"\n<tool_call>\n{written}\n</tool_call>")
    return "".join(parts)
