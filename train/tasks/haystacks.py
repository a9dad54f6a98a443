"""Long texts in which something is to be found: needles in a haystack, and tasks of RULER. All is made up."""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
import string
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from errors import UserError, did_you_mean
from train.tasks.graders import contains
from train.tasks.task import Grade, Problem, Split, ask, share, spoken
from train.tasks.words import ADJECTIVES, NOUNS, pairs, sentence

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
"""What RULER fills with, repeated."""
CODED_LENGTH = 6
"""Letters of a coded word of `fwe`."""
SHORTEST, LONGEST = 100, 2_000_000
"""Words."""
PIECE = 50
SHORT = 4096
"""Below that, lists of common words have fewer of each, as RULER has it (it counts tokens)."""


@dataclass(frozen=True)
class Haystack(ABC):
    """Problems made up without end, each with a long text.

    A problem is in the test split if the hash of its answer falls below `TEST_SHARE`, else in the train split: no
    answer is in both. The same options give the same problems for ever, and a greater `size` the same ones first.

    Attributes:
        path: a text file to hide things in, from its beginning, repeated if it is short; empty makes a text up.
        length: of the text, in words between white space. A token is about three quarters of a word of English, and
            less of what is numbers and rare words: leave room. size: problems of a split. seed: others for another.
    """

    path: str = ""
    length: int = 1000
    size: int = 100
    seed: int = 0

    name: ClassVar[str] = ""
    TEST_SHARE: ClassVar[float] = 0.2

    def __post_init__(self) -> None:
        if not SHORTEST <= self.length <= LONGEST or self.size < 1:
            raise UserError(
                f"{self.name} has length={self.length}, size={self.size}; give {SHORTEST} to {LONGEST} words, "
                "a size from 1"
            )
        if self.path and not self._sentences:
            raise UserError(f"{self.path} has no text to hide something in")

    @functools.cached_property
    def _made(self) -> dict[Split, list[Problem]]:
        return {}

    def problems(self, split: Split) -> Sequence[Problem]:
        """As `Task` has it."""
        if split not in self._made:  # the other one may never be asked for, and texts are long
            self._made[split] = self._make(split)
        return self._made[split]

    def _make(self, split: Split) -> list[Problem]:
        made = []
        draw = random.Random(f"{self.name} {self.seed} {split}")
        while len(made) < self.size:
            state = draw.getrandbits(64)
            hidden = self.hide(random.Random(state))
            if (share(f"{self.name} {' '.join(hidden)}") < self.TEST_SHARE) == (split == "test"):
                text = self.text(random.Random(state), len(made))
                made.append(Problem(f"{split}-{len(made)}", ask(text), hidden))
        return made

    @abstractmethod
    def hide(self, draw: random.Random) -> list[str]:
        """What is to be found."""

    @abstractmethod
    def text(self, draw: random.Random, number: int) -> str:
        """The problem number `number` of a split, whose first draws are those of `hide`."""

    @functools.cached_property
    def _sentences(self) -> list[str]:
        """Of the file; longer ones in pieces of `PIECE` words."""
        file = Path(self.path).expanduser()
        if not file.is_file():
            siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
            raise UserError(f"there is no file {self.path}{did_you_mean(file.name, siblings)}")
        try:
            words = " ".join(file.read_text(encoding="utf-8").split())
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is no text in UTF-8 ({error}); convert it") from error
        split = [sentence.split() for sentence in re.split(r"(?<=[.!?])\s", words)]
        return [" ".join(part[at : at + PIECE]) for part in split for at in range(0, len(part), PIECE)]

    def filling(self, made_up: Iterator[str], words: int) -> list[str]:
        """Sentences of the file, or else those that are given, `words` long or a little less; at least one."""
        found: list[str] = []
        for piece in itertools.cycle(self._sentences) if self.path else made_up:
            words -= len(piece.split())
            if words < 0 and found:
                break
            found.append(piece)
        return found


def insert(draw: random.Random, sentences: list[str], needles: Sequence[str]) -> list[str]:
    """The sentences with needles between them, in the needles' order, at places drawn without preference."""
    places = sorted(draw.randint(0, len(sentences)) for _ in needles)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        sentences.insert(place, needle)
    return sentences


@dataclass(frozen=True)
class Needle(Haystack):
    """One sentence with a number, hidden among others that are all different: the needle in a haystack.

    Attributes:
        depth: share of the text before the needle, from 0 to 1; -1 spreads the problems over 0, 0.1, and so on to 1.
    """

    depth: float = -1.0

    name: ClassVar[str] = "needle"

    def __post_init__(self) -> None:
        if self.depth != -1 and not 0 <= self.depth <= 1:
            raise UserError(f"depth={self.depth} of task 'needle' is no share from 0 to 1, nor -1 for all depths")
        super().__post_init__()

    def hide(self, draw: random.Random) -> list[str]:
        """As `Haystack` has it."""
        return [str(draw.randrange(10**6, 10**7))]

    def text(self, draw: random.Random, number: int) -> str:
        """As `Haystack` has it."""
        value, key = self.hide(draw)[0], pairs(draw, 1)[0]
        needle = f"The secret number of {key} is {value}."
        sentences = self.filling((sentence(draw) for _ in itertools.count()), self.length - len(needle.split()))
        depth = number % 11 / 10 if self.depth == -1 else self.depth
        sentences.insert(round(depth * len(sentences)), needle)
        question = f"What is the secret number of {key}? Answer with the number alone."
        return f"Read this text; a question follows.\n\n{' '.join(sentences)}\n\n{question}"

    def grade(self, problem: Problem, reply: str) -> Grade:
        """The reply holds the number."""
        return contains(problem.answer, reply)


@dataclass(frozen=True)
class Ruler(Haystack):
    """Tasks of RULER (Hsieh et al. 2024, arXiv 2404.06654, sections 3 and B), scored as there (string match, all).

    Lengths are words here and tokens there, words come from a list of ours, and a prompt has no beginning of an answer.
    `niah_single` with noise is niah_single_1, with a file niah_single_2; `niah_multikey` is niah_multikey_1.

    Attributes:
        kind: niah_single: a number for a word; niah_multikey: the same, among three others; niah_multivalue: four
            numbers for a word; niah_multiquery: numbers for four words; vt: variables that have a value, over four
            assignments; cwe: the ten words that are commonest in a list; fwe: the three of a text of coded words.
    """

    kind: Literal["niah_single", "niah_multikey", "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe"] = (
        "niah_single"
    )

    name: ClassVar[str] = "ruler"
    NEEDLES: ClassVar[dict[str, tuple[int, int, int]]] = {
        "niah_single": (1, 1, 1),
        "niah_multikey": (4, 1, 1),
        "niah_multivalue": (1, 4, 1),
        "niah_multiquery": (4, 1, 4),
    }
    """Keys, values of a key, keys that are asked for."""
    HOPS: ClassVar[int] = 4
    COMMON: ClassVar[int] = 10

    def __post_init__(self) -> None:
        if self.path and self.kind in ("cwe", "fwe"):
            raise UserError(f"kind={self.kind} of task 'ruler' hides nothing in a text; leave out :{self.path}")
        if self.kind == "cwe" and self._uncommon[2] + self.COMMON > len(ADJECTIVES) * len(NOUNS):
            raise UserError(f"length={self.length} of ruler's cwe needs more words than there are; take 180000 or less")
        super().__post_init__()

    @property
    def _uncommon(self) -> tuple[int, int, int]:
        """How often common and uncommon words of `cwe` come, and how many of the latter there are."""
        often, seldom = (6, 1) if self.length < SHORT else (30, 3)
        return often, seldom, max(1, (self.length // 2 - self.COMMON * often) // seldom)  # an entry is two words

    def hide(self, draw: random.Random) -> list[str]:
        """As `Haystack` has it."""
        if self.kind == "vt":
            return distinct(draw, string.ascii_uppercase, 5, self.HOPS + 1)
        if self.kind == "cwe":
            return pairs(draw, self.COMMON)
        if self.kind == "fwe":
            return distinct(draw, string.ascii_lowercase, CODED_LENGTH, 3)
        _, values, asked = self.NEEDLES[self.kind]
        return distinct(draw, string.digits[1:], 7, values * asked)

    def text(self, draw: random.Random, number: int) -> str:
        """As `Haystack` has it."""
        hidden = self.hide(draw)
        if self.kind == "vt":
            return self._variables(draw, hidden)
        if self.kind == "cwe":
            return self._common(draw, hidden)
        if self.kind == "fwe":
            return self._frequent(draw, hidden)
        return self._needles(draw, hidden)

    def _noise(self, words: int) -> list[str]:
        return self.filling(itertools.repeat(NOISE), words)

    def _joined(self, pieces: list[str]) -> str:
        return (" " if self.path else "\n").join(pieces)

    def _needles(self, draw: random.Random, hidden: list[str]) -> str:
        keys, values, asked = self.NEEDLES[self.kind]
        names = pairs(draw, keys)
        numbers = hidden + distinct(draw, string.digits[1:], 7, keys * values - len(hidden), hidden)
        needles = [
            f"One of the special magic numbers for {names[i // values]} is: {value}." for i, value in enumerate(numbers)
        ]
        draw.shuffle(needles)
        words = self.length - sum(len(needle.split()) for needle in needles)
        context = self._joined(insert(draw, self._noise(words), needles))
        several = asked * values > 1
        what = "Some special magic numbers are" if several else "A special magic number is"
        query = "What are all the special magic numbers" if several else "What is the special magic number"
        wanted = ", ".join(names[:asked])
        return f"{what} hidden within this text. Memorize them.\n{context}\n{query} for {wanted} mentioned in the text?"

    def _variables(self, draw: random.Random, names: list[str]) -> str:
        value = str(draw.randrange(10_000, 100_000))
        chain = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in itertools.pairwise(names))]
        words = self.length - sum(len(line.split()) for line in chain)
        context = self._joined(insert(draw, self._noise(words), [f"{line}." for line in chain] if self.path else chain))
        question = f"Question: Find all variables that are assigned the value {value} in the text above."
        return f"Memorize and track the chain of variable assignment hidden in this text.\n\n{context}\n{question}"

    def _common(self, draw: random.Random, common: list[str]) -> str:
        often, seldom, count = self._uncommon
        known = set(common)
        others = [word for word in pairs(draw, count + self.COMMON) if word not in known][:count]
        context = numbered(draw, common * often + others * seldom)
        shown = pairs(draw, 2 * self.COMMON)
        example = numbered(draw, shown[: self.COMMON] * 3 + shown[self.COMMON :])
        answer = " ".join(f"{i}. {word}" for i, word in enumerate(shown[: self.COMMON], 1))
        ask_for = "What are the 10 most common words in the above list?"
        head = "Below is a numbered list of words, some of which appear more often than others. Memorize those."
        return f"{head}\n{example}\nQuestion: {ask_for} Answer: {answer}\n\n{head}\n{context}\nQuestion: {ask_for}"

    def _frequent(self, draw: random.Random, frequent: list[str]) -> str:
        """Words' counts fall with the square of their rank (a zeta distribution, alpha 2); the first rank is noise."""
        rest = distinct(draw, string.ascii_lowercase, CODED_LENGTH, max(2, self.length // 50), frequent)
        ranked = ["...", *frequent, *rest]
        counts = [int(self.length / rank**2 / (math.pi**2 / 6)) for rank in range(1, len(ranked) + 1)]
        words = [word for word, count in zip(ranked, counts, strict=True) for _ in range(count)]
        draw.shuffle(words)
        head = "Read this coded text and track how often each coded word appears; ignore the dots '...'."
        return f"{head}\n{' '.join(words)}\nQuestion: What are the three most frequent words in the coded text above?"

    def grade(self, problem: Problem, reply: str) -> Grade:
        """The share of what is to be found that stands in the reply, whatever the case."""
        text = spoken(reply).lower()
        missing = [wanted for wanted in problem.answer if wanted.lower() not in text]
        note = f"missing {', '.join(missing)}" if missing else "found all"
        return Grade(1 - len(missing) / len(problem.answer), note)


def distinct(draw: random.Random, letters: str, size: int, count: int, taken: Sequence[str] = ()) -> list[str]:
    """So many different texts of `size` letters, none of them `taken`."""
    found: dict[str, None] = {}
    while len(found) < count:
        text = "".join(draw.choices(letters, k=size))
        if text not in taken:
            found[text] = None
    return list(found)


def numbered(draw: random.Random, words: list[str]) -> str:
    """The words in any order, as "1. one 2. two"."""
    return " ".join(f"{i}. {word}" for i, word in enumerate(draw.sample(words, len(words)), 1))
