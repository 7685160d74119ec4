"""SDS: particles that follow the teacher's score."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.base import StageError
from stages.diffusion.grid import Grid
from stages.diffusion.levels import Levels
from stages.losses.score import ScoreDifference, matching_loss
from stages.networks.adapter import Adapter
from stages.networks.condition import Condition
from stages.networks.denoiser import TeacherDenoiser
from stages.networks.fake_score import FakeScore
from stages.optimize.config import ObjectiveMaterials
from stages.optimize.representations.base import Views
from stages.training import Batch, Player, Turn

if TYPE_CHECKING:
    from stages.optimize.objectives.config import ScoreDistillationConfig


class SDS:
    """Score distillation sampling of particles theta (Poole et al. 2022, 2209.14988, eq. 3).

    dL/dx = w(t) (noise_real(z, t, c) - noise) = w(t) alpha / sigma (x - mu_real)       x = render(theta, camera)

    z = alpha x + sigma noise at a random timestep t of `time_range`. noise_real is guided, and c the prompt with the
    words for the view. The teacher's Jacobian is left out. The loss is averaged over the elements of x. The
    paper sums it, so a further term of the loss counts more here than with the same weight in the paper.
    """

    def __init__(
        self, config: ScoreDistillationConfig, materials: ObjectiveMaterials, fake: FakeScore | None = None
    ) -> None:
        """`fake` is the score that is subtracted from the teacher's. Without `fake`, the noise is subtracted.

        Raises StageError if the teacher does not know the prompt."""
        self.config, self.particles, self.prompt = config, materials.particles, materials.prompt
        teacher = materials.teacher
        self._check_prompts(teacher)
        grid = Grid.trailing(teacher.schedule, len(teacher.schedule))
        real = TeacherDenoiser(teacher, grid, config.guidance_scale)
        ranges = [config.time_range, *([config.anneal.time_range] if config.anneal else [])]
        levels = Levels(teacher.schedule, teacher.device)
        self.scores = [ScoreDifference(real, fake, levels, config.weighting, times) for times in ranges]
        """The differences of scores before and after `anneal.after`."""
        self.players = {"particles": Player(self.particles, materials.training)}

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("particles", partial(self.loss, step=step))]

    def loss(self, batch: Batch, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of the particles in `batch["particles"]` (B,), and its terms."""
        views = self.particles.draw(batch["particles"])
        x, terms = self.particles.render(views)
        annealed = self.config.anneal is not None and step >= self.config.anneal.after
        score = self.scores[1 if annealed else 0]
        prompts = self.particles.prompts(self.prompt, views)
        gradient = score.gradient(x, prompts, self.score_condition(x, views))
        matching = matching_loss(x, gradient)
        loss = matching + sum(terms.values(), torch.zeros_like(matching))
        return loss.mean(), {"matching": matching, **terms}

    def score_condition(self, x: Tensor, views: Views) -> Condition | None:
        """Return the condition of the particles' score at renders x of `views`. SDS has no such score: None."""
        return None

    def _check_prompts(self, teacher: Adapter) -> None:
        """Raise StageError if the teacher does not know the prompt, or the prompts of views."""
        teacher.teacher_condition([self.prompt])
        try:
            teacher.teacher_condition(self.particles.prompts(self.prompt, self.particles.fixed(1)))
        except StageError as error:
            raise StageError(f"{error}; set representation.view_prompts: false") from None

    def after_step(self, step: int) -> None:
        pass
