"""Results as text tables for people. Programs use --json."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline.planning import Plan
from stages.evaluate import figures
from stages.reports.sections import Section

UNLIMITED = 10_000
"""Width, in characters, of a table that is not printed on a terminal."""
NARROWEST = 24
"""Minimum width of a wrapped last column. If there is less room, each row becomes several lines."""
MOST_READS = 3
"""Maximum number of stages in the column `reads`. --json lists all of them."""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Align columns. On a terminal that is too narrow, the last column is wrapped between words, so that paths can be
    copied; if that is not enough, each row becomes several lines."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    room = terminal_width() - sum(max(len(row[i]) for row in [head, *rows]) + 2 for i in range(len(head) - 1))
    if room < NARROWEST:
        return "\n".join(line for row in rows for line in _upright(head, row))
    made = Table(*head, box=None, padding=(0, 2, 0, 0), pad_edge=False, show_header=any(head))
    for row in rows:
        made.add_row(*map(Text, row[:-1]), Text("\n".join(_wrapped(row[-1], room))))
    printed = io.StringIO()
    Console(width=UNLIMITED, file=printed, color_system=None).print(made)
    return "\n".join(map(str.rstrip, printed.getvalue().splitlines()))


def _wrapped(text: str, width: int, indent: str = "") -> list[str]:
    """Wrap text between words. Lines after the first are indented by two more than `indent`, unless it is empty."""
    return textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent and f"{indent}  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _upright(head: Sequence[str], row: Sequence[str]) -> Iterator[str]:
    yield row[0]
    for name, cell in zip(head[1:], row[1:], strict=True):
        if cell:
            yield from _wrapped(f"{name}: {cell}", max(terminal_width(), NARROWEST), "    ")


def terminal_width() -> int:
    """Width of the terminal in characters; UNLIMITED if the output is not a terminal. COLUMNS overrides both."""
    if os.environ.get("COLUMNS", "").isdecimal():
        return int(os.environ["COLUMNS"])
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else UNLIMITED


def plan(planned: Plan) -> str:
    """The stages of the plan, those that they read, the state of each, and the reason."""
    rows = [[s.name, _reads(s.reads), s.state, s.artifact.kind, s.artifact.fingerprint, s.why] for s in planned]
    counts = Counter(stage.state for stage in planned)
    words = ", ".join(
        f"{count} to {state}" if state != "blocked" else f"{count} blocked" for state, count in counts.items()
    )
    return f"{table(['stage', 'reads', 'will', 'kind', 'fingerprint', 'why'], rows)}\n{words}"


def _reads(names: Sequence[str]) -> str:
    more = [f"{len(names) - MOST_READS} more"] if len(names) > MOST_READS else []
    return ", ".join([*names[:MOST_READS], *more])


def difference(found: Mapping[str, Sequence[str]]) -> str:
    """The changed stages of two plans."""
    rows = [[name, "; ".join(words)] for name, words in found.items()]
    return table(["stage", "difference"], rows) if rows else "no difference"


def status(run: str, store: str, stages: Mapping[str, Mapping[str, Any]]) -> str:
    """The state, progress and cost of each stage of a run."""
    rows = [[name, *_status_cells(store, stage)] for name, stage in stages.items()]
    cost = sum(stage["device_seconds"] for stage in stages.values())
    counts = Counter(stage["state"] for stage in stages.values())
    words = ", ".join(f"{count} {state}" for state, count in counts.items())
    head = ["stage", "state", "progress", "rate", "left", "device", "artifact"]
    lines = [f"run {run}: {words}; {duration(cost)} of devices", f"store {store}", table(head, rows)]
    if counts.keys() - {"done", "running"} and not counts["running"]:
        lines.append(f"carry on with: retort resume {run} --store {store}")
    return "\n".join(lines)


def _status_cells(store: str, stage: Mapping[str, Any]) -> list[str]:
    progress = stage.get("progress")
    done = f"{progress['done']:,}/{progress['total']:,} {progress['unit']}" if progress else ""
    rate = f"{stage['per_second']:.3g}/s" if "per_second" in stage else ""
    left = duration(stage["seconds_left"]) if "seconds_left" in stage else ""
    cost = duration(stage["device_seconds"]) if stage["device_seconds"] else ""
    place = [os.path.relpath(stage["artifact"], store)] if stage["state"] == "done" else []
    return [stage["state"], done, rate, left, cost, ", ".join(filter(None, [*place, stage["detail"]]))]


def runs(store: str, found: Mapping[str, Mapping[str, Any]]) -> str:
    """One row for each run of a store."""
    rows = [
        [name, run["state"], f"{run['done']}/{run['stages']}", (run["last"] or "")[:19], run["driver"] or ""]
        for name, run in found.items()
    ]
    if not rows:
        return f"no runs in {store}; `retort submit MANIFEST` makes one"
    return f"store {store}\n" + table(["run", "state", "stages", "last event (UTC)", "driver"], rows)


def garbage(found: Mapping[str, Any], deleted: bool) -> str:
    """What can be removed, or was removed, and what is kept."""
    from rich.filesize import decimal

    rows = [[one["what"], decimal(one["bytes"]), one["path"]] for one in found["found"]]
    rows += [["kept", "", f"{one['path']}: {one['why']}"] for one in found["kept"]]
    verb = "removed" if deleted else "can be removed by --delete"
    if not rows:
        return "nothing to remove"
    return table(["what", "size", "path"], rows) + f"\n{decimal(found['bytes'])} {verb}"


def duration(seconds: float) -> str:
    """Seconds in at most two units: `12 s`, `3 min 5 s`, `5 h 12 min`, `3 d 4 h`."""
    left = round(seconds)
    parts: list[str] = []
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        count, left = divmod(left, length)
        if count or (unit == "s" and not parts):
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2])


def done(planned: Plan) -> str:
    """The folders of the artifacts, and the figures of evaluations."""
    parts = [table(["stage", "artifact"], [[s.name, str(s.artifact.folder)] for s in planned])]
    for stage in planned:
        file = stage.artifact.folder / "metrics.json"
        if stage.artifact.kind == "evaluate" and file.exists():
            metrics = json.loads(file.read_text(encoding="utf-8"))
            sides = {**metrics["sides"], **metrics.get("references", {})}
            parts.append(figures_table([(figures.title(name, values), values) for name, values in sides.items()]))
            parts.append(f"page: {stage.artifact.folder / 'index.html'}")
    return "\n\n".join(parts)


def figures_table(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """A table with a column for each figure that one of the rows has."""
    shown = figures.columns(row for _, row in rows)
    cells = [[name, *(" ".join(figures.words(row, key)).strip() for key in shown)] for name, row in rows]
    return table(["", *(figures.FIGURES[key].title for key in shown)], cells)


def compared(sections: Sequence[Section], missing: Sequence[str]) -> str:
    """One table for each section, then the lines about missing evaluations."""
    parts = [f"{s.title}\n{figures_table([(row.label, row.figures) for row in s.rows])}" for s in sections]
    return "\n\n".join([*parts, *(["\n".join(missing)] if missing else [])])


def stats(found: Mapping[str, Any]) -> str:
    """One row for each fact about a dataset. Facts that are unknown are left out."""
    rows = [
        ["pairs" if "members" not in found else "samples", f"{found['count']:,}"],
        ["shards", f"{found['shards']:,}" + "".join(f", {found[k]:,} {k}" for k in SHARDS if found[k])],
        ["bytes", f"{found['bytes']:,}"],
        ["repeated noises", f"{found['repeated_noises']:,}"],
    ]
    prompts = found["prompts"]
    spreads = {name: s for name, s in prompts.items() if isinstance(s, Mapping) and s["most"] > 0}
    lengths = [f"{name} {s['mean']:.1f} on average, {s['most']:.0f} at most" for name, s in spreads.items()]
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
    for name, value in found["provenance"].items():
        words = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, Mapping) else str(value)
        rows.append([name.replace("_", " "), words])
    rows += [["DAMAGED", line] for line in _damaged(found)]
    return table(["", ""], rows).lstrip("\n ")


SHARDS = ("missing", "unreceipted", "corrupt", "extra")
"""Ways in which a shard can be wrong; keys of a report about shards."""
MOST_DAMAGED = 20
"""Maximum number of lines about damage in a table. --json lists all of them."""


def verified(found: Mapping[str, Any]) -> str:
    """What was verified, then the damaged files."""
    if "kind" in found:
        whole = f"{found['kind']}, {found['files']:,} files hashed"
    else:
        whole = f"{found['count']:,} samples in {found['shards']:,} intact shards"
    lines = [f"{found['target']}: {whole}"]
    return "\n".join([*lines, *(f"DAMAGED  {line}" for line in _damaged(found))])


def _damaged(found: Mapping[str, Any]) -> list[str]:
    lines = [_printable(f"{path}: {problem}") for path, problem in found["damaged"].items()]
    more = len(lines) - MOST_DAMAGED
    return lines if more <= 0 else [*lines[:MOST_DAMAGED], f"and {more:,} more; --json lists all"]


def _printable(text: str) -> str:
    """Escape control characters: names in foreign tars may hold terminal commands."""
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)


def _figures(about: Mapping[str, Any]) -> str:
    others = "".join(f", also {other}" for other in about.get("others", []))
    if "mean" not in about:
        return f"{others} (--deep reads the values)"
    ks = f", KS distance to N(0, 1) {about['ks_distance']:.4f}" if about.get("ks_distance") is not None else ""
    broken = f", {about['nonfinite']:,} NOT FINITE" if about["nonfinite"] else ""
    return f"{others}: mean {about['mean']:+.4f}, std {about['std']:.4f}, largest {about['absmax']:.2f}{ks}{broken}"
