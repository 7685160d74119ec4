"""Writes the images of an evaluation: a strip for each side, a grid of all sides, and a self-contained HTML page."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.data.pictures import data_url, png, strip
from stages.evaluate import figures

COLUMNS = 16
STRIP = 2048
"""Pixels that a strip may be wide, unless four images are wider: strips of many students make one page."""
ZOOM = 64
"""Pixels that an image's side is drawn with in the grid, at least."""

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .7rem; text-align: right }
th { border-bottom: 1px solid #888 } td:first-child, th:first-child { text-align: left }
tr.student td { font-weight: 600 } .reference td { color: #666 } small { color: #666 }
.row { display: flex; align-items: center; margin: 2px 0 } .row span { width: 8rem; flex: none }
.row img { image-rendering: pixelated; width: calc(100% - 8rem) }
"""


def columns(samples: int, width: int) -> list[int]:
    """Which samples to show, of images so many pixels wide: drawn at random, since prompts come in a cycle."""
    count = min(COLUMNS, max(4, STRIP // width))
    return [int(i) for i in np.random.default_rng(0).permutation(samples)[:count]]


def write(
    output: Path, metrics: Mapping[str, Any], pictures: Mapping[str, NDArray[np.float32]], shown: Mapping[str, Any]
) -> None:
    """Write `rows/SIDE.png` (one noise a column, in native resolution), `grid.png` (all of them), `shown.json` (which
    noises and prompts they are) and `index.html`. `pictures` maps a side's name to its images (N, 3, H, W) in
    [-1, 1], made from `shown["prompts"]`."""
    strips = {name: strip(images) for name, images in pictures.items()}
    (output / "rows").mkdir(exist_ok=True)
    for name, row in strips.items():
        (output / "rows" / f"{name}.png").write_bytes(png(row))
    Image.fromarray(_enlarge(np.concatenate(list(strips.values())), pictures)).save(output / "grid.png")
    text = json.dumps(shown, indent=2, ensure_ascii=False)
    (output / "shown.json").write_text(text + "\n", encoding="utf-8")
    captions = " · ".join(map(html.escape, shown["prompts"]))
    rows = "".join(
        f'<div class="row"><span>{figures.title(name, metrics["sides"][name])}</span>'
        f'<img alt="{name}" src="{data_url(png(row))}"></div>'
        for name, row in strips.items()
    )
    (output / "index.html").write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Retort: student and teacher</title>
<style>{STYLE}</style><h1>Student and teacher</h1>
<p>Every column is one noise and one prompt, the same in all rows.</p>{rows}<p><small>{captions}</small></p>
{_table(metrics)}{_legend(metrics)}</html>
""",
        encoding="utf-8",
    )


def _table(metrics: Mapping[str, Any]) -> str:
    shown = figures.columns(metrics["sides"].values())
    head = "".join(f"<th>{figures.FIGURES[key].title}</th>" for key in shown)
    groups = [("reference", metrics.get("references", {})), ("", metrics["sides"])]
    body = "".join(
        f'<tr class="{kind or name}"><td>{figures.title(name, values)}</td>'
        f"{''.join(_cell(values, key) for key in shown)}</tr>"
        for kind, rows in groups
        for name, values in rows.items()
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _cell(values: Mapping[str, Any], key: str) -> str:
    figure, spread = figures.words(values, key)
    return f"<td>{figure}{f' <small>{spread}</small>' if spread else ''}</td>"


def _legend(metrics: Mapping[str, Any]) -> str:
    return "".join(f"<p><small>{html.escape(line)}</small></p>" for line in figures.legend(metrics))


def _enlarge(grid: NDArray[np.uint8], pictures: Mapping[str, NDArray[np.float32]]) -> NDArray[np.uint8]:
    scale = max(1, ZOOM // next(iter(pictures.values())).shape[2])
    return grid.repeat(scale, 0).repeat(scale, 1)
