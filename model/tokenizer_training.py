"""Trains a vocabulary: sentencepiece BPE over raw text, with bytes for whatever it does not know.

Nothing is normalised and no space is added, so decoding gives back every text to the byte. Digits stand alone, as in
Qwen's vocabularies.
"""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import random
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from errors import UserError
from model.chat_template import clean, default_template
from model.tokenizer import FILES, Tokenizer
from model.tokenizer_backends import MARKUP
from terminal import console

FRAME = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
SPECIALS = (*FRAME, *MARKUP)
"""Control tokens, in the order of their ids from 1 on; id 0 is <unk>, which sentencepiece wants and bytes make idle."""
RESERVED = 1 + len(SPECIALS) + 256
"""Ids that are no pieces of text: <unk>, the control tokens, and one for each byte."""
SMALLEST = RESERVED + 64

SAMPLE_BYTES = 64 << 20
"""Text that training holds in memory; of a larger corpus it reads an even sample of pieces."""
PIECE_CHARS = 2000
CHARACTER_COVERAGE = 0.9995
SEPARATOR = "\u2585"  # sentencepiece reserves it, and skips what holds it


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    out: Path,
    *,
    progress: bool = True,
    sample_bytes: int = SAMPLE_BYTES,
) -> Tokenizer:
    """Trains a vocabulary of exactly `vocab_size` tokens on `texts` and writes it as the directory `out`.

    The same texts give the same bytes. `out` appears whole or not at all; a tokenizer that stands there is replaced.
    UserError when the corpus is empty, when it does not support so many tokens (with the number that it does), when
    `vocab_size` leaves no room for text, and when `out` holds something else.
    """
    out = Path(out)
    _check_size(vocab_size)
    check_place(out)
    with status(progress) as say:
        sample = even_sample(texts, sample_bytes, say)
        say(f"learning {vocab_size} tokens from {sum(map(len, sample)) / 1e6:.1f} million characters")
        model = _learn(sample, vocab_size)
    with tokenizer_directory(out) as partial:
        (partial / "tokenizer.model").write_bytes(model)
        config = json.dumps(_config(), indent=1, ensure_ascii=False) + "\n"
        (partial / "tokenizer_config.json").write_text(config, encoding="utf-8")
        (partial / "chat_template.jinja").write_text(default_template(), encoding="utf-8")
    return Tokenizer.load(out)


def _check_size(vocab_size: int) -> None:
    if vocab_size < SMALLEST:
        raise UserError(
            f"a vocabulary of {vocab_size} tokens is too small: {RESERVED} are control tokens and bytes, "
            f"so take at least {SMALLEST}"
        )


def check_place(out: Path) -> None:
    """Refuses a place for a tokenizer that holds something else."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file; name a directory for the tokenizer")
    others = sorted(path.name for path in out.iterdir() if path.name not in FILES) if out.is_dir() else []
    if others:
        raise UserError(f"{out} holds more than a tokenizer ({others[0]}); name a new or empty directory")


def _config() -> dict[str, Any]:
    tokens = {str(i): {"content": piece, "special": piece in FRAME} for i, piece in enumerate(SPECIALS, start=1)}
    names = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "unk_token": "<unk>"}
    return {"added_tokens_decoder": tokens, **names}


# ---------------------------------------------------------------------------------------------------------------------
# The sample


def even_sample(texts: Iterable[str], sample_bytes: int, say: Callable[[str], None]) -> list[str]:
    """Pieces of `texts` of about `sample_bytes` at most, each kept with the same probability, in their order."""
    kept: list[tuple[float, str]] = []
    rng = random.Random(0)
    share, size, read = 1.0, 0, 0
    for text in texts:
        for piece in _pieces(clean(text)):
            read += len(piece)
            draw = rng.random()
            if draw >= share:
                continue
            kept.append((draw, piece))
            size += len(piece.encode())
            while size > sample_bytes and len(kept) > 1:
                share /= 2
                kept = [(d, p) for d, p in kept if d < share] or kept[:1]
                size = sum(len(p.encode()) for _, p in kept)
        say(f"read {read / 1e6:.1f} million characters")
    if not any(piece.strip() for _, piece in kept):
        raise UserError("the corpus is empty: there is no text to learn a vocabulary from")
    return [piece for _, piece in kept]


def _pieces(text: str) -> Iterator[str]:
    """`text` cut behind line ends into pieces of at most PIECE_CHARS: sentencepiece skips long ones."""
    start = 0
    while start < len(text):
        end = start + PIECE_CHARS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _by_frequency(sample: list[str]) -> list[tuple[str, int]]:
    """Characters that may have a token of their own, and how often they occur; the most frequent first."""
    counts: collections.Counter[str] = collections.Counter()
    for piece in sample:
        counts.update(piece)
    del counts[SEPARATOR], counts["\u2581"]
    return sorted(counts.items(), key=lambda item: (-item[1], item[0]))


def _common(characters: list[tuple[str, int]], room: int) -> int:
    """How many of `characters` deserve a token.

    Those that together make up the last 0.05% of the text would waste it, and in a small vocabulary (Chinese has
    thousands) they would leave no room for words: at most `room`.
    """
    missing = (1 - CHARACTER_COVERAGE) * sum(count for _, count in characters)
    kept = len(characters)
    while kept and characters[kept - 1][1] <= missing:
        kept -= 1
        missing -= characters[kept][1]
    return min(kept, room)


def _spelled_in_bytes(sample: list[str], rare: list[tuple[str, int]]) -> list[str]:
    """`sample` cut at `rare` characters: sentencepiece gives every character that it sees a token."""
    cuts = dict.fromkeys([0x2581, *(ord(char) for char, _ in rare)], SEPARATOR)
    return [part for piece in sample for part in piece.translate(cuts).split(SEPARATOR) if part]


# ---------------------------------------------------------------------------------------------------------------------
# Learning and writing


class _TooManyError(Exception):
    """More tokens than the sample supports; `limit` is what it does."""

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit


def _learn(sample: list[str], vocab_size: int) -> bytes:
    """A sentencepiece model of exactly `vocab_size` tokens, serialised."""
    characters = _by_frequency(sample)
    kept = _common(characters, (vocab_size - RESERVED) // 2)
    try:
        return _run_sentencepiece(_spelled_in_bytes(sample, characters[kept:]), vocab_size)
    except _TooManyError as error:
        kept += vocab_size - error.limit  # too few words to learn: rare characters fill the rest
    try:
        return _run_sentencepiece(_spelled_in_bytes(sample, characters[kept:]), vocab_size)
    except _TooManyError as error:
        raise UserError(
            f"a vocabulary of {vocab_size} tokens is more than the corpus supports: at most {error.limit}; "
            "take fewer tokens or give more text"
        ) from error


def _run_sentencepiece(sample: list[str], vocab_size: int) -> bytes:
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=1.0,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=8 * PIECE_CHARS,
            control_symbols=list(SPECIALS),
            unk_id=0,
            bos_id=-1,
            eos_id=-1,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        limit = re.search(r"value <= (\d+)", str(error))
        if limit is None:
            raise UserError(f"sentencepiece could not learn a vocabulary of {vocab_size} tokens: {error}") from error
        raise _TooManyError(int(limit[1])) from error
    return model.getvalue()


@contextlib.contextmanager
def tokenizer_directory(out: Path) -> Iterator[Path]:
    """A directory to write into, which becomes `out` at the end."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}; name another place") from error
    try:
        new, old = work / "new", work / "old"
        new.mkdir()
        yield new
        if out.exists():
            os.rename(out, old)
        os.rename(new, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def status(wanted: bool) -> Iterator[Callable[[str], None]]:
    """A line on the terminal that says what is going on; nothing elsewhere."""
    if not (wanted and sys.stderr.isatty()):
        yield lambda text: None
        return
    with console().status("reading") as line:
        yield line.update
