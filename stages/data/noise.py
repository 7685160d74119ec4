"""Starting noise of samples. It is a pure function of the seed and the sample's index."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

CONVENTION = "philox-key(seed,index)-standard_normal-float32"


def noise_for(seed: int, index: int, shape: tuple[int, ...], dtype: np.dtype) -> NDArray[np.floating]:
    """Return the standard normal noise of sample `index`, rounded to `dtype`. It is both stored and used by the solver.

    The generator is counter-based (Philox, Salmon et al. 2011), so a worker can draw any sample's noise directly.
    """
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
    return generator.standard_normal(shape, dtype=np.float32).astype(dtype)


def guidance_scale_for(seed: int, index: int, least: float, most: float) -> np.float32:
    """Return the guidance scale of sample `index`, from the uniform distribution on [least, most).

    It is drawn from the same key as the sample's noise, in a part of the counter's range that no noise reaches.
    """
    bits = np.random.Philox(key=np.array([seed, index], dtype=np.uint64), counter=np.array([0, 0, 0, 1], np.uint64))
    return np.float32(least + (most - least) * np.random.Generator(bits).random())


def hash64(content: bytes) -> int:
    """Return a 64-bit hash. Receipts store it for noises and prompts, so that duplicates are found without the data."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
