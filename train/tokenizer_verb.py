"""`qmax tokenizer`: trains a vocabulary on files of text and says how well it fits them."""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from errors import UserError
from model.tokenizer import Tokenizer
from terminal import Parser, print_table, write_json

EXCERPTS = 256
EXCERPT_CHARS = 8000
SHOWN_CHARS = 90


def tokenizer_main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code. UserError for what the user can mend."""
    args = _parser().parse_args(argv)
    _check(args)
    from train.data.sources import read_documents

    excerpts = Excerpts()
    documents = excerpts.watch(read_documents(args.files, args.max_bad_rows))
    if args.extend:
        from model.tokenizer_extension import extend_tokenizer

        old = tokenizer_of(args.extend)
        tokenizer = extend_tokenizer(old, documents, args.add, args.out)
    else:
        from model.tokenizer_training import train_tokenizer

        old, tokenizer = None, train_tokenizer(documents, args.vocab_size, args.out)
    result = excerpts.measure(tokenizer) | {"out": str(args.out), "fingerprint": tokenizer.fingerprint}
    rows: list[tuple[str, object]] = [
        ("vocabulary", f"{tokenizer.vocab_size:,}"),
        ("documents", f"{excerpts.documents:,}"),
        ("characters", f"{excerpts.characters:,}"),
        ("characters per token", f"{result['characters_per_token']:.2f}"),
        ("bytes per token", f"{result['bytes_per_token']:.2f}"),
        ("sample", excerpts.sample(tokenizer)),
        ("written to", args.out),
    ]
    if old is not None:
        before = excerpts.measure(old)
        result |= {"tokens_per_character_before": 1 / float(before["characters_per_token"])}
        result |= {"tokens_per_character": 1 / float(result["characters_per_token"])}
        change = f"{result['tokens_per_character_before']:.3f} -> {result['tokens_per_character']:.3f}"
        rows[0] = ("vocabulary", f"{old.vocab_size:,} -> {tokenizer.vocab_size:,}")
        rows.insert(3, ("tokens per character", change))
    print_table(rows)
    if args.json:
        write_json(args.json, result)
    return 0


def tokenizer_of(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer directory or of a MODEL. UserError where there is none."""
    if any((path / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return Tokenizer.load(path)
    if (path / "tokenizer").is_dir():  # a run, whose weights are not wanted here
        return Tokenizer.load(path / "tokenizer")
    from model.load import open_model

    return open_model(path).tokenizer()


def _parser() -> Parser:
    parser = Parser(
        "tokenizer",
        "Trains a sentencepiece tokenizer (BPE, with bytes for the unknown; every text decodes to itself)\n"
        'on .txt, .jsonl(.gz|.zst) with a field "text" or conversations, .parquet and .arrayrecord.\n'
        "With --extend it adds tokens to a vocabulary instead, whose own ids stay as they are: `qmax train` with\n"
        "init_from starts a new token's rows as the mean of the old tokens that it replaces.",
        [
            "qmax tokenizer books/*.txt --vocab-size 8192 --out runs/tokenizer",
            "qmax tokenizer corpus.jsonl.gz --vocab-size 32000 --out tok --json tok.json",
            "qmax tokenizer french/*.txt --extend runs/english --add 1000 --out runs/larger",
        ],
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="text to learn from; globs are taken")
    parser.add_argument(
        "--vocab-size", type=int, metavar="N", help="tokens, control tokens included (not with --extend)"
    )
    parser.add_argument("--extend", type=Path, metavar="MODEL", help="model or tokenizer whose vocabulary to add to")
    parser.add_argument("--add", type=int, metavar="N", help="tokens to add to it")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="directory to write")
    parser.add_argument(
        "--max-bad-rows", type=int, default=100, metavar="N", help="malformed rows that are skipped (default 100)"
    )
    parser.add_json()
    return parser


def _check(args: argparse.Namespace) -> None:
    """Refuses sizes that do not say what is wanted."""
    if args.extend is None and args.vocab_size is None:
        raise UserError("an argument is required: --vocab-size, or --extend with --add; --help shows them all")
    if args.extend is None and args.add is not None:
        raise UserError("--add is for --extend; name the vocabulary to add to")
    if args.extend is not None and (args.add is None or args.vocab_size is not None):
        raise UserError("--extend goes with --add, the number of new tokens, and without --vocab-size")


class Excerpts:
    """An even sample of a stream of documents, to measure a vocabulary by."""

    def __init__(self) -> None:
        self.documents = 0
        self.characters = 0
        self._kept: list[str] = []
        self._rng = random.Random(1)

    def watch(self, documents: Iterable[str]) -> Iterator[str]:
        """Passes `documents` on; keeps the beginnings of some (a reservoir: each with the same probability)."""
        for text in documents:
            self.documents += 1
            self.characters += len(text)
            place = self._rng.randrange(self.documents)
            if len(self._kept) < EXCERPTS:
                self._kept.append(text[:EXCERPT_CHARS])
            elif place < EXCERPTS:
                self._kept[place] = text[:EXCERPT_CHARS]
            yield text

    def measure(self, tokenizer: Tokenizer) -> dict[str, int | float | str]:
        """Sizes, and characters and bytes per token of what was kept."""
        if not self._kept:
            raise UserError("the corpus is empty: there is no text to learn a vocabulary from")
        tokens = sum(len(tokenizer.encode(text)) for text in self._kept)
        characters = sum(map(len, self._kept))
        size = sum(len(text.encode("utf-8", "replace")) for text in self._kept)
        return {
            "vocab_size": tokenizer.vocab_size,
            "documents": self.documents,
            "characters": self.characters,
            "characters_per_token": characters / tokens,
            "bytes_per_token": size / tokens,
        }

    def sample(self, tokenizer: Tokenizer) -> str:
        """The beginning of a document, cut at its tokens."""
        line = " ".join(self._kept[0].split())[:SHOWN_CHARS]
        return "|".join(tokenizer.token_bytes(i).decode("utf-8", "replace") for i in tokenizer.encode(line))
