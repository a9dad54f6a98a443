"""Replies drawn by the engine from the very weights that are trained, some of them in several turns with tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from configs.alignment import RLConfig
from errors import UserError
from model.tokenizer import Tokenizer
from serve.engine import Engine
from serve.parsing import Call, ReplyParser
from serve.request import Completion
from serve.sampling_params import MAX_SEED, SamplingParams
from train.data.order import derive
from train.rl.samples import Sample
from train.tasks.task import Problem
from train.tools import Tool, call_tool


@dataclass
class Talk:
    """A reply on its way: what was said, what of it the model has drawn, and the text of its last turn."""

    prompt: list[int]
    group: int
    tokens: list[int]
    drawn: list[bool]
    logprobs: list[float]
    experts: Any = None
    texts: list[str] = field(default_factory=list)
    cut: bool = False
    calls: int = 0
    over: bool = False

    @classmethod
    def of(cls, prompt: Sequence[int], group: int) -> Talk:
        """Nothing said yet."""
        return cls(list(prompt), group, list(prompt), [False] * len(prompt), [0.0] * len(prompt))

    def add(self, reply: Completion) -> None:
        """A turn of the model's."""
        self.tokens += reply.tokens
        self.drawn += [True] * len(reply.tokens)
        self.logprobs += reply.logprobs
        self.experts, self.cut = reply.experts, reply.finish_reason != "stop"

    def hear(self, tokens: Sequence[int]) -> None:
        """What tools have said, and the beginning of the next turn."""
        self.tokens += tokens
        self.drawn += [False] * len(tokens)
        self.logprobs += [0.0] * len(tokens)

    def sample(self) -> Sample:
        """The finished reply; only its last turn is graded."""
        drawn, logprobs = np.array(self.drawn), np.array(self.logprobs, np.float32)
        text = self.texts[-1] if self.texts else ""
        return Sample(
            self.group, len(self.prompt), self.tokens, drawn, logprobs, self.experts, text, self.cut, self.calls
        )


class Rollout:
    """Draws replies to problems.

    Args:
        limit: most tokens of prompt and reply together.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: RLConfig, tools: Sequence[Tool], limit: int):
        self.engine, self.tokenizer, self.config, self.tools, self.limit = engine, tokenizer, config, list(tools), limit
        self._schemas: list[dict[str, Any]] = [tool.schema for tool in tools]

    def encode(self, problem: Problem) -> list[int]:
        """The prompt of a problem."""
        return self.tokenizer.encode_chat(
            problem.prompt,
            tools=[*self._schemas, *(problem.tools or [])] or None,
            add_generation_prompt=True,
            enable_thinking=self.config.thinking,
        )

    def fits(self, prompt: Sequence[int]) -> bool:
        """Whether there is room for the longest reply after it."""
        return len(prompt) + self.config.max_new_tokens <= self.limit

    def draw(self, prompts: Sequence[Sequence[int]], seed: int, *, samples: int, greedy: bool = False) -> list[Sample]:
        """`samples` replies to each prompt, those of a prompt one after the other. The same seed draws the same."""
        talks = [Talk.of(prompt, group) for group, prompt in enumerate(prompts) for _ in range(samples)]
        for turn in range(self.config.turns if self.tools else 1):
            going = [(index, talk) for index, talk in enumerate(talks) if not talk.over]
            if not going:
                break
            sampling = [self._sampling(derive(seed, "reply", index, turn), talk, greedy) for index, talk in going]
            replies = self.engine.generate([talk.tokens for _, talk in going], sampling)
            for (_, talk), reply in zip(going, replies, strict=True):
                self._take(talk, reply, last=turn + 1 == self.config.turns)
        return [talk.sample() for talk in talks]

    def _sampling(self, seed: int, talk: Talk, greedy: bool) -> SamplingParams:
        room = min(self.config.max_new_tokens, self.limit - len(talk.tokens))
        return SamplingParams(
            temperature=0.0 if greedy else self.config.temperature, seed=seed % MAX_SEED, max_tokens=room
        )

    def _take(self, talk: Talk, reply: Completion, *, last: bool) -> None:
        """Adds a turn; if it calls tools, what they say and the beginning of the next turn."""
        talk.add(reply)
        text = self.tokenizer.decode(reply.content, skip_specials=not self.tools)
        if not self.tools:
            talk.texts, talk.over = [text], True
            return
        words, calls = take_apart(text, self._schemas)
        talk.texts.append(words)
        talk.over = last or talk.cut or not calls
        if talk.over:
            return
        talk.calls += len(calls)
        tokens = self._heard([call_tool(self.tools, call.name, call.arguments) for call in calls])
        if len(talk.tokens) + len(tokens) + self.config.max_new_tokens > self.limit:
            talk.over, talk.cut = True, True
        else:
            talk.hear(tokens)

    def _heard(self, results: Sequence[str]) -> list[int]:
        """Tokens from the end of a turn that called tools to the beginning of the next.

        Raises:
            UserError: the chat template does not put what tools say after the turn that called them.
        """
        call = {"type": "function", "function": {"name": "f", "arguments": {}}}
        said = [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": "", "tool_calls": [call] * len(results)},
        ]
        told = [{"role": "tool", "content": result} for result in results]
        before = self.tokenizer.encode_chat(said, tools=self._schemas)
        after = self.tokenizer.encode_chat(
            [*said, *told], tools=self._schemas, add_generation_prompt=True, enable_thinking=self.config.thinking
        )
        turns = sum(token in self.tokenizer.stop_ids for token in before)
        ends = [place for place, token in enumerate(after) if token in self.tokenizer.stop_ids]
        if not turns or len(ends) <= turns:
            raise UserError(
                f"the chat template of {self.tokenizer.source} does not add what tools say after a turn; "
                "use one that does, or leave rl.tools empty"
            )
        # The turn's last token was drawn; what the template writes after it was not.
        return after[ends[turns - 1] + 1 :]


def take_apart(text: str, tools: Sequence[dict[str, Any]]) -> tuple[str, list[Call]]:
    """The words of a turn and its calls of tools."""
    parser = ReplyParser(tools=tools)
    pieces = [*parser.push(text), *parser.finish()]
    words = "".join(piece.text for piece in pieces if piece.kind == "words")
    return words, [piece.call for piece in pieces if piece.call is not None]
