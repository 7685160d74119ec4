"""The settings and inputs that `kind: distill` sends to the training worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stages.base import Artifact
from stages.methods.base import MethodConfig
from stages.training import TrainingSettings


@dataclass(frozen=True)
class Recipe:
    """How a student is taught, and on what: pairs of several sources, mixed by weight, or latents."""

    method: MethodConfig
    training: TrainingSettings
    pairs: Sequence[Artifact]
    weights: Sequence[float | None]
    """Of the pairs; None: by their number."""
    held_out: int
    """Of the first source's last pairs."""
    latents: Artifact | None
    start: Artifact | None
    """The student to go on from."""
    inputs: Mapping[str, Artifact]
    """What the method's fields name."""
    contents: Mapping[str, str]
    """What the method's `Content` fields were found to hold."""

    @property
    def data(self) -> Sequence[Artifact]:
        """What it is trained on."""
        return [self.latents] if self.latents else self.pairs

    @property
    def generation(self) -> int:
        """How many students it goes on from, one after another."""
        count, student = 0, self.start
        while student is not None:
            count, student = count + 1, student.inputs.get("start_from")
        return count

    @property
    def teacher(self) -> Artifact:
        return self.data[0].inputs["teacher"]
