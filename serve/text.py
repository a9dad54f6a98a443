"""Text of a reply as its tokens come: whole characters only, up to the first stop string."""

from __future__ import annotations

from collections.abc import Sequence

from model.tokenizer import StreamDecoder, Tokenizer


class ReplyText:
    """The text of one reply.

    Args:
        context: tokens before the reply, of which its first may complete a character.
        stop: strings of which the first that is complete ends it; none of it is part of the text.
        skip_specials: leave out the frame (<|im_end|>), see `Tokenizer.decode`.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int] = (), stop: Sequence[str] = (), *, skip_specials: bool = True
    ):
        self._decoder = StreamDecoder(tokenizer, skip_specials=skip_specials)
        for token in context[-8:]:
            self._decoder.push(token)
        self._stop = tuple(stop)
        self._held = ""
        self.stopped_by: str | None = None

    def push(self, token: int) -> str:
        """The text that is certain now: nothing that a stop string may begin with."""
        return self._take(self._decoder.push(token))

    def finish(self) -> str:
        """The rest, when no token follows."""
        certain = self._take(self._decoder.finish())
        held, self._held = self._held, ""
        return certain + ("" if self.stopped_by else held)

    def _take(self, text: str) -> str:
        if self.stopped_by is not None:
            return ""
        self._held += text
        found = [(self._held.find(one), one) for one in self._stop if one in self._held]
        if found:
            # What was complete first, however many characters came at once; of two that end together the longer.
            at, self.stopped_by = min(found, key=lambda it: (it[0] + len(it[1]), it[0]))
            certain, self._held = self._held[:at], ""
            return certain
        keep = unfinished(self._held, self._stop)
        certain, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return certain


def unfinished(text: str, words: Sequence[str]) -> int:
    """How many of the last characters of `text` may be the beginning of one of these words."""
    longest = max((len(word) for word in words), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        tail = text[-size:]
        if any(word.startswith(tail) for word in words if len(word) > size):
            return size
    return 0
