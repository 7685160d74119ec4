"""Results as text tables. Every one has its --json twin, so nothing here is meant for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.plan import Plan
from stages.evaluation import figures
from stages.evaluation.sections import Section


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


def evaluation(metrics: Mapping[str, Any]) -> str:
    """A row a side, then the references."""
    sides = {**metrics["sides"], **metrics.get("references", {})}
    return figures_table([(figures.title(name), values) for name, values in sides.items()])


def figures_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Names and figures as text, with a column for each figure that one of the rows has."""
    shown = figures.columns(row for _, row in rows)
    cells = [[name, *(" ".join(figures.words(row, key)).strip() for key in shown)] for name, row in rows]
    return table(["", *(figures.FIGURES[key].title for key in shown)], cells)


def compared(sections: Sequence[Section], missing: Sequence[str]) -> str:
    """A table a section, then lines that say what is missing."""
    parts = [f"{s.title}\n{figures_table([(row.label, row.figures) for row in s.rows])}" for s in sections]
    return "\n\n".join([*parts, *(["\n".join(missing)] if missing else [])])


def stats(found: Mapping[str, Any]) -> str:
    """A line a fact; what is not there is not said."""
    rows = [
        ["pairs" if "members" not in found else "samples", f"{found['count']:,}"],
        ["shards", f"{found['shards']:,}" + "".join(f", {found[k]:,} {k}" for k in SHARDS if found[k])],
        ["bytes", f"{found['bytes']:,}"],
        ["repeated noises", f"{found['repeated_noises']:,}"],
    ]
    prompts = found["prompts"]
    lengths = [
        f"{name} {s['mean']:.1f} on average, {s['most']:.0f} at most" for name, s in prompts.items() if _spread(s)
    ]
    empty = f", {prompts['empty']:,} empty" if prompts["empty"] else ""
    rows.append(["prompts", f"{prompts['distinct']:,} distinct{empty}; {', '.join(lengths)}"])
    for name, about in found.get("members", {}).items():
        note = ", never opened: a pickle" if name in found["never_opened"] else ""
        note += f", {found['not_looked_into'][name]:,} not looked into" if name in found["not_looked_into"] else ""
        lacking = f", missing in {found['incomplete'][name]:,}" if name in found["incomplete"] else ""
        rows.append([_printable(f".{name}"), f"{about['count']:,} of {about['bytes']:,} bytes{lacking}{note}"])
    for name, about in found["arrays"].items():
        rows.append([name, f"{about['dtype']} {'x'.join(map(str, about['shape']))}{_figures(about)}"])
        rows += [
            [f"  channel {i}", f"mean {c['mean']:+.4f}, std {c['std']:.4f}, largest {c['absmax']:.2f}"]
            for i, c in enumerate(about.get("channels", [])[:8])
            if name == "latent"
        ]
    rows += [[name.replace("_", " "), _value(value)] for name, value in found["provenance"].items()]
    rows += [["DAMAGED", line] for line in _damaged(found)]
    return table(["", ""], rows).lstrip("\n ")


SHARDS = ("missing", "unreceipted", "corrupt", "extra")
MOST_DAMAGED = 20


def verified(found: Mapping[str, Any]) -> str:
    lines = [f"{found['target']}: {found['count']:,} samples in {found['shards']:,} whole shards"]
    return "\n".join([*lines, *(f"DAMAGED  {line}" for line in _damaged(found))])


def _damaged(found: Mapping[str, Any]) -> list[str]:
    lines = [_printable(f"{path}: {problem}") for path, problem in found["damaged"].items()]
    more = len(lines) - MOST_DAMAGED
    return lines if more <= 0 else [*lines[:MOST_DAMAGED], f"and {more:,} more; --json lists all"]


def _printable(text: str) -> str:
    """Names in tars of others may hold what a terminal obeys."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _spread(value: Any) -> bool:
    return isinstance(value, Mapping) and value["most"] > 0


def _figures(about: Mapping[str, Any]) -> str:
    if "mean" not in about:
        return "".join(f", also {other}" for other in about.get("others", [])) + " (--deep reads the values)"
    ks = f", KS distance to N(0, 1) {about['ks_distance']:.4f}" if about.get("ks_distance") is not None else ""
    broken = f", {about['nonfinite']:,} NOT FINITE" if about["nonfinite"] else ""
    others = "".join(f", also {other}" for other in about.get("others", []))
    return f"{others}: mean {about['mean']:+.4f}, std {about['std']:.4f}, largest {about['absmax']:.2f}{ks}{broken}"


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return str(value)
