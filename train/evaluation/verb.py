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
    from train.evaluation.arena_task import Judge
    from train.evaluation.measuring import Result


OPTIONS: dict[str, list[tuple[str, Any, Any, str]]] = {
    "": [
        ("--tasks", str, None, "tasks, with their files and options, separated by commas"),
        ("--limit", int, None, "the first N problems of each task; all without it"),
        ("--out", Path, None, "results and rows; without it MODEL/eval of a run, else runs/eval/NAME"),
    ],
    "a model elsewhere": [
        ("--endpoint", str, None, "OpenAI-compatible: http://host/v1; its key: QMAX_MODEL_KEY or OPENAI_API_KEY"),
        ("--endpoint-model", str, "", "the model to ask for there; without it its first"),
        ("--workers", int, 16, "requests at the same time, to the judge too"),
    ],
    "who judges answers (arena_hard)": [
        ("--judge", str, None, "OpenAI-compatible: http://host/v1; its key: QMAX_JUDGE_KEY or OPENAI_API_KEY"),
        ("--judge-model", str, "", "the model to ask for there; without it its first"),
    ],
    "how replies are drawn": [
        ("--max-tokens", int, 1024, "longest reply"),
        ("--temperature", float, 0.0, "0 takes the most likely token always"),
        ("--top-p", float, 1.0, "draw from the most likely tokens that make up this probability"),
        ("--samples", int, 1, "replies to each problem; several give pass@k"),
        ("--seed", int, 0, "of the first reply to a problem"),
        ("--no-thinking", bool, False, "ask for the answer without thinking first"),
        ("--system", str, "", "instruction that stands before every problem"),
    ],
    "this machine": [
        ("--slots", int, None, "replies that are drawn together; without it 16 on a CPU, else 128"),
        ("--batch-tokens", int, 4096, "positions that are scored together"),
    ],
}
"""Options by group: flag, type, default, what it says."""
METAVARS = {"--tasks": "A,B", "--out": "DIR", "--endpoint": "URL", "--judge": "URL"} | dict.fromkeys(
    ("--endpoint-model", "--judge-model"), "NAME"
)


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
    from train.evaluation.arena_task import ArenaHard, Judge
    from train.tasks.catalogue import ALL, open_any

    drawn = {name: getattr(args, name) for name in ("temperature", "top_p", "max_tokens", "samples", "seed", "system")}
    settings = Settings(**drawn, thinking=not args.no_thinking)
    names = split_names(args.tasks)
    known = ALL | {ArenaHard.name: ArenaHard}
    tasks = [(name, open_any(name, known)) for name in names]  # before the model is loaded: what is misspelt is found
    if any(isinstance(task, ArenaHard) for _, task in tasks) and not args.judge:
        raise UserError("task 'arena_hard' needs a judge; give --judge URL and --judge-model NAME")
    judge = Judge(args.judge or "", args.judge_model, args.workers)
    configure_jax()
    out = args.out or default_place(args)
    who = make_answerer(args)
    results = [measure(name, task, who, settings, judge, args.limit, out) for name, task in tasks]
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
            "qmax eval runs/demo/sft --tasks 'arena_hard:question.jsonl?baseline=o3-mini.jsonl' --judge http://host/v1",
            "qmax eval --compare runs/a/eval runs/b/eval --page comparison.html",
        ],
    )
    parser.add_argument("model", nargs="?", type=Path, metavar="MODEL", help="run or model directory, .gguf, .bin")
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title) if title else parser
        for flag, kind, default, words in options:
            if kind is bool:
                group.add_argument(flag, action="store_true", help=words)
                continue
            metavar = METAVARS.get(flag) or {int: "N", float: "X"}.get(kind, "TEXT")
            shown = "" if default in (None, "") else " (default: %(default)s)"
            group.add_argument(flag, type=kind, default=default, metavar=metavar, help=words + shown)
    several = parser.add_argument_group("several results")
    several.add_argument("--compare", nargs="+", type=Path, metavar="DIR", help="show earlier results side by side")
    several.add_argument("--page", type=Path, metavar="FILE", help="with --compare: write an HTML page of them")
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


def measure(
    name: str, task: Any, who: Answerer, settings: Settings, judge: Judge, limit: int | None, out: Path
) -> Result:
    """One task, with a bar."""
    from train.evaluation.arena_task import ArenaHard, measure_arena
    from train.evaluation.measuring import measure_likelihoods, measure_replies

    rows = out / f"{file_name(name)}.jsonl"
    if hasattr(task, "items"):
        total = sum(len(item.asked) for item in task.items("test")[:limit])
        with progress_bar(name, total, unit="continuations") as bar:
            return measure_likelihoods(name, task, who, limit, rows, bar)
    if isinstance(task, ArenaHard):
        with progress_bar(name, 2 * len(task.pairs(limit)[0]), unit="answers and judgments") as bar:
            return measure_arena(name, task, who, settings, judge, limit, out, bar)
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
