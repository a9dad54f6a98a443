"""What people say of replies, kept as rows that preference training reads as they are. No jax here."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from errors import UserError

Messages = Sequence[Mapping[str, Any]]


class Feedback:
    """Appends rows to a JSONL file; a row is there whole or not at all.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path):
        self._path, self._lock = path, threading.Lock()
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
        self._append("vote", model, prompt, {"completion": said(reply), "label": good})

    def correction(self, model: str, prompt: Messages, reply: str, better: str) -> None:
        """A reply and what it should have been: a pair, as DPO takes it (arXiv 2305.18290)."""
        self._append("correction", model, prompt, {"chosen": said(better), "rejected": said(reply)})

    def _append(self, kind: str, model: str, prompt: Messages, more: Mapping[str, Any]) -> None:
        row = {"prompt": list(prompt), **more, "kind": kind, "model": model, "time": int(time.time())}
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
