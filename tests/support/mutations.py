"""Makes manifests with mistakes from the shipped ones: lost lines, misspelt keys, values of the wrong type."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path as File
from typing import Any

from hypothesis import strategies as st

from pipeline.errors import UsageError
from pipeline.manifest.document import Path, parse
from pipeline.manifest.model import examine
from pipeline.planning import make_plan, read_contents
from pipeline.store import Store
from tests.support.cli import ROOT
from tests.support.pipelines import GAUSSIAN, TINY

MATRIX = TINY.replace("    kind: distill", "    kind: distill\n    matrix: {method.loss: [l1, mse], seed: [0, 1]}")
SHIPPED = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "manifests").glob("*.yaml"))]
TEXTS = [*SHIPPED, GAUSSIAN, TINY, MATRIX]
VALUES = ["-1", "0", "1e99", "nan", ".inf", "~", "true", "[]", "{}", "'x'", "[1, x]", "{a: 1}", "*a", "&a b", "!!set x",
          "2.5", "''", "9" * 400, "digits", "teacher", "../x", "/zz/", "\t", '"', "|", "- 1", "\u00fc"]  # fmt: skip


@dataclass(frozen=True)
class Mutation:
    text: str
    what: str
    line: int | None = None
    """The line in which a problem must be found, counted from 1. None if the text may be valid."""


@st.composite
def mutations(draw: st.DrawFn) -> Mutation:
    text = draw(st.sampled_from(TEXTS))
    return draw(st.sampled_from([_misspelt, _replaced, _cut, _lines]))(draw, text)


def _paths(value: Any, path: Path = ()) -> Iterator[Path]:
    """Yield the path of each value inside another."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for part, inner in inside:
        yield (*path, part)
        yield from _paths(inner, (*path, part))


def _misspelt(draw: st.DrawFn, text: str) -> Mutation:
    """Misspell a key in the settings of a stage. The problem must be found at this key."""
    document = parse(text, "m.yaml")
    keys = [path for path in _paths(document.value) if len(path) > 2 and "matrix" not in path]
    keys = [path for path in keys if path[0] == "stages" and isinstance(path[-1], str)]
    line, column = document.place(draw(st.sampled_from(keys)), at_key=True)
    lines = text.splitlines(keepends=True)
    name = draw(st.from_regex(r"zz[a-z_]{1,8}", fullmatch=True))
    lines[line] = lines[line][:column] + re.sub(r"^[\w.]+", name, lines[line][column:])
    return Mutation("".join(lines), f"a key misspelt as {name}", line + 1)


def _replaced(draw: st.DrawFn, text: str) -> Mutation:
    document = parse(text, "m.yaml")
    line, column = document.place(draw(st.sampled_from([*_paths(document.value)])))
    lines = text.splitlines(keepends=True)
    value = draw(st.one_of(st.sampled_from(VALUES), st.text(max_size=6)))
    lines[line] = lines[line][:column] + re.sub(r"^[^,}\]\s]+", lambda _: value, lines[line][column:])
    return Mutation("".join(lines), f"a value replaced by {value!r}")


def _cut(draw: st.DrawFn, text: str) -> Mutation:
    start = draw(st.integers(0, len(text)))
    stop = draw(st.integers(start, min(len(text), start + 40)))
    return Mutation(text[:start] + draw(st.text(max_size=3)) + text[stop:], f"{start}:{stop} cut out")


def _lines(draw: st.DrawFn, text: str) -> Mutation:
    lines = text.splitlines(keepends=True)
    one, other = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
    how = draw(st.sampled_from(["lost", "twice", "moved", "indented"]))
    line = lines[one]
    if how in ("lost", "moved"):
        del lines[one]
    if how in ("twice", "moved"):
        lines.insert(other, line)
    if how == "indented":
        lines[one] = " " * draw(st.integers(1, 3)) + line
    return Mutation("".join(lines), f"line {one + 1} {how}")


def check(mutation: Mutation, folder: File) -> bool:
    """Return whether the manifest is valid. If it is not, check that every problem has its line. Other errors are
    raised."""
    path = folder / "m.yaml"
    path.write_bytes(mutation.text.encode("utf-8", "surrogatepass"))
    try:
        loaded = examine(path)
        store = Store(folder / "store")
        make_plan(loaded, read_contents(loaded, store.root / "contents.json"), store)
    except UsageError as error:
        problems = getattr(error, "problems", [str(error)])
        assert problems and error.exit_code == 2
        assert all(re.match(rf"{re.escape(str(path))}:\d+:\d+: .", problem) for problem in problems), problems
        assert mutation.line is None or any(f"m.yaml:{mutation.line}:" in problem for problem in problems), problems
        return False
    assert mutation.line is None, f"{mutation.what} was not noticed"
    return True
