"""How well a model foretells texts: LAMBADA's last words, WikiText's perplexity, and that of any text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from errors import UserError
from train.tasks.likelihood import Continuation, Form, Item, Likelihood, LikelihoodFile, Part
from train.tasks.rows import take


@dataclass(frozen=True)
class Lambada(LikelihoodFile):
    """The last word of a passage that one cannot guess without the whole of it (Paperno et al. 2016); rows {"text"}.

    `acc`: all tokens of the word are the most likely ones. `perplexity`: of the word.
    """

    name: ClassVar[str] = "lambada"
    forms: ClassVar[dict[str, Form]] = {"acc": "mean", "perplexity": "exp"}

    def item(self, row: dict[str, Any], where: str) -> Item:
        """As `LikelihoodFile` has it."""
        context, space, word = take(row, where, "text").rstrip().rpartition(" ")
        if not space or not context.strip():
            raise UserError(f"{where}: 'text' has one word only, so that nothing foretells it")
        return Item(str(row.get("id", where)), (Continuation(context, f" {word}"),), 0)

    def measure(self, item: Item, found: Sequence[Likelihood]) -> dict[str, Part]:
        """Whether the word came true, and how surprising it was."""
        return {"acc": Part(float(found[0].greedy)), "perplexity": Part(-found[0].logprob)}


@dataclass(frozen=True)
class Text(LikelihoodFile):
    """Perplexity of whole texts; rows {"text"}.

    A text longer than the model's positions is read in windows; each token is foretold once.
    """

    name: ClassVar[str] = "text"
    forms: ClassVar[dict[str, Form]] = {"bits_per_byte": "bits", "byte_perplexity": "exp", "word_perplexity": "exp"}

    def said(self, text: str) -> str:
        """What the model reads of a text."""
        return text

    def item(self, row: dict[str, Any], where: str) -> Item:
        """As `LikelihoodFile` has it."""
        if self.shots:
            raise UserError(f"task {self.name!r} reads whole texts; leave shots out")
        text = take(row, where, "page" if "page" in row else "text")
        if not text.strip():
            raise UserError(f"{where}: the text is empty; leave the row out")
        return Item(str(row.get("id", where)), (Continuation("", self.said(text)),), text)

    def measure(self, item: Item, found: Sequence[Likelihood]) -> dict[str, Part]:
        """Nats over the bytes and the words of the text as the row has it."""
        nats = -found[0].logprob
        per_byte = Part(nats, len(item.answer.encode()))
        words = Part(nats, len(re.split(r"\s+", item.answer)))
        return {"bits_per_byte": per_byte, "byte_perplexity": per_byte, "word_perplexity": words}


@dataclass(frozen=True)
class WikiText(Text):
    """WikiText-2 or -103; the model reads plain text, without the marks of the data's own tokenisation."""

    name: ClassVar[str] = "wikitext"
    forms: ClassVar[dict[str, Form]] = {"word_perplexity": "exp", "byte_perplexity": "exp", "bits_per_byte": "bits"}

    def said(self, text: str) -> str:
        """The text with numbers, quotes, punctuation and headings written as people write them."""
        for pattern, plain in MARKS:
            text = re.sub(pattern, plain, text)
        return text


MARKS = (
    (r"s '", r"s'"),
    (r" @-@ ", "-"),
    (r" @,@ ", ","),
    (r" @\.@ ", "."),
    *((rf" ([{mark}]) ", r"\1 ") for mark in ":;.!?,"),  # one after the other: "Jr . , and" needs both
    (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
    (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
    (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
    (r'"\s*([^"]*?)\s*"', r'"\1"'),
    (r"'\s*([^']*?)\s*'", r"'\1'"),
    (r"= = = =", "===="),
    (r"= = =", "==="),
    (r"= =", "=="),
    (rf" {chr(176)} ", chr(176)),
    (r" \n", "\n"),
    (r"\n ", "\n"),
    (r" N ", " 1 "),
    (r" 's", "'s"),
)
"""What WikiText's tokenisation wrote -> what stood there: the replacements behind the numbers that are published, which
lm-evaluation-harness makes too."""
