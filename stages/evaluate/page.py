"""Writes the images of an evaluation: a strip for each side, a figure of all sides, and a self-contained page."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.data import pictures
from stages.evaluate import figures

COLUMNS = 16
STRIP = 2048
"""Largest width of a strip in pixels, unless four images are wider. Strips of many students share one page."""

STYLE = """
.figures td, .figures th { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line) }
.figures td:first-child { text-align: left } .student td { font-weight: 600 } .reference td { color: var(--faint) }
"""


def columns(samples: int, width: int) -> list[int]:
    """Choose random samples to show, for images `width` pixels wide. Random, because prompts repeat in a cycle."""
    count = min(COLUMNS, max(4, STRIP // width))
    return [int(i) for i in np.random.default_rng(0).permutation(samples)[:count]]


def write(
    output: Path,
    metrics: Mapping[str, Any],
    images: Mapping[str, NDArray[np.float32]],
    shown: Mapping[str, Any],
    previews: Path | None = None,
) -> None:
    """Write the images and the page of an evaluation to `output`.

    `rows/SIDE.png` is a strip with one column for each noise, in native resolution. `grid.png` shows all sides with
    labels. `shown.json` names the noises and prompts. `index.html` is the page.

    images: name of a side -> (N, 3, H, W) in [-1, 1], made from the N prompts in `shown["prompts"]`.
    previews: the figure of the student's samples while it was trained. It need not exist.
    """
    (output / "rows").mkdir(exist_ok=True)
    rows = []
    for side, values in metrics["sides"].items():
        strip = Image.fromarray(pictures.strip(images[side]))
        strip.save(output / "rows" / f"{side}.png")
        label = f"{figures.title(side, values)}\n{figures.calls(values)}"
        rows.append((label, pictures.cut(strip, len(shown["prompts"]))))
    pictures.figure(rows, shown["prompts"]).save(output / "grid.png")
    measured = figures.subject(metrics) or "student"
    text = json.dumps(shown, indent=2, ensure_ascii=False)
    (output / "shown.json").write_text(text + "\n", encoding="utf-8")
    (output / "index.html").write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Retort: {measured} and teacher</title>
<style>{pictures.STYLE}{STYLE}</style><h1>{measured.capitalize()} and teacher</h1>
<p>Each column shows one noise and one prompt, the same in all rows.</p>
{pictures.table(rows, shown["prompts"])}{_table(metrics)}{_legend(metrics)}{_trained(previews)}</html>
""",
        encoding="utf-8",
    )


def _trained(previews: Path | None) -> str:
    """Return the section on the student's samples while it was trained. Empty if there is no figure of them."""
    if previews is None or not previews.exists():
        return ""
    image = f'<img alt="samples by training step" src="{pictures.data_url(Image.open(previews))}">'
    return f"<h2>While it was trained</h2><p>The averaged student, with the same noises in all rows.</p>{image}"


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
    return f'<table class="figures"><tr><th></th>{head}</tr>{body}</table>'


def _cell(values: Mapping[str, Any], key: str) -> str:
    figure, spread = figures.words(values, key)
    return f"<td>{figure}{f' <small>{spread}</small>' if spread else ''}</td>"


def _legend(metrics: Mapping[str, Any]) -> str:
    return "".join(f"<p><small>{html.escape(line)}</small></p>" for line in figures.legend(metrics))
