"""Draw a plan like `git log --graph` draws commits: one line for each stage, with lanes from the stages that it
reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

UNICODE = {"node": "●", "on": "├", "end": "╰", "down": "│", "across": "─", "joins": "┼", "joins_end": "┴"}
ASCII = {"node": "*", "on": "+", "end": "`", "down": "|", "across": "-", "joins": "+", "joins_end": "+"}


def draw(reads: Mapping[str, Sequence[str]], signs: Mapping[str, str] = UNICODE) -> dict[str, str]:
    """stage -> its line of the drawing. `reads` maps each stage to the stages that it reads. These come before it."""
    last = {other: name for name, others in reads.items() for other in others}
    lanes: list[str | None] = []
    lines: dict[str, str] = {}
    for name, others in reads.items():
        sources = sorted(lanes.index(other) for other in others if other in lanes)
        place = _free(lanes, sources[-1] + 1 if sources else 0)
        lines[name] = _line(lanes, sources, place, {i for i in sources if last[lanes[i] or ""] == name}, signs)
        for i in sources:
            if last[lanes[i] or ""] == name:
                lanes[i] = None
        if name in last:
            lanes += [None] * (place + 1 - len(lanes))
            lanes[place] = name
    return lines


def _free(lanes: Sequence[str | None], start: int) -> int:
    return next((i for i in range(start, len(lanes)) if lanes[i] is None), max(start, len(lanes)))


def _line(
    lanes: Sequence[str | None], sources: Sequence[int], place: int, ending: set[int], signs: Mapping[str, str]
) -> str:
    cells = []
    for i in range(max(place + 1, len(lanes))):
        reached = bool(sources) and sources[0] < i < place
        if i == place:
            sign = signs["node"]
        elif sources and i == sources[0]:
            sign = signs["end" if i in ending else "on"]
        elif i in sources:
            sign = signs["joins_end" if i in ending else "joins"]
        elif i < len(lanes) and lanes[i] is not None:
            sign = signs["down"]  # a lane that passes by is drawn over the horizontal line
        else:
            sign = signs["across"] if reached else " "
        crosses = bool(sources) and sources[0] <= i < place
        cells.append(sign + (signs["across"] if crosses else " "))
    return "".join(cells).rstrip()
