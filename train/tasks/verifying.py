"""What verifiers of instructions share: the register, words, sentences, paragraphs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Values = Mapping[str, Any]
WORD = re.compile(r"\w+(?:['’\-]\w+)*")
END = re.compile(r"(?<=[.!?…])[\"'”’)\]*]*\s+|\n+")
ABBREVIATION = re.compile(r"(?:\b(?:Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|a\.m|p\.m|U\.S|No|Fig)|\b[A-Z])\.$")


@dataclass(frozen=True)
class Verifier:
    """One kind of instruction.

    Attributes:
        check: whether a reply follows it, given the row's values and the "prompt". needs: values without which it
            means nothing.
    """

    check: Callable[[str, Values], bool]
    needs: tuple[str, ...]


VERIFIERS: dict[str, Verifier] = {}


def verifies(kind: str, *needs: str) -> Callable[[Callable[[str, Values], bool]], Callable[[str, Values], bool]]:
    """Registers a function as the verifier of a kind."""

    def register(check: Callable[[str, Values], bool]) -> Callable[[str, Values], bool]:
        VERIFIERS[kind] = Verifier(check, needs)
        return check

    return register


def words_of(text: str) -> list[str]:
    """Words: letters and digits, with hyphens and apostrophes inside."""
    return WORD.findall(text)


def bare(words: list[str]) -> list[str]:
    """Pieces between spaces in lower case, without punctuation about them; empty ones dropped."""
    return [w for w in (re.sub(r"^\W+|\W+$", "", word).lower() for word in words) if w]


def sentences_of(text: str) -> list[str]:
    """Sentences: they end with . ! ? before a space, or with a line. Common abbreviations and initials end none."""
    found: list[str] = []
    start = 0
    for match in END.finditer(text):
        piece = text[start : match.end()].strip()
        if "\n" not in match.group() and ABBREVIATION.search(piece):
            continue
        if piece:
            found.append(piece)
        start = match.end()
    last = text[start:].strip()
    return [*found, last] if last else found


def lines_of(text: str) -> list[str]:
    """Lines that are not empty."""
    return [line for line in text.splitlines() if line.strip()]


def paragraphs_of(text: str) -> list[str]:
    """What empty lines separate."""
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()]


def holds(count: int, relation: Any, limit: Any) -> bool:
    """`count` is "at least" or "less than" `limit`, as IFEval's rows say it; "exactly" too."""
    limit = int(limit)
    if relation in ("less than", "at most"):
        return count < limit if relation == "less than" else count <= limit
    return count == limit if relation == "exactly" else count >= limit


def times(text: str, word: str) -> int:
    """How often a word or phrase occurs as whole words, whatever the case."""
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.IGNORECASE))
