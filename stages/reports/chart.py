"""Draws quality against network calls: one panel for each metric, one line for the teacher and each student."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stages.evaluate.figures import FIGURES
from stages.reports.sections import Row, seedless

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = ("kernel_distance", "recall", "latent_mse", "prompt_accuracy")
WIDE = 20
"""The y axis is logarithmic if no value is negative and the largest is more than WIDE times the smallest positive one.
Values of 0 are then left out."""
LETTERS = 150
"""Number of letters that fit into a row of the legend below four panels."""


def family(row: Row) -> str:
    """Return a row's name without its number of steps: student[w=2] for student/4[w=2] and student[w=2,steps=4]."""
    if row.kind == "teacher":
        return "teacher"
    head, _, inside = row.name.partition("[")
    kept = [part for part in inside.removesuffix("]").split(",") if part not in ("", f"steps={row.steps}")]
    return head.removesuffix(f"/{row.steps}") + (f"[{','.join(kept)}]" if kept else "")


def chart(rows: Sequence[Row]) -> Figure | None:
    """Draw the chart of a section. Error bars are one standard error. Several seeds are drawn as their mean.

    None if there is no student, or if all rows have the same number of network calls."""
    from matplotlib.figure import Figure

    meant = {row.name for row in rows if row.kind == "mean"}
    drawn = [row for row in rows if "network_calls" in row.figures and seedless(row.name) not in meant]
    if len({row.figures["network_calls"] for row in drawn}) < 2 or all(row.kind == "teacher" for row in drawn):
        return None
    lines: dict[str, list[Row]] = {}
    for row in sorted(drawn, key=lambda row: row.figures["network_calls"]):
        lines.setdefault(family(row), []).append(row)
    panels = [name for name in PANELS if any(row.figures.get(name) is not None for row in drawn)]
    figure = Figure(figsize=(3.6 * len(panels), 3.4), layout="constrained", dpi=150)
    for axes, name in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for line, members in lines.items():
            found = [row.figures for row in members if row.figures.get(name) is not None]
            axes.errorbar(
                [values["network_calls"] for values in found],
                [values[name] for values in found],
                [values.get(f"{name}_se", 0.0) for values in found],
                label=line,
                color="black" if line == "teacher" else None,
                marker="o",
                markersize=3.5,
                linewidth=1.2,
            )
        values = [row.figures[name] for row in drawn if row.figures.get(name) is not None]
        positive = [value for value in values if value > 0]
        if min(values) >= 0 and positive and max(positive) > WIDE * min(positive):
            axes.set_yscale("log")
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set(title=FIGURES[name].title, xlabel="network calls")
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    fitting = LETTERS * len(panels) // len(PANELS) // (max(map(len, labels)) + 8)
    figure.legend(handles, labels, loc="outside lower center", ncols=max(1, min(fitting, len(labels))), frameon=False)
    return figure
