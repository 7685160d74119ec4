"""The named records that travel: a pair, a row of a receipt, and what a receipt says of its shard."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Pair:
    """Sample `index` of a pool: what was solved from and what came out, as stored.

    noise, latent: (C, H, W), float16 or float32; latent is the VAE's times its scaling factor.
    """

    index: int
    prompt: str
    noise: NDArray[np.floating]
    latent: NDArray[np.floating]

    @property
    def key(self) -> str:
        """Nine digits and no dot: webdataset splits a member's name at its first dot."""
        return f"{self.index:09d}"


@dataclass(frozen=True)
class ShardFacts:
    """What a receipt says of its shard as a whole; everything `retort stats` needs."""

    count: int
    bytes: int
    sha256: str
    arrays: dict[str, dict[str, Any]]
    """name -> {"dtype", "shape", "moments", "histogram"}, the last two mergeable (see statistics)."""
    provenance: dict[str, Any]
    """solver, steps, guidance scale, noise convention, teacher and pool fingerprints, device, versions, seconds."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
