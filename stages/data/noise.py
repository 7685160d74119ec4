"""Starting noise, a pure function of (seed, sample index)."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

CONVENTION = "philox-key(seed,index)-standard_normal-float32"


def noise_for(seed: int, index: int, shape: tuple[int, ...], dtype: np.dtype) -> NDArray[np.floating]:
    """Standard normal noise of sample `index`, rounded to `dtype`: what is stored and what is solved from.

    Counter-based (Salmon et al. 2011, Philox): any worker makes any sample's noise without the ones before.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
    return generator.standard_normal(shape, dtype=np.float32).astype(dtype)


def hash64(content: bytes) -> int:
    """A 64-bit hash: equal noises, and equal prompts, are found without reading any."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
