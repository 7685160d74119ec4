"""Writes the images of an evaluation: a strip for each side, a figure of all sides, and a self-contained page."""

from __future__ import annotations

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
    groups = [("reference", metrics.get("references", {})), ("", metrics["sides"])]
    table = [
        (kind or name, figures.title(name, values), "", values)
        for kind, some in groups
        for name, values in some.items()
    ]
    page = pictures.page(
        "evaluation.html",
        measured=measured,
        images=pictures.table(rows, shown["prompts"]),
        figures=figures.table(table),
        legend=figures.legend(metrics),
        previews=pictures.data_url(Image.open(previews)) if previews and previews.exists() else None,
    )
    (output / "index.html").write_text(page, encoding="utf-8")
