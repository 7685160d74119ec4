"""DMD2: a student in one or several steps, trained by the difference of two scores and a GAN term."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.losses.adversarial import discriminator_loss, generator_loss, mean_over_maps
from stages.losses.score import matching_loss, with_gradient
from stages.methods.base import Materials, prompts_of
from stages.networks.fake_score import FakeScore
from stages.training import Batch, Player, Turn
from stages.training.figures import sample_figures
from stages.training.loop import step_seed

if TYPE_CHECKING:
    from stages.methods.dmd2.config import DMD2Config


LEAST_GRADIENT = 1e-12
"""The least norm by which the GAN's gradient is divided. With an untrained fake score the norm is 0."""


class DMD2:
    """DMD2 for a student G of one or several steps (Yin et al. 2024, 2405.14867, section 4 and appendix).

    L_G    = 1/2 |x - stopgrad(x - gradient)|^2 + weight * softplus(-D(x_t))                 x = G(z_i, i, c)
    L_fake = w(t) |mu_fake(x_t, t, c) - stopgrad(x)|^2
             + discriminator_weight * (softplus(-D(y_t)) + softplus(D(x_t)))                 all t

    gradient is that of DMD. z_i is the state of the student's own sampling before its call i: pure noise at the first
    call. i is the same for the whole batch, a function of the seed and the step. x_t = alpha x + sigma noise at a
    random timestep t, drawn anew for each term. y_t is a real latent y, noised in the same way. D is the logit of a
    head on the fake score's middle block. The fake score has a turn in each step. In every `fake_updates`-th step, the
    student has a turn before it, and both use the same samples.
    """

    def __init__(self, config: DMD2Config, materials: Materials) -> None:
        self.config, self.gan, self.seed = config, config.gan, materials.seed
        self.student = materials.student(config.form)
        self.fake = FakeScore.from_teacher(materials.teacher, config.fake_score.lora, judges=config.gan is not None)
        self.matching = config.matching(materials, self.fake)
        self.shape, self.device = materials.teacher.latent_shape, materials.teacher.device
        self.players = {
            "student": Player(self.student, materials.training),
            "fake_score": Player(self.fake, config.fake_score.training(materials.training), averaged=False),
        }
        self._samples: deque[Tensor] = deque()

    def turns(self, step: int) -> Sequence[Turn]:
        calls = step_seed(self.seed, step) % self.config.steps  # the calls of sampling before the one that is trained
        turns = [Turn("fake_score", partial(self.fake_loss, calls=calls))]
        since = step - self.config.fake_warmup_steps
        if since >= 0 and since % self.config.fake_updates == 0:
            turns.insert(0, Turn("student", partial(self.student_loss, calls=calls)))
        return turns

    def sample(self, batch: Batch, calls: int) -> Tensor:
        """Return x (B, C, H, W), the estimate of call `calls`, counted from 0. Gradients flow through this last call.

        Without backward simulation, the input of the last call is a noised real latent, or pure noise if `calls` is 0.
        """
        prompts = prompts_of(batch)
        condition = self.student.encode(prompts)
        noise = torch.randn(len(prompts), *self.shape, device=self.device)
        if calls and not self.config.backward_simulation:
            i = torch.full((len(noise),), self.config.steps - calls, device=self.device)
            return self.student.x0(self.student.noised(batch["latents"]["latent"], noise, i), i, condition)
        states = self.student.states(noise, condition)
        with torch.no_grad():
            for _ in range(calls):
                next(states)
        _, _, x = next(states)
        return x

    def student_loss(self, batch: Batch, calls: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L_G and its terms. `batch`: latents, prompts or both."""
        prompts, x = prompts_of(batch), self.sample(batch, calls)
        self._samples.append(x.detach())
        gradient = self.matching.gradient(x, prompts)
        matching = matching_loss(x, gradient)
        figures = {"matching": matching}
        if not calls:  # later calls start from states with new noise, which adds to the variance
            figures |= sample_figures(x, batch["latents"]["latent"] if "latents" in batch else None)
        if self.gan is None:
            return matching.mean(), figures
        # With a detached copy, the head's activations are freed before the student's backward pass.
        copy = x.detach().requires_grad_()
        gan = generator_loss(self.fake.logits(copy, *self.fake.levels.draw(copy), self.fake.encode(prompts)))
        (gan_gradient,) = torch.autograd.grad(self.gan.weight * gan, copy)
        ratio = gan_gradient.norm() / (gradient.norm() / gradient.numel()).clamp_min(LEAST_GRADIENT)
        loss = matching.mean() + with_gradient(self.gan.weight * gan, x, gan_gradient)
        return loss, {**figures, "gan": gan, "gan_ratio": ratio}

    def fake_loss(self, batch: Batch, calls: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L_fake, and the mean logits of real latents and of samples.

        `batch`: the same as in the student's turn of this step, if it has one. The samples of that turn are reused."""
        if self._samples:
            x = self._samples.popleft()
        else:
            with torch.no_grad():
                x = self.sample(batch, calls)
        condition = self.fake.encode(prompts_of(batch))
        loss = self.fake.errors(x, *self.fake.levels.draw(x), condition, self.config.fake_score.weighting).mean()
        if self.gan is None:
            return loss, {}
        real = batch["latents"]["latent"]
        real_logits = self.fake.logits(
            real, *self.fake.levels.draw(real), self.fake.encode(batch["latents"]["prompts"])
        )
        false_logits = self.fake.logits(x, *self.fake.levels.draw(x), condition)
        loss = loss + self.gan.discriminator_weight * discriminator_loss(real_logits, false_logits)
        return loss, {"real": mean_over_maps(real_logits).mean(), "false": mean_over_maps(false_logits).mean()}

    def after_step(self, step: int) -> None:
        pass
