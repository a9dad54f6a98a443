"""What was measured, as a page: one row for each measurement and peer, then parts of a step, loss, compilations."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.shapes import BYTES, LOSS_TOKENS, LOSS_VOCABULARY
from bench.timing import NOISY, median, spread
from terminal import human_bytes

NOTE = """Medians over rounds in which both sides run by turns, each time in a fresh process, in float32; in
brackets the range of the middle four fifths of all samples, as a share of the median. *ratio*: the median over rounds
of ours divided by the peer's. *required*: the ratio that must be reached. *roofline*: our share of what the machine's
limits allow; a model that fits into the processor's cache (T) may pass it. *other CPU*: cores that other processes
used meanwhile (ours / peer, the worst round); `~` marks rows above {noisy}, which count for little."""


def processor() -> str:
    """The processor's name."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def describe(limits: dict[str, Any], versions: dict[str, str]) -> dict[str, Any]:
    """The head of a report: where, when and with what."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "device": limits["device"],
        "processor": processor(),
        "cores": os.cpu_count(),
        "read_gigabytes_per_second": limits["bandwidth"] / 1e9,
        "matrix_gigaflops_per_second": limits["flops"] / 1e9,
        "versions": {"python": platform.python_version(), **limits["versions"], **versions},
    }


def rates(rounds: Sequence[dict[str, Any]]) -> list[float]:
    """All samples of all rounds."""
    return [rate for one in rounds for rate in one["rates"]]


def ratio(ours: Sequence[dict[str, Any]], peer: Sequence[dict[str, Any]]) -> float:
    """The median over rounds of our median rate divided by the peer's."""
    return median([median(a["rates"]) / median(b["rates"]) for a, b in zip(ours, peer, strict=False)])


def figure(value: float) -> str:
    """Three digits or more, without a fraction where there are."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def cell(rounds: Sequence[dict[str, Any]]) -> str:
    """Median and spread."""
    values = rates(rounds)
    return f"{figure(median(values))} ({spread(values):.0%})"


def other_cpu(rounds: Sequence[dict[str, Any]]) -> float | None:
    """The noisiest round's share of other processes, in cores."""
    return max((one["other_cpu"] for one in rounds if one.get("other_cpu") is not None), default=None)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; all columns but the first two to the right."""
    rule = ["---" if i < 2 else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *rows))


def speed_table(measured: Sequence[dict[str, Any]]) -> str:
    """Our rates beside those of the peers, tokens per second."""
    rows = []
    for entry in measured:
        peers = entry["peers"] or [{"name": "none", "rounds": [], "required": None}]
        for peer in peers:
            noise = [other_cpu(rounds) for rounds in (entry["ours"], peer["rounds"]) if rounds]
            shown = " / ".join("?" if value is None else f"{value:.2f}" for value in noise)
            loud = any(value is not None and value > NOISY for value in noise)
            rows.append(
                [
                    ("~ " if loud else "") + entry["what"],
                    entry["shape"],
                    cell(entry["ours"]),
                    peer["name"],
                    cell(peer["rounds"]) if peer["rounds"] else "not measured",
                    f"{ratio(entry['ours'], peer['rounds']):.2f}" if peer["rounds"] else "",
                    f"{peer['required']:.2f}" if peer["required"] else "",
                    f"{median(rates(entry['ours'])) / entry['bound']:.0%}",
                    shown,
                ]
            )
    header = ("what", "shape", "ours, tokens/s", "peer", "peer, tokens/s", "ratio", "required", "roofline", "other CPU")
    return markdown(header, rows)


@dataclass
class Comparison:
    """One comparison: figures of both sides, turn by turn. less: whether less is better. mark: what
    must be reached."""

    what: str
    shape: str
    unit: str
    ours: list[float]
    beside: str = ""
    theirs: list[float] = field(default_factory=list)
    less: bool = False
    other_cpu: float | None = None
    mark: str = ""

    @property
    def ratios(self) -> list[float]:
        """How many times better ours is, in each turn."""
        pairs = zip(self.ours, self.theirs, strict=False)
        return [theirs / ours if self.less else ours / theirs for ours, theirs in pairs]

    @property
    def record(self) -> dict[str, Any]:
        """All of it, for a JSON file."""
        return {**asdict(self), "ratios": self.ratios}

    @property
    def cells(self) -> list[str]:
        """A line of the table."""

        def shown(values: Sequence[float]) -> str:
            if not values:
                return ""
            if self.unit == "bytes":
                return human_bytes(int(values[0]))
            return cell([{"rates": values}])

        loud = "~ " if self.other_cpu is not None and self.other_cpu > NOISY else ""
        ratio = f"{median(self.ratios):.2f} ({spread(self.ratios):.0%})" if self.ratios else ""
        own, other = shown(self.ours), shown(self.theirs)
        return [loud + self.what, self.shape, self.unit, own, self.beside, other, ratio, self.mark]


COMPARED = ("what", "shape", "unit", "ours", "beside", "theirs", "times better", "mark")
COMPARED_NOTE = f"""Sides that take turns, in one process or in processes right after each other: medians of all turns.
*times better*: the median of the ratios of neighbours; below 1 ours is worse. `~`: other processes used more than
{NOISY} of a core meanwhile, which counts for little."""


def comparisons(rows: Sequence[Comparison]) -> str:
    """What serving costs, and a step of reinforcement learning."""
    return markdown(COMPARED, [row.cells for row in rows])


def parts_table(parts: dict[str, dict[str, Any]]) -> str:
    """Milliseconds of the parts of a training step, and their shares of it."""
    rows = []
    for shape, found in parts.items():
        seconds = found["seconds"]
        for name in sorted(seconds, key=lambda name: (name == "step", -seconds[name])):
            share = seconds[name] / seconds["step"]
            rows.append([name, shape, f"{seconds[name] * 1e3:.1f}", f"{share:.0%}"])
    return markdown(("part", "shape", "ms", "share"), rows)


def loss_table(found: Sequence[dict[str, Any]]) -> str:
    """Temporary memory and speed of the loss beside one that keeps all logits."""
    logits = LOSS_TOKENS * LOSS_VOCABULARY * BYTES
    rows = [
        [
            f"width {one['width']:,}",
            f"{LOSS_TOKENS:,} x {LOSS_VOCABULARY:,}",
            f"{human_bytes(one['temporary_bytes'])} ({one['temporary_share']:.3f})",
            "0.25",
            f"{human_bytes(one['temporary_bytes_at_once'])} ({one['temporary_bytes_at_once'] / logits:.3f})",
            figure(median(one["rates"])),
            figure(median(one["at_once_rates"])),
            f"{median(one['rates']) / median(one['at_once_rates']):.2f}",
        ]
        for one in found
    ]
    header = ("loss", "tokens x vocabulary", "temporary memory (share of the logits)", "at most")
    more = ("all logits at once", "ours, tokens/s", "at once, tokens/s", "ratio")
    return markdown((*header, *more), rows)


def layers_table(found: Sequence[dict[str, Any]]) -> str:
    """Single layers and files, beside who does the same."""

    def shown(rounds: Sequence[dict[str, Any]], scale: float) -> str:
        return cell([{"rates": [rate / scale for rate in one["rates"]]} for one in rounds])

    rows = [
        [
            one["name"],
            one["unit"],
            shown(one["ours"], one["scale"]),
            one["peer"] if one["theirs"] else "none",
            shown(one["theirs"], one["scale"]) if one["theirs"] else "not measured",
            f"{ratio(one['ours'], one['theirs']):.2f}" if one["theirs"] else "",
            f"{one['required']:.2f}" if one["required"] else "",
        ]
        for one in found
    ]
    return markdown(("what", "unit", "ours", "peer", "peer's", "ratio", "required"), rows)


def compilations(measured: Sequence[dict[str, Any]]) -> str:
    """A table of what was compiled for each measurement; the worst round counts."""
    rows = [
        [
            entry["what"],
            entry["shape"],
            *(
                str(max(one[name] for one in entry["ours"])) if name in entry["ours"][0] else ""
                for name in ("step_compilations", "compilations_after_warmup")
            ),
        ]
        for entry in measured
    ]
    return markdown(("what", "shape", "compilations of its step", "after warm-up"), rows)


def page(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    head = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in head["versions"].items())
    lines = [
        "# Speed and memory",
        "Written by `python -m bench`; see README.md in this folder.",
        f"{head['date']}. {head['processor']}, {head['cores']} cores; jax on {head['device']}. "
        f"Limits as measured: {head['read_gigabytes_per_second']:.1f} GB/s read, "
        f"{head['matrix_gigaflops_per_second']:.0f} GFLOP/s float32 matrix product. {versions}.",
    ]
    if report["measured"]:
        lines += [NOTE.format(noisy=NOISY), speed_table(report["measured"])]
    if report["parts"]:
        lines += [
            "Parts of a training step, each compiled alone, forward and backward (`rest`: what they leave):",
            parts_table(report["parts"]),
        ]
    if report["loss"]:
        lines += ["Loss and its gradients, float32:", loss_table(report["loss"])]
    if report["layers"]:
        lines += ["Single layers, forward and backward, and files:", layers_table(report["layers"])]
    if report["compared"]:
        lines += ["Serving and reward:", COMPARED_NOTE, comparisons(report["compared"])]
    if report["measured"]:
        lines += ["Compilations, counted by jax's monitoring events:", compilations(report["measured"])]
    if report["notes"]:
        lines += ["Notes:", "\n".join(f"- {note}" for note in report["notes"])]
    return "\n\n".join(lines) + "\n"
