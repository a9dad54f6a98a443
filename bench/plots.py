"""The same figures to look at: a page of bars."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from bench.table import Comparison, rates, ratio
from bench.timing import median
from train.report_plots import bar_chart
from train.report_style import save_page, whole_page


def save_plots(path: str, found: dict[str, Any]) -> None:
    """Writes the page. UserError where it cannot be written."""
    rows: list[Comparison] = found["compared"]
    beside = [
        (f"{one['what']}, {one['shape']}: {peer['name']}", ratio(one["ours"], peer["rounds"]), 0.0)
        for one in found["measured"]
        for peer in one["peers"]
        if peer["rounds"]
    ]
    beside += [
        (f"{one['name']}: {one['peer']}", ratio(one["ours"], one["theirs"]), 0.0)
        for one in found["layers"]
        if one["theirs"]
    ]
    serving = [(f"{row.what}, {row.shape}: {row.beside}", median(row.ratios), 0.0) for row in rows if row.ratios]
    roofline = [
        (f"{one['what']}, {one['shape']}", 100 * median(rates(one["ours"])) / one["bound"], 0.0)
        for one in found["measured"]
    ]
    figures = [
        bar_chart("Times as fast as", beside),
        bar_chart("Serving and reward: times better than", serving),
        bar_chart("Share of what the machine allows, %", roofline, 100.0),
    ]
    for shape, parts in found["parts"].items():
        whole = parts["seconds"]["step"]
        shares = [(name, 100 * value / whole, 0.0) for name, value in parts["seconds"].items() if name != "step"]
        figures.append(bar_chart(f"Parts of a training step of {shape}, %", shares, 100.0))
    machine = found["machine"]
    head = f"{machine['processor']}, {machine['cores']} cores, {machine['device']}, {machine['date']}"
    body = f"<header><h1>Speed and memory</h1><p>{escape(head)}</p></header><main>{''.join(figures)}</main>"
    save_page(Path(path), whole_page("Speed and memory", body))
