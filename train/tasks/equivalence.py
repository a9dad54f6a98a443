"""Whether two answers of mathematics mean the same: numbers, expressions, lists, sets, intervals, matrices."""

from __future__ import annotations

import re

from train.tasks.answers import to_number
from train.tasks.latex import NotAnExpressionError, close, same_value, value_at

OPEN, CLOSE = "([{", ")]}"
LONGEST = 1000
"""Characters of an answer."""
SILENT = re.compile(r"\\left|\\right|(?<!\\)\\[!,;: ]|\\(?:quad|displaystyle|big|Big|bigg|Bigg)[lr]?(?![A-Za-z])|~|\$")
UNIT = re.compile(r"\s*\\(?:text|mbox|mathrm|textrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?$")
WRAPPED = re.compile(r"\\(?:text|mbox|mathrm|textbf|textit|mathbf|textrm|operatorname)\s*\{([^{}]*)\}")
MATRIX = re.compile(r"\\begin\{([pbvB]?matrix|array)\}(?:\{[^{}]*\})?(.*?)\\end\{\1\}")
GROUPED = re.compile(r"(?<![\d.,])(\d{1,3}(?:,\d{3})+)(?![\d,])")


def normal(text: str) -> str:
    """An answer without what changes no meaning: spacing, units, degrees, dollars, the name before `=` or `\\in`."""
    text = SILENT.sub(
        "", re.sub(r",\\!\s*", "", text).replace("\\$", "").replace("\\%", "").replace("%", "").replace("\\\n", " ")
    ).strip()
    text = text.rstrip(".").strip()
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|°|\\degree", "", text)
    while (shorter := UNIT.sub("", text)).strip() and shorter != text:
        text = shorter
    text = WRAPPED.sub(r"\1", text)
    text = re.sub(r"\\[dtc]frac", r"\\frac", text).replace("\\lbrace", "\\{").replace("\\rbrace", "\\}")
    text = text.replace("\\{", "{").replace("\\}", "}").replace("\\mp", "\\pm").replace("±", "\\pm")
    text = text.replace("∞", "\\infty").replace("∪", "\\cup").replace("\\leq", "\\le").replace("\\geq", "\\ge")
    text = re.sub(r"_\{(\w)\}", r"_\1", text)
    text = re.sub(r"^\s*[A-Za-z]\s*(?:=|\\in(?![a-z]))\s*", "", text) if text.count("=") <= 1 else text
    return re.sub(r"\s+", " ", text).strip()


def equivalent(gold: str, given: str) -> bool:
    """Whether `given` says what `gold` says. Never raises, and takes milliseconds whatever the texts are."""
    if len(given) > LONGEST:
        return False
    try:
        return _same_equation(gold, given) or _same(normal(gold), normal(given))
    except (ValueError, ArithmeticError, RecursionError):
        return False


def _same(a: str, b: str) -> bool:
    if _letters(a) == _letters(b):
        return True
    x, y = to_number(_ungrouped(a)), to_number(_ungrouped(b))
    if x is not None and y is not None:
        return x == y
    if (first := _matrix(a)) is not None and (second := _matrix(b)) is not None:
        return len(first) == len(second) and all(map(_same_in_order, first, second))
    for mark in ("\\cup", "\\text{ or }", " or ", " and "):
        if mark in a or mark in b:
            return _same_in_any_order(_parts(a.split(mark)), _parts(b.split(mark)))
    inner, other = _inside(a), _inside(b)
    if inner and other:
        items, others = _list(inner[1]), _list(other[1])
        if len(items) > 1 or len(others) > 1 or inner[0] == "{":
            same = _same_in_any_order if inner[0] == "{" else _same_in_order
            return (inner[0], inner[2]) == (other[0], other[2]) and same(items, others)
    items, others = _list(a), _list(b)
    if len(items) > 1 or len(others) > 1:
        return _same_in_any_order(items, others)
    return same_value(_ungrouped(a), _ungrouped(b))


def _letters(text: str) -> str:
    """For comparing words: no spaces, no case, no parentheses about a single letter."""
    plain = re.sub(r"\s", "", text)
    single = re.fullmatch(r"\(([A-Za-z])\)", plain)
    plain = single.group(1) if single else plain
    return plain.lower() if re.fullmatch(r"[A-Za-z]{2,}", plain) else plain.upper() if len(plain) == 1 else plain


def _ungrouped(text: str) -> str:
    """Numbers without commas between thousands: 58,500. A list has spaces after them, or groups of other lengths."""
    return GROUPED.sub(lambda m: m.group().replace(",", ""), text) if GROUPED.fullmatch(text.strip()) else text


def _parts(parts: list[str]) -> list[str]:
    return [part.strip() for part in parts if part.strip()]


def _split(text: str) -> list[str]:
    """At commas that stand in no bracket."""
    depth, start, parts = 0, 0, []
    for at, letter in enumerate(text):
        depth += (letter in OPEN) - (letter in CLOSE)
        if letter in ",;" and depth == 0:
            parts.append(text[start:at])
            start = at + 1
    return _parts([*parts, text[start:]])


def _inside(text: str) -> tuple[str, str, str] | None:
    """Opening bracket, content, closing bracket, where one pair is about all of the text."""
    if len(text) < 2 or text[0] not in OPEN or text[-1] not in CLOSE:
        return None
    depth = 0
    for at, letter in enumerate(text):
        depth += (letter in OPEN) - (letter in CLOSE)
        if depth == 0 and at < len(text) - 1:
            return None
    return text[0], text[1:-1], text[-1]


def _list(text: str) -> list[str]:
    """What stands between commas; a ± b is two."""
    parts = _split(_ungrouped(text))
    return [part.replace("\\pm", sign) for part in parts for sign in ("+-" if "\\pm" in part else "+")]


def _matrix(text: str) -> list[list[str]] | None:
    found = MATRIX.fullmatch(text)
    if not found:
        return None
    return [_parts(row.split("&")) for row in re.split(r"\\\\", found.group(2)) if row.strip()]


def _same_in_order(a: list[str], b: list[str]) -> bool:
    return len(a) == len(b) and all(map(_same, a, b))


def _same_in_any_order(a: list[str], b: list[str]) -> bool:
    if len(a) != len(b) or len(a) > 50:
        return False
    rest = list(b)
    for item in a:
        match = next((other for other in rest if _same(item, other)), None)
        if match is None:
            return False
        rest.remove(match)
    return True


def _same_equation(a: str, b: str) -> bool:
    """Whether two equations say the same: their differences of sides are proportional, by a constant."""
    sides = [SILENT.sub("", text).strip(" .").split("=") for text in (a, b)]
    if any(len(pair) != 2 or not all(side.strip() for side in pair) for pair in sides):
        return False
    ratio = None
    for point in range(4):
        try:
            first, second = (value_at(left, point) - value_at(right, point) for left, right in sides)
            found = first / second
        except ZeroDivisionError:
            return False
        except NotAnExpressionError:
            return False
        if ratio is not None and not close(ratio, found):
            return False
        ratio = found
    return True
