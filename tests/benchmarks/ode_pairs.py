"""Draws quality against the number of pairs and against compute, from the evaluations of manifests/ode_pairs.yaml.

    retort submit manifests/ode_pairs.yaml
    python -m tests.benchmarks.ode_pairs --store retort-store --figure docs/ode_pairs.png

Compute is counted in network evaluations of one image, forward passes only. A pair costs the teacher's network calls. A
training step costs three evaluations for each sample of its batch (a backward pass counts as two), and in consistency
distillation two more: one of the teacher and one of the target.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from pipeline.runs import Run
from pipeline.store import RECORD, Store
from pipeline.views.compare import collect

LOSSES = {"mse": "L2", "pixel_lpips": "LPIPS in pixels", "e_latent_lpips": "E-LatentLPIPS"}
COLOURS = {"mse": "C0", "pixel_lpips": "C1", "e_latent_lpips": "C2"}
FIGURES = {
    "latent_mse": "latent MSE to the teacher",
    "kernel_distance": "kernel distance",
    "frechet_distance": "Fréchet distance",
    "recall": "recall",
    "prompt_accuracy": "prompt accuracy",
}


@dataclass(frozen=True)
class Point:
    """An evaluated student. pairs: its number of pairs, 0 for consistency distillation. calls: network calls for one
    sample. compute: network evaluations for pairs and training."""

    method: str
    pairs: int
    steps: int
    calls: int
    seed: int
    compute: int
    figures: dict[str, float]


def points(store: Path, names: list[str]) -> Iterator[Point]:
    """Yield the evaluated students of the runs, each once."""
    evaluations = collect([Run(Store(store), name) for name in names])[0]
    for one in {one.folder: one for one in evaluations}.values():
        folder = one.folder / json.loads((one.folder / RECORD).read_text())["inputs"]["student"]
        student = json.loads((folder / RECORD).read_text())
        settings, training = student["settings"], student["settings"]["training"]
        side = one.metrics["sides"]["student"]
        seen = training["steps"] * training["batch_size"]
        if settings["method"]["name"] == "consistency":
            point = ("consistency", 0, 5 * seen)
        else:
            pairs = json.loads((folder / student["inputs"]["pairs.0.pairs"] / RECORD).read_text())["settings"]
            cost = pairs["count"] * pairs["sampler"]["steps"]
            point = (settings["method"]["loss"]["name"], pairs["count"], cost + 3 * seen)
        method, count, compute = point
        yield Point(method, count, training["steps"], side["network_calls"], student["seed"], compute, side)


def mean(found: list[Point], figure: str) -> float:
    return fmean(point.figures[figure] for point in found)


def grouped(found: list[Point]) -> dict[tuple[Any, ...], list[Point]]:
    groups: dict[tuple[Any, ...], list[Point]] = {}
    for point in sorted(found, key=lambda p: (p.method, p.steps, p.calls, p.pairs, p.seed)):
        groups.setdefault((point.method, point.steps, point.calls, point.pairs), []).append(point)
    return groups


def table(found: list[Point]) -> str:
    """Return a table in Markdown: a row for each method, length of training and number of pairs."""
    titles = ["method", "training steps", "network calls", "pairs", "seeds", "compute", *FIGURES.values()]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for (method, steps, calls, pairs), members in grouped(found).items():
        values = [f"{mean(members, name):.3f}" for name in FIGURES]
        cells = [LOSSES.get(method, method), steps, calls, f"{pairs:,}", len(members), f"{members[0].compute:,}"]
        lines.append("| " + " | ".join(map(str, [*cells, *values])) + " |")
    return "\n".join(lines)


def figure(found: list[Point]) -> Figure:
    """Draw latent MSE and kernel distance against the number of pairs, and kernel distance against compute."""
    drawn = Figure(figsize=(13, 4.2), layout="constrained", dpi=150)
    axes = drawn.subplots(1, 3)
    groups = grouped(found)
    steps = sorted({point.steps for point in found if point.pairs})
    panels = (
        (axes[0], "latent_mse", "pairs"),
        (axes[1], "kernel_distance", "pairs"),
        (axes[2], "kernel_distance", "compute"),
    )
    for axis, name, against in panels:
        for method, label in LOSSES.items():
            for length in steps:
                members = [points for (m, s, _, _), points in groups.items() if (m, s) == (method, length)]
                x = [getattr(points[0], against) for points in members]
                y = [mean(points, name) for points in members]
                style = {"color": COLOURS[method], "linestyle": "-" if length == max(steps) else ":", "markersize": 4}
                axis.plot(x, y, marker="o", label=f"{label}, {length} steps", **style)
                several = [
                    (getattr(p, against), p.figures[name]) for points in members if len(points) > 1 for p in points
                ]
                axis.plot(*zip(*several, strict=True), "_", color=COLOURS[method], markersize=9) if several else None
        if against == "compute":
            for calls, marker in ((1, "s"), (4, "D")):
                members = [points for (m, _, c, _), points in groups.items() if (m, c) == ("consistency", calls)]
                x, y = [p[0].compute for p in members], [mean(p, name) for p in members]
                label = f"consistency distillation, {calls} step{'s' if calls > 1 else ''}"
                axis.plot(x, y, marker=marker, color="black", linestyle="-" if calls == 1 else ":", label=label)
        axis.set(
            xscale="log", xlabel="pairs" if against == "pairs" else "network evaluations in all", ylabel=FIGURES[name]
        )
        axis.grid(alpha=0.3)
        if name == "kernel_distance":
            axis.set_yscale("log")
    handles, labels = axes[2].get_legend_handles_labels()
    drawn.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--run", action="append", help="a run of the manifest; default: ode_pairs")
    parser.add_argument("--figure", type=Path, help="also draw the figure to this file")
    arguments = parser.parse_args()
    found = list(points(arguments.store, arguments.run or ["ode_pairs"]))
    print(table(found))
    if arguments.figure:
        figure(found).savefig(arguments.figure)


if __name__ == "__main__":
    main()
