"""The base classes of objectives and representations, and the settings of training. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from stages.base import Config, Neutral
from stages.training import Method, TrainingSettings

if TYPE_CHECKING:
    from stages.networks.adapter import Adapter
    from stages.optimize.representations.base import Representation


class ObjectTraining(TrainingSettings):
    """How the particles are trained. By default, their weights are not averaged."""

    batch_size: int = Field(
        4,
        ge=1,
        description="views in a batch; with more particles than views, particles are drawn in turn, and the others do "
        "not change",
    )
    learning_rate: float = Field(3e-2, gt=0, description="peak learning rate, after the warm-up and before the decay")
    eps: Annotated[float, Neutral()] = Field(
        1e-15,
        gt=0,
        description="AdamW's epsilon; it is small because losses are averaged over the elements of latents, which "
        "makes gradients small (about 1e-9 for a hash grid)",
    )
    ema_decay: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of the exponential moving average of the particles; 0: the particles of the last step",
    )


@dataclass(frozen=True)
class RepresentationMaterials:
    """What a representation is made from."""

    teacher: Adapter
    """The frozen teacher, whose latents the particles make."""
    particles: int
    """The number of particles."""
    folder: Path
    """The stage's folder, with the files that `RepresentationConfig.prepare` has put there."""


class RepresentationConfig(Config):
    """Base class of the settings of representations."""

    name: str

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (field path, problem) for each setting that cannot work. It may read files that settings name."""
        yield from ()

    def prompts(self, prompt: str) -> list[str]:
        """Return all prompts that the teacher may get for `prompt`, one for each kind of view."""
        return [prompt]

    def prepare(self, folder: Path) -> None:
        """Copy the files that `create` reads to `folder`. Raises StageError if a file cannot be used."""

    def create(self, materials: RepresentationMaterials) -> Representation:
        """Create the particles as they are before training. Only this method, and what it calls, may import torch."""
        raise TypeError(f"{type(self).__name__} does not implement create()")


@dataclass(frozen=True)
class ObjectiveMaterials:
    """What an objective is made from."""

    teacher: Adapter
    """The frozen teacher. An objective must not change it."""
    particles: Representation
    prompt: str
    training: ObjectTraining


class ObjectiveConfig(Config):
    """Base class of the settings of objectives."""

    name: str

    @property
    def uses_guidance(self) -> bool:
        """Whether the teacher is called both with and without the prompt."""
        return False

    def check(self, steps: int) -> Iterator[tuple[str, str]]:
        """Yield (field path, problem) for each setting that does not fit the number of training steps."""
        yield from ()

    def create(self, materials: ObjectiveMaterials) -> Method:
        """Create the method, whose first player is called `particles`. Only this method, and what it calls, may import
        torch."""
        raise TypeError(f"{type(self).__name__} does not implement create()")
