"""DMD: a one-step student trained by the difference of two scores, and by regression."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.diffusion.guidance import draw_w
from stages.losses.score import matching_loss
from stages.methods.base import Materials, prompts_of
from stages.networks.fake_score import FakeScore
from stages.training import Batch, Player, Turn
from stages.training.figures import sample_figures

if TYPE_CHECKING:
    from stages.methods.dmd.config import DMDConfig


class DMD:
    """Distribution matching distillation of a one-step student G (Yin et al. 2023, 2311.18828, algorithm 1).

    L_G    = 1/2 |x - stopgrad(x - gradient)|^2 + regression_weight * d(G(z', c'), y')       x = G(z, c)
    L_fake = w(t) |mu_fake(alpha x + sigma noise, t, c) - stopgrad(x)|^2                     all t

    gradient = (mu_fake - mu_real) / mean|x - mu_real| at x noised to a random timestep of `time_range` (eq. 7 and 8). z
    is new noise and c a prompt of the stream `prompts`. (z', y', c') is a stored pair, d the distance of the setting
    `loss`. mu_real is guided, mu_fake is not. The fake score's turn reuses the samples of the student's turn.

    If the guidance scales of the pairs differ, G and mu_fake take w as an input, and mu_real is guided by it. w of z is
    drawn uniformly from the range.
    """

    def __init__(self, config: DMDConfig, materials: Materials) -> None:
        self.config = config
        self.student = materials.student(config.form)
        self.fake = FakeScore.from_teacher(
            materials.teacher, config.fake_score.lora, takes_w=self.student.form.w_range is not None
        )
        self.matching = config.matching(materials, self.fake)
        self.distance = materials.distance(config.loss) if config.regression_weight else None
        self.shape, self.device = materials.teacher.latent_shape, materials.teacher.device
        self.players = {
            "student": Player(self.student, materials.training),
            "fake_score": Player(self.fake, config.fake_score.training(materials.training), averaged=False),
        }
        self._samples: deque[tuple[Tensor, Tensor | None]] = deque()

    def turns(self, step: int) -> Sequence[Turn]:
        return [Turn("student", self.student_loss), Turn("fake_score", self.fake_loss)]

    def student_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L_G and its terms. `batch`: pairs, prompts or both."""
        prompts = prompts_of(batch)
        z, w = torch.randn(len(prompts), *self.shape, device=self.device), self._draw_w(len(prompts))
        if self.distance is None:
            x = self.student(z, self.student.encode(prompts), w)
            matching, figures = self._matching(x, prompts, w, None)
            return matching, figures
        pairs = batch["pairs"]
        both = self.student(
            torch.cat([z, pairs["noise"]]),
            self.student.encode([*prompts, *pairs["prompts"]]),
            None if w is None else torch.cat([w, pairs["w"]]),
        )
        x, regressed = both.split([len(z), len(pairs["noise"])])
        matching, figures = self._matching(x, prompts, w, pairs["latent"])
        distance = self.distance(regressed, pairs["latent"]).mean()
        return matching + self.config.regression_weight * distance, {**figures, "distance": distance}

    def _draw_w(self, count: int) -> Tensor | None:
        """Draw w for new noises. None if the student takes no w."""
        w_range = self.student.form.w_range
        return draw_w(w_range, count).to(self.device) if w_range else None

    def _matching(
        self, x: Tensor, prompts: list[str], w: Tensor | None, data: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of distribution matching, and figures. Keep the samples x and their w for the fake score's
        turn."""
        self._samples.append((x.detach(), w))
        matching = matching_loss(x, self.matching.gradient(x, prompts, w=w))
        return matching.mean(), {"matching": matching, **sample_figures(x, data)}

    def fake_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L_fake. `batch`: the same as in the student's turn of this step."""
        (x, w), condition = self._samples.popleft(), self.fake.encode(prompts_of(batch))
        weighting = self.config.fake_score.weighting
        return self.fake.errors(x, *self.fake.levels.draw(x), condition, weighting, w).mean(), {}

    def after_step(self, step: int) -> None:
        pass
