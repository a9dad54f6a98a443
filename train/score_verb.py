"""`qmax score MODEL --input FILE --output FILE`: log-probabilities of every token of every row."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError
from terminal import Parser, print_table, progress_bar, write_json

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer

ROWS = 1024
"""Rows that are read, scored and written together, so that a file of any size fits into memory."""


def score_main(argv: list[str]) -> int:
    """Runs the verb; returns its exit code."""
    args = make_parser().parse_args(argv)
    check_places(args.input, args.output)
    from sharding.runtime import configure_jax

    configure_jax()
    from model.load import check_language_model, open_model, read_model
    from sharding.mesh import MeshConfig, make_mesh
    from train.scoring import Scorer

    source = open_model(args.model)
    check_language_model(source)
    rows = read_rows(args.input)
    tokenizer = source.tokenizer() if any("text" in row for row in rows) else None
    scorer = Scorer(read_model(source, make_mesh(MeshConfig())), args.batch_tokens)
    tokens = [tokens_of(row, tokenizer) for row in rows]
    for number, row in enumerate(tokens, 1):
        scorer.check(row, f"line {number} of {args.input}")
    partial = args.output.with_name(f".{args.output.name}.partial-{os.getpid()}")
    nll = scored = 0
    try:
        with (
            partial.open("w", encoding="utf-8") as out,
            progress_bar("score", sum(map(len, tokens)), unit="tokens") as bar,
        ):
            for start in range(0, len(tokens), ROWS):
                part = tokens[start : start + ROWS]
                for row, (logprobs, _) in zip(part, scorer.score(part, bar.advance), strict=True):
                    out.write(json.dumps({"tokens": row, "logprobs": logprobs}) + "\n")
                    nll -= sum(value for value in logprobs if value is not None)
                    scored += len(row) - 1
        partial.replace(args.output)
    finally:
        partial.unlink(missing_ok=True)
    summary = summarise(rows, nll, scored)
    print_table(
        [[name, f"{value:,.4f}" if isinstance(value, float) else f"{value:,}"] for name, value in summary.items()]
    )
    if args.json:
        write_json(args.json, summary)
    return 0


def make_parser() -> Parser:
    """What the verb takes."""
    parser = Parser(
        "score",
        'Log-probabilities of given tokens under a model. Rows of the input are {"text": ...} or {"tokens": [...]};\n'
        'rows of the output {"tokens": [...], "logprobs": [null, ...]}, in the same order: natural logarithms, one\n'
        "for each token, none for the first. The perplexity of all of it is printed.",
        ["qmax score runs/demo/sft --input rows.jsonl --output scores.jsonl"],
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="run or model directory, .gguf or llama2.c file")
    parser.add_argument("--input", type=Path, required=True, metavar="FILE", help="JSON lines to score")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="JSON lines to write")
    parser.add_argument(
        "--batch-tokens", type=int, default=4096, metavar="N", help="positions scored together (default: %(default)s)"
    )
    parser.add_json()
    return parser


def check_places(source: Path, target: Path) -> None:
    """Refuses files that cannot be read or written, before the model is loaded."""
    if not source.is_file():
        raise UserError(f"{source} is not a file; give --input a file of JSON lines")
    folder = target.absolute().parent
    if not folder.is_dir() or target.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {target}; give --output a file in a directory that you may write to")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of the input. UserError naming file and line of one that is malformed."""
    return list(_rows(path))


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"line {number} of {path}"
            try:
                row = json.loads(line)
            except ValueError as exc:
                raise UserError(f"{where} is not JSON: {exc}") from exc
            if not isinstance(row, dict) or not ("text" in row or "tokens" in row):
                raise UserError(f'{where} is not an object with "text" or "tokens"')
            tokens = row.get("tokens")
            if tokens is None and not isinstance(row.get("text"), str):
                raise UserError(f'{where}: "text" must be a string')
            if tokens is not None and not (isinstance(tokens, list) and all(type(t) is int for t in tokens)):
                raise UserError(f'{where}: "tokens" must be a list of whole numbers')
            yield row


def tokens_of(row: dict[str, Any], tokenizer: Tokenizer | None) -> list[int]:
    """The tokens that a row gives, or those of its text."""
    if row.get("tokens") is not None:
        return row["tokens"]
    assert tokenizer is not None
    return tokenizer.encode(row["text"])


def summarise(rows: list[dict[str, Any]], nll: float, scored: int) -> dict[str, Any]:
    """Totals; bits per byte where all rows are texts."""
    mean = nll / max(scored, 1)
    found: dict[str, Any] = {"rows": len(rows), "tokens_scored": scored, "nll_per_token": mean}
    found["perplexity"] = math.exp(min(mean, 700.0))
    if rows and all(row.get("tokens") is None for row in rows):
        found["bits_per_byte"] = nll / math.log(2) / max(sum(len(row["text"].encode()) for row in rows), 1)
    return found
