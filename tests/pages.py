"""The pages of the repository as data: links, inline code, blocks of code and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conftest import ROOT
from test_layout import files

from configs.override import config_docstring

PAGES = [path for path in files() if path.suffix == ".md"]
CONFIGS = [path for path in files() if path.suffix == ".py" and path.parent.as_posix() == "configs"]
FENCE = re.compile(
    r"^(?:<!-- (?P<mark>[^>]*?) -->\n)?```(?P<kind>[a-z]*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
RUN = "run"
"""`<!-- run -->` above a block of commands: the tests execute them."""
FROM = "from "
"""`<!-- from FILE -->` above a block of Python: it stands in that file, word for word."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its mark (the comment above it), its language, its text, and its first line's number."""

    mark: str
    kind: str
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    """A command of ours: the words after `qmax`, or after `python` for a benchmark (`-m` first)."""

    page: Path
    line: int
    words: tuple[str, ...]
    marked: bool

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def read(page: Path) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page."""
    text = read(page)
    return [
        Block(found["mark"] or "", found["kind"], found["text"], text.count("\n", 0, found.start("text")) + 1)
        for found in FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCE.sub("", read(page))


def links(page: Path) -> list[str]:
    """Where the links of a page lead."""
    return re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`(?!\])", "", prose(page)))


def anchors(page: Path) -> set[str]:
    """What headings of a page are called in links."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def inline(page: Path) -> list[str]:
    """Inline code of a page."""
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", prose(page))]


def commands() -> list[Command]:
    """Every command of ours in the blocks of all pages, and in what config files say of themselves."""
    found: list[Command] = []
    for page in PAGES:
        for block in blocks(page):
            if block.kind in ("", "sh", "bash"):
                found += in_shell(block.text, page, block.line, marked=block.mark == RUN)
    for page in CONFIGS:
        found += in_shell(config_docstring(ROOT / page), page, 1, marked=False)
    return found


def in_shell(text: str, page: Path, line: int, *, marked: bool) -> Iterator[Command]:
    """The commands of ours in lines of shell; others are passed over."""
    lines = text.split("\n")
    while lines:
        number, whole = line, lines.pop(0).strip()
        line += 1
        while whole.endswith("\\") and lines:
            whole = f"{whole[:-1]} {lines.pop(0).strip()}"
            line += 1
        words = [word for word in split(whole) if word != "&"]
        while words and re.match(r"[A-Z_]+=", words[0]):
            words.pop(0)
        benchmark = words[:2] == ["python", "-m"] and words[2].split(".")[0] == "bench"
        if benchmark or words[:1] in (["./run.sh"], ["qmax"]):
            yield Command(page, number, tuple(words[1:]), marked)


def split(line: str) -> list[str]:
    """Words of a line of shell; none where it is no line of its own (a tree, a picture)."""
    try:
        return shlex.split(line, comments=True)
    except ValueError:
        return []
