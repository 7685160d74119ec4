"""Shows samples of a dataset of pairs with their prompts, and writes the page of `retort stats --html`."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.base import Artifact, Execution, StageError
from stages.data import tars
from stages.data.images.files import IMAGES
from stages.data.inspection.foreign import MOST, small_image
from stages.data.inspection.source import Source
from stages.data.pictures import data_url
from stages.data.pool import read_list
from stages.data.reader import PairReader
from stages.data.statistics import EDGES
from stages.data.urls import redacted
from stages.networks import gaussian

GRID = 32
"""Number of samples on the page."""
Picture = tuple[NDArray[np.uint8], str]
"""An image (H, W, 3) in 0 to 255, and its prompt."""


def pictures(target: str, artifact: Artifact | None, count: int) -> Iterator[Picture]:
    """Yield at most `count` samples with their prompts. Raises StageError if there is nothing to show.

    Samples of a sealed artifact are spread evenly over it, and decoded by its teacher. For other shards, they are the
    first samples that contain an image, with one in memory at a time.
    """
    found = islice(_decoded(artifact, count) if artifact else _images(target), count)
    first = next(found, None)
    if first is None:
        text = f"{target} holds no images; to decode latents, give the sealed artifact, which names its teacher"
        raise StageError(redacted(text))
    return chain([first], found)


def _decoded(artifact: Artifact, count: int) -> Iterator[Picture]:
    folder = artifact.inputs["teacher"].folder
    if (folder / gaussian.FILE).exists():
        raise StageError(f"{folder} is an analytic teacher: it makes no images")
    import torch

    from stages.networks.teachers import load_network

    reader = PairReader(read_list(artifact.folder))
    chosen = np.linspace(0, len(reader) - 1, min(count, len(reader))).round().astype(int)
    batch = reader.batch(chosen)
    images = load_network(folder, Execution()).decode(torch.from_numpy(batch.latent).float()).numpy()
    levels = ((images + 1.0) * 127.5).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
    yield from zip(levels, batch.prompts, strict=True)


def _images(target: str) -> Iterator[Picture]:
    source = Source(target)
    for tar in source.tars():
        with suppress(OSError, ValueError), source.open(tar.path) as file:  # the report lists damaged tars
            yield from _of_tar(file)


def _of_tar(file: Any) -> Iterator[Picture]:
    for sample in tars.walk(file):
        position = file.tell()
        kind = next((kind for kind in IMAGES if kind in sample.members), None)
        if kind is not None:
            try:
                image = small_image(tars.read(file, sample.members[kind], MOST))
                text = tars.read(file, sample.members["txt"], MOST) if "txt" in sample.members else b""
                if image is not None:
                    yield image, text.decode("utf-8", "replace")
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
                pass
        file.seek(position)


def write_samples(folder: Path, shown: Iterable[Picture]) -> None:
    """Write `00000.png`, ... and `metadata.jsonl`: a folder that Hugging Face's imagefolder reads.

    Files are numbered, because keys of samples in a shard cannot be trusted as paths. Raises StageError if the folder
    is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise StageError(f"{folder} is not empty; give another folder with --out")
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "metadata.jsonl", "w", encoding="utf-8") as file:
        for number, (image, prompt) in enumerate(shown):
            name = f"{number:05d}.png"
            Image.fromarray(image).save(folder / name)
            file.write(json.dumps({"file_name": name, "text": prompt}, ensure_ascii=False) + "\n")


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td { padding: .15rem .8rem .15rem 0; vertical-align: top }
figure { display: inline-block; width: 128px; margin: 4px; vertical-align: top; font-size: 11px }
figure img { width: 128px; image-rendering: pixelated } svg { background: #f6f6f6 } .bad { color: #b00020 }
"""


def write_page(path: Path, report: Mapping[str, Any], shown: Sequence[Picture]) -> None:
    """Write a self-contained HTML page with the report's figures, histograms and samples."""
    figures = "".join(
        f'<figure><img alt="" src="{data_url(Image.fromarray(image))}">'
        f"<figcaption>{html.escape(prompt[:200])}</figcaption></figure>"
        for image, prompt in shown
    )
    plots = "".join(
        f"<h2>{html.escape(name)}</h2><p>{_words(about)}</p>{_plot(about['histogram'], name == 'noise')}"
        for name, about in report["arrays"].items()
        if "histogram" in about
    )
    damage = "".join(
        f'<p class="bad">{html.escape(f"{tar}: {problem}")}</p>'
        for tar, problem in list(report["damaged"].items())[:100]
    )
    plain = {**report, **report["provenance"]}
    rows = "".join(
        f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{html.escape(_short(value))}</td></tr>"
        for name, value in plain.items()
        if name not in ("arrays", "provenance", "damaged")
    )
    path.write_text(
        f"""<!doctype html><html lang="en"><meta charset="utf-8"><title>Retort: shards</title><style>{STYLE}</style>
<h1>{html.escape(str(report["target"]))}</h1>{damage}<table>{rows}</table>{plots}<h2>Samples</h2>
{figures or "<p>There are no images. To see decoded latents, give the sealed artifact.</p>"}</html>
""",
        encoding="utf-8",
    )


def _words(about: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in about.items() if name not in ("histogram", "channels")}
    return html.escape(", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in kept.items()))


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_short(inner)}" for name, inner in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plot(counts: Sequence[int], normal: bool) -> str:
    """Return a histogram as SVG. With `normal`, it also shows the density of N(0, 1)."""
    width, height, total = 576, 120, max(1, sum(counts))
    step = width / len(counts)
    density = np.exp(-0.5 * np.square((EDGES[1:] + EDGES[:-1]) / 2)) / (2 * np.pi) ** 0.5 * (EDGES[1] - EDGES[0])
    top = max(max(counts) / total, float(density.max()) if normal else 0.0, 1e-12)
    bars = "".join(
        f'<rect x="{i * step:.1f}" y="{height * (1 - n / total / top):.1f}" width="{step:.1f}" '
        f'height="{height * n / total / top:.1f}" fill="#5b8def"/>'
        for i, n in enumerate(counts)
        if n
    )
    points = " ".join(f"{(i + 0.5) * step:.1f},{height * (1 - d / top):.1f}" for i, d in enumerate(density))
    line = f'<polyline points="{points}" fill="none" stroke="#b00020"/>' if normal else ""
    return (
        f'<svg width="{width}" height="{height + 16}" role="img">{bars}{line}'
        f'<text x="0" y="{height + 13}" font-size="11">{EDGES[0]:.0f}</text>'
        f'<text x="{width - 8}" y="{height + 13}" font-size="11">{EDGES[-1]:.0f}</text></svg>'
    )
