"""What a finished checkpoint says about itself, so that a torn or altered one is never mistaken for a good one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

NAME = "manifest.json"
FORMAT = 1
"""Raised when an older reader would misread what is written now."""


class DamageError(Exception):
    """What is wrong with a checkpoint, as a clause: "its file state/d/12ab is 3 bytes long, not 4"."""


def write(
    directory: Path,
    *,
    step: int,
    leaves: Mapping[str, Any],
    meta: Mapping[str, Any],
    validation_loss: float | None,
) -> None:
    """Hashes every file under `directory`, writes its manifest, and puts all of it on the disk itself (fsync).

    Args:
        directory: a complete checkpoint that lacks only this file.
        step: optimizer steps that the state has seen.
        leaves: path of each array -> {"shape": [...], "dtype": "..."}.
        meta: anything that JSON can hold.
        validation_loss: finite, or None where it is not known.
    """
    names = sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    with ThreadPoolExecutor(_threads()) as pool:
        sums = list(pool.map(lambda name: _sum_and_sync(directory / name), names))
    body = {
        "format": FORMAT,
        "step": step,
        "validation_loss": validation_loss,
        "meta": dict(meta),
        "leaves": {path: dict(leaf) for path, leaf in leaves.items()},
        "files": {name: {"size": size, "sha256": digest} for name, (size, digest) in zip(names, sums, strict=True)},
    }
    with open(directory / NAME, "wb") as file:
        file.write(_signed(body))
        file.flush()
        os.fsync(file.fileno())
    for path in sorted((path for path in directory.rglob("*") if path.is_dir()), reverse=True):
        sync_directory(path)
    sync_directory(directory)


def read(directory: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `directory`, proven whole; says nothing of the other files.

    Raises:
        DamageError: it is missing, torn or altered.
    """
    try:
        raw = (directory / NAME).read_bytes()
    except FileNotFoundError:
        raise DamageError(f"it has no {NAME}") from None
    except OSError as exc:
        raise DamageError(f"its {NAME} cannot be read ({exc.strerror})") from exc
    try:
        body = json.loads(raw)
        signature = body.pop("sha256", None)
        # Writing it again catches a changed byte that leaves the meaning as it was.
        whole = bool(signature) and raw == _signed(body)
    except (ValueError, AttributeError):
        whole, body = False, {}
    if not whole:
        raise DamageError(f"its {NAME} is damaged")
    if body["format"] != FORMAT:
        raise DamageError(f"its {NAME} has format {body['format']} and this version of qmax reads format {FORMAT}")
    return body


def verify(directory: Path) -> dict[str, Any]:
    """The manifest of the checkpoint at `directory`, every file of which has its size and hash.

    Raises:
        DamageError: the first thing that is wrong; sizes are compared before anything is hashed.
    """
    body = read(directory)
    files: dict[str, dict[str, Any]] = body["files"]
    for name, wanted in files.items():
        try:
            size = (directory / name).stat().st_size
        except OSError:
            raise DamageError(f"its file {name} is missing") from None
        if size != wanted["size"]:
            raise DamageError(f"its file {name} is {size:,} bytes long, not {wanted['size']:,}")
    with ThreadPoolExecutor(_threads()) as pool:
        for name, digest in zip(files, pool.map(lambda name: _digest(directory / name), files), strict=True):
            if digest != files[name]["sha256"]:
                raise DamageError(f"the contents of its file {name} have changed")
    return body


def sync_directory(path: Path) -> None:
    """Makes the names in `path` survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _signed(body: Mapping[str, Any]) -> bytes:
    """`body` as bytes that only the same `body` gives, with their own hash as its last entry."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()
    return (json.dumps({**body, "sha256": digest}, indent=1, allow_nan=False) + "\n").encode()


def _sum_and_sync(path: Path) -> tuple[int, str]:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), digest


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as exc:
        raise DamageError(f"its file {path.name} cannot be read ({exc.strerror})") from exc


def _threads() -> int:
    """hashlib lets go of the interpreter lock, so threads help; more than a few only fight over the disk."""
    return min(8, os.cpu_count() or 1)
