"""Shows how well two teachers follow prompts, alone and fused with several delta (Coop-Diffusion).

    retort submit manifests/digits_coop.yaml
    python -m tests.benchmarks.coop --store ./retort-store [--run digits_coop] [--figure docs/coop.png]

Reads the evaluations of a run, and prints a table in Markdown: accuracy on digit, on colour and on both, and the kernel
distance to real images. Images of different sizes are measured by different probes. The figure draws the fused teachers
over delta, with the host alone at 0 and the guest alone at 1.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from pipeline.runs import Run
from pipeline.store import Store, load_artifact
from stages.teacher import Teacher

ACCURACIES = {"accuracy_of_digit": "digit", "accuracy_of_colour": "colour", "prompt_accuracy": "both"}
LINES = {"re_encode": "-", "own": "--"}
"""Value of `refresh`, the source of the guest's state -> line style."""


def rows(run: Run) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Return name of an evaluation -> settings of its fused teacher (None for other teachers), and its figures."""
    found = {}
    for name, stage in run.plan().items():
        if stage["kind"] == "evaluate":
            artifact = load_artifact(run.store.root / "evaluate" / stage["fingerprint"])
            side = artifact.record["metrics"]["sides"]
            pairs = artifact.inputs.get("pairs")
            teacher = pairs.inputs["teacher"].stage if pairs else None
            coop = teacher.coop if isinstance(teacher, Teacher) else None
            found[name.removeprefix("quality_")] = coop, side.get("student") or next(iter(side.values()))
    return found


def drawn(found: dict[str, tuple[Any, dict[str, Any]]], host: str, guest: str) -> Figure:
    """Draw accuracies and kernel distance over delta."""
    figure = Figure(figsize=(8.5, 3.4), layout="constrained", dpi=150)
    left, right = figure.subplots(1, 2)
    for refresh, style in LINES.items():
        fused = [(coop.delta, values) for coop, values in found.values() if coop and coop.refresh == refresh]
        points = sorted([(0.0, found[host][1]), *fused, (1.0, found[guest][1])], key=lambda point: point[0])
        deltas = [delta for delta, _ in points]
        for colour, (name, title) in zip(("C0", "C3", "black"), ACCURACIES.items(), strict=True):
            values = [values[name] for _, values in points]
            left.plot(deltas, values, style, color=colour, marker="o", markersize=3.5, label=f"{title}, {refresh}")
        distances, errors = ([values[f"kernel_distance{end}"] for _, values in points] for end in ("", "_se"))
        right.errorbar(deltas, distances, errors, linestyle=style, color="black", marker="o", markersize=3.5)
    for axes, title in ((left, "accuracy"), (right, "kernel distance")):
        axes.set_xlabel("delta, the guest's share")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
    figure.legend(loc="outside right center", fontsize=8)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--run", default="digits_coop")
    parser.add_argument("--host", default="digits", help="name of its evaluation, without the prefix quality_")
    parser.add_argument("--guest", default="colours", help="name of its evaluation, without the prefix quality_")
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    found = rows(Run(Store(given.store), given.run))
    print(f"| | {' | '.join(ACCURACIES.values())} | kernel distance |\n|---|---|---|---|---|")
    for name, (_, values) in found.items():
        shares = " | ".join(f"{values[key]:.3f}" for key in ACCURACIES)
        print(f"| {name} | {shares} | {values['kernel_distance']:.3f} ± {values['kernel_distance_se']:.3f} |")
    if given.figure:
        drawn(found, given.host, given.guest).savefig(given.figure)


if __name__ == "__main__":
    main()
