"""The embedded image set `digits`: real scanned handwriting (scikit-learn's 1,797 8x8 digits), tinted.

Each image is one scan in one of six colours, upscaled to `size` pixels on black, with a caption such as
"a red handwritten seven". Every fifth scan is held out: what is trained (a teacher, a probe classifier) sees
the others only, 1,437 scans. Image i of S scans is scan i % S in colour i // S.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.15, 0.15),
    "green": (0.15, 0.9, 0.2),
    "blue": (0.25, 0.35, 1.0),
    "yellow": (1.0, 0.9, 0.1),
    "purple": (0.75, 0.2, 0.95),
    "white": (1.0, 1.0, 1.0),
}
HOLD_OUT_EVERY = 5


@dataclass(frozen=True)
class LabelledImages:
    """images: (N, 3, H, W) float32 in [-1, 1]; captions: N strings; labels: name -> (N,) int64 classes."""

    images: NDArray[np.float32]
    captions: list[str]
    labels: dict[str, NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.captions)

    def take(self, index: NDArray[np.int64]) -> LabelledImages:
        return LabelledImages(
            self.images[index],
            [self.captions[i] for i in index],
            {name: values[index] for name, values in self.labels.items()},
        )


def caption(colour: str, digit: str) -> str:
    return f"a {colour} handwritten {digit}"


def captions() -> list[str]:
    """The sixty captions, colour by colour."""
    return [caption(colour, digit) for colour in COLOURS for digit in DIGITS]


def caption_labels(texts: list[str]) -> dict[str, NDArray[np.int64]]:
    """The classes that captions of this set ask for. Raises ValueError for any other text."""
    place = {text: i for i, text in enumerate(captions())}
    unknown = next((text for text in texts if text not in place), None)
    if unknown is not None:
        raise ValueError(f"{unknown!r} is not a caption of the digits set, such as {captions()[0]!r}")
    index = np.array([place[text] for text in texts], dtype=np.int64)
    return {"colour": index // len(DIGITS), "digit": index % len(DIGITS)}


@cache
def load(size: int = 16, held_out: bool = False) -> LabelledImages:
    """The training images (8,622), or with `held_out` the others (2,160), in the set's order."""
    from PIL import Image
    from sklearn.datasets import load_digits

    scans, digit = load_digits(return_X_y=True)
    chosen = (np.arange(len(scans)) % HOLD_OUT_EVERY == 0) == held_out
    ink = np.stack(
        [
            np.asarray(Image.fromarray(scan).resize((size, size), Image.Resampling.BICUBIC))
            for scan in scans[chosen].reshape(-1, 8, 8).astype(np.float32) / 16.0
        ]
    ).clip(0.0, 1.0)
    tints = np.array(list(COLOURS.values()), dtype=np.float32)
    images = (2.0 * ink[None, :, None] * tints[:, None, :, None, None] - 1.0).reshape(-1, 3, size, size)
    labels = {
        "colour": np.repeat(np.arange(len(tints)), len(ink)),
        "digit": np.tile(digit[chosen].astype(np.int64), len(tints)),
    }
    names = list(COLOURS)
    texts = [caption(names[c], DIGITS[d]) for c, d in zip(labels["colour"], labels["digit"], strict=True)]
    return LabelledImages(images.astype(np.float32), texts, labels)
