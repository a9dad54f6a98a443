"""Graders by name: from an answer and a reply to a score. A `jsonl` task picks one; others use them too."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from typing import Any

from train.sandbox import run_python
from train.tasks.answers import boxed, final_number, to_number
from train.tasks.equivalence import equivalent
from train.tasks.task import Grade, right_or_wrong, spoken

Grader = Callable[[Any, str], Grade]
CHRF_ORDER, CHRF_BETA = 6, 2.0
UNSPACED = re.compile("[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")
REGEX_SECONDS = 2.0
STATED = re.compile(r"(?i)(?:final\s+)?answer\s*(?:is|:|=)\s*:?\s*(.+)")
CHOICE = re.compile(r"(?<![A-Za-z'’])\(?([A-J])\)?(?![A-Za-z'’])")


def exact(answer: Any, reply: str) -> Grade:
    """The whole reply is the answer, or one of a list of answers; spaces at the ends do not count."""
    text = spoken(reply).strip()
    return right_or_wrong(text in [str(a).strip() for a in listed(answer)], f"said {text[:100]!r}")


def contains(answer: Any, reply: str) -> Grade:
    """The reply holds the answer, or one of a list, as whole words (where its script has spaces), whatever the case."""
    text = folded(spoken(reply))
    found = []
    for option in listed(answer):
        wanted = folded(str(option))
        before = "" if UNSPACED.match(wanted[:1]) else r"(?<!\w)"
        after = "" if UNSPACED.match(wanted[-1:]) else r"(?!\w)"
        if wanted and re.search(before + re.escape(wanted) + after, text):
            found.append(option)
    return right_or_wrong(bool(found), f"holds {found[0]!r}" if found else "holds none")


def number(answer: Any, reply: str) -> Grade:
    """The number that a reply ends with (after ####, in \\boxed{}, or its last one) equals the answer exactly."""
    gold, found = to_number(str(answer)), final_number(spoken(reply))
    if gold is None:
        raise ValueError(f"the answer {answer!r} is no number")
    return right_or_wrong(gold == found, f"read {found}, wanted {gold}")


def math(answer: Any, reply: str) -> Grade:
    """The reply's last \\boxed{}, else what follows "answer is", else its last line, means what the answer means."""
    text = spoken(reply)
    found = boxed(text)
    if found is None:
        stated = STATED.findall(text)
        found = stated[-1] if stated else next((line for line in reversed(text.splitlines()) if line.strip()), "")
    right = any(equivalent(str(a), found) for a in listed(answer))
    return right_or_wrong(right, f"read {found[:100]!r}, wanted {str(answer)[:100]!r}")


def regex(answer: Any, reply: str) -> Grade:
    """The pattern (Python's `re`) is found in the reply. It runs in the sandbox: some patterns take for ever."""
    code = "import json, re, sys\npattern, text = json.load(sys.stdin)\nprint(bool(re.search(pattern, text)))"
    outcome = run_python(code, stdin=json.dumps([str(answer), spoken(reply)]), seconds=REGEX_SECONDS)
    return right_or_wrong(outcome.stdout.strip() == "True", "" if outcome.ok else f"the search: {outcome.reason}")


def choice(answer: Any, reply: str) -> Grade:
    """The letter that a reply chooses: in \\boxed{}, after "answer is", or its last one that stands alone.

    The answer is a letter, or the position of the choice from 0.
    """
    gold = "ABCDEFGHIJ"[answer] if isinstance(answer, int) else str(answer).strip().upper()
    text = spoken(reply)
    stated = STATED.findall(text)
    for part in (boxed(text), stated[-1] if stated else None):
        found = CHOICE.search(part or "")
        if found:
            return right_or_wrong(found.group(1) == gold, f"chose {found.group(1)}, wanted {gold}")
    letters = CHOICE.findall(text)
    if not letters:
        return Grade(0.0, "no letter stands alone")
    if CHOICE.match(text.lstrip()) and re.match(r"\W*[A-J]\W", text.lstrip() + "."):  # "B. Because A is ..."
        letters = letters[:1] if not re.match(r"[AI]\s+[a-z]", text.lstrip()) else letters  # "A cat ..." chooses none
    return right_or_wrong(letters[-1] == gold, f"chose {letters[-1]}, wanted {gold}")


def chrf(answer: Any, reply: str) -> Grade:
    """Character F-score of the reply to the nearest of the answers."""
    text = spoken(reply).strip()
    score = max(chrf_score(text, str(a)) for a in listed(answer))
    return Grade(score, f"chrF {100 * score:.1f}")


def chrf_score(hypothesis: str, reference: str, order: int = CHRF_ORDER, beta: float = CHRF_BETA) -> float:
    """chrF of one sentence, 0 to 1 (Popović 2015, equation 1): (1 + b^2) P R / (b^2 P + R).

    P and R are the shares of character n-grams of the hypothesis found in the reference, and the reverse, averaged
    over n = 1 to `order`, without n for which either text is too short; white space is left out.
    """
    a, b = "".join(hypothesis.split()), "".join(reference.split())
    precisions, recalls = [], []
    for n in range(1, order + 1):
        mine, theirs = (Counter(t[i : i + n] for i in range(len(t) - n + 1)) for t in (a, b))
        if mine and theirs:
            common = (mine & theirs).total()
            precisions.append(common / mine.total())
            recalls.append(common / theirs.total())
    if not precisions or not sum(precisions):
        return 0.0
    p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
    return (1 + beta**2) * p * r / (beta**2 * p + r)


def listed(answer: Any) -> list[Any]:
    """Answers of which each will do."""
    return answer if isinstance(answer, list) else [answer]


def folded(text: str) -> str:
    """Without case, with one form of each letter and single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


GRADERS: dict[str, Grader] = {
    "exact": exact,
    "contains": contains,
    "number": number,
    "math": math,
    "regex": regex,
    "choice": choice,
    "chrf": chrf,
}
