"""The difference of two scores, as a gradient at samples: outputs of a student, or renders of particles.

mu_real(z, t) and mu_fake(z, t) are estimates of x0 from z = alpha x + sigma noise. The score of noised samples is
s = (alpha mu - z) / sigma^2. So mu_fake - mu_real = (sigma^2 / alpha) (s_fake - s_real), the gradient of the KL
divergence of the two distributions up to a weight (Yin et al. 2023, 2311.18828, eq. 7; with x in place of mu_fake,
Poole et al. 2022, 2209.14988, eq. 3; with LoRA scores, Wang et al. 2023, 2305.16213, eq. 9).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stages.diffusion.levels import Levels
from stages.diffusion.schedule import Level
from stages.diffusion.weighting import NoiseWeighting, ScoreWeighting, noise_weight
from stages.networks.condition import Condition
from stages.networks.denoiser import Denoiser
from stages.networks.fake_score import FakeScore

EPSILON = 1e-6
"""Added to the mean that `dmd` divides by, which is 0 if the teacher returns the sample itself."""


def difference(
    x: Tensor, real: Tensor, fake: Tensor, level: Level, weighting: ScoreWeighting | NoiseWeighting = "dmd"
) -> Tensor:
    """Return the weighted mu_fake - mu_real (B, C, H, W). Its negative points to where the teacher expects x.

    dmd: divided by mean|x - mu_real| of each sample, computed in at least float32 (2311.18828, eq. 8, without the
    factor alpha, as in the paper's listing). constant: not weighted, which is w_t = sigma^2 / alpha^2 in the paper's
    w_t alpha (s_fake - s_real). sigma2_over_alpha: multiplied by sigma^2 / alpha, which stresses noisy levels. A
    NoiseWeighting weights noise_real - noise_fake, by `noise_weight`. `level` holds alpha and sigma (B, 1, 1, 1)."""
    gradient = fake - real
    if weighting == "dmd":
        wide = torch.promote_types(x.dtype, torch.float32)
        scale = (x.to(wide) - real.to(wide)).abs().mean((1, 2, 3), keepdim=True)
        return gradient / (scale + EPSILON).to(gradient.dtype)
    if weighting == "sigma2_over_alpha":
        return gradient * (level.sigma**2 / level.alpha).to(gradient.dtype)
    if weighting == "constant":
        return gradient
    return gradient * weight_on_x0(noise_weight(weighting, *level), level).to(gradient.dtype)


def weight_on_x0(weight_on_noise: Tensor | float, level: Level) -> Tensor:
    """Convert a weight of differences of the noise to the weight of differences of x0: (alpha / sigma) w.

    noise = (z - alpha x0) / sigma, so noise_real - noise_fake = (alpha / sigma) (mu_fake - mu_real)."""
    weight: Tensor = level.alpha / level.sigma * weight_on_noise
    return weight


def matching_loss(x: Tensor, gradient: Tensor) -> Tensor:
    """Return 1/2 |x - stopgrad(x - gradient)|^2, averaged over the elements of each sample, (B,).

    The gradient with respect to x (B, C, H, W) is `gradient` / (C H W). No gradient flows to `gradient`."""
    return 0.5 * (x - (x - gradient).detach()).square().mean((1, 2, 3))


def with_gradient(value: Tensor, x: Tensor, gradient: Tensor) -> Tensor:
    """Return the scalar `value` with the given gradient with respect to x. No other gradient flows from it."""
    return value.detach() + ((x - x.detach()) * gradient.detach()).sum()


class ScoreDifference:
    """The gradient of distribution matching at samples: the difference of the fake and the real score."""

    def __init__(
        self,
        real: Denoiser,
        fake: FakeScore | None,
        levels: Levels,
        weighting: ScoreWeighting | NoiseWeighting = "dmd",
        time_range: tuple[float, float] = (0.02, 0.98),
    ) -> None:
        """`real` is the teacher, guided or not, on the grid of all T timesteps of its schedule. `levels` are those of
        that schedule.

        Without `fake`, mu_fake is the sample itself: the score of a distribution that consists of this sample only
        (2305.16213). Timesteps are drawn uniformly between the two fractions of T in `time_range`, both included."""
        self.real, self.fake, self.levels, self.weighting, self.time_range = real, fake, levels, weighting, time_range

    def gradient(
        self, x: Tensor, prompts: Sequence[str], fake_condition: Condition | None = None, w: Tensor | None = None
    ) -> Tensor:
        """Return the gradient (B, C, H, W) at samples x, at random timesteps and with random noise.

        The fake score's condition is by default that of `prompts`. w (B,) guides the real score and is an input of the
        fake score. None: the real score has its own guidance."""
        return self.at(x, prompts, *self.levels.draw(x, self.time_range), fake_condition, w)

    @torch.no_grad()
    def at(
        self,
        x: Tensor,
        prompts: Sequence[str],
        t: Tensor,
        noise: Tensor,
        fake_condition: Condition | None = None,
        w: Tensor | None = None,
    ) -> Tensor:
        """Return the weighted mu_fake - mu_real (B, C, H, W) at samples x that are noised to timesteps t (B,)."""
        z = self.levels.noised(x, t, noise)
        real = self.real.x0(z, t + 1, self.real.encode(prompts), w)  # point i of the grid is timestep i - 1
        fake = self.fake.x0(z, t, fake_condition or self.fake.encode(prompts), w) if self.fake else x
        return difference(x, real, fake, self.levels.at(t), self.weighting)
