"""`qmax eval MODEL --tasks a,b`: tasks graded, with standard errors, and results that can be compared."""

from __future__ import annotations

import argparse
import hashlib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from errors import UserError
from terminal import Parser, print_table, progress_bar, write_json

if TYPE_CHECKING:
    from train.evaluation.answerer import Answerer, Settings
    from train.evaluation.measuring import Result


def eval_main(argv: list[str]) -> int:
    """Runs the verb; returns its exit code."""
    args = make_parser().parse_args(argv)
    if args.compare:
        return compare_main(args)
    if (args.model is None) == (args.endpoint is None):
        raise UserError("qmax eval examines a MODEL or an --endpoint; name one of them")
    if not args.tasks:
        raise UserError("qmax eval needs --tasks, such as --tasks arithmetic?digits=2,gsm8k:test.jsonl")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit} must be 1 or more")
    from sharding.runtime import configure_jax
    from train.evaluation.answerer import Settings
    from train.tasks.catalogue import open_any

    drawn = {name: getattr(args, name) for name in ("temperature", "top_p", "max_tokens", "samples", "seed", "system")}
    settings = Settings(**drawn, thinking=not args.no_thinking)
    names = split_names(args.tasks)
    tasks = [(name, open_any(name)) for name in names]  # before the model is loaded: what is misspelt is found at once
    configure_jax()
    out = args.out or default_place(args)
    who = make_answerer(args)
    results = [measure(name, task, who, settings, args.limit, out) for name, task in tasks]
    from train.evaluation.results import rows_of_table, write_results

    record = write_results(out, who.name, who.fingerprint, results)
    mine = {result.task: record["tasks"][result.task] for result in results}
    print_table(rows_of_table(mine), ["task", "metric", "value", "stderr", "n"])
    tell_flaws(results)
    print(f"\n{out / 'results.json'}; every row is beside it")
    if args.json:
        write_json(args.json, {**record, "tasks": mine})
    return 0


def make_parser() -> Parser:
    """What the verb takes."""
    parser = Parser(
        "eval",
        "Examines a model: graded replies (gsm8k, humaneval, ifeval, ...) and choices or texts by how likely they\n"
        "are (mmlu, arc, hellaswag, lambada, wikitext, ...). Nothing is fetched: a task reads a file that you name,\n"
        "NAME[:FILE][?option=value&...]; train/tasks/README.md lists them. Killed and called again, it goes on.",
        [
            "qmax eval runs/demo/sft --tasks 'arithmetic?digits=1&operations=+' --limit 50",
            "qmax eval models/Qwen3-0.6B --tasks mmlu:mmlu_test.jsonl,gsm8k:gsm8k_test.jsonl --limit 200 --no-thinking",
            "qmax eval models/Qwen3-0.6B --tasks humaneval:HumanEval.jsonl.gz --samples 10 --temperature 0.6",
            "qmax eval --endpoint http://127.0.0.1:8000/v1 --tasks gsm8k:gsm8k_test.jsonl",
            "qmax eval --compare runs/a/eval runs/b/eval --page comparison.html",
        ],
    )
    parser.add_argument(
        "model", nargs="?", type=Path, metavar="MODEL", help="run or model directory, .gguf or .bin file"
    )
    parser.add_argument("--tasks", metavar="A,B", help="tasks, with their files and options, separated by commas")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N problems of each task (default: all)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="results and rows (default: MODEL/eval of a run, else runs/eval/NAME)"
    )
    whom = parser.add_argument_group("a model elsewhere")
    whom.add_argument(
        "--endpoint",
        metavar="URL",
        help="OpenAI-compatible, with the version: http://host/v1; its key is taken from QMAX_MODEL_KEY or OPENAI_API_KEY",
    )
    whom.add_argument(
        "--endpoint-model", default="", metavar="NAME", help="the model to ask for there (default: its first)"
    )
    whom.add_argument(
        "--workers", type=int, default=16, metavar="N", help="requests at the same time (default: %(default)s)"
    )
    drawing = parser.add_argument_group("how replies are drawn")
    drawing.add_argument(
        "--max-tokens", type=int, default=1024, metavar="N", help="longest reply (default: %(default)s)"
    )
    drawing.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="X",
        help="0 takes the most likely token always (default: %(default)s)",
    )
    drawing.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="X",
        help="draw from the most likely tokens that make up this probability (default: %(default)s)",
    )
    drawing.add_argument(
        "--samples",
        type=int,
        default=1,
        metavar="N",
        help="replies to each problem; gives pass@k (default: %(default)s)",
    )
    drawing.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the first reply to a problem (default: %(default)s)"
    )
    drawing.add_argument("--no-thinking", action="store_true", help="ask for the answer without thinking first")
    drawing.add_argument("--system", default="", metavar="TEXT", help="instruction that stands before every problem")
    machine = parser.add_argument_group("this machine")
    machine.add_argument(
        "--slots", type=int, metavar="N", help="replies that are drawn together (default: 16 on a CPU, else 128)"
    )
    machine.add_argument(
        "--batch-tokens",
        type=int,
        default=4096,
        metavar="N",
        help="positions that are scored together (default: %(default)s)",
    )
    several = parser.add_argument_group("several results")
    several.add_argument(
        "--compare", nargs="+", type=Path, metavar="DIR", help="show results that were measured before, side by side"
    )
    several.add_argument(
        "--page", type=Path, metavar="FILE", help="with --compare: write table and charts as one HTML page"
    )
    parser.add_json()
    return parser


def compare_main(args: argparse.Namespace) -> int:
    """Results of several models in one table."""
    from train.evaluation.results import compare, read_results, write_page

    records = [read_results(place) for place in args.compare]
    header, rows = compare(records)
    print_table(rows, header)
    if args.page:
        write_page(args.page, records)
        print(f"\n{args.page}")
    if args.json:
        write_json(args.json, {"results": records})
    return 0


def split_names(text: str) -> list[str]:
    """Tasks between commas. UserError for one named twice."""
    names = [part.strip() for part in text.split(",") if part.strip()]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UserError(f"task {twice!r} is named twice; name it once")
    return names


def default_place(args: argparse.Namespace) -> Path:
    """Beside the run that is examined, else under runs/eval."""
    if args.model is None:
        return Path("runs/eval") / (re.sub(r"\W+", "-", f"{args.endpoint} {args.endpoint_model}").strip("-"))
    if (args.model / "config.json").exists() and (args.model / "checkpoints").is_dir():
        return args.model / "eval"
    return Path("runs/eval") / args.model.name


def make_answerer(args: argparse.Namespace) -> Answerer:
    """The model, loaded, or the endpoint."""
    if args.endpoint:
        from train.evaluation.remote import Remote

        return Remote(args.endpoint, args.endpoint_model, workers=args.workers)
    from train.evaluation.local import Local

    return Local(args.model, slots=args.slots, batch_tokens=args.batch_tokens)


def measure(name: str, task: Any, who: Answerer, settings: Settings, limit: int | None, out: Path) -> Result:
    """One task, with a bar."""
    from train.evaluation.measuring import measure_likelihoods, measure_replies

    rows = out / f"{file_name(name)}.jsonl"
    if hasattr(task, "items"):
        total = sum(len(item.asked) for item in task.items("test")[:limit])
        with progress_bar(name, total, unit="continuations") as bar:
            return measure_likelihoods(name, task, who, limit, rows, bar)
    total = len(task.problems("test")[:limit]) * settings.samples
    with progress_bar(name, total, unit="replies") as bar:
        return measure_replies(name, task, who, settings, limit, rows, bar)


def file_name(name: str) -> str:
    """A task's name as that of a file; where it has options, with a few digits of them."""
    plain = re.sub(r"\W+", "-", name.partition(":")[0].partition("?")[0])
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def tell_flaws(results: Sequence[Result]) -> None:
    """Sentences on what a score does not show."""
    for one in results:
        if one.unfit:
            print(f"{one.task}: {one.unfit} prompts are longer than the model's positions, and count as wrong")
        if one.cut:
            kind = "replies came to no end within --max-tokens" if one.tokens else "contexts lost their beginning"
            print(f"{one.task}: {one.cut} {kind}")
        if one.failed:
            print(f"{one.task}: the grader failed on {one.failed} replies; they count as wrong, see their notes")
