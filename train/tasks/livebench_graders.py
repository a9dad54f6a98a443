"""Graders of LiveBench's tasks that are plain functions of the ground truth, as its process_results has them.

Each takes the ground truth and a reply without thoughts, and gives a score from 0 to 1. What a reply may look like is
a matter of each task: words in bold, within <solution>, in \\boxed{}, or at its end.
"""

from __future__ import annotations

import ast
import difflib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from train.tasks.answers import boxed

SOLUTION = re.compile(r"<solution>(.*?)</solution>")
BADLY_OPENED = re.compile(r"</solution>(.*?)</solution>")
LOOSE = re.compile(r"<solution>(.*?)</solution>", re.DOTALL | re.IGNORECASE)
BOLD = re.compile(r"\*\*(.*?)\*\*")
NUMBERS_TEXT = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen twenty
"""
NUMBERS = NUMBERS_TEXT.split()
LONGEST = 20_000
"""Characters of a reply that are looked at, at its end: some of these patterns take time that grows with the square."""


def plain_box(text: str) -> str | None:
    """What the last \\boxed{} holds, without \\text and braces."""
    inside = boxed(text)
    return None if inside is None else re.sub(r"\\text(?:bf)?\{|\\mathbf\{|\}|\\", "", inside.replace("$", ""))


def distance(a: Sequence[Any], b: Sequence[Any]) -> int:
    """Levenshtein's: how many insertions, removals and replacements of items make one the other."""
    row = list(range(len(b) + 1))
    for i, item in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (item != other))
    return row[-1]


def all_and_share(right: int, total: int) -> float:
    """Half for the share that is right, half for all of them being so."""
    return ((right == total) + right / total) / 2


def contest_choice(truth: str, reply: str, question: str) -> float:
    """AMC and SMC: a letter from A to E, repeated, in <solution>, boxed or last; or its value at the end."""
    if truth not in tuple("ABCDE"):
        raise ValueError(f"{truth!r} is no letter from A to E")
    said = SOLUTION.findall(reply)
    if said and set(said[-1].lower()) == {truth.lower()}:
        return 1.0
    if truth * 4 in reply or (plain_box(reply) or "").lower() == truth.lower():
        return 1.0
    choices = dict(re.findall(r"\\textbf\{\(([A-E])\)\s?\}(.*?)(?:\\qquad|\$)", question))
    value = choices.get(truth, "").strip().strip("$").strip("~")
    if value and value in reply[-20 - len(value) :]:
        return 1.0
    line = reply.strip().split("\n")[-1]
    inside = re.search(r"\(([^()]*)\)", line)
    found = {line.strip().replace("*", "").lower(), inside.group(1).lower() if inside else ""}
    return float(truth.lower() in found)


def aime(truth: str, reply: str) -> float:
    """The whole number stands in the last 50 characters."""
    return float(truth in reply[-50:])


def rearrangement(truth: str, reply: str) -> float:
    """Olympiads: numbers of formulas in the order of a proof, after "answer:", boxed, on the last line, or anywhere."""
    wanted = [int(n) for n in truth.split(",")]
    found = next(filter(None, _orders(reply)), [])
    return 1 - distance(found, wanted) / max(len(found), len(wanted))


def _orders(reply: str) -> Iterator[Sequence[int | None]]:
    """Orders that a reply may mean, the likeliest first; some are empty."""
    lines = reply.lower().strip().split("\n")
    for at, line in reversed(list(enumerate(lines))):
        if "answer:" in line:
            after = line.split("answer:")[1].replace("*", "").strip(" .")
            yield _numbers(after if after or at + 1 == len(lines) else lines[at + 1])
            break
    yield _numbers(plain_box(reply) or "")
    parts = [re.search(r"\d{1,9}", part) for part in lines[-1].split(",")]
    yield [int(part.group()) for part in parts if part]
    found = []
    for at, part in enumerate(reply.lower().split("answer:")[-1].split(",")):
        number = re.search(r"\d{1,9}", part)
        found += [int(number.group())] if number else []
        if at and not (number and number.group() == part.strip()):
            break
    yield found


def _numbers(text: str) -> list[int | None]:
    """Numbers between commas, None where there is no number; empty where there is none at all."""
    parts = [re.sub(r"[$<>{}\\*.]|boxed", "", part).split() for part in text.split(",")]
    found = [int(words[-1]) if words and re.fullmatch(r"\d{1,9}", words[-1]) else None for words in parts]
    return found if any(n is not None for n in found) else []


def yes_no(truth: str, reply: str) -> float:
    """Web of lies, version 2: three of yes, no and unknown, in <solution>, in bold, boxed, or as a plain list."""
    said = SOLUTION.findall(reply) or BADLY_OPENED.findall(reply)
    words = [w.lower().strip(",. ") for part in BOLD.findall(reply) for w in part.split()]
    bold = ", ".join([w for w in words if w in ("yes", "no", "unknown")][-3:])
    answer = said[-1] if said else bold
    answer = answer if answer.strip() else _boxed_or_listed(reply)
    count = sum(answer.count(word) for word in ("yes", "no", "unknown"))  # "unknown" holds "no", as in the original
    return float(answer == truth.lower() or (count == 3 and truth.lower() in answer))


def yes_no_shares(truth: str, reply: str) -> float:
    """Web of lies, version 3: half for each word's share, half for all of them."""
    said = SOLUTION.findall(reply)
    answer = said[-1] if said and said[-1].strip() else _boxed_or_listed(reply)
    wanted, found = truth.split(","), answer.split(",")
    return all_and_share(sum(map(str.__eq__, wanted, found)), len(wanted))


def _boxed_or_listed(reply: str) -> str:
    """What is boxed, else the last "a, b, c" of yes, no and unknown whose first place in the reply comes latest."""
    if (inside := plain_box(reply.replace("\\textbf{", "\\boxed{"))) is not None:
        return inside
    lists = [", ".join(words) for words in itertools.product(("yes", "no", "unknown"), repeat=3)]
    text = reply.lower()
    best = max(lists, key=text.find)
    return best if best in text else ""


def houses(truth: str, reply: str) -> float:
    """Names in order: the last words in bold, or all within the last piece of bold."""
    bold = [inside for _, inside in re.findall(r"(\*{2,}+)(.*?)\1", reply.lower())]
    names = truth.lower().split(" ")
    if not bold:
        return 0.0
    if len(bold) >= len(names) and all(map(str.__eq__, bold[-len(names) :], names)):
        return 1.0
    places = [bold[-1].find(name) for name in names]
    return float(min(places) >= 0 and all(a < b for a, b in itertools.pairwise(places)))


def zebra_old(truth: str, reply: str) -> float:
    """Before 2024-11-25: the last word in ***triple bold***, or else the last word; digits may stand for words."""
    words = re.findall(r"\*\*\*(\w+)\*\*\*", reply) or re.findall(r"\w+", reply)
    last = words[-1].lower() if words else ""
    word = NUMBERS[int(last)] if re.fullmatch("[1-9]", last) else last
    return float(truth.lower() in (last, word, f"{last} movies"))


def zebra(truth: str, reply: str) -> float:
    """Several words between commas: half for each one's share, half for all of them."""
    wanted = truth.split(",")
    said = SOLUTION.findall(reply) or BADLY_OPENED.findall(reply) or list(filter(None, [plain_box(reply)]))
    line = reply.strip().split("\n")[-1]
    if not said and line.count(",") == len(wanted) - 1:
        said = [line]
    words = [word for text in said for word in text.split(",")]
    words = words[-len(wanted) :] if len(said) > 1 else words
    pairs = zip(map(_zebra_word, wanted), map(_zebra_word, words), strict=False)
    return all_and_share(sum(a in b.replace("position", "") for a, b in pairs), len(wanted)) if said else 0.0


def _zebra_word(text: str) -> str:
    return text.strip().lower().replace("-", " ")


def spatial(truth: str, reply: str) -> float:
    """A word or number among the last three pieces of bold, or boxed; numbers may be words."""
    wanted = truth.strip().lower()
    for word in (text.strip().lower() for text in re.findall(r"\*\*([^*]+)\*\*", reply)[-3:]):
        if word == wanted or (word in NUMBERS and str(NUMBERS.index(word)) == wanted):
            return 1.0
        shape = wanted in ("tetrahedra", "tetrahedron", "triangle", "square")
        if shape and wanted in word and len(word) < 2 * len(wanted) + 5:  # "two tetrahedra", "equilateral triangle"
            return 1.0
    return float(truth in (reply, plain_box(reply)))


def said_word(truth: str, reply: str) -> float:
    """Theory of mind: the answer is in <solution>, or on the last line."""
    said = LOOSE.findall(reply) or [reply.strip().split("\n")[-1]]
    return float(truth.strip().lower() in re.sub(r"[.,!?;:]", "", said[-1].strip().lower()))


def position(truth: Sequence[int] | str, reply: str) -> float:
    """Logic with navigation: two whole numbers in the last <solution>."""
    wanted = json.loads(truth) if isinstance(truth, str) else list(truth)
    said = LOOSE.findall(reply)
    pair = r"(-?\d{1,12})\s*,\s*(-?\d{1,12})"
    found = (re.search(rf"\(\s*{pair}\s*\)", said[-1]) or re.search(pair, said[-1])) if said else None
    return float(found is not None and [int(n) for n in found.groups()] == wanted)


def sudoku(truth: str, reply: str) -> float:
    """The first <solution>, without white space."""
    said = LOOSE.findall(reply)
    return float("".join(said[0].split()) == "".join(truth.split())) if said else 0.0


def typos(truth: str, reply: str) -> float:
    """The corrected text stands in the last <solution>, or in the reply."""
    said = SOLUTION.findall(reply)
    text = said[-1] if said else re.sub("</?solution>", "", reply)
    if not said and (marked := re.search(r"^.* --- (.*?) --- ", text, re.MULTILINE)):
        text = marked.group(1)
    return float(truth in " ".join(filter(None, text.strip().split("\n"))))


def grouped(words: Sequence[str]) -> list[set[str]]:
    """Words by four different ones, as a set each."""
    groups: list[set[str]] = [set()]
    for word in words:
        if len(groups[-1]) == 4:
            groups.append(set())
        groups[-1].add(word.strip().lower())
    return groups


def connections(truth: str, reply: str) -> float:
    """The share of groups of four that are right, in <solution> or boxed."""
    flat = reply.replace("\n", "")
    said = SOLUTION.findall(reply) or SOLUTION.findall(flat) or BADLY_OPENED.findall(flat)
    said = said or list(filter(None, [plain_box(reply)]))
    wanted = truth.split(",")
    words = [word for text in said for word in text.replace("\n", "").split(",")]
    groups = grouped(words[-len(wanted) :] if len(said) > 1 else words)
    right = grouped(wanted)
    return min(1.0, sum(group in right for group in groups) / len(right))


def connections_old(truth: str, reply: str) -> float:
    """Before 2024-11-25: the best piece of bold."""
    right = grouped(truth.split(","))
    tries = [grouped(text.split(",")) for text in BOLD.findall(reply.replace("\n", ""))]
    return max((sum(any(r <= g for g in groups) for r in right) / len(right) for groups in tries), default=0.0)


def plot(truth: str, reply: str) -> float:
    """Sentences in their order: 1 less the edit distance of the order over how many there are."""
    body = re.search(r"<PLOT_SUMMARY>(.*)</PLOT_SUMMARY>|<PLOT_SUMMARY>(.*)", reply, re.DOTALL)
    wanted, found = (
        [s.strip() for s in text.split(".") if s.strip() not in ("", "**End of Plot Summary**", "</PLOT_SUMMARY>")]
        for text in (truth, (body.group(1) or body.group(2) or "") if body else reply)
    )
    nearest = [difflib.get_close_matches(sentence, found, n=1, cutoff=0.0) for sentence in wanted]
    order = [found.index(match[0]) for match in nearest if match]
    return 1 - distance(range(len(wanted)), order) / len(wanted)


def column_type(truth: str, reply: str) -> float:
    """Column type annotation: the reply, or what is boxed, ends with the answer; letters and digits alone count."""
    wanted, found = (re.sub(r"\W", "", text.lower()) for text in (truth, plain_box(reply) or reply))
    return float(bool(wanted) and found.endswith(wanted))


def table_join(truth: dict[str, Any] | str, reply: str) -> float:
    """A mapping of columns, written as a dict: F1 of its pairs, to two places."""
    wanted = ast.literal_eval(truth) if isinstance(truth, str) else truth
    found = {key: value for key, value in _mapping(reply).items() if value is not None}
    right = sum(wanted.get(key) == value for key, value in found.items())
    wrong = len(found) - right
    missed = sum(key not in found or found[key] != value for key, value in wanted.items())
    return round(2 * right / (2 * right + wrong + missed), 2) if found else 0.0


def _mapping(text: str) -> dict[Any, Any]:
    """The dict in a <solution>, a fence or \\boxed{}, or that is the text."""
    said = re.findall(r"<solution>(.*?)</solution>", text, re.DOTALL)
    inner = said[-1].strip() if said else text
    flat = inner.replace("\n", "")
    fences = next(filter(None, (re.findall(f"```{kind}(.*?)```", flat) for kind in ("python", "json", ""))), [])
    box = boxed(inner)
    candidates = [inner, *fences[-1:]]
    if box:
        candidates.append(re.sub(r"\\text\{['\"](.*?)['\"]\}", r"'\1'", box).replace("\\", ""))
    for candidate in candidates:
        try:
            value = ast.literal_eval(candidate.strip().replace("\n", "").replace("null", "None"))
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        if isinstance(value, dict):
            return value
    return {}


def events(truth: list[dict[str, Any]] | str, reply: str) -> float:
    """Consecutive events: Jaccard's index of pairs of user and months, in a <solution> of JSON."""
    wanted = json.loads(truth) if isinstance(truth, str) else truth
    said = LOOSE.findall(reply)
    try:
        rows = json.loads(said[-1]) if said else None
    except (ValueError, RecursionError):
        return 0.0
    if not isinstance(rows, list):
        return 0.0
    key, value = "user_id", "max_consecutive_growth_months"
    gold = {json.dumps(row[key]): row[value] for row in wanted}
    found = {json.dumps(row[key]): row.get(value) for row in rows if isinstance(row, dict) and key in row}
    right = sum(found.get(user) == months for user, months in gold.items())
    union = len(gold) + len(found) - right  # a wrong value is both a false positive and a false negative
    return round(right / union, 4) if union else 1.0
