"""The embedded image set `digits`: coloured scans of handwritten digits (the 1,797 scans of 8x8 in scikit-learn).

An image shows one digit ("a red handwritten seven") or two ("a red seven above a blue two", "a red seven left of a blue
two"). Captions can name only the first of two digits ("a red seven"), or be right only about the digit, or only about
the colour. The background is black or a crop of a photograph. Every fifth scan is held out: training images (for a
teacher or a probe) never contain it.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from numpy.typing import NDArray

from stages.data.images import photographs
from stages.data.images.labelled import LabelledImages

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (1.0, 0.15, 0.15),
    "green": (0.15, 0.9, 0.2),
    "blue": (0.25, 0.35, 1.0),
    "yellow": (1.0, 0.9, 0.1),
    "purple": (0.75, 0.2, 0.95),
    "white": (1.0, 1.0, 1.0),
}
ARRANGEMENTS = ("above", "left of")
HOLD_OUT_EVERY = 5
SCENES = 20_000
"""Number of training images of a randomly composed set. The number of held-out images is a fifth of it."""
DIM = 0.5
"""Factor that darkens the photographs, so that the digits in front of them stay legible."""


def captions(digits_per_image: int, named: str = "all") -> list[str]:
    """Return all captions that the set can have. With `named` "first", those of two digits name only the first one.
    With "digit" or "colour", they are the same as with "all".

    The 7,200 captions of two digits are in a fixed random order, so that the first few are as varied as all of them.
    """
    tinted = [(c, d) for c in COLOURS for d in DIGITS]
    if digits_per_image == 1:
        return [f"a {c} handwritten {d}" for c, d in tinted]
    if named == "first":
        return [f"a {c} {d}" for c, d in tinted]
    texts = [f"a {c} {d} {how} a {k} {e}" for c, d in tinted for how in ARRANGEMENTS for k, e in tinted]
    return [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]


def prompt_labels(texts: list[str]) -> dict[str, NDArray[np.int64]]:
    """Return the classes that captions ask for: label -> (N,). Raises ValueError for a text that is no caption of this
    set."""
    parsed = [_parse(text) for text in texts]
    return {name: np.array([p[name] for p in parsed], dtype=np.int64) for name in parsed[0]}


def _parse(text: str) -> dict[str, int]:
    try:
        match text.split():
            case ["a", colour, "handwritten", digit] | ["a", colour, digit]:
                return {"colour": _COLOUR[colour], "digit": _DIGIT[digit]}
            case ["a", colour, digit, *how, "a", colour_2, digit_2]:
                first = {"colour": _COLOUR[colour], "digit": _DIGIT[digit]}
                second = {"colour_2": _COLOUR[colour_2], "digit_2": _DIGIT[digit_2]}
                return {**first, **second, "arrangement": ARRANGEMENTS.index(" ".join(how))}
    except (KeyError, ValueError):
        pass
    raise ValueError(f"{text!r} is not a caption of the digits set, such as 'a red handwritten seven'")


_COLOUR = {name: i for i, name in enumerate(COLOURS)}
_DIGIT = {name: i for i, name in enumerate(DIGITS)}


@cache
def load(
    digits_per_image: int, size: int, background: str, held_out: bool = False, named: str = "all"
) -> LabelledImages:
    """Return the training images, or with `held_out` the images made from held-out scans. `named` as in `captions`.
    With "digit" or "colour", only that word of a caption is right, and the other word is random.

    One digit on black: every scan in every colour (8,622 training and 2,160 held-out images). Otherwise SCENES training
    images, and a fifth as many held-out ones; image i is a function of i alone.
    """
    scans, digit = _scans(held_out)
    if digits_per_image == 1 and background == "plain":
        return _half_told(_all_tints(scans, digit, size), named, held_out)
    texts = captions(digits_per_image)
    wanted = prompt_labels(texts)
    count = SCENES // HOLD_OUT_EVERY if held_out else SCENES
    made = [_scene(i, size, background, held_out, wanted, scans, digit) for i in range(count)]
    place = np.array([p for _, p, _ in made])
    labels = {name: values[place] for name, values in wanted.items()}
    if background == "photographs":
        labels["photograph"] = np.array([b for _, _, b in made], dtype=np.int64)
    images = np.stack([image for image, _, _ in made])
    words = 3 if named == "first" else None  # of "a red seven above a blue two"
    image_captions = [" ".join(texts[p].split()[:words]) for p in place]
    return _half_told(LabelledImages(images, image_captions, labels, np.arange(count)), named, held_out)


def _half_told(images: LabelledImages, named: str, held_out: bool) -> LabelledImages:
    """Return images of one digit with partly random captions: with `named` "digit" the colour is random, with "colour"
    the digit."""
    other = {"digit": "colour", "colour": "digit"}.get(named)
    if other is None:
        return images
    words = {"colour": list(COLOURS), "digit": list(DIGITS)}
    drawn = np.random.default_rng([len(images), held_out]).integers(len(words[other]), size=len(images))
    in_captions = {**images.labels, other: drawn}
    pairs = zip(in_captions["colour"], in_captions["digit"], strict=True)
    texts = [f"a {words['colour'][c]} handwritten {words['digit'][d]}" for c, d in pairs]
    return replace(images, captions=texts)


def _scans(held_out: bool) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the scans of a split: ink (S, 8, 8) in [0, 1], and the digit of each (S,)."""
    from sklearn.datasets import load_digits

    scans, digit = load_digits(return_X_y=True)
    chosen = (np.arange(len(scans)) % HOLD_OUT_EVERY == 0) == held_out
    return scans[chosen].reshape(-1, 8, 8).astype(np.float32) / 16.0, digit[chosen].astype(np.int64)


def _enlarge(scan: NDArray[np.float32], size: int) -> NDArray[np.float32]:
    from PIL import Image

    return np.asarray(Image.fromarray(scan).resize((size, size), Image.Resampling.BICUBIC)).clip(0.0, 1.0)


def _all_tints(scans: NDArray[np.float32], digit: NDArray[np.int64], size: int) -> LabelledImages:
    """Return every scan in every colour. For S scans, image i is scan i % S in colour i // S."""
    ink = np.stack([_enlarge(scan, size) for scan in scans])
    tints = np.array(list(COLOURS.values()), dtype=np.float32)
    images = (ink[None, :, None] * tints[:, None, :, None, None]).reshape(-1, 3, size, size)
    labels = {"colour": np.repeat(np.arange(len(tints)), len(ink)), "digit": np.tile(digit, len(tints))}
    names = list(COLOURS)
    texts = [f"a {names[c]} handwritten {DIGITS[d]}" for c, d in zip(labels["colour"], labels["digit"], strict=True)]
    return LabelledImages(_levels(images), texts, labels, np.tile(np.arange(len(ink)), len(tints)))


def _scene(
    number: int,
    size: int,
    background: str,
    held_out: bool,
    wanted: dict[str, NDArray[np.int64]],
    scans: NDArray[np.float32],
    digit: NDArray[np.int64],
) -> tuple[NDArray[np.uint8], int, int]:
    """Compose image `number`. Return its pixels (3, H, W), the index of its caption, and that of its photograph."""
    generator = np.random.default_rng([number, held_out])
    place = int(generator.integers(len(wanted["digit"])))
    behind = int(generator.integers(len(photographs.PHOTOGRAPHS)))
    image = np.zeros((3, size, size), dtype=np.float32)
    if background == "photographs":
        image += DIM * photographs.crop(behind, size, generator)
    tints = np.array(list(COLOURS.values()), dtype=np.float32)
    two = "digit_2" in wanted
    for which in range(1 + two):
        suffix = "_2" if which else ""
        scan = generator.choice(np.flatnonzero(digit == wanted["digit" + suffix][place]))
        side, top, left = _cell(size, which, int(wanted["arrangement"][place])) if two else (size, 0, 0)
        if two:
            top, left = (edge + int(generator.integers(-1, 2)) for edge in (top, left))
        ink = _enlarge(scans[scan], side)
        part = image[:, top : top + side, left : left + side]
        part += ink * (tints[wanted["colour" + suffix][place]][:, None, None] - part)
    return _levels(image), place, behind


def _cell(size: int, which: int, arrangement: int) -> tuple[int, int, int]:
    """Return side, top and left of the square of digit `which` (0 or 1). Digit 0 is above, or left of, digit 1."""
    side = size // 2 - 2
    near, far, middle = 1, size // 2 + 1, (size - side) // 2
    along = far if which else near
    return (side, along, middle) if ARRANGEMENTS[arrangement] == "above" else (side, middle, along)


def _levels(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    return (images * 255.0).round().clip(0, 255).astype(np.uint8)
