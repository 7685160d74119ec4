"""What the training loop is told: players, and for each step whose turn it is with which loss. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from stages.base import Config, Execution

if TYPE_CHECKING:
    from torch import Tensor, nn

Batch = Mapping[str, Any]


class TrainingSettings(Config):
    """How the networks of a stage are optimised: AdamW, linear warm-up, then constant or falling to zero."""

    steps: int = Field(ge=1, description="optimizer steps, each of `accumulate` batches")
    batch_size: int = Field(64, ge=1, description="samples a batch; a step sees `accumulate` times as many")
    learning_rate: float = Field(1e-3, gt=0, description="its peak: after the warm-up, before the decay")
    warmup_steps: int = Field(0, ge=0, description="steps over which the learning rate rises linearly to its peak")
    decay: Literal["constant", "cosine", "linear", "ramp"] = Field(
        "cosine",
        description="of the learning rate after the warm-up: none, half a cosine to zero at the last step, linearly to "
        "zero over the second half of the steps, or (ramp) over all of them",
    )
    betas: tuple[float, float] = Field(
        (0.9, 0.99), strict=False, description="AdamW's decay of its averages of gradients and of their squares"
    )
    weight_decay: float = Field(0.0, ge=0, description="AdamW's, decoupled: times the learning rate, at every step")
    clip_norm: float = Field(1.0, gt=0, description="largest norm of a player's gradient")
    ema_decay: float = Field(0.99, ge=0, lt=1, description="of the averaged weights, which are what is kept")
    accumulate: int = Field(1, ge=1, description="batches whose gradients are averaged into one step")
    mixed_precision: Literal["no", "bf16"] = Field(
        "no", description="bf16: compute in bfloat16, weights stay float32; for GPUs that have it"
    )

    def learning_rate_at(self, step: int) -> float:
        """The rate of the 0-based `step`: a function of the step alone, so that resuming needs no state."""
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
    """How a stage that trains is carried out. Recorded in what it makes, and never a reason to make it again."""

    checkpoint_every: int = Field(
        250, ge=1, description="training steps between two checkpoints, of which the last two are kept"
    )
    gradient_checkpointing: bool = Field(
        False,
        description="compute activations again in the backward pass instead of keeping them: far less memory for about "
        "a third more time",
    )


def training_progress(checkpoints: Path) -> str | None:
    """The newest checkpoint below a folder, in words."""
    newest = max(checkpoints.rglob("step-*"), key=lambda path: path.stat().st_mtime, default=None)
    if newest is None:
        return None
    phase = "" if newest.parent == checkpoints else f"{newest.parent.name}: "
    return f"{phase}checkpoint of step {int(newest.name.removeprefix('step-'))}"


@dataclass(frozen=True)
class Player:
    """A trainable module and how it is optimised."""

    module: nn.Module
    training: TrainingSettings
    averaged: bool = True
    """Whether an average (EMA) of its weights is kept: not of one that only serves another's training."""


@dataclass(frozen=True)
class Turn:
    """One optimizer step of one player. `loss(batch)` gives the scalar loss and further figures to log."""

    player: str
    loss: Callable[[Batch], tuple[Tensor, dict[str, Tensor]]]


class Method(Protocol):
    """Everything that the training loop needs to know. It never asks which method it runs."""

    @property
    def players(self) -> Mapping[str, Player]:
        """By name; a distillation method's result is its player `student`."""

    def turns(self, step: int) -> Sequence[Turn]:
        """Who is optimised in this step, in order. All turns of a step see the same batch."""

    def after_step(self, step: int) -> None:
        """Called when all turns of `step` are done: for targets that follow the players."""
