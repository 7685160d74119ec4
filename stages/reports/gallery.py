"""Shows samples of a dataset of pairs with their prompts, and writes the page of `retort stats --html`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from stages.base import Artifact, Execution, StageError
from stages.data import tars
from stages.data.images.files import IMAGES
from stages.data.inspection.foreign import MOST, small_image
from stages.data.inspection.source import Source
from stages.data.pictures import as_svg, data_url, page
from stages.data.pool import read_list
from stages.data.reader import PairReader
from stages.data.statistics import edges_of
from stages.data.urls import redacted
from stages.networks import gaussian

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID = 32
"""Number of samples on the page."""
MOST_DAMAGED, LONGEST = 100, 200
"""Lines about damage, and characters of a prompt, on the page."""
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


def write_page(path: Path, report: Mapping[str, Any], shown: Sequence[Picture]) -> None:
    """Write a self-contained HTML page with the report's figures, histograms and samples.

    Each histogram is also written beside the page, as PAGE-ARRAY.png and PAGE-ARRAY.svg.
    """
    arrays = []
    for name, about in report["arrays"].items():
        if "histogram" in about:
            drawn = _plot(name, about["histogram"])
            for suffix in (".png", ".svg"):
                drawn.savefig(path.with_name(f"{path.stem}-{name}{suffix}"))
            arrays.append((name, _words(about), as_svg(drawn)))
    about = {
        name.replace("_", " "): _short(value)
        for name, value in {**report, **report["provenance"]}.items()
        if name not in ("arrays", "provenance", "damaged")
    }
    damaged = [f"{tar}: {problem}" for tar, problem in list(report["damaged"].items())[:MOST_DAMAGED]]
    samples = [(data_url(Image.fromarray(image)), prompt[:LONGEST]) for image, prompt in shown]
    values = {"target": str(report["target"]), "about": about, "damaged": damaged, "arrays": arrays, "samples": samples}
    path.write_text(page("shards.html", **values), encoding="utf-8")


def _words(about: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in about.items() if name not in ("histogram", "channels")}
    return ", ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in kept.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_short(inner)}" for name, inner in value.items())
    return f"{value:,}" if isinstance(value, int) else str(value)


def _plot(name: str, counts: Sequence[int]) -> Figure:
    """Draw the histogram of the array `name`. That of the noise also shows the density of N(0, 1)."""
    from matplotlib.figure import Figure

    edges = edges_of(name)
    drawn = Figure(figsize=(6, 1.6), layout="constrained")
    axes = drawn.subplots()
    axes.stairs(np.asarray(counts) / max(1, sum(counts)), edges, fill=True)
    if name == "noise":
        middles = (edges[1:] + edges[:-1]) / 2
        axes.plot(middles, np.exp(-0.5 * middles**2) / (2 * np.pi) ** 0.5 * (edges[1] - edges[0]), color="C3")
    axes.set(xlim=(edges[0], edges[-1]), yticks=[])
    return drawn
