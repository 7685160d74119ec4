"""The interface between a method and the training loop: players, turns and settings. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Protocol

from pydantic import Field

from stages.base import Config, Execution, Neutral

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = Mapping[str, Any]
"""A batch: name -> tensor (B, ...), or list of B strings. In distillation, a batch maps each data stream to such a
mapping: `batch["pairs"]["noise"]`."""


class TrainingSettings(Config):
    """How a network is trained: by AdamW, with a linear warm-up and a decay of the learning rate."""

    steps: int = Field(ge=1, description="optimizer steps; each uses `accumulate` batches")
    batch_size: int = Field(64, ge=1, description="samples in a batch; a step uses `accumulate` times as many")
    learning_rate: float = Field(1e-3, gt=0, description="peak learning rate, after the warm-up and before the decay")
    warmup_steps: int = Field(0, ge=0, description="steps in which the learning rate rises linearly to its peak")
    decay: Literal["constant", "cosine", "linear", "ramp"] = Field(
        "cosine",
        description="decay of the learning rate; constant: none; cosine: half a cosine, to zero at the last step; "
        "linear: linearly to zero over the second half of the steps; ramp: linearly to zero over all steps",
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.99), strict=False, description="betas of AdamW, for the means of gradients and of squared gradients"
    )
    eps: Annotated[float, Neutral()] = Field(
        1e-8, gt=0, description="AdamW's epsilon, which is added to the root of the mean squared gradient"
    )
    weight_decay: float = Field(
        0.0, ge=0, description="decoupled weight decay of AdamW; each step multiplies it by the learning rate"
    )
    clip_norm: float = Field(
        1.0, gt=0, description="maximum norm of a network's gradient; larger gradients are scaled down to it"
    )
    ema_decay: float = Field(
        0.99,
        ge=0,
        lt=1,
        description="decay of the exponential moving average of the weights; the averaged weights are the result of "
        "training",
    )
    accumulate: int = Field(1, ge=1, description="batches whose gradients are averaged for one step")
    mixed_precision: Literal["no", "bf16"] = Field(
        "no", description="bf16: compute in bfloat16 and keep the weights in float32, for GPUs that support bfloat16"
    )

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of the 0-based `step`. It depends only on the step, so that resuming needs no state.

        It is learning_rate * min(1, (step + 1) / (warmup_steps + 1)) * decay(step / steps)."""
        from math import cos, pi

        warm = min(1.0, (step + 1) / (self.warmup_steps + 1))
        part = step / self.steps
        falls = {
            "constant": 1.0,
            "cosine": 0.5 * (1 + cos(pi * part)),
            "linear": min(1.0, 2 - 2 * part),
            "ramp": 1 - part,
        }
        return self.learning_rate * warm * falls[self.decay]


class TrainingExecution(Execution):
    """How a training stage is run. These settings are recorded, but changing them makes nothing stale."""

    checkpoint_every: int = Field(
        250, ge=1, description="training steps between two checkpoints; the last two checkpoints are kept"
    )
    gradient_checkpointing: bool = Field(
        False,
        description="recompute activations in the backward pass instead of storing them: much less memory, about a "
        "third more time",
    )


PREVIEWS = "previews.png"
"""The image file in a student's folder that shows its samples during training. It may be missing."""


class StudentExecution(TrainingExecution):
    """How a student is trained."""

    previews: int = Field(
        10,
        ge=0,
        description="approximate number of times that images of fixed noises are drawn during training; 0: never",
    )


def training_progress(checkpoints: Path) -> str | None:
    """Describe the newest checkpoint in `checkpoints` or its subfolders, or return None if there is none."""
    newest = max(checkpoints.rglob("step-*"), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return None
    phase = "" if newest.parent == checkpoints else f"{newest.parent.name}: "
    return f"{phase}checkpoint of step {int(newest.name.removeprefix('step-'))}"


@dataclass(frozen=True)
class Player:
    """A network and its training settings.

    Only the parameters with `requires_grad` are trained, averaged and checkpointed. Networks may share all others."""

    module: nn.Module
    training: TrainingSettings
    averaged: bool = True
    """Whether an exponential moving average (EMA) of the weights is kept. Auxiliary networks, such as a discriminator,
    need none."""


@dataclass(frozen=True)
class Turn:
    """One optimizer step of one player."""

    player: str
    """The name of the player."""
    loss: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]
    """A function batch -> (scalar loss, {name: other scalar to log})."""


class Method(Protocol):
    """The interface between the training loop and a method. All methods share the loop."""

    @property
    def players(self) -> Mapping[str, Player]:
        """The players by name. A distillation method returns the player `student` as its result."""

    def turns(self, step: int) -> Sequence[Turn]:
        """Return the turns of the 0-based `step`, in order. All turns of a step get the same batch."""

    def after_step(self, step: int) -> None:
        """Update other state, such as an averaged target network. The loop calls this after all turns of `step`."""
