"""`samples.jsonl`: replies of the model as it was at a step, a line each.

`{"step", "prompt", "reply"}`, and `reward` where replies are graded; a prompt is text or messages.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

SAMPLES = "samples.jsonl"


def write_samples(out: Path, step: int, shown: Sequence[dict[str, Any]]) -> None:
    """Adds the replies of a step in the place of what a run that was cut back had from it on."""
    path = out / SAMPLES
    kept = [line for line, one in _lines(path) if one["step"] < step]
    kept += [json.dumps({"step": step, **one}, ensure_ascii=False) for one in shown]
    partial = path.with_name(f".{path.name}.tmp")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    partial.replace(path)


def read_samples(out: Path) -> list[dict[str, Any]]:
    """The replies of a run, oldest first; empty without any. Lines that say nothing are left out."""
    return [one for _, one in _lines(out / SAMPLES)]


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    # Not splitlines: a reply may hold other characters that end lines.
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else ():
        try:
            one = json.loads(line)
        except ValueError:
            continue
        if isinstance(one, dict) and isinstance(one.get("step"), int):
            yield line, one
