"""Results as text tables. Every one has its --json twin, so nothing here is meant for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.plan import Plan


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, the last one ragged."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in [head, *rows]
    ]
    return "\n".join(lines)


def plan(planned: Plan) -> str:
    rows = [[s.name, s.artifact.kind, s.state, s.artifact.fingerprint, s.why] for s in planned]
    return table(["stage", "kind", "will", "fingerprint", "why"], rows)


def status(run: str, stages: Mapping[str, Mapping[str, Any]]) -> str:
    rows = []
    for name, stage in stages.items():
        progress = stage.get("progress")
        done = f"{progress['done']}/{progress['total']} {progress['unit']}" if progress else ""
        rows.append([name, stage["kind"], stage["state"], done, stage["detail"] or stage["artifact"]])
    return f"run {run}\n" + table(["stage", "kind", "state", "progress", "detail"], rows)


def done(planned: Plan) -> str:
    """Where the artifacts lie, and for evaluations what they found."""
    parts = [table(["stage", "artifact"], [[s.name, str(s.artifact.folder)] for s in planned])]
    for stage in planned:
        metrics = stage.artifact.folder / "metrics.json"
        if stage.artifact.kind == "evaluate" and metrics.exists():
            parts.append(evaluation(json.loads(metrics.read_text(encoding="utf-8"))))
            parts.append(f"page: {stage.artifact.folder / 'index.html'}")
    return "\n\n".join(parts)


EVALUATION = {
    "network_calls": "{}",
    "seconds_per_image": "{:.4f}",
    "latent_mse": "{:.4f}",
    "prompt_accuracy": "{:.3f}",
    "frechet_distance": "{:.2f}",
    "recall": "{:.3f}",
    "diversity": "{:.2f}",
}


def evaluation(metrics: Mapping[str, Any]) -> str:
    """A row a side, then the references."""
    columns = [name for name in EVALUATION if name in next(iter(metrics["sides"].values()))]
    sides = {**metrics["sides"], **metrics.get("references", {})}
    rows = [
        [name, *(EVALUATION[c].format(values[c]) if c in values else "" for c in columns)]
        for name, values in sides.items()
    ]
    return table(["", *(c.replace("_", " ") for c in columns)], rows)


def stats(found: Mapping[str, Any]) -> str:
    rows = [
        ["pairs", f"{found['count']:,}"],
        ["shards", f"{found['shards']:,}"],
        ["bytes", f"{found['bytes']:,}"],
        ["distinct prompts", f"{found['distinct_prompts']:,}"],
        ["repeated noises", f"{found['repeated_noises']:,}"],
    ]
    for name, about in found["arrays"].items():
        shape = "x".join(map(str, about["shape"]))
        figures = f"mean {about['mean']:+.4f}, std {about['std']:.4f}, largest {about['absmax']:.2f}"
        rows.append([name, f"{about['dtype']} {shape}: {figures}"])
    rows += [[name.replace("_", " "), _value(value)] for name, value in found["provenance"].items()]
    rows += [["damaged", f"{Path(tar).name}: {problem}"] for tar, problem in found["damaged"].items()]
    return table(["", ""], rows).lstrip("\n ")


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return str(value)
