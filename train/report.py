"""`qmax report RUN`: one page with everything that a run measured, readable anywhere, without network or script."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from errors import UserError
from model.config import ModelConfig
from terminal import Parser, print_table, write_json
from train.metrics import NAME as METRICS
from train.metrics import read_metrics
from train.report_plots import Marks, Series, expert_heat_map, line_chart, short, time_heat_map
from train.report_style import STYLE

NAME = "report.html"


def report_main(argv: list[str]) -> int:
    """`qmax report RUN [--json FILE]`."""
    parser = Parser(
        "report",
        "Draws what a training run measured into RUN/report.html: losses, rates, norms, expert load.",
        ["qmax report runs/demo"],
    )
    parser.add_argument("run", metavar="RUN", help="directory that qmax train wrote")
    parser.add_json()
    arguments = parser.parse_args(argv)
    path = write_report(arguments.run)
    summary = summarize(arguments.run)
    print_table([(name.replace("_", " "), value) for name, value in summary.items()])
    print(f"\n{path}")
    if arguments.json:
        write_json(arguments.json, summary)
    return 0


def write_report(run_dir: str | Path) -> Path:
    """Renders `report.html` into the run directory, whole or not at all, and returns its path.

    Raises:
        UserError: the directory is not a run, or cannot be written.
    """
    run_dir = Path(run_dir)
    config, records = _load(run_dir)
    page = _page(run_dir, config, records)
    path = run_dir / NAME
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=run_dir, prefix=f".{NAME}.")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as exc:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise UserError(f"{path} could not be written ({exc.strerror}); make room or make it writable") from exc
    return path


def summarize(run_dir: str | Path) -> dict[str, Any]:
    """What the page says, in numbers; None where a run did not measure something."""
    config, records = _load(Path(run_dir))
    losses = _values(records, "loss")
    validation = _values(records, "validation_loss")
    skipped, resumed = _marks(records).skipped, _marks(records).resumed
    total, active = _parameters(config)
    last = records[-1] if records else {}
    return {
        "steps": last.get("step", 0),
        "tokens": last.get("tokens"),
        "loss_first": losses[0] if losses else None,
        "loss_last": losses[-1] if losses else None,
        "validation_loss_best": min(validation, default=None),
        "validation_loss_last": validation[-1] if validation else None,
        "tokens_per_second": _median(_values(records, "tokens_per_second")),
        "mfu": _median(_values(records, "mfu")),
        "expert_load_max_over_mean": next(iter(reversed(_values(records, "expert_load_max_over_mean"))), None),
        "memory_bytes": max(_values(records, "memory_bytes"), default=None),
        "seconds": sum(_values(records, "seconds")) or None,
        "skipped": len(skipped),
        "resumes": len(resumed),
        "parameters_total": total,
        "parameters_active": active,
    }


# ---- reading --------------------------------------------------------------------
def _load(run_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    for name in ("config.json", METRICS):
        if not (run_dir / name).is_file():
            what = "is not a run" if run_dir.is_dir() else "does not exist or is no directory"
            raise UserError(f"{run_dir} {what} (no {name} in it); name the directory that qmax train wrote")
    try:
        config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    except ValueError as exc:
        raise UserError(f"{run_dir / 'config.json'} is not valid JSON ({exc}); restore it from a checkpoint") from exc
    if not isinstance(config, dict) or not isinstance(config.get("run"), dict):
        raise UserError(
            f"{run_dir} is not a run (its config.json has no 'run'); name the directory that qmax train wrote"
        )
    return config, read_metrics(run_dir)


def _points(records: Iterable[Mapping[str, Any]], name: str, factor: float = 1.0) -> list[tuple[float, float]]:
    return [
        (record["step"], record[name] * factor)
        for record in records
        if isinstance(record.get(name), (int, float)) and math.isfinite(record[name])
    ]


def _values(records: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    return [y for _, y in _points(records, name)]


def _median(values: Sequence[float]) -> float | None:
    return median(values) if values else None


def _marks(records: Sequence[Mapping[str, Any]]) -> Marks:
    return Marks(
        skipped=[record["step"] for record in records if record.get("skipped")],
        resumed=[record["resumed_from"] for record in records if "resumed_from" in record],
    )


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
def _page(run_dir: Path, config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> str:
    title = escape(run_dir.resolve().name)
    body = [f"<header><h1>{title}</h1>{_tiles(records)}</header>"]
    body.append(f"<section>{_facts(config, records)}</section>")
    groups = ["".join(_course_charts(records)), "".join(_expert_charts(config, records))]
    body += [f"<main>{charts}</main>" for charts in groups if charts] or ["<main>No step has been logged yet.</main>"]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{title} - qmax</title><style>{STYLE}</style></head>\n<body>{''.join(body)}</body></html>\n"
    )


def _tiles(records: Sequence[Mapping[str, Any]]) -> str:
    def last(name: str, form: str) -> str | None:
        values = _values(records, name)
        return format(values[-1], form) if values else None

    rate = _median(_values(records, "tokens_per_second"))
    share = _median(_values(records, "mfu"))
    tokens = _values(records, "tokens")
    tiles = [
        ("step", f"{records[-1]['step']:,}" if records else None),
        ("loss", last("loss", ".4g")),
        ("validation loss", last("validation_loss", ".4g")),
        ("tokens", short(tokens[-1]) if tokens else None),
        ("tokens/s", short(rate) if rate else None),
        ("MFU", f"{share:.1%}" if share else None),
        ("busiest expert, x mean", last("expert_load_max_over_mean", ".3g")),
        ("choices dropped", last("dropped_share", ".2%")),
    ]
    return "<dl>" + "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in tiles if value) + "</dl>"


def _series(
    records: Iterable[Mapping[str, Any]],
    name: str,
    label: str,
    color: int = 1,
    factor: float = 1.0,
    smooth: bool = False,
) -> Series:
    return Series(label, _points(records, name, factor), color, smooth=smooth)


def _course_charts(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """Losses, rates, norms and memory over steps; an empty string for what was not measured."""
    marks = _marks(records)
    train = _series(records, "loss", "train", smooth=True)
    validation = Series("validation", _points(records, "validation_loss"), 2, dots=True)
    reference = Series("reference", _points(records, "reference_loss"), 3, dots=True)
    rate, share = _series(records, "tokens_per_second", "tokens/s"), _series(records, "mfu", "MFU", factor=100.0)
    norms = [
        _series(records, "parameter_norm", "parameters", 3),
        _series(records, "gradient_norm", "gradient"),
        _series(records, "update_norm", "update", 2),
    ]
    memory = _series(records, "memory_bytes", "memory", factor=2.0**-30)
    return [
        line_chart(
            "Loss, nats per token", [train, validation, reference], marks=marks, show=lambda value: f"{value:.4g}"
        ),
        line_chart("Learning rate", [_series(records, "learning_rate", "learning rate")], zero=True),
        line_chart("Throughput, tokens per second", [rate], zero=True),
        line_chart("MFU, share of the device's peak", [share], zero=True, show=lambda value: f"{value:.3g}%"),
        line_chart("Norms", norms, log=True),
        line_chart("Memory", [memory], zero=True, show=lambda value: f"{value:.3g} GiB" if value else "0"),
    ]


def _expert_charts(config: Mapping[str, Any], records: Sequence[Mapping[str, Any]]) -> list[str]:
    """How tokens spread over experts; an empty string for what was not measured."""
    busiest = _series(records, "expert_load_max_over_mean", "max / mean", smooth=True)
    z_losses = [_series(records, "router_z_loss", "router"), _series(records, "z_loss", "output", 2)]
    z_losses = [one for one in z_losses if any(y for _, y in one.points)]
    return [
        *_heat_maps(config, records),
        line_chart("Busiest expert of all layers, x mean load", [busiest]),
        line_chart("Balance loss", [_series(records, "balance_loss", "balance loss", smooth=True)]),
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
    mesh = " x ".join(f"{axis} {size}" for axis, size in run.get("mesh", {}).items() if size != 1)
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
    marks, times = _marks(records), _values(records, "time")
    best = min(_points(records, "validation_loss"), key=lambda point: point[1], default=None)
    losses = _values(records, "loss")
    return [
        ("steps", f"{records[-1]['step']:,} of {run['steps']:,}" if run.get("steps") else f"{records[-1]['step']:,}"),
        ("loss", f"{losses[0]:.4g} to {losses[-1]:.4g}" if losses else ""),
        ("best validation loss", f"{best[1]:.4g} at step {best[0]:,}" if best else ""),
        ("first step", _when(times[0]) if times else ""),
        ("last step", _when(times[-1]) if times else ""),
        ("in steps", _span(sum(_values(records, "seconds")))),
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
