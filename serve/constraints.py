"""What a reply must look like: JSON, a pattern, one of some texts, a call of a tool; and thoughts that must end.

Grammars are llguidance's: it says which tokens may come next, in microseconds for most.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from errors import UserError
from model.tokenizer import Tokenizer
from serve.parsing import CALL, END_CALL
from serve.request import Constraint

if TYPE_CHECKING:
    import llguidance


SPACE: Any = {"whitespace_pattern": r"[ \n]{0,24}"}
"""White space between the parts of JSON: enough for any layout, and no model gets lost in it."""


def bits_of(tokens: Sequence[int], vocab: int) -> np.ndarray:
    """Words with the bits of these tokens set."""
    words = np.zeros(-(-vocab // 32), np.uint32)
    for token in tokens:
        words[token // 32] |= np.uint32(1) << np.uint32(token % 32)
    return words


class Thinking:
    """A thought of at most `budget` tokens, then `after`; or `after` at once, if the reply begins with none.

    Args:
        vocab: tokens. marks: those that begin and end a thought. budget: None: as long as it likes. within: whether the
            prompt has begun the thought.
    """

    def __init__(
        self, vocab: int, marks: tuple[int, int], budget: int | None, after: Constraint | None, *, within: bool
    ):
        self._begin, self._end = marks
        self._begins, self._ends = (bits_of([mark], vocab) for mark in marks)
        self._left, self._after = budget, after
        self._state: Literal["before", "within", "over"] = "within" if within else "before"

    def allowed(self) -> np.ndarray | None:
        """All while it thinks, the token that ends it when it has thought enough."""
        if self._state == "within":
            return self._ends if self._left is not None and self._left <= 0 else None
        after = None if self._after is None else self._after.allowed()
        if after is None or self._state == "over":
            return after
        both = np.zeros(max(len(after), len(self._begins)), np.uint32)
        both[: len(after)] |= after
        both[: len(self._begins)] |= self._begins
        return both

    def take(self, token: int) -> None:
        """Counts a token of the thought."""
        if self._state == "within":
            self._state = "over" if token == self._end else "within"
            self._left = None if self._left is None else self._left - 1
        elif self._state == "before" and token == self._begin:
            self._state = "within"
        else:
            self._state = "over"
            if self._after is not None:
                self._after.take(token)


class Grammar:
    """A reply that a grammar describes, and the tokens that end it."""

    def __init__(self, matcher: llguidance.LLMatcher, ends: np.ndarray):
        self._matcher, self._ends = matcher, ends

    def allowed(self) -> np.ndarray:
        """What the grammar lets come next; where nothing is left, or it has given up, the end."""
        if self._matcher.is_stopped() or self._matcher.is_error():
            return self._ends
        raw = self._matcher.compute_bitmask()
        found = np.frombuffer(raw + bytes(-len(raw) % 4), np.uint32)
        return found if found.any() else self._ends

    def take(self, token: int) -> None:
        """Goes on with the token that was drawn."""
        if not self._matcher.is_stopped():
            self._matcher.consume_token(token)


class Grammars:
    """Makes grammars over a tokenizer's tokens; what they have in common is made when the first is asked for."""

    def __init__(self, tokenizer: Tokenizer, stop_ids: Sequence[int]):
        self._tokenizer, self._stops = tokenizer, list(stop_ids)
        self._lock = threading.Lock()

    @cached_property
    def _tokens(self) -> llguidance.LLTokenizer:
        import llguidance

        own = self._tokenizer

        class Words:
            eos_token_id = self._stops[0] if self._stops else own.document_end_id
            bos_token_id = None
            tokens = [own.token_bytes(token) for token in range(own.vocab_size)]  # noqa: RUF012
            special_token_ids = sorted(own.control_ids)

            def __call__(self, text: bytes | str) -> list[int]:
                return own.encode(text.decode("utf-8", "replace") if isinstance(text, bytes) else text)

        wrapper = llguidance.TokenizerWrapper(Words())
        return llguidance.LLTokenizer(wrapper, eos_token=self._stops or None)

    def make(
        self, schema: Mapping[str, Any] | None = None, regex: str | None = None, choice: Sequence[str] | None = None
    ) -> Grammar:
        """The grammar of JSON that fits a schema, of a pattern, or of one of some texts. UserError if it makes none."""
        given = [one for one in (schema, regex, choice) if one is not None]
        if len(given) != 1:
            raise UserError("structured_outputs takes one of json, regex and choice")
        if choice is not None:
            if not choice or not all(choice):
                raise UserError("choice needs at least one text, and none that is empty")
            return self._compile("start: " + " | ".join(json.dumps(text) for text in choice), "choice")
        from llguidance import LLMatcher

        try:
            if regex is not None:
                return self._compile(LLMatcher.grammar_from_regex(regex), "regex")
            return self._compile(
                LLMatcher.grammar_from_json_schema(dict(schema or {}), overrides=SPACE), "the JSON schema"
            )
        except ValueError as error:
            raise UserError(f"the JSON schema cannot be used: {error}") from error

    def calls(self, tools: Sequence[Mapping[str, Any]], *, parallel: bool) -> Grammar:
        """The grammar of calls of these tools (`{"name", "parameters"}`), in the form of Hermes."""
        options = [
            {
                "type": "object",
                "properties": {
                    "name": {"const": tool["name"]},
                    "arguments": tool.get("parameters") or {"type": "object"},
                },
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
            for tool in tools
        ]
        schema = json.dumps((options[0] if len(options) == 1 else {"anyOf": options}) | {"x-guidance": SPACE})
        first, last = (
            mark if self._tokenizer.token_id(mark) in self._tokenizer.control_ids else json.dumps(mark)
            for mark in (CALL, END_CALL)
        )
        more = '("\\n" call)*' if parallel else ""
        lark = f'start: call {more}\ncall: {first} "\\n" body "\\n" {last}\nbody: %json {schema}'
        return self._compile(lark, "tools")

    def _compile(self, grammar: str, name: str) -> Grammar:
        from llguidance import LLMatcher

        with self._lock:
            tokens = self._tokens
        matcher = LLMatcher(tokens, grammar, log_level=0)
        if matcher.is_error():
            raise UserError(f"{name} cannot be used: {matcher.get_error().splitlines()[0]}")
        ends = self._stops or [self._tokenizer.document_end_id]
        return Grammar(matcher, bits_of(ends, self._tokenizer.vocab_size))
