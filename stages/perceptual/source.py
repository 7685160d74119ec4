"""Loads the images and triplets that a perceptual network is trained and tested on."""

from __future__ import annotations

from collections.abc import Generator
from functools import cache
from pathlib import Path

import numpy as np
import torch

from stages.base import Progress
from stages.data.images.config import ImageSet
from stages.data.images.labelled import LabelledImages
from stages.data.images.load import load
from stages.data.images.sealed import images_of
from stages.data.latents import read_latents
from stages.data.triplets.triplets import Triplets
from stages.latents import Latents
from stages.networks.teachers import load_network
from stages.perceptual import seen
from stages.perceptual.config import Recipe
from stages.perceptual.seen import Encode, Seen, SeenTriplets
from stages.training import TrainingExecution

SOURCES = 20_000
"""Maximum number of images that synthetic triplets are made from."""


class Source:
    """The inputs of a perceptual network: labelled images and triplets, as latents of the teacher or as pixels."""

    def __init__(self, recipe: Recipe, execution: TrainingExecution, scratch: Path) -> None:
        assert recipe.latents and isinstance(recipe.latents.stage, Latents)
        self.recipe, self.latents, self.scratch = recipe, recipe.latents, scratch
        self.images: ImageSet = recipe.latents.stage.images
        self.dtype = np.dtype(recipe.latents.stage.storage_dtype)
        self._verified = cache(lambda: images_of(self.latents))  # cached, because it reads all files
        self._teacher = cache(lambda: load_network(self.latents.inputs["teacher"].folder, execution))
        self._encode: Encode = lambda images: images if recipe.space == "pixels" else self._teacher().encode(images)

    def seen(self, held_out: bool) -> Seen:
        """Return the labelled images of a split as inputs of the network."""
        if self.recipe.space == "latents":
            encoded = read_latents(self.latents.folder, held_out)
            labels = {name: torch.from_numpy(values) for name, values in encoded.labels.items()}
            return Seen(lambda index: torch.from_numpy(encoded.batch(index)), labels, len(encoded))
        images = load(self._verified(), held_out=held_out, scratch=self.scratch / "images")
        labels = {name: torch.from_numpy(values) for name, values in images.labels.items()}
        return Seen(lambda index: torch.from_numpy(images.pixels(index)), labels, len(images))

    def triplets(self, held_out: bool) -> Triplets:
        """Return the triplets to calibrate on, or with `held_out` those to test on."""
        assert self.recipe.triplets
        return self.recipe.triplets.load(self._sources, held_out)

    def _sources(self, held_out: bool) -> LabelledImages:
        return load(self._verified(), held_out=held_out, limit=SOURCES, scratch=self.scratch / "sources")

    def encoded(self, triplets: Triplets, name: str) -> Generator[Progress, None, SeenTriplets]:
        """Encode triplets to the scratch folder, continuing an earlier attempt, and return them.

        `name`, such as "test triplets", names the folder and the progress."""
        folder = self.scratch / name.replace(" ", "_")
        for done in seen.encoded(triplets, self._encode, folder, self.dtype):
            yield Progress(done, len(triplets.votes), f"{name} encoded")
        return seen.read(triplets, folder)
