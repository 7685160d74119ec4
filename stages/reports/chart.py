"""Draws quality against steps as inline SVG: one panel for each metric, one line for the teacher and each student."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from stages.evaluate.figures import FIGURES
from stages.reports.sections import Row, seedless

PANELS = ("kernel_distance", "frechet_distance", "latent_mse", "prompt_accuracy")
LOGARITHMIC = ("latent_mse",)
WIDTH, HEIGHT, LEFT, BELOW, ABOVE = 330, 220, 56, 34, 22
COLOURS = ("#d1495b", "#2e86ab", "#3b9e5f", "#e08e2b", "#7b5ea7", "#b5838d", "#1b998b", "#8a7f2c")

STYLE = """
.chart { display: flex; flex-wrap: wrap; gap: 1rem }
.chart svg { overflow: visible; font-size: 11px; fill: currentColor }
.chart svg * { vector-effect: non-scaling-stroke } .chart .grid { stroke: var(--line) } .chart polyline { fill: none }
.key span { margin-right: 1.2rem; white-space: nowrap; font-size: .85rem }
"""


class Point(NamedTuple):
    """A figure at a number of steps, with its standard error."""

    steps: int
    value: float
    spread: float


def family(row: Row) -> str:
    """Return a row's name without its number of steps: student[w=2] for student/4[w=2] and student[w=2,steps=4]."""
    if row.kind == "teacher":
        return "teacher"
    head, _, inside = row.name.partition("[")
    kept = [part for part in inside.removesuffix("]").split(",") if part not in ("", f"steps={row.steps}")]
    return head.removesuffix(f"/{row.steps}") + (f"[{','.join(kept)}]" if kept else "")


def chart(rows: Sequence[Row]) -> str:
    """Return the chart of a section as HTML. Empty if there is no student, or if all rows have the same steps."""
    meant = {row.name for row in rows if row.kind == "mean"}
    drawn = [row for row in rows if row.steps and seedless(row.name) not in meant]
    if len({row.steps for row in drawn}) < 2 or all(row.kind == "teacher" for row in drawn):
        return ""
    lines: dict[str, list[Row]] = {}
    for row in drawn:
        lines.setdefault(family(row), []).append(row)
    colours = {name: "currentColor" if name == "teacher" else COLOURS[i % len(COLOURS)] for i, name in enumerate(lines)}
    panels = "".join(_panel(figure, lines, colours) for figure in PANELS)
    key = "".join(
        f'<span><span style="color: {colours[name]}; margin: 0">&#9632;</span> {html.escape(name)}</span>'
        for name in lines
    )
    return f'<div class="chart">{panels}</div><p class="key">{key}</p>\n'


def _panel(figure: str, lines: dict[str, list[Row]], colours: dict[str, str]) -> str:
    found = {name: _points(rows, figure) for name, rows in lines.items()}
    points = [point for one in found.values() for point in one]
    if not points:
        return ""
    steps = sorted({point.steps for point in points})
    logarithmic = figure in LOGARITHMIC
    values = [point.value for point in points]
    ticks = _decades(values) if logarithmic else _round_numbers(min(0.0, *values), max(values))
    x = _scale(math.log2(steps[0]), math.log2(steps[-1]), LEFT, WIDTH - 8)
    of = math.log10 if logarithmic else float
    y = _scale(of(ticks[0]), of(ticks[-1]), HEIGHT - BELOW, ABOVE)

    def height(value: float) -> float:
        return y(of(max(value, ticks[0])))

    drawn = [f'<text x="0" y="11">{html.escape(FIGURES[figure].title)}</text>']
    for tick in ticks:
        drawn += [
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH}" y1="{height(tick):.1f}" y2="{height(tick):.1f}"/>',
            f'<text x="{LEFT - 6}" y="{height(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>',
        ]
    for n in steps:
        drawn.append(f'<text x="{x(math.log2(n)):.1f}" y="{HEIGHT - BELOW + 16}" text-anchor="middle">{n}</text>')
    drawn.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 2}" text-anchor="middle">steps</text>')
    for name, one in found.items():
        drawn.append(_line(name, one, colours[name], lambda n: x(math.log2(n)), height))
    return f'<svg width="{WIDTH}" height="{HEIGHT}" role="img">{"".join(drawn)}</svg>'


def _line(
    name: str, points: Sequence[Point], colour: str, x: Callable[[int], float], y: Callable[[float], float]
) -> str:
    """Return an SVG line through points, with error bars of one standard error."""
    corners = " ".join(f"{x(p.steps):.1f},{y(p.value):.1f}" for p in points)
    marks = "".join(
        f'<line stroke="{colour}" x1="{x(p.steps):.1f}" x2="{x(p.steps):.1f}" '
        f'y1="{y(p.value - p.spread):.1f}" y2="{y(p.value + p.spread):.1f}"/>'
        f'<circle cx="{x(p.steps):.1f}" cy="{y(p.value):.1f}" r="3" fill="{colour}">'
        f"<title>{html.escape(name)}, {p.steps}: {p.value:.4g}</title></circle>"
        for p in points
    )
    path = f'<polyline points="{corners}" stroke="{colour}" stroke-width="1.5"/>' if len(points) > 1 else ""
    return path + marks


def _points(rows: Sequence[Row], figure: str) -> list[Point]:
    """Return the points of a figure, sorted by steps. Without zeros if its axis is logarithmic."""
    found = []
    for row in rows:
        value = row.figures.get(figure)
        if row.steps and value is not None and (value > 0 or figure not in LOGARITHMIC):
            spread = row.figures.get(f"{figure}_se", 0.0)
            found.append(Point(row.steps, float(value), float(spread)))
    return sorted(found)


def _scale(low: float, high: float, start: float, stop: float) -> Callable[[float], float]:
    width = (high - low) or 1.0
    return lambda value: start + (value - low) / width * (stop - start)


def _decades(values: Sequence[float]) -> list[float]:
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    return [10.0**n for n in range(low, max(high, low + 1) + 1)]


def _round_numbers(low: float, high: float) -> list[float]:
    """Return about five evenly spaced round numbers that cover the range from `low` to `high`."""
    rough = (high - low) / 5 or 1.0
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(n * unit for n in (1, 2, 5, 10) if n * unit >= rough)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(n * step, 12) for n in range(first, max(last, first + 1) + 1)]
