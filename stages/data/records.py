"""The named records that travel: a pair, and what a receipt says of its shard."""

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
    """Sample `index` of a pool: what was solved from and what came out, as stored.

    arrays, float16 or float32: noise and latent (C, H, W), the latent being the VAE's times its scaling factor or an
    image in [-1, 1]; where they were asked for path (K, C, H, W), states z_t at chosen timesteps, and text_embedding.
    """

    index: int
    prompt: str
    arrays: Mapping[str, NDArray[np.floating]]

    @property
    def key(self) -> str:
        """Nine digits and no dot: webdataset splits a member's name at its first dot."""
        return f"{self.index:09d}"


class ArrayFacts(Config):
    """One array of all samples of a shard: moments and histogram merge with those of other shards."""

    dtype: Literal["float16", "float32", "float64"]
    shape: list[int] = Field(max_length=8)
    moments: Moments
    channels: list[Moments] = Field(default_factory=list, max_length=4096)
    """Of arrays (C, H, W), each channel's."""
    histogram: list[Annotated[int, Field(ge=0, le=MOST)]] = Field(min_length=BINS, max_length=BINS)


class PromptFacts(Config):
    """Lengths of a shard's prompts, in characters and in words."""

    characters: Moments
    words: Moments
    empty: int = Field(0, ge=0, le=MOST)


class ShardFacts(Config):
    """What a receipt says of its shard as a whole."""

    count: int = Field(ge=0, le=MOST)
    bytes: int = Field(ge=0, le=MOST)
    sha256: str
    arrays: dict[str, ArrayFacts]
    prompts: PromptFacts
    provenance: dict[str, Any]
    """sampler, noise convention, teacher, pool and prompts, device, versions, seconds."""
