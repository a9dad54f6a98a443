"""Plots as inline SVG: lines over steps and heat maps. Plain strings; colours live in the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from itertools import pairwise

WIDTH, HEIGHT = 640, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 10, 36
BUCKETS = 320
"""Points that a line is thinned to: more would fall on the same pixel."""
COLUMNS = 100
"""Columns of a heat map over time, and strips that show values under the pointer."""
LEVELS = 11
"""Colours of a heat map."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """One line: what it is called and its finite points, by ascending x."""

    name: str
    points: Sequence[Point]
    color: int = 1
    """Which of the page's colours."""
    smooth: bool = False
    """Draw the points faintly and their running mean over them."""
    dots: bool = False
    """Mark each point: for few and far between."""


@dataclass(frozen=True)
class Marks:
    """Things that happened at steps."""

    skipped: Sequence[float] = field(default_factory=list)
    resumed: Sequence[float] = field(default_factory=list)


def short(value: float) -> str:
    """`0.0003`, `12.3k`, `4.56M`: three figures."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        digits, _, power = f"{value:.2e}".partition("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}P"


def line_chart(
    title: str,
    series: Iterable[Series],
    *,
    log: bool = False,
    zero: bool = False,
    marks: Marks | None = None,
    show: Callable[[float], str] = short,
) -> str:
    """A figure of lines over steps; empty when there is nothing to draw.

    Args:
        log: a logarithmic y axis, where the values span enough for one; what is not positive, or
            twelve powers of ten below the largest, is left out then.
        zero: let the y axis begin at 0.
        show: how a value is written.
    """
    drawn = [one for one in series if len(one.points) > 0]
    values = [y for one in drawn for _, y in one.points]
    floor = max(values, default=0.0) * 1e-12
    positive = [y for y in values if y > 0 and y >= floor]
    log = log and bool(positive) and max(positive) > 20 * min(positive)
    if log:
        drawn = [replace(one, points=[(x, y) for x, y in one.points if y > 0 and y >= floor]) for one in drawn]
        drawn = [one for one in drawn if len(one.points) > 0]
        values = positive
    if not values:
        return ""
    marks = marks or Marks()
    xs = [x for one in drawn for x, _ in one.points] + list(marks.skipped)
    across = _Scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    lowest = min([*values, 0.0] if zero and not log else values)
    up = _Scale(lowest, max(values), HEIGHT - BOTTOM, TOP, log=log, pad=True)
    parts = [_axes(across, up, show), _events(marks, across)]
    parts += [_line(one, across, up) for one in drawn]
    parts.append(_hits(drawn, across, show))
    legend = [(one.color, one.name, show(one.points[-1][1])) for one in drawn]
    return _figure(title + (", log scale" if log else ""), "".join(parts), HEIGHT, legend, marks)


def bar_chart(title: str, bars: Sequence[tuple[str, float, float]], end: float | None = None) -> str:
    """A figure with a bar for each (name, value, half of its interval), from 0 or the lowest value to `end`."""
    if not bars:
        return ""
    most = max([value + half for _, value, half in bars] + [end or 0.0])
    across = _Scale(min(0.0, *(value - half for _, value, half in bars)), most or 1.0, 8, WIDTH - 40)
    parts, height = [], 42
    for row, (name, value, half) in enumerate(bars):
        top, left = row * height, across(min(0.0, across.low))
        words = f"{short(value)} ± {short(half)}" if half else short(value)
        parts.append(_text(8, top + 14, f"{name}: {words}", "start"))
        parts.append(
            f'<rect class="c1 band" x="{left}" y="{top + 20}" width="{across(value) - left:.1f}" height="14"/>'
        )
        if half:
            low, high, middle = across(value - half), across(value + half), top + 27
            whisker = f"M{low} {middle}H{high}M{low} {middle - 5}v10M{high} {middle - 5}v10"
            parts.append(f'<path class="c1 line" d="{whisker}"/>')
    return _figure(title, "".join(parts), len(bars) * height + 6)


def time_heat_map(
    title: str, steps: Sequence[float], rows: Sequence[Sequence[float]], labels: Sequence[str], share_of: str = ""
) -> str:
    """A figure of rows over time, coloured from 1 upwards by powers of 2.

    Args:
        steps: step of each column, ascending.
        rows: [rows, columns]; what is not finite is left blank.
        labels: one for each row.
        share_of: the rows are shares of this, from 0 to 1, and coloured evenly up to the largest.
    """
    if not rows or not steps:
        return ""
    edges = _buckets(len(steps), COLUMNS)
    columns = [[_mean(row[a:b]) for row in rows] for a, b in edges]
    doublings = _doublings(v for column in columns for v in column)
    most = max((v for column in columns for v in column if v > 0), default=1.0)
    height, row_height = _heat_height(len(rows))
    across = _Scale(steps[0], steps[-1], LEFT, WIDTH - RIGHT)
    cell = (WIDTH - RIGHT - LEFT) / len(edges)
    parts = []
    for column, ((a, b), values) in enumerate(zip(edges, columns, strict=True)):
        when = f"step {steps[a]:,.0f}" + (f" to {steps[b - 1]:,.0f}" if b - a > 1 else "")
        for row, value in enumerate(values):
            if math.isfinite(value):
                level = _level(value / most if share_of else math.log2(max(value, 1)) / doublings)
                words = f"{labels[row]}, {when}: {f'{value:.1%}' if share_of else f'{value:.2f}'}"
                parts.append(_cell(LEFT + column * cell, TOP + row * row_height, cell, row_height, f"s{level}", words))
    parts.append(_row_labels(labels, row_height))
    bottom = TOP + row_height * len(rows)
    for x in _ticks(across.low, across.high, 7):
        # Cells are equally wide whatever steps they stand for, so a label goes to the column of its step.
        column = next((i for i, (_, b) in enumerate(edges) if steps[b - 1] >= x), len(edges) - 1)
        if x >= across.low:
            parts.append(_text(LEFT + (column + 0.5) * cell, bottom + 15, short(x), "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, bottom + 31, "step", "middle"))
    every = math.ceil(doublings / 6)
    ticks = [f"{2**i}" for i in range(0, doublings + 1, every)]
    scale = _color_bar("s", ticks, "busiest expert, x mean (1 = even)")
    if share_of:
        scale = _color_bar("s", ["0", f"{most / 2:.0%}", f"{most:.0%}"], f"share of {share_of}")
    return _figure(title, "".join(parts), height, extra=scale)


def expert_heat_map(title: str, rows: Sequence[Sequence[float]], labels: Sequence[str]) -> str:
    """A figure of each expert's load in each layer, coloured by how far it is from 1 (both ways, by powers of 2)."""
    if not rows or not rows[0]:
        return ""
    count = max(len(row) for row in rows)
    height, row_height = _heat_height(len(rows))
    cell = (WIDTH - RIGHT - LEFT) / count
    tell = count * len(rows) <= 4096
    reach = min(3, _doublings(max(value, 1 / value) if value > 0 else 1 for row in rows for value in row))
    parts = []
    for row, values in enumerate(rows):
        for column, value in enumerate(values):
            if math.isfinite(value):
                level = _level((math.log2(max(value, 1e-3)) / reach + 1) / 2)
                words = f"{labels[row]}, expert {column}: {value:.2f}" if tell else ""
                parts.append(_cell(LEFT + column * cell, TOP + row * row_height, cell, row_height, f"d{level}", words))
    parts.append(_row_labels(labels, row_height))
    bottom = TOP + row_height * len(rows)
    every = max(1, 2 ** math.ceil(math.log2(count / 16)))
    for column in range(0, count, every):
        parts.append(_text(LEFT + (column + 0.5) * cell, bottom + 15, str(column), "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, bottom + 31, "expert", "middle"))
    ticks = [f"1/{2**-i}" if i < 0 else f"{2**i}" for i in range(-reach, reach + 1)]
    scale = _color_bar("d", ticks, "load, x mean (1 = even)")
    return _figure(title, "".join(parts), height, extra=scale)


# ---- scales -------------------------------------------------------------------
class _Scale:
    """From values to pixels, linearly or by logarithm."""

    def __init__(
        self, low: float, high: float, start: float, end: float, *, log: bool = False, pad: bool = False
    ) -> None:
        self.log = log
        if pad and not log:
            if high - low <= 1e-12 * max(abs(high), abs(low)):
                spread = abs(high) * 0.1 or 1.0
                low, high = (low - spread if low else 0.0), high + spread
            margin = (high - low) * 0.06
            low, high = (low if low == 0 else low - margin), high + margin
        elif pad:
            low, high = low / 1.15, high * 1.15
        self.low, self.high = low, high if high > low else low + 1
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        if self.log:
            part = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            part = (value - self.low) / (self.high - self.low)
        return round(self._start + part * (self._end - self._start), 1)

    def ticks(self, count: int) -> list[float]:
        """Round numbers inside the scale."""
        if not self.log:
            return _ticks(self.low, self.high, count)
        decades = math.log10(self.high / self.low)
        factors = (1, 2, 5) if decades < 2 else (1, 3) if decades < 3.2 else (1,)
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        every = 1 if decades < 7 else math.ceil(decades / 6)
        found = [f * 10.0**p for p in powers if p % every == 0 for f in factors]
        return [tick for tick in found if self.low <= tick <= self.high]


def _ticks(low: float, high: float, count: int) -> list[float]:
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    ticks = [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step + 1e-9) + 1)]
    return [tick for tick in ticks if low <= tick <= high]


def _doublings(values: Iterable[float]) -> int:
    """How many times 1 is doubled to reach the largest of `values`; at least once."""
    largest = max((value for value in values if math.isfinite(value)), default=2.0)
    return math.ceil(math.log2(max(2.0, largest)) - 0.05)


def _level(part: float) -> int:
    return min(LEVELS - 1, max(0, int(part * LEVELS)))


def _buckets(count: int, most: int) -> list[tuple[int, int]]:
    """Ranges that cut `count` things into at most `most` parts."""
    parts = min(count, most)
    return [(count * i // parts, count * (i + 1) // parts) for i in range(parts)]


def _mean(values: Sequence[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


# ---- pieces -------------------------------------------------------------------
def _line(one: Series, across: _Scale, up: _Scale) -> str:
    """The path of a series, thinned; where it is smoothed, the spread of the points lies faintly under it."""
    parts: list[str] = []
    points = one.points
    edges = _buckets(len(points), BUCKETS)
    thin = [(_mean([x for x, _ in points[a:b]]), _mean([y for _, y in points[a:b]])) for a, b in edges]
    if one.smooth:
        if len(points) > BUCKETS:
            low = [(x, min(y for _, y in points[a:b])) for (x, _), (a, b) in zip(thin, edges, strict=True)]
            high = [(x, max(y for _, y in points[a:b])) for (x, _), (a, b) in zip(thin, edges, strict=True)]
            outline = [*low, *reversed(high)]
            parts.append(f'<path class="band c{one.color}" d="{_path(outline, across, up)}Z"/>')
        else:
            parts.append(f'<path class="faint c{one.color}" d="{_path(points, across, up)}"/>')
        thin = _smoothed(thin)
    parts.append(f'<path class="line c{one.color}" d="{_path(thin, across, up)}"/>')
    if one.dots or len(points) == 1:
        parts += [
            f'<circle class="dot c{one.color}" cx="{across(x)}" cy="{up(y)}" r="{3.5 if len(points) <= 40 else 2}"/>'
            for x, y in (points if len(points) <= BUCKETS else thin)
        ]
    return "".join(parts)


def _smoothed(points: Sequence[Point]) -> list[Point]:
    """Each point's mean with as many before it as after it, so that a falling line is not drawn late."""
    reach = max(1, len(points) // 40)
    result = []
    for i, (x, _) in enumerate(points):
        around = min(reach, i, len(points) - 1 - i)
        result.append((x, _mean([y for _, y in points[i - around : i + around + 1]])))
    return result


def _path(points: Sequence[Point], across: _Scale, up: _Scale) -> str:
    return "M" + "L".join(f"{across(x):g},{up(y):g}" for x, y in points)


def _axes(across: _Scale, up: _Scale, show: Callable[[float], str]) -> str:
    parts = []
    for y in up.ticks(5):
        place = up(y)
        parts.append(f'<path class="grid" d="M{LEFT},{place:g}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 7, place + 4, show(y), "end"))
    floor = HEIGHT - BOTTOM
    parts.append(f'<path class="axis" d="M{LEFT},{floor}H{WIDTH - RIGHT}"/>')
    for x in across.ticks(7):
        if x == int(x):
            parts.append(f'<path class="axis" d="M{across(x):g},{floor}v4"/>')
            parts.append(_text(across(x), floor + 16, short(x), "middle"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 3, "step", "middle"))
    return "".join(parts)


def _events(marks: Marks, across: _Scale) -> str:
    floor = HEIGHT - BOTTOM
    parts = [
        f'<path class="resumed" d="M{across(x):g},{TOP}V{floor}"><title>resumed after step {x:,.0f}</title></path>'
        for x in marks.resumed
        if across.low <= x <= across.high
    ]
    for x in list(marks.skipped)[:500]:
        place = across(x)
        shape = f"M{place - 4:g},{floor}h8l-4,-7z"
        parts.append(f'<path class="skipped" d="{shape}"><title>step {x:,.0f} was skipped</title></path>')
    return "".join(parts)


def _hits(drawn: Sequence[Series], across: _Scale, show: Callable[[float], str]) -> str:
    """Invisible strips that show the values of a step under the pointer, without a script."""
    xs = sorted({x for one in drawn for x, _ in one.points})
    values = [dict(one.points) for one in drawn]
    chosen = [xs[(a + b) // 2] for a, b in _buckets(len(xs), COLUMNS)]
    borders = [(a + b) / 2 for a, b in pairwise(chosen)]
    edges = [across.low, *borders, across.high]
    parts = []
    for x, left, right in zip(chosen, edges, edges[1:], strict=False):
        lines = [f"step {x:,.0f}"]
        lines += [f"{one.name} {show(found[x])}" for one, found in zip(drawn, values, strict=True) if x in found]
        parts.append(
            f'<rect class="hit" x="{across(left):g}" y="{TOP}" width="{max(1.0, across(right) - across(left)):g}" '
            f'height="{HEIGHT - BOTTOM - TOP}"><title>{escape(chr(10).join(lines))}</title></rect>'
        )
    return "".join(parts)


def _cell(x: float, y: float, width: float, height: float, css: str, words: str) -> str:
    # A hair of surface between cells, where they are large enough to afford it.
    gap = 1.0 if min(width, height) >= 8 else 0.0
    title = f"<title>{escape(words)}</title>" if words else ""
    box = f'x="{x:.2f}" y="{y:.2f}" width="{width - gap + 0.02:.2f}" height="{height - gap + 0.02:.2f}"'
    return f'<rect class="{css}" {box}>{title}</rect>' if title else f'<rect class="{css}" {box}/>'


def _heat_height(rows: int) -> tuple[int, float]:
    row_height = min(24.0, max(3.0, 320 / rows))
    return math.ceil(TOP + rows * row_height + BOTTOM), row_height


def _row_labels(labels: Sequence[str], row_height: float) -> str:
    every = math.ceil(13 / row_height)
    return "".join(
        _text(LEFT - 7, TOP + (row + 0.5) * row_height + 4, label, "end")
        for row, label in enumerate(labels)
        if row % every == 0
    )


def _color_bar(kind: str, ticks: Sequence[str], words: str) -> str:
    swatches = "".join(f'<i class="{kind}{level}"></i>' for level in range(LEVELS))
    marks = "".join(f"<span>{tick}</span>" for tick in ticks)
    bar = f'<div class="bar"><div class="swatches">{swatches}</div><div class="ticks">{marks}</div></div>'
    return f"{bar}<em>{words}</em>"


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'


def _figure(
    title: str,
    body: str,
    height: float,
    legend: Sequence[tuple[int, str, str]] = (),
    marks: Marks | None = None,
    extra: str = "",
) -> str:
    items = [f'<li><i class="key k{color}"></i>{escape(name)} <b>{last}</b></li>' for color, name, last in legend]
    if marks is not None and marks.skipped:
        items.append(f'<li><i class="triangle"></i>skipped <b>{len(marks.skipped):,}</b></li>')
    if marks is not None and marks.resumed:
        items.append(f'<li><i class="dash"></i>resumed <b>{len(marks.resumed):,}</b></li>')
    keys = f"<ul>{''.join(items)}</ul>" if items else ""
    return (
        f"<figure><figcaption><h2>{escape(title)}</h2>{keys}{extra}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">{body}</svg></figure>\n'
    )
