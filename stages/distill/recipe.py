"""The settings and inputs that a `distill` stage sends to its training worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages.base import Artifact
from stages.methods.base import MethodConfig, Stream, StudentTraining


@dataclass(frozen=True)
class Origin:
    """The pipeline or teacher in `start`, whose network the student starts from."""

    folder: Path
    about: Mapping[str, Any]
    """Its source, the commit if the source is a hub id, and its licence if it is known."""


@dataclass(frozen=True)
class Recipe:
    """All that determines a student, except the seed."""

    method: MethodConfig
    training: StudentTraining
    streams: Sequence[Stream]
    """The data streams of training. Their order determines the seed of each."""
    teacher: Artifact
    pairs: Sequence[Artifact]
    """The sources of pairs. Empty if the student is not trained on pairs."""
    weights: Sequence[float | None]
    """The weight of each source of pairs. None: its number of training pairs."""
    held_out: int
    """The number of pairs that are held out: the last ones of the first source."""
    latents: Artifact | None
    prompts: Path
    """The folder of the prompt table. It exists if the student is trained on prompts."""
    start: Artifact | None
    """The student in `start_from`, whose weights the student starts from."""
    origin: Origin | None
    """The network that the setting `start` names. None: the student starts from the teacher or from `start_from`."""
    inputs: Mapping[str, Artifact]
    """Dotted path of a field in the method's settings -> the sealed artifact that it names."""
    contents: Mapping[str, str]
    """Dotted path of a `Content` field in the method's settings -> identity of its content."""

    @property
    def data(self) -> Sequence[Artifact]:
        """The artifacts that the student is trained on: pairs, then latents."""
        return [*self.pairs, *([self.latents] if self.latents else [])]

    @property
    def generation(self) -> int:
        """The number of earlier students in the chain of `start_from`."""
        count, student = 0, self.start
        while student is not None:
            count, student = count + 1, student.inputs.get("start_from")
        return count
