"""A file of JSON rows with keys: kept as they come, and in the end in order."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from errors import UserError


class RowFile:
    """Rows of a measurement, in a `with` block.

    known: rows by key: those of an earlier run of the same model, and what was added.

    Args:
        path: the file. A torn last line, as a kill leaves it, is dropped, as are rows of other models.
        model: its fingerprint.
        keys: of the rows, in the order that the finished file has; what was asked otherwise stands behind them.

    Raises:
        UserError: the file cannot be written.
    """

    def __init__(self, path: Path, model: str, keys: Sequence[str]):
        self.path, self._model, self._keys = path, model, keys
        self.known: dict[str, dict[str, Any]] = {}
        self._file: TextIO | None = None

    def __enter__(self) -> RowFile:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for line in self.path.read_text(encoding="utf-8").split("\n") if self.path.exists() else ():
                row = _parsed(line)
                if row is not None and row.get("model") == self._model:
                    self.known[row["key"]] = row
            self._write()
            self._file = self.path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{self.path} cannot be written ({error.strerror}); give --out another place") from error
        return self

    def add(self, key: str, row: dict[str, Any]) -> None:
        """Keeps a row."""
        assert self._file is not None
        self.known[key] = {"key": key, "model": self._model, **row}
        self._file.write(json.dumps(self.known[key], ensure_ascii=False) + "\n")
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        assert self._file is not None
        self._file.close()
        self._write()

    def _write(self) -> None:
        """What is known, in order; a reader sees the old file or the new one."""
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        order = dict.fromkeys([*self._keys, *self.known])
        lines = [json.dumps(self.known[key], ensure_ascii=False) for key in order if key in self.known]
        partial.write_text("".join(line + "\n" for line in lines), encoding="utf-8", errors="replace")
        partial.replace(self.path)


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("key"), str) else None
