"""Two pipelines along one trajectory: a structure network for noisy levels, and a texture network for the others.

This is the time-decoupled teacher of PanGu-Draw (2312.16486, section 3.1). Planning imports this module, so it imports
neither torch nor NumPy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.base import StageError
from stages.networks.adapter import Adapter

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from stages.diffusion.schedule import Level
    from stages.networks.condition import Condition

FILE, STRUCTURE, TEXTURE = "time_decoupled.json", "structure", "texture"
"""The file that marks a folder as a time-decoupled teacher, and the folders of its two pipelines."""


class TimeDecoupled(Adapter):
    """The structure pipeline, whose network is replaced by that of the texture pipeline at timesteps below `switch`.

    The network that is called at a timestep t is chosen by t itself: structure for t >= switch, texture for t < switch.
    The authors' sampler chooses by the previous timestep, so it switches one step later.

    VAE, scheduler and images are those of the structure pipeline. Each network has the conditions of its own pipeline.
    """

    def __init__(
        self, folder: Path, *, device: str = "cpu", dtype: torch.dtype | None = None, compile: bool = False
    ) -> None:
        """Raises StageError if the two pipelines differ in latents, noise schedule or prediction type."""
        super().__init__(folder / STRUCTURE, device=device, dtype=dtype, compile=compile)
        family = type(self).__bases__[1]
        self.texture: Adapter = family(folder / TEXTURE, device=device, dtype=dtype, compile=compile)
        self.switch: int = json.loads((folder / FILE).read_text(encoding="utf-8"))["switch"]
        for name in ("latent_shape", "prediction"):
            one, other = getattr(self, name), getattr(self.texture, name)
            if one != other:
                raise StageError(f"structure and texture differ in {name.replace('_', ' ')}: {one} and {other}")
        if list(self.schedule.alpha) != list(self.texture.schedule.alpha):
            raise StageError("structure and texture have different noise schedules")

    def teacher_condition(self, prompts: Sequence[str]) -> Condition:
        return _joined(super().teacher_condition(prompts), self.texture.teacher_condition(prompts))

    def teacher_dropped(self) -> Condition:
        return _joined(super().teacher_dropped(), self.texture.teacher_dropped())

    def output(self, z: Tensor, level: Level, condition: Condition) -> Tensor:
        """Return the output of the network that `level.timestep` chooses, for each sample."""
        import torch

        from stages.diffusion.schedule import Level

        structure = torch.as_tensor(level.timestep, device=z.device) >= self.switch
        if bool(structure.all()):
            return super().output(z, level, _part(condition, STRUCTURE))
        if not bool(structure.any()):
            return self.texture.output(z, level, _part(condition, TEXTURE))
        outputs = torch.empty_like(z, dtype=torch.float32)
        for rows, name, call in (
            (structure.nonzero()[:, 0], STRUCTURE, super().output),
            ((~structure).nonzero()[:, 0], TEXTURE, self.texture.output),
        ):
            levels = Level(*(value[rows] for value in (level.alpha, level.sigma, level.timestep)))
            outputs[rows] = call(z[rows], levels, _part(condition, name).select(rows))
        return outputs

    def at(self, timestep: float) -> Adapter:
        return self if timestep >= self.switch else self.texture

    def release(self) -> None:
        super().release()
        self.texture.release()


def _joined(structure: Condition, texture: Condition) -> Condition:
    """Return both conditions as one. The name of each tensor begins with its half."""
    from stages.networks.condition import Condition

    halves = {STRUCTURE: structure.tensors, TEXTURE: texture.tensors}
    named = {f"{half}/{name}": value for half, tensors in halves.items() for name, value in tensors.items()}
    return Condition(len(structure), named)


def _part(condition: Condition, half: str) -> Condition:
    """Return the condition of one half."""
    from stages.networks.condition import Condition

    own = {name.removeprefix(f"{half}/"): v for name, v in condition.tensors.items() if name.startswith(f"{half}/")}
    return Condition(len(condition), own)


@cache
def time_decoupled(family: type[Adapter]) -> type[Adapter]:
    """Return the adapter of time-decoupled teachers whose pipelines are of `family`."""
    made: Any = type(f"TimeDecoupled{family.__name__}", (TimeDecoupled, family), {})
    return made
