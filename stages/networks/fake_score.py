"""The fake score of distribution matching: a denoiser that learns the distribution of a student's samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from stages.base import StageError
from stages.diffusion.levels import Levels
from stages.diffusion.prediction import target, to_noise, to_x0
from stages.diffusion.weighting import FakeWeighting
from stages.networks.adapter import Adapter
from stages.networks.condition import Condition
from stages.networks.lora import LoraSettings

EDM_SIGMA_DATA = 0.5
"""The assumed standard deviation of the data in EDM's loss weight (Karras et al. 2022, 2206.00364)."""
HEAD_SIDE = 4
"""The head halves the side of the features down to this number. One convolution then reduces it to 1, as in DMD2's
code."""


class FakeScore(nn.Module):
    """The denoiser mu_fake(z, t, c) of a student's samples (Yin et al. 2023, 2311.18828, section 3.2).

    It starts as the teacher's network, and keeps its prediction type. It is trained on all timesteps. With `judges`, it
    is also DMD2's discriminator (Yin et al. 2024, 2405.14867, section 4.3): a head on the output of its middle block
    distinguishes noised real latents from noised samples.

    In all methods, x, z and noise are (B, C, H, W), and t (B,) are timesteps of the teacher's schedule, 0 to T - 1.
    `condition` has B rows and was made by `encode`. w (B,) is guidance_scale - 1, only for a network that takes it.
    """

    def __init__(self, adapter: Adapter, network: Any, judges: bool = False) -> None:
        """Raises StageError if the network has no features for a head, or if x0 cannot be computed at a timestep."""
        super().__init__()
        if adapter.prediction == "epsilon" and adapter.schedule.alpha[-1] == 0:
            raise StageError("the schedule ends in pure noise, where a fake score that predicts epsilon gives no x0")
        self.adapter, self.network = adapter, network
        self.levels = Levels(adapter.schedule, adapter.device)
        if judges:
            self._bottleneck = adapter.bottleneck(network)
            side = max(1, min(adapter.latent_shape[1:]) >> self._bottleneck.halvings)
            self.head = _head(self._bottleneck.channels, self._bottleneck.groups, side)

    @classmethod
    def from_teacher(
        cls, teacher: Adapter, lora: LoraSettings | None = None, judges: bool = False, takes_w: bool = False
    ) -> FakeScore:
        """Create a fake score with a copy of the teacher's network.

        With `lora`, the copy shares the teacher's weights and trains LoRA weights. With `takes_w`, the network takes w
        as an input, of which its output does not depend at first."""
        if lora:
            return cls(teacher, teacher.lora_network(lora, takes_w), judges)
        network = teacher.student_network()
        return cls(teacher, teacher.with_guidance_embedding(network) if takes_w else network, judges)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Return the network's condition for `prompts`, one row for each prompt."""
        return self.adapter.encode_prompts(prompts)

    def x0(self, z: Tensor, t: Tensor, condition: Condition, w: Tensor | None = None) -> Tensor:
        """Estimate x0 from z: mu_fake(z, t). It is converted in float64, because epsilon is divided by alpha."""
        level = self.levels.at(t)
        output = self.adapter.predict(self.network, z, level, condition, w)
        return to_x0(self.adapter.prediction, output.double(), z.double(), *level).to(z.dtype)

    def errors(
        self,
        x: Tensor,
        t: Tensor,
        noise: Tensor,
        condition: Condition,
        weighting: FakeWeighting = "output",
        w: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted squared error (B,) of denoising samples x, averaged over elements (2311.18828, eq. 6).

        output: the error of the network's output, with which teachers are trained. snr: that of the noise, which is
        SNR = alpha^2 / sigma^2 times that of x0; DMD uses it for Stable Diffusion. edm: SNR + 1 / 0.5^2 times the error
        of x0, EDM's weight. No gradient flows to x."""
        x, prediction = x.detach(), self.adapter.prediction
        level = self.levels.at(t)
        alpha, sigma = level
        z = self.levels.noised(x, t, noise)
        output = self.adapter.predict(self.network, z, level, condition, w)
        if weighting == "output":
            wanted = target(prediction, x, noise, alpha, sigma)
            return (output.double() - wanted).float().square().mean((1, 2, 3))
        output, z = output.double(), z.double()
        error = (to_noise(prediction, output, z, alpha, sigma) - noise).square()
        if weighting == "edm":
            error = error + (to_x0(prediction, output, z, alpha, sigma) - x).square() / EDM_SIGMA_DATA**2
        return error.float().mean((1, 2, 3))

    def logits(self, x: Tensor, t: Tensor, noise: Tensor, condition: Condition) -> list[Tensor]:
        """Return one map of logits (B, h, w) for latents x that are noised to t. Gradients flow to x.

        A positive logit means that the latent looks real. Only the encoder of the network is computed."""
        z = self.levels.noised(x, t, noise)
        features = self._bottleneck.features(
            lambda: self.adapter.predict(self.network, z, self.levels.at(t), condition)
        )
        return [self.head(features).squeeze(1)]


def _head(channels: int, groups: int, side: int) -> nn.Module:
    """Return DMD2's head, from features (B, `channels`, h, w) of `side` elements to logits (B, 1, h', w').

    4x4 convolutions of stride 2 halve the side down to HEAD_SIDE, and one without padding reduces it to 1. Each is
    followed by group norm and SiLU. A 1x1 convolution gives the logit."""

    def block(kernel: int, stride: int, padding: int) -> list[nn.Module]:
        convolution = nn.Conv2d(channels, channels, kernel, stride, padding)
        return [convolution, nn.GroupNorm(groups, channels), nn.SiLU()]

    layers: list[nn.Module] = []
    while side > HEAD_SIDE:
        layers += block(4, 2, 1)
        side //= 2
    return nn.Sequential(*layers, *block(side, side, 0), nn.Conv2d(channels, 1, 1))
