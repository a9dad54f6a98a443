"""What people say of replies, kept as rows that preference training reads as they are. No jax here."""

from __future__ import annotations

import json
import os
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from errors import UserError

Messages = Sequence[Mapping[str, Any]]
Winner = Literal["a", "b", "tie", "both_bad"]


class Feedback:
    """Appends rows to a JSONL file; a row is there whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.Lock()
        self._counted, self._verdicts = 0, Counter[tuple[str, str, str]]()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise UserError(f"cannot write feedback to {path}: {error.strerror}") from error
        size = os.fstat(self._file).st_size
        if size and os.pread(self._file, 1, size - 1) != b"\n":  # a row that was cut off stays one line of its own
            os.write(self._file, b"\n")

    def vote(self, model: str, prompt: Messages, reply: str, good: bool) -> None:
        """A reply was good, or not: a row without a pair, as KTO takes it (arXiv 2402.01306)."""
        self._append("vote", prompt, {"completion": said(reply), "label": good}, {"model": model})

    def correction(self, model: str, prompt: Messages, reply: str, better: str) -> None:
        """A reply and what it should have been: a pair, as DPO takes it (arXiv 2305.18290)."""
        self._append("correction", prompt, {"chosen": said(better), "rejected": said(reply)}, {"model": model})

    def arena(self, models: tuple[str, str], prompt: Messages, replies: tuple[str, str], winner: Winner) -> None:
        """Two replies, A's and B's, and which is better: a pair, as DPO takes it.

        Where neither is, there is no pair, and the row has none: the replies are kept under a name of their own.
        """
        a, b = map(said, replies)
        pairs = {"a": {"chosen": a, "rejected": b}, "b": {"chosen": b, "rejected": a}}
        words = pairs.get(winner, {"replies": {"a": a, "b": b}})
        self._append("arena", prompt, words, {"models": dict(zip("ab", models, strict=True)), "winner": winner})

    def verdicts(self) -> Counter[tuple[str, str, str]]:
        """How often model A and model B got which verdict in the arena, as the file says now.

        Lines that are no rows of the arena are passed over.
        """
        with self._lock:
            size = os.fstat(self._file).st_size
            if size < self._counted:  # somebody has put another file in its place, or taken rows away
                self._counted, self._verdicts = 0, Counter()
            lines = os.pread(self._file, size - self._counted, self._counted).split(b"\n")[:-1]
            self._counted += sum(len(line) + 1 for line in lines)
            self._verdicts.update(filter(None, map(verdict, lines)))
            return self._verdicts.copy()

    def _append(self, kind: str, prompt: Messages, words: Mapping[str, Any], about: Mapping[str, Any]) -> None:
        row = {"prompt": list(prompt), **words, "kind": kind, **about, "time": int(time.time())}
        line = (json.dumps(row, ensure_ascii=False) + "\n").encode(errors="replace")  # halves of characters
        with self._lock:
            before = os.fstat(self._file).st_size
            if os.write(self._file, line) != len(line):
                os.ftruncate(self._file, before)
                raise OSError(f"{self._path} took only part of a row")
            os.fsync(self._file)


def said(text: str) -> list[dict[str, str]]:
    """An assistant's message."""
    return [{"role": "assistant", "content": text}]


def verdict(line: bytes) -> tuple[str, str, str] | None:
    """Model A, model B and the winner of a row of the arena; None for any other line."""
    if b'"arena"' not in line:
        return None
    try:
        row = json.loads(line)
        found = (row["models"]["a"], row["models"]["b"], row["winner"])
        right = row["kind"] == "arena" and all(isinstance(one, str) for one in found) and found[2] in get_args(Winner)
    except (ValueError, LookupError, TypeError):
        return None
    return found if right else None
