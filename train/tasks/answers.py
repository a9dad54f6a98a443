"""Where a reply's answer stands: within \\boxed{}, after a phrase, or its last number."""

from __future__ import annotations

import re
from fractions import Fraction

NUMBER = re.compile(r"(?<![\w.])-?\$?-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?![\d])|(?<![\w.])-?\.\d+")
LONGEST_NUMBER = 400
"""Characters."""


def boxed(text: str) -> str | None:
    """What the last \\boxed{...} or \\fbox{...} holds, braces balanced; None where there is none."""
    starts = list(re.finditer(r"\\(?:boxed|fbox)\s*(\{|(?=[^\s{]))", text))
    closing = _pairs(text) if starts else {}
    for match in reversed(starts):
        if not match.group(1):
            short = re.match(r"\\?\w+", text[match.end() :])
            if short:  # \boxed 5
                return short.group()
            continue
        if (end := closing.get(match.end() - 1)) is not None:
            return text[match.end() : end].strip()
    return None


def _pairs(text: str) -> dict[int, int]:
    """Where the brace closes that opens at a place, in one pass: a reply may open thousands and close none."""
    found, opened = {}, []
    for at, letter in enumerate(text):
        if letter in "{}" and text[at - 1 : at] != "\\":
            if letter == "{":
                opened.append(at)
            elif opened:
                found[opened.pop()] = at
    return found


def to_number(text: str) -> Fraction | None:
    """A decimal numeral, with or without thousands' commas, `$` and `%`, as an exact number; None for anything else."""
    plain = text.strip("$% \n\t").rstrip(".").replace("$", "").replace("\\", "").replace("−", "-")
    plain = re.sub(r"^([-+]?\d{1,3}(?:,\d{3})+)(?![\d,])", lambda m: m.group().replace(",", ""), plain)
    if len(plain) > LONGEST_NUMBER or not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)(/\d+)?", plain, re.ASCII):
        return None
    try:
        whole, slash, below = plain.partition("/")
        return Fraction(whole) / int(below) if slash else Fraction(whole)
    except (ValueError, ZeroDivisionError):
        return None


def final_number(text: str) -> Fraction | None:
    """The number a reply ends with: that after the last "####", within the last \\boxed{}, or else the last one."""
    _, marked, rest = text.rpartition("####")
    if marked and (found := NUMBER.search(rest)):
        return to_number(found.group())
    inside = boxed(text)
    if inside is not None:
        whole = to_number(inside)
        if whole is not None:
            return whole
        text = inside
    numbers = NUMBER.findall(text.replace("−", "-"))
    return to_number(numbers[-1]) if numbers else None
