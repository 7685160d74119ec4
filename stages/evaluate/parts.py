"""The parts of an evaluation, and the files in which workers leave what they measured.

Planning imports this module, so it imports neither torch nor, at module level, NumPy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stages.data.files import publish, temporary_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Arrays = dict[str, NDArray[Any]]
    """`SIDE/WHAT` -> values, with one row for each image, for example student/latent_mse and real/features."""

FOLDER = "parts"
"""The folder of measured parts, in the scratch folder of an unfinished evaluation."""
SIZE, PROMPTS = 512, 25
"""The number of samples in a part, and of prompts in a part that compares images of one prompt."""
ABOUT = "about"


@dataclass(frozen=True)
class Part:
    """A unit of work of a worker: samples `start` to `stop` - 1, or the real images, or several images of each of the
    prompts `start` to `stop` - 1."""

    start: int
    stop: int
    what: Literal["samples", "real", "prompts"] = "samples"

    @property
    def file(self) -> str:
        return f"{self.what}-{self.start:09d}-{self.stop:09d}.safetensors"

    def __str__(self) -> str:
        return "the real images" if self.what == "real" else f"{self.what} {self.start} to {self.stop - 1}"


def parts_of(samples: int, real: bool, prompts: int = 0) -> list[Part]:
    """Return the parts of an evaluation. The real images come first, so that problems with them are found early.

    real: whether real images are measured. prompts: the number of prompts of which several images are compared."""
    runs: list[tuple[Literal["samples", "prompts"], int, int]] = [
        ("samples", samples, SIZE),
        ("prompts", prompts, PROMPTS),
    ]
    return [
        *([Part(0, 0, "real")] if real else []),
        *(Part(i, min(i + size, count), what) for what, count, size in runs for i in range(0, count, size)),
    ]


def write(folder: Path, part: Part, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> str:
    """Write a part to `folder`, completely or not at all. Return the name of the file."""
    import numpy as np
    from safetensors.numpy import save_file

    folder.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(folder / part.file)
    try:
        kept = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
        save_file(kept, temporary, {ABOUT: json.dumps(about)})
        publish(temporary, folder / part.file)
    finally:
        temporary.unlink(missing_ok=True)
    return part.file


class Measured:
    """What the workers measured: the arrays of several parts, joined in order, and what is known about each part."""

    def __init__(self, folder: Path, parts: Iterable[Part]) -> None:
        from safetensors import safe_open

        self._files = [safe_open(folder / part.file, "np") for part in parts]
        self._names = [set(file.keys()) for file in self._files]
        self.about: list[dict[str, Any]] = [json.loads(file.metadata()[ABOUT]) for file in self._files]

    def __contains__(self, name: str) -> bool:
        return any(name in names for names in self._names)

    def __getitem__(self, name: str) -> NDArray[Any]:
        """Return an array of all parts that have it, (N, ...)."""
        import numpy as np

        with_it = (file for file, names in zip(self._files, self._names, strict=True) if name in names)
        return np.concatenate([file.get_tensor(name) for file in with_it])
