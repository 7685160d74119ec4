"""Diffusion2GAN: a one-step student trained by regression and a conditional discriminator."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stages.losses.adversarial import discriminator_loss, generator_loss, mean_over_maps, r1_penalty
from stages.methods.base import Materials
from stages.methods.diffusion2gan.mix_and_match import mix_and_match
from stages.networks.condition import Condition
from stages.networks.discriminator import DiffusionDiscriminator
from stages.training import Batch, Player, Turn

if TYPE_CHECKING:
    from stages.methods.diffusion2gan.config import Diffusion2GANConfig


class Diffusion2GAN:
    """Diffusion2GAN: a one-step student G and a conditional discriminator D (Kang et al. 2024, 2405.05967, section 3).

    L_G = d(G(z, c), x) + gan_weight * E[-log D(c, z, G(z, c))]
    L_D = E[-log D(c, z, x)] + E[-log(1 - D(c, z, G(z, c)))] + r1_weight / 2 |grad_x D(c, z, x)|^2

    z is the noise, c the prompt and x the stored latent. d is the distance of the setting `loss`. If the guidance
    scales of the pairs differ, G also takes w, and D does not. The discriminator's turn reuses the latents that the
    student generated in its turn of the same step.
    """

    def __init__(self, config: Diffusion2GANConfig, materials: Materials) -> None:
        self.gan_weight, self.settings = config.gan_weight, config.discriminator
        self.distance, teacher = materials.distance(config.loss), materials.teacher
        self.student = materials.one_step_student(config.prediction)
        self.players = {"student": Player(self.student, materials.training)}
        self._generated: deque[Tensor] = deque()
        if self.gan_weight:
            settings = self.settings
            self.discriminator = DiffusionDiscriminator.from_teacher(
                teacher, settings.weights, settings.noise, settings.multi_scale, materials.training.lora
            )
            training = settings.training(materials.training)
            self.players["discriminator"] = Player(self.discriminator, training, averaged=False)
        teacher.release()

    def turns(self, step: int) -> Sequence[Turn]:
        turns = [Turn("student", self.student_loss)]
        if self.gan_weight:
            with_r1 = step % self.settings.r1_every == 0 and self.settings.r1_weight > 0
            turns.append(Turn("discriminator", partial(self.discriminator_loss, with_r1=with_r1)))
        return turns

    def student_loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L_G and its two terms. `batch`: pairs."""
        pairs = batch["pairs"]
        z, prompts = pairs["noise"], pairs["prompts"]
        x = self.student(z, self.student.encode(prompts), pairs["w"])
        distance = self.distance(x, pairs["latent"]).mean()
        if not self.gan_weight:
            return distance, {}
        self._generated.append(x.detach())
        gan = generator_loss(self.discriminator(x, z, self.discriminator.encode(prompts)))
        return distance + self.gan_weight * gan, {"distance": distance, "gan": gan}

    def discriminator_loss(self, batch: Batch, with_r1: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """Return L_D, the mean logits of real and fake latents, and the R1 penalty if `with_r1`.

        `batch`: pairs, the same as in the student's turn of this step. The R1 penalty is computed on one sample and
        multiplied by `r1_every` (section 3.3)."""
        pairs = batch["pairs"]
        z, c, x = pairs["noise"], self.discriminator.encode(pairs["prompts"]), pairs["latent"]
        false_x, false_z, false_c = mix_and_match(
            self._generated.popleft(), x, z, c, self.settings.mix_and_match, self.settings.noise
        )
        conditions = Condition.cat([c, false_c])
        both = self.discriminator(torch.cat([x, false_x]), torch.cat([z, false_z]), conditions)
        real, false = zip(*(logits.chunk(2) for logits in both), strict=True)
        loss = discriminator_loss(real, false)
        figures = {"real": mean_over_maps(real).mean(), "false": mean_over_maps(false).mean()}
        if with_r1:
            # The second derivative is expensive, so the penalty takes one sample of each micro-batch.
            one = torch.randint(len(x), (1,), device=x.device)
            z, c = z[one], c.select(one)
            r1 = r1_penalty(lambda real: self.discriminator(real, z, c), x[one], self.settings.r1_weight)
            loss = loss + self.settings.r1_every * r1
            figures["r1"] = r1
        return loss, figures

    def after_step(self, step: int) -> None:
        pass
