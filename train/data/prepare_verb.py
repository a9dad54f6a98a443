"""`qmax prepare`: tokenises a corpus once, into a store that training reads at random."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from errors import UserError
from terminal import Parser, write_json
from train.data.kinds import KINDS

_DESCRIPTION = """\
Tokenises text once into sharded ArrayRecord, which training reads at random.

SOURCES are files, globs or both: .txt (one document a file; large ones are cut at blank lines), .jsonl, .jsonl.gz,
.jsonl.zst, .parquet, .arrayrecord. Rows for --objective pretrain hold {"text"}. Rows for --objective sft hold
{"messages": [{"role", "content"}]}, {"conversations": [{"from", "value"}]} or {"instruction", "input", "output"}, with
"tools" if there are any; loss falls on the assistant's turns alone, but for those with "weight": 0 (sft-last: on the
last turn alone, for data.train_on=last).

Rows for --objective preference (objective=dpo or reward) hold two replies: {"prompt", "chosen", "rejected"}, each text
or a list of messages; {"chosen", "rejected"} as whole conversations with one beginning; {"messages" or "conversations",
"chosen", "rejected"}; {"instruction", "input", "chosen", "rejected"}; with a "margin" where there is one. Rows for
--objective kto hold a reply and whether it is good: {"prompt", "completion", "label": true}, {"messages", "label"} or
{"conversations", "kto_tag"}. The file in which `qmax serve` keeps feedback is read by both; each takes its own rows.

Killed or interrupted, the same command goes on where it was: at most one shard of work is lost, and the store comes out
byte for byte as if nothing had happened. Then name the directory in the config: data.sources=("data/corpus",)
"""


def _parser() -> Parser:
    parser = Parser(
        "prepare",
        _DESCRIPTION,
        [
            "qmax prepare 'corpus/*.jsonl.zst' --tokenizer tok --out data/corpus",
            "qmax prepare chats.jsonl --objective sft --tokenizer tok --out data/chats",
            "qmax prepare feedback.jsonl --objective preference --tokenizer tok --out data/pairs",
        ],
    )
    parser.add_argument("sources", nargs="+", metavar="SOURCES", help="files or globs of text or conversations")
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="holds tokenizer.model or tokenizer.json")
    parser.add_argument("--out", required=True, metavar="DIR", help="the store: new, or to be resumed")
    parser.add_argument("--objective", choices=KINDS, default="pretrain", help="kind of rows (default: pretrain)")
    parser.add_argument(
        "--max-bad-rows", type=int, default=100, metavar="N", help="malformed rows to skip (default: 100)"
    )
    parser.add_argument(
        "--shard-tokens", type=int, metavar="N", help="tokens after which a shard ends (default: 67 million)"
    )
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes; 0 for none (default: by size of the input)"
    )
    parser.add_json()
    return parser


def prepare_main(argv: list[str]) -> int:
    """The verb. Returns the exit code; raises UserError for what the user can mend."""
    args = _parser().parse_args(argv)
    from model.tokenizer import Tokenizer
    from train.data.prepare import SHARD_TOKENS, prepare
    from train.data.sources import expand
    from train.data.system import say

    if args.shard_tokens is not None and args.shard_tokens < 1:
        raise UserError(f"--shard-tokens {args.shard_tokens} must be at least 1")
    finished = (Path(args.out) / "meta.json").is_file()
    try:
        store = prepare(
            expand(args.sources),
            Tokenizer.load(args.tokenizer),
            Path(args.out),
            objective=args.objective,
            max_bad_rows=args.max_bad_rows,
            shard_tokens=args.shard_tokens or SHARD_TOKENS,
            workers=args.workers,
        )
    except KeyboardInterrupt:
        say(f"\nstopped; the same command goes on with {args.out} where it was")
        return 130
    if finished:
        say(f"{args.out} was finished already")
    result = summary(store.meta, args.out)
    _print_table(result)
    if args.json:
        write_json(args.json, result)
    return 0


def summary(meta: dict[str, Any], out: str) -> dict[str, Any]:
    """What the table and the JSON say of a store."""
    return {
        "out": out,
        "objective": meta["objective"],
        "documents": meta["documents"],
        "tokens": meta["tokens"],
        "loss_tokens": meta["loss_tokens"],
        "source_bytes": meta["source_bytes"],
        "bytes_per_token": round(meta["source_bytes"] / meta["tokens"], 4),
        "shards": len(meta["shards"]),
        "bad_rows": meta["bad_rows"],
    }


def _print_table(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False)
    for name, value in result.items():
        table.add_row(name.replace("_", " "), f"{value:,}" if isinstance(value, (int, float)) else str(value))
    Console(file=sys.stdout).print(table)
