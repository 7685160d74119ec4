"""Records of a pair, and of the statistics of a shard in its receipt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from stages.base import Config
from stages.data.statistics import BINS, MOST, Moments


@dataclass(frozen=True)
class Pair:
    """Sample `index` of a pool, as stored: the starting noise, and the result of the teacher's ODE.

    arrays, float16 or float32: `noise` and `latent`, each (C, H, W). The latent includes the VAE's scaling factor;
    for a pixel-space teacher it is an image in [-1, 1]. On request also `path` (K, C, H, W), the states z_t at K
    timesteps, and `text_embedding`, the text encoder's states. If the scales of the pairs differ, also
    `guidance_scale` (), float32.
    """

    index: int
    prompt: str
    arrays: Mapping[str, NDArray[np.floating]]

    @property
    def key(self) -> str:
        """The index as nine digits. It has no dot, because webdataset splits member names at the first dot."""
        return f"{self.index:09d}"


class ArrayFacts(Config):
    """Statistics of one array over all samples of a shard. They can be merged with those of other shards."""

    dtype: Literal["float16", "float32", "float64"]
    shape: list[int] = Field(max_length=8)
    moments: Moments
    channels: list[Moments] = Field(default_factory=list, max_length=4096)
    """The moments of each channel; empty unless the array is (C, H, W)."""
    histogram: list[Annotated[int, Field(ge=0, le=MOST)]] = Field(min_length=BINS, max_length=BINS)


class PromptFacts(Config):
    """Lengths of a shard's prompts in characters and in words, and the number of empty prompts."""

    characters: Moments
    words: Moments
    empty: int = Field(0, ge=0, le=MOST)


class ShardFacts(Config):
    """The part of a receipt that describes the shard as a whole."""

    count: int = Field(ge=0, le=MOST)
    bytes: int = Field(ge=0, le=MOST)
    sha256: str
    arrays: dict[str, ArrayFacts]
    prompts: PromptFacts
    provenance: dict[str, Any]
    """How the shard was made: sampler, noise convention, teacher, pool, prompts, device, versions and seconds."""
