"""Previews: images of fixed noises or fixed views that show how a result changes during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from stages.data import pictures
from stages.training.loop import LOG_EVERY
from stages.training.players import PREVIEWS

FOLDER = "previews"
"""A folder of strips, one for each preview."""
COLUMNS, LARGEST = 8, 256
"""The most images in a strip, and their largest width in pixels."""

Averages = Mapping[str, nn.Module]


class Previews:
    """Draws strips of images about `count` times during training: `previews/step-NUMBER.png`.

    An interrupted training keeps its strips."""

    def __init__(
        self,
        output: Path,
        captions: Sequence[str],
        steps: int,
        count: int,
        draw: Callable[[Averages], NDArray[np.float32]],
    ) -> None:
        """`captions` has one for each image. `steps` is the number of training steps, `count` that of previews.

        `draw` makes the images (N, 3, H, W) in [-1, 1] from the averaged networks."""
        self.output, self.captions, self.steps, self.count = output, list(captions), steps, count
        self.images = draw
        self.every = max(1, round(steps / max(count, 1) / LOG_EVERY)) * LOG_EVERY

    @torch.no_grad()
    def __call__(self, step: int, averages: Averages) -> None:
        """Write the strip of `step`, a multiple of LOG_EVERY or the last step, if a preview is due."""
        if not self.count or (step % self.every and step != self.steps):
            return
        strip = Image.fromarray(pictures.strip(self.images(averages)))
        strip.thumbnail((LARGEST * len(self.captions), strip.height))
        (self.output / FOLDER).mkdir(exist_ok=True)
        strip.save(self.output / FOLDER / f"step-{step:07}.png")

    def draw(self) -> None:
        """Draw the strips below one another as PREVIEWS, if there are any."""
        strips = sorted((self.output / FOLDER).glob("step-*.png"))
        rows = [
            (f"step {int(path.stem.removeprefix('step-')):,}", pictures.cut(Image.open(path), len(self.captions)))
            for path in strips
        ]
        if rows:
            pictures.figure(rows, self.captions).save(self.output / PREVIEWS)
