"""VSD: particles that follow the difference of the teacher's score and their own."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor

from stages.networks.camera import CAMERA, dropped
from stages.networks.condition import Condition
from stages.networks.fake_score import FakeScore
from stages.optimize.config import ObjectiveMaterials
from stages.optimize.objectives.sds import SDS
from stages.optimize.representations.base import Views
from stages.training import Batch, Player, Turn

if TYPE_CHECKING:
    from stages.optimize.objectives.config import VSDConfig


class VSD(SDS):
    """Variational score distillation of particles theta (Wang et al. 2023, 2305.16213, algorithm 1).

    dL/dx   = w(t) (noise_real(z, t, c) - noise_fake(z, t, c', camera))                 x = render(theta, camera)
    L_score = |network(z, t, c', camera) - its target|^2     z = alpha x + sigma noise, all t, x without gradient

    noise_real is guided, noise_fake is not. noise_fake is a LoRA of the teacher's network, with its prediction type.
    c' is the prompt without the words for the view: noise_fake gets the camera instead. In training, the camera is left
    out with the probability `drop_camera`. If noise_fake is the score of a single point, noise_fake = noise, and VSD is
    SDS.
    """

    def __init__(self, config: VSDConfig, materials: ObjectiveMaterials) -> None:
        settings = config.score
        self.fake = FakeScore.from_teacher(materials.teacher, settings.lora)
        self.drop_camera, self.weighting = config.drop_camera, settings.weighting
        self.fake_turns = settings.turns
        if materials.particles.solid:
            materials.teacher.with_camera(self.fake.network)
        super().__init__(config, materials, self.fake)
        self.players["score"] = Player(self.fake, settings.training(materials.training), averaged=False)
        self._renders: deque[tuple[Tensor, Condition]] = deque()

    def turns(self, step: int) -> Sequence[Turn]:
        last = self.fake_turns - 1
        scores = [Turn("score", partial(self.score_loss, again=turn < last)) for turn in range(self.fake_turns)]
        return [*super().turns(step), *scores]

    def score_condition(self, x: Tensor, views: Views) -> Condition:
        """Return the condition of the particles' score, and keep it with x for the score's turns."""
        condition = self.fake.encode([self.prompt] * len(x))
        if views.cameras:
            camera = views.cameras.to_world().flatten(1).to(x)
            condition = Condition(len(x), {**condition.tensors, CAMERA: camera})
        self._renders.append((x.detach(), condition))
        return condition

    def score_loss(self, batch: Batch, again: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L_score at the oldest renders that are kept. With `again`, keep them for another turn."""
        x, condition = self._renders.popleft()
        if again:
            self._renders.append((x, condition))
        if CAMERA in condition.tensors:
            camera = dropped(condition.tensors[CAMERA], self.drop_camera)
            condition = Condition(len(x), {**condition.tensors, CAMERA: camera})
        return self.fake.errors(x, *self.fake.levels.draw(x), condition, self.weighting).mean(), {}
