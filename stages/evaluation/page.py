"""One self-contained HTML page: the grid, the table, what the columns mean."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.data.pictures import data_url, strip

COLUMNS = 16
ZOOM = 64
"""Pixels that an image's side is drawn with, at least."""

FIGURES = {
    "network_calls": ("network calls", "{:d}"),
    "seconds_per_image": ("s / image", "{:.4f}"),
    "latent_mse": ("latent MSE to teacher", "{:.4f}"),
    "prompt_accuracy": ("prompt accuracy", "{:.3f}"),
    "frechet_distance": ("Fréchet distance", "{:.2f}"),
    "kernel_distance": ("kernel distance", "{:.4f}"),
    "precision": ("precision", "{:.3f}"),
    "recall": ("recall", "{:.3f}"),
    "diversity": ("diversity", "{:.2f}"),
}

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .25rem .7rem; text-align: right }
th { border-bottom: 1px solid #888 } td:first-child, th:first-child { text-align: left }
tr.student td { font-weight: 600 } .reference td { color: #666 } small { color: #666 }
.row { display: flex; align-items: center; margin: 2px 0 } .row span { width: 8rem; flex: none }
.row img { image-rendering: pixelated; width: calc(100% - 8rem) }
"""


def columns(samples: int) -> list[int]:
    """Which samples to show: drawn at random, since prompts come in a cycle."""
    return [int(i) for i in np.random.default_rng(0).permutation(samples)[:COLUMNS]]


def write(
    output: Path, metrics: Mapping[str, Any], pictures: Mapping[str, NDArray[np.float32]], prompts: Sequence[str]
) -> None:
    """Write `grid.png` (rows: sides, columns: one noise each) and `index.html`. `pictures` maps a side's name to
    its images (N, 3, H, W) in [-1, 1], made from `prompts`."""
    rows = {name: _enlarge(strip(images)) for name, images in pictures.items()}
    Image.fromarray(np.concatenate(list(rows.values()))).save(output / "grid.png")
    captions = " · ".join(map(html.escape, prompts))
    strips = "".join(
        f'<div class="row"><span>{_title(name)}</span><img alt="{name}" src="{data_url(row)}"></div>'
        for name, row in rows.items()
    )
    (output / "index.html").write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Retort: student and teacher</title>
<style>{STYLE}</style><h1>Student and teacher</h1>
<p>Every column is one noise and one prompt, the same in all rows.</p>{strips}<p><small>{captions}</small></p>
{_table(metrics)}{_legend(metrics)}</html>
""",
        encoding="utf-8",
    )


def _table(metrics: Mapping[str, Any]) -> str:
    shown = [key for key in FIGURES if key in next(iter(metrics["sides"].values()))]
    head = "".join(f"<th>{FIGURES[key][0]}</th>" for key in shown)
    groups = [("reference", metrics.get("references", {})), ("", metrics["sides"])]
    body = "".join(
        f'<tr class="{kind or name}"><td>{_title(name)}</td>{"".join(_cell(values, key) for key in shown)}</tr>'
        for kind, rows in groups
        for name, values in rows.items()
    )
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def _cell(values: Mapping[str, Any], key: str) -> str:
    if key not in values:
        return "<td></td>"
    error = values.get(f"{key}_se")
    form = FIGURES[key][1]
    spread = f" <small>± {form.format(error)}</small>" if error is not None else ""
    return f"<td>{form.format(values[key])}{spread}</td>"


def _legend(metrics: Mapping[str, Any]) -> str:
    lines = [
        f"{metrics['samples']} samples a side; ± is one standard error.",
        "Latent MSE: to the teacher's own full-step output from the same noise; full-step rows are 0 by definition.",
        "Seconds an image: in batches of 64, without decoding. Network calls count guidance's second half.",
    ]
    if "features" in metrics:
        lines += [
            f"Distances, precision, recall and diversity are at {metrics['distance_samples']} samples a side, in "
            f"{metrics['features']}: features of a classifier trained on real images. They are not FID.",
            "'real': other real images at the same number of samples, the floor. 'VAE reconstruction': those through "
            "the VAE alone, the floor for every latent model of this teacher.",
            f"The classifier is right on {metrics['probe_accuracy']:.1%} of real images it never saw.",
        ]
    return "".join(f"<p><small>{html.escape(line)}</small></p>" for line in lines)


def _title(name: str) -> str:
    kind, _, steps = name.partition("_")
    if kind == "teacher":
        return f"teacher, {steps} step{'s' if steps != '1' else ''}"
    return {"student": "student, 1 step", "vae_reconstruction": "VAE reconstruction"}.get(name, name)


def _enlarge(row: NDArray[np.uint8]) -> NDArray[np.uint8]:
    scale = max(1, ZOOM // row.shape[0])
    return row.repeat(scale, 0).repeat(scale, 1)
