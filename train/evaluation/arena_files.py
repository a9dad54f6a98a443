"""Arena-Hard's questions, answers and judgments, in the files of lmarena/arena-hard-auto (arXiv 2406.11939).

A row that is written is one line, added at the end and forced to the disk: a killed run leaves at most one torn line,
the last, which is dropped when the file is read or added to.
"""

from __future__ import annotations

import functools
import json
import os
import re
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from errors import UserError, did_you_mean
from train.data.sources import scan
from train.data.system import explain_disk, say
from train.tasks.rows import take
from train.tasks.task import spoken

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PROMPTS = Path(__file__).with_name("arena_prompts.json")
_ADDING = threading.Lock()
"""A line at a time, whoever answers at once."""


@functools.cache
def prompts() -> dict[str, Any]:
    """Of each category the baseline and the judge's instructions, and the form of its question; a data file."""
    return json.loads(PROMPTS.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class ArenaQuestion:
    """What is asked. `where` is the row's `file:line`."""

    uid: str
    category: str
    subcategory: str
    prompt: str
    where: str = ""


@dataclass(frozen=True)
class Style:
    """What a reader sees of an answer at a glance: its length, and its headers, list items and bold words.

    tokens: o200k_base tokens, as the official files count them; None where nobody counted.
    """

    tokens: int | None
    headers: int
    lists: int
    bold: int


@dataclass(frozen=True)
class Answer:
    """A model's answer to a question, without thoughts. `where` is the row's `file:line`."""

    uid: str
    model: str
    text: str
    style: Style
    where: str = ""


@dataclass(frozen=True)
class Game:
    """One verdict. In the first game of a question the baseline is A, in the second the model is.

    score: the verdict, such as `A>>B`; None where what the judge said holds none.
    """

    score: str | None
    judgment: dict[str, Any]
    prompt: list[dict[str, Any]]


@dataclass(frozen=True)
class Judgment:
    """Both games of a question; None in the place of a game that the judge never answered."""

    uid: str
    category: str
    judge: str
    model: str
    baseline: str
    games: tuple[Game | None, Game | None]
    where: str = field(default="", compare=False)


def read_questions(path: str | Path) -> list[ArenaQuestion]:
    """The questions of a file, in its order.

    Raises UserError, naming file and line, for a malformed row, an unknown category, a uid that is there twice.
    """
    found: dict[str, ArenaQuestion] = {}
    known = prompts()["categories"]
    for row, where in _rows(path):
        uid, category = take(row, where, "uid"), take(row, where, "category")
        if category not in known:
            hint = did_you_mean(category, known) or f"; there is {', '.join(known)}"
            raise UserError(f"{where}: no category is called {category!r}{hint}")
        if uid in found:
            raise UserError(f"{where}: question {uid} is at {found[uid].where} already; leave one of them out")
        found[uid] = ArenaQuestion(uid, category, row.get("subcategory") or "", take(row, where, "prompt"), where)
    if not found:
        raise UserError(f"{path} has no question in it; fetch Arena-Hard's question.jsonl again")
    return list(found.values())


def read_answers(path: str | Path) -> dict[str, Answer]:
    """Of each question's uid the answer; of several the last. Raises UserError, naming file and line."""
    found: dict[str, Answer] = {}
    for row, where in _rows(path):
        uid, model, messages = take(row, where, "uid"), take(row, where, "model"), take(row, where, "messages", list)
        content = messages[-1].get("content") if messages and isinstance(messages[-1], dict) else None
        text = content.get("answer") if isinstance(content, dict) else content
        if not isinstance(text, str):
            raise UserError(f"{where}: the last of 'messages' has no text as its content nor as its content's 'answer'")
        found[uid] = Answer(uid, model, text, _style(row.get("metadata"), text, where), where)
    return found


def read_baseline(questions: Sequence[ArenaQuestion], paths: Sequence[str | Path]) -> dict[str, Answer]:
    """The answers to beat: of each question that of its category's official baseline, else the first file's.

    What is not compared with the official baseline is said on stderr: its scores stand beside no published ones.
    Raises UserError for a question that no file answers.
    """
    files = [read_answers(path) for path in paths]
    found: dict[str, Answer] = {}
    others: dict[str, str] = {}
    for question in questions:
        official = prompts()["categories"][question.category]["baseline"]
        here = [answers[question.uid] for answers in files if question.uid in answers]
        if not here:
            raise UserError(
                f"{question.where}: no baseline answers question {question.uid}; its category {question.category} "
                f"is compared with {official}: name the file of its answers beside {', '.join(map(str, paths))}"
            )
        found[question.uid] = next((answer for answer in here if answer.model == official), here[0])
        if found[question.uid].model != official:
            others[question.category] = found[question.uid].model
    for category, model in others.items():
        official = prompts()["categories"][category]["baseline"]
        say(f"{category} is compared with {model}; published scores are with {official}")
    return found


def read_judgments(path: str | Path) -> list[Judgment]:
    """The judgments of a file, in its order; of several of one question the last. Raises UserError."""
    found: dict[str, Judgment] = {}
    for row, where in _rows(path):
        names = {key: take(row, where, key) for key in ("uid", "category", "judge", "model", "baseline")}
        games = take(row, where, "games", list)
        if len(games) != 2 or not all(game is None or (isinstance(game, dict) and "score" in game) for game in games):
            raise UserError(f"{where}: 'games' is no list of two games, each with a 'score' or null")
        first, second = (
            game and Game(game["score"], game.get("judgment") or {}, game.get("prompt") or []) for game in games
        )
        found[names["uid"]] = Judgment(**names, games=(first, second), where=where)
    return list(found.values())


def write_answer(
    path: str | Path, question: ArenaQuestion, model: str, reply: str, *, tokens: int | None = None
) -> Answer:
    """Adds a model's reply to its file, without the thoughts in it.

    Args:
        tokens: how long the reply without thoughts is in tokens of o200k_base, where the caller can tell. A count by
            another tokenizer does not compare with the official files' and must not be given; without one the row has
            no `token_len`, which the official utils/add_markdown_info.py adds.

    Raises:
        UserError: the disk is full, or may not be written to.
    """
    text = spoken(reply)
    style = _style(None if tokens is None else {"token_len": tokens}, text, "")
    row = {
        "uid": question.uid,
        "ans_id": uuid.uuid4().hex,
        "model": model,
        "messages": [
            {"role": "user", "content": question.prompt},
            {"role": "assistant", "content": {"answer": text}},
        ],
        "tstamp": time.time(),
        "metadata": ({} if tokens is None else {"token_len": tokens}) | markdown_counts(text),
    }
    append_row(Path(path), row)
    return Answer(question.uid, model, text, style, str(path))


def judgment_row(judgment: Judgment) -> dict[str, Any]:
    """A judgment as the official file has it."""
    games = [
        game and {"score": game.score, "judgment": game.judgment, "prompt": game.prompt} for game in judgment.games
    ]
    names = ("uid", "category", "judge", "model", "baseline")
    return {**{name: getattr(judgment, name) for name in names}, "games": games}


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    """Marks of Markdown outside of code: headers by level, list items and bold words by kind, as in `metadata`."""
    for block in re.findall(r"```([^`]*)```", text):
        text = text.replace(block, "")

    def count(pattern: str) -> int:
        return len(re.findall(pattern, text, re.MULTILINE))

    return {
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a row of JSON to a file, on the disk when this returns; what a killed run left of a line is cut off."""
    line = json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
    with explain_disk(path, "free some and start again: what is written already is kept"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _ADDING, path.open("ab+") as file:
            _end_line(file)
            file.write(line)
            file.flush()
            os.fsync(file.fileno())


def _end_line(file: Any) -> None:
    """Cuts a torn last line off a file that is open for adding; a whole one that only lacks its end gets it."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return
    file.seek(0)
    data = file.read()
    tail = data[data.rfind(b"\n") + 1 :]
    try:
        json.loads(tail)
        file.write(b"\n")
    except ValueError:
        file.truncate(size - len(tail))


def _rows(path: str | Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Rows of a file and where each stands; a torn last line is left out, any other malformed one is a UserError."""
    file = Path(path).expanduser()
    if not file.is_file():
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(f"there is no file {path}{did_you_mean(file.name, siblings)}")
    if not file.name.endswith(SUFFIXES):
        raise UserError(f"{path} is none of {', '.join(SUFFIXES)}; convert it to one row of JSON a line")
    broken = ""
    for row in scan(file):
        if broken:
            raise UserError(broken)
        if row.problem:
            broken = f"{row.where}: {row.problem}; mend the line or take it out"
        else:
            yield row.value, row.where
    if broken and not _is_torn(file):
        raise UserError(broken)


def _is_torn(path: Path) -> bool:
    """Whether the last line has no end: it was being written when its writer was killed."""
    if path.suffix != ".jsonl":
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


def _style(metadata: Any, text: str, where: str) -> Style:
    """The style that a row states, and where it states none that of its text."""
    stated = metadata if isinstance(metadata, dict) else {}
    tokens, counts = stated.get("token_len"), {**markdown_counts(text), **stated}
    try:
        headers, lists, bold = (
            int(sum(counts[name].values())) for name in ("header_count", "list_count", "bold_count")
        )
        return Style(None if tokens is None else int(tokens), headers, lists, bold)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{where}: 'metadata' has other counts than token_len, header_count, list_count and bold_count ({error})"
        ) from error
