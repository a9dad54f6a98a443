"""`qmax report RUN ...`: one page with all that runs measured, readable anywhere, without network or script."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

from errors import UserError
from model.config import ModelConfig
from terminal import Parser, print_table, write_json
from train.evaluation.results import NAME as RESULTS
from train.evaluation.results import evaluation_charts, read_results
from train.report_alignment import alignment_charts, sample_cards
from train.report_plots import expert_heat_map, line_chart, short, time_heat_map
from train.report_records import held_out, load, marks_of, median_of, points, series, values
from train.report_style import save_page, whole_page
from train.samples_file import read_samples

NAME = "report.html"
ALIGNMENT = "accuracy", "validation_accuracy", "reward_margin", "reward", "validation_reward", "reply_tokens"
"""What is summarised where a run learns from preferences or rewards: its last value."""


def report_main(argv: list[str]) -> int:
    """`qmax report RUN [RUN ...] [--html FILE] [--json FILE]`."""
    parser = Parser(
        "report",
        "Draws what a training run measured into RUN/report.html: losses, rates, norms, expert load,\n"
        "rewards, evaluations and replies. Several runs, such as the stages of one model, come on one\n"
        "page, in the folder that they share. --json writes the same in numbers, of several by run.",
        ["qmax report runs/demo/pretrain", "qmax report runs/demo/pretrain runs/demo/sft --json numbers.json"],
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="directory that qmax train wrote")
    parser.add_argument("--html", metavar="FILE", help="where the page goes, if not there")
    parser.add_json()
    arguments = parser.parse_args(argv)
    path = write_report(*arguments.runs, path=arguments.html)
    summaries = {run: summarize(run) for run in arguments.runs}
    if len(summaries) == 1:
        (summary,) = summaries.values()
        print_table([(name.replace("_", " "), value) for name, value in summary.items()])
    else:
        summary = summaries
        names = dict.fromkeys(name for one in summaries.values() for name in one)
        rows = [(name.replace("_", " "), *(one.get(name) for one in summaries.values())) for name in names]
        print_table(rows, ["", *(Path(run).name for run in summaries)])
    print(f"\n{path}")
    if arguments.json:
        write_json(arguments.json, summary)
    return 0


def write_report(*run_dirs: str | Path, path: str | Path | None = None) -> Path:
    """Renders runs into one page, whole or not at all, and returns its path.

    Args:
        path: of the page; if not given, `report.html` in the run's directory, or in the one that several runs share.

    Raises:
        UserError: a directory is not a run, or the page cannot be written.
    """
    runs = [Path(run_dir) for run_dir in dict.fromkeys(map(str, run_dirs))]
    loaded = [(place, run, *load(run)) for place, run in enumerate(runs)]
    together = runs[0] if len(runs) == 1 else Path(os.path.commonpath([run.resolve() for run in runs]))
    page = whole_page(escape(together.resolve().name), _contents(runs) + "".join(_part(*one) for one in loaded))
    path = together / NAME if path is None else Path(path)
    save_page(path, page)
    return path


def summarize(run_dir: str | Path) -> dict[str, Any]:
    """What the page says, in numbers; None where a run did not measure something."""
    config, records = load(Path(run_dir))
    losses = values(records, "loss")
    validation = values(records, "validation_loss")
    marks = marks_of(records)
    total, active = _parameters(config)
    last = records[-1] if records else {}
    return {
        "steps": last.get("step", 0),
        "tokens": sum(values(records, "tokens")) or None,
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "validation_loss_best": min(validation, default=None),
        "validation_loss_last": validation[-1] if validation else None,
        "tokens_per_second": median_of(values(records, "tokens_per_second")),
        "mfu": median_of(values(records, "mfu")),
        "expert_load_max_over_mean": next(iter(reversed(values(records, "expert_load_max_over_mean"))), None),
        "memory_bytes": max(values(records, "memory_bytes"), default=None),
        "seconds": sum(values(records, "seconds")) or None,
        "skipped": len(marks.skipped),
        "resumes": len(marks.resumed),
        "parameters_total": total,
        "parameters_active": active,
        **{name: numbers[-1] for name in ALIGNMENT if (numbers := values(records, name))},
    }


# ---- facts ----------------------------------------------------------------------
def _model(config: Mapping[str, Any]) -> ModelConfig | None:
    """The architecture of the run; None where another version of qmax wrote what this one cannot read."""
    try:
        return ModelConfig.from_dict(config["run"]["model"], "config.json")
    except (TypeError, KeyError, AttributeError, UserError):
        return None


def _parameters(config: Mapping[str, Any]) -> tuple[int | None, int | None]:
    if "parameters_total" in config:
        return config["parameters_total"], config.get("parameters_active")
    model = _model(config)
    return (model.parameters_total, model.parameters_active) if model and model.vocab_size else (None, None)


# ---- the page -------------------------------------------------------------------
def _contents(runs: Sequence[Path]) -> str:
    """Links to the runs of a page, where it has more than one."""
    if len(runs) == 1:
        return ""
    links = [f'<a href="#run-{n}">{escape(run.resolve().name)}</a>' for n, run in enumerate(runs)]
    return f"<nav>{''.join(links)}</nav>"


def _part(place: int, run_dir: Path, config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """All that one run measured; `place` is its number on the page."""
    title = escape(run_dir.resolve().name)
    body = [f'<header id="run-{place}"><h1>{title}</h1>{_tiles(records)}</header>']
    body.append(f"<section>{_facts(config, records)}</section>")
    objective = config["run"].get("objective", "pretrain")
    examined = run_dir / "eval" / RESULTS
    groups = [
        alignment_charts(config["run"], records),
        _course_charts(objective, records),
        _expert_charts(config, records),
        evaluation_charts(read_results(examined)) if examined.exists() else [],
    ]
    drawn = [f"<main>{''.join(charts)}</main>" for charts in groups if any(charts)]
    drawn = drawn or ["<main>No step has been logged yet.</main>"]
    body += [drawn[0], sample_cards(read_samples(run_dir)), *drawn[1:]]
    return "".join(body)


def _tiles(records: Sequence[Mapping[str, Any]]) -> str:
    def last(name: str, form: str) -> str | None:
        found = values(records, name)
        return format(found[-1], form) if found else None

    rate = median_of(values(records, "tokens_per_second"))
    share = median_of(values(records, "mfu"))
    tokens = values(records, "tokens")
    tiles = [
        ("step", f"{records[-1]['step']:,}" if records else None),
        ("loss", last("loss", ".4g")),
        ("validation loss", last("validation_loss", ".4g")),
        ("reward", last("reward", ".3g")),
        ("held-out reward", last("validation_reward", ".3g")),
        ("preferred rightly", last("accuracy", ".0%")),
        ("held out", last("validation_accuracy", ".0%")),
        ("tokens", short(sum(tokens)) if tokens else None),
        ("tokens/s", short(rate) if rate else None),
        ("MFU", f"{share:.1%}" if share else None),
        ("busiest expert, x mean", last("expert_load_max_over_mean", ".3g")),
        ("choices dropped", last("dropped_share", ".2%")),
    ]
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles if value) + "</dl>"


def _course_charts(objective: str, records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Losses, rates, norms and memory over steps; an empty string for what was not measured."""
    marks = marks_of(records)
    losses = [
        series(records, "loss", "train", smooth=True),
        held_out(records, "validation_loss", "validation"),
        held_out(records, "reference_loss", "reference", 3),
    ]
    unit = ", nats per token" if objective in ("pretrain", "sft") else ""
    rate, share = series(records, "tokens_per_second", "tokens/s"), series(records, "mfu", "MFU", factor=100.0)
    norms = [
        series(records, "parameter_norm", "parameters", 3),
        series(records, "gradient_norm", "gradient"),
        series(records, "update_norm", "update", 2),
    ]
    memory = series(records, "memory_bytes", "memory", factor=2.0**-30)
    return [
        line_chart(f"Loss{unit}", losses, marks=marks, show=lambda value: f"{value:.4g}"),
        line_chart("Learning rate", [series(records, "learning_rate", "learning rate")], zero=True),
        line_chart("Throughput, tokens per second", [rate], zero=True),
        line_chart("MFU, share of the device's peak", [share], zero=True, show=lambda value: f"{value:.3g}%"),
        line_chart("Norms", norms, log=True),
        line_chart("Memory", [memory], zero=True, show=lambda value: f"{value:.3g} GiB" if value else "0"),
    ]


def _expert_charts(config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """How tokens spread over experts; an empty string for what was not measured."""
    busiest = series(records, "expert_load_max_over_mean", "max / mean", smooth=True)
    z_losses = [series(records, "router_z_loss", "router"), series(records, "z_loss", "output", 2)]
    z_losses = [one for one in z_losses if any(y for _, y in one.points)]
    return [
        *_heat_maps(config, records),
        line_chart("Busiest expert of all layers, x mean load", [busiest]),
        line_chart("Balance loss", [series(records, "balance_loss", "balance loss", smooth=True)]),
        line_chart("Squared log-partitions (z-losses)", z_losses, log=True),
    ]


def _heat_maps(config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[str]:
    loads = [(record["step"], record["expert_load"]) for record in records if _is_matrix(record.get("expert_load"))]
    if not loads:
        return []
    rows = len(loads[-1][1])
    loads = [(step, load) for step, load in loads if len(load) == rows]
    model = _model(config)
    routed = [layer for layer in range(model.num_layers) if model.is_moe(layer)] if model else []
    labels = [f"layer {layer}" for layer in (routed if len(routed) == rows else range(rows))]
    busiest = [[max(map(_number, load[row]), default=math.nan) for _, load in loads] for row in range(rows)]
    last_step, last = loads[-1]
    return [
        time_heat_map("Busiest expert of each layer", [step for step, _ in loads], busiest, labels),
        expert_heat_map(f"Each expert at step {last_step:,}", [list(map(_number, row)) for row in last], labels),
    ]


def _is_matrix(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, list) and row for row in value)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _facts(config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    """The config and the course of the run in three small tables."""
    run = config["run"]
    tables = [("Model", _model_facts(config)), ("Training", _training_facts(run)), ("Course", _course(run, records))]
    parts = []
    for title, rows in tables:
        lines = [f"<tr><th>{escape(name)}</th><td>{escape(str(value))}</td></tr>" for name, value in rows if value]
        parts.append(f'<table><thead><tr><th colspan="2">{title}</th></tr></thead>{"".join(lines)}</table>')
    return "".join(parts)


def _model_facts(config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    model = _model(config)
    if model is None:
        return [("", "written by another version of qmax")]
    total, active = _parameters(config)
    moe = model.moe
    facts: list[tuple[str, Any]] = [
        ("parameters", f"{total:,}" if total else ""),
        ("active for a token", f"{active:,}" if active and active != total else ""),
        ("layers", model.num_layers),
        ("width", model.hidden_size),
        ("heads", f"{model.num_heads} queries, {model.num_kv_heads} keys/values, width {model.head_dim}"),
        ("vocabulary", f"{model.vocab_size:,}" if model.vocab_size else ""),
    ]
    if not moe.num_experts:
        return [*facts, ("feed-forward", f"dense, width {model.intermediate_size:,}")]
    shared = f", and a shared one of width {moe.shared_intermediate_size:,}" if moe.shared_intermediate_size else ""
    width = f"width {moe.intermediate_size:,}"
    return [
        *facts,
        ("routed layers", model.num_moe_layers if model.num_moe_layers != model.num_layers else ""),
        ("experts", f"{moe.num_experts}, {moe.experts_per_token} for a token, {width}{shared}"),
    ]


def _training_facts(run: Mapping[str, Any]) -> list[tuple[str, Any]]:
    data, optimizer = run.get("data", {}), run.get("optimizer", {})
    rows, length = data.get("batch_size"), data.get("sequence_length")
    mesh = " x ".join(f"{axis} {size}" for axis, size in run.get("mesh", {}).items() if type(size) is int and size > 1)
    batch = f"{rows} rows of {length:,} = {rows * length:,} tokens" if rows and length else ""
    return [
        ("objective", run.get("objective")),
        ("batch", batch + (f", in {run['accumulate']} parts" if run.get("accumulate", 1) > 1 else "")),
        ("optimizer", f"{optimizer.get('name')}, weight decay {optimizer.get('weight_decay')}" if optimizer else ""),
        ("learning rate", f"{optimizer.get('learning_rate')}, {optimizer.get('schedule')}" if optimizer else ""),
        ("warm-up", f"{optimizer.get('warmup_steps')} steps" if optimizer else ""),
        ("type of activations", run.get("dtype")),
        ("mesh", mesh or "one device"),
        ("seed", str(run.get("seed", ""))),
        ("data", ", ".join(data.get("sources", []))),
    ]


def _course(run: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[tuple[str, Any]]:
    if not records:
        return [("steps", f"0 of {run.get('steps', 0):,}")]
    marks, times = marks_of(records), values(records, "time")
    best = min(points(records, "validation_loss"), key=lambda point: point[1], default=None)
    losses = values(records, "loss")
    return [
        ("steps", f"{records[-1]['step']:,} of {run['steps']:,}" if run.get("steps") else f"{records[-1]['step']:,}"),
        ("loss", f"{losses[0]:.4g} to {losses[-1]:.4g}" if losses else ""),
        ("best validation loss", f"{best[1]:.4g} at step {best[0]:,}" if best else ""),
        ("first step", _when(times[0]) if times else ""),
        ("last step", _when(times[-1]) if times else ""),
        ("in steps", _span(sum(values(records, "seconds")))),
        ("skipped steps", str(len(marks.skipped))),
        ("resumed", ", ".join(f"after step {step:,}" for step in marks.resumed[-8:]) or "never"),
    ]


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _span(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds else ""
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"
