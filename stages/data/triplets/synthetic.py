"""Synthetic triplets: real images with distortions of known strength. By definition, the weaker distortion is closer.

A triplet depends only on the settings, the images, the split, the family of distortions, and its number in the family.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.data.images.labelled import LabelledImages
from stages.data.triplets.distortions import DISTORTIONS, moved
from stages.data.triplets.families import FAMILIES, Family

LEAST = 0.25
"""The strength of the stronger distortion is drawn uniformly from LEAST to 1."""


@dataclass(frozen=True)
class Recipe:
    """How to make a triplet: the index of its reference image, the family, and the strengths of both distortions."""

    key: tuple[int, int, int]
    """(split, family, number in the family): the seed of its random draws."""
    source: int
    family: Family
    strengths: tuple[float, float]


class SyntheticTriplets:
    """Training triplets of all families except the held-out one, in equal shares; with `held_out`, test triplets of
    every family.

    Implements the interface Triplets.
    """

    def __init__(
        self,
        images: LabelledImages,
        count: int,
        *,
        held_out: bool,
        held_out_family: Family,
        ratio: tuple[float, float],
        misalignment: float,
    ) -> None:
        """count: the number of triplets of all families together; with `held_out`, of each family."""
        self._images, self._misalignment = images.images, misalignment
        families = [family for family in FAMILIES if held_out or family != held_out_family]
        self.categories: dict[str, range] = {}
        self.recipes: list[Recipe] = []
        for place, family in enumerate(families):
            share = count if held_out else len(range(place, count, len(families)))
            self.categories[family] = range(len(self.recipes), len(self.recipes) + share)
            keys = ((int(held_out), FAMILIES.index(family), number) for number in range(share))
            self.recipes += [_recipe(key, ratio, len(images)) for key in keys]
        self.unseen: frozenset[str] = frozenset([held_out_family]) if held_out else frozenset()
        self.votes = np.array([recipe.strengths[1] < recipe.strengths[0] for recipe in self.recipes], dtype=np.float32)

    def batch(self, index: NDArray[np.int64]) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint8]]:
        """Return the references, first images and second images, each (B, 3, H, W)."""
        recipes = [self.recipes[i] for i in index]
        references = np.stack([self._reference(recipe) for recipe in recipes])
        first, second = (np.stack([self._distorted(recipe, which) for recipe in recipes]) for which in (0, 1))
        return references, first, second

    def _reference(self, recipe: Recipe) -> NDArray[np.uint8]:
        return np.asarray(self._images[recipe.source])

    def _distorted(self, recipe: Recipe, which: int) -> NDArray[np.uint8]:
        image = self._reference(recipe)
        generator = np.random.default_rng([*recipe.key, 1 + which])
        if self._misalignment and recipe.family != "shift":
            image = moved(image, generator.uniform(0.0, self._misalignment), generator)
        return DISTORTIONS[recipe.family](image, recipe.strengths[which], generator)


def _recipe(key: tuple[int, int, int], ratio: tuple[float, float], sources: int) -> Recipe:
    generator = np.random.default_rng([*key, 0])
    stronger = generator.uniform(LEAST, 1.0)
    weaker = stronger * generator.uniform(*ratio)
    strengths = (weaker, stronger) if generator.integers(2) else (stronger, weaker)
    return Recipe(key, int(generator.integers(sources)), FAMILIES[key[1]], strengths)
