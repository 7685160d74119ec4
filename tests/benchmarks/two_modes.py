"""Which modes does DMD's student cover? Figure 3 of Yin et al. 2023, 2311.18828, in one dimension.

    python -m tests.benchmarks.two_modes [--distance 10] [--inwards 2] [--steps 2000] [--weighting dmd]
        [--figure docs/two_modes.png]

The data have two modes, at -DISTANCE and DISTANCE, each with a spread of 1. Their score is known in closed form. Stable
Diffusion's schedule adds the noise: sigma / alpha is 13 at the last timestep that is used. The generator maps
z ~ N(0, 1) to x. It starts one-sided, near the right mode: x ~ N(DISTANCE - INWARDS, 1). It is trained in three ways:

- real score only: the fake score is 0, so mu_fake = z_t / alpha. The samples climb the density of the noised data.
- real minus fake: DMD without pairs. The fake score is first trained on the data, because in DMD it starts as the
  teacher. Then it is trained on the generator's samples with the squared error of the noise, at all timesteps, in turn
  with the generator. Its network predicts x0, scaled as in EDM.
- plus regression: the same, with 0.25 times the squared error on 10,000 pairs. Paths of an ODE in one dimension cannot
  cross, so the exact map of the ODE rises with z: y = F^-1(Phi(z)), F the cumulative distribution of the data.

`difference` divides by a mean over the elements of a sample. A sample has 32 elements here: independent draws of x with
one timestep. Prints, in Markdown, means over three seeds and their range: the share of samples on each side of 0; the
share further than 4 from both modes; the mean and the deviation of |x| of all others. Takes a minute on a free core.

The settings were chosen so that the cases differ as in the paper. The result depends on DISTANCE: at 4 and 6, real
minus fake finds both modes. At 8 and 10 it stays in the right mode, even in 8,000 steps (one seed). At 8, a generator
with SiLU and higher rates left it within 6,000 steps (one seed). With SiLU, more samples lie between the modes.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from torch import Tensor, nn

from stages.diffusion.mixture import posterior
from stages.diffusion.schedule import Level, NoiseSchedule
from stages.diffusion.weighting import ScoreWeighting
from stages.losses.score import difference, matching_loss

CASES = ("real score only", "real minus fake", "plus regression")
SEEDS, PAIRS, DRAWN = 3, 10_000, 50_000
SHAPE = (8, 1, 1, 32)
"""A batch of samples: 8 timesteps, 32 draws of x for each."""
SCHEDULE = NoiseSchedule.stable_diffusion()
RATES = (2e-3, 4e-3)
"""Adam's learning rates of the generator and of the fake score. Both fall linearly to 0."""


def mlp(inputs: int, activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 64), activation, nn.Linear(64, 64), activation, nn.Linear(64, 1))


class Data:
    """The two modes, in closed form."""

    def __init__(self, distance: float) -> None:
        self.modes = torch.tensor([[-distance], [distance]])

    def draw(self, *shape: int) -> Tensor:
        return self.modes[torch.randint(2, shape), 0] + torch.randn(shape)

    def x0(self, z: Tensor, level: Level) -> Tensor:
        alpha, sigma = (value.expand_as(z).reshape(-1, 1) for value in level)
        return posterior(z.reshape(-1, 1), self.modes, alpha, sigma, 1.0)[0].view_as(z)

    def density(self, x: Tensor) -> Tensor:
        one = torch.ones(len(x), 1)
        return posterior(x[:, None], self.modes, one, 0 * one, 1.0)[1].exp()

    def quantile(self, z: Tensor) -> Tensor:
        """F^-1(Phi(z)): the map of the ODE."""
        reach = float(self.modes[1]) + 6
        grid = torch.linspace(-reach, reach, 100_001)
        cumulative = torch.special.ndtr(grid - self.modes).mean(0)
        return torch.from_numpy(np.interp(torch.special.ndtr(z), cumulative, grid))


class Generator(nn.Module):
    """z + start + an MLP, whose last layer starts as 0."""

    def __init__(self, start: float) -> None:
        super().__init__()
        self.start, self.network = start, mlp(1, nn.Tanh())
        for parameter in self.network[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.start + self.network(z[..., None])[..., 0]


class Fake(nn.Module):
    """mu_fake(z, t). The MLP's output is scaled as in EDM (Karras et al. 2022, 2206.00364, eq. 7)."""

    def __init__(self, deviation: float) -> None:
        super().__init__()
        self.deviation, self.network = deviation, mlp(4, nn.SiLU())

    def forward(self, z: Tensor, level: Level) -> Tensor:
        alpha, sigma = (value.expand_as(z) for value in level)
        total = (alpha**2 * self.deviation**2 + sigma**2).sqrt()
        unit, snr = z / total, alpha / sigma
        output = self.network(torch.stack([unit, unit * snr.clamp(max=8), snr.log(), alpha], -1))[..., 0]
        return alpha * (self.deviation / total) ** 2 * z + sigma * self.deviation / total * output


def level(least: float, most: float, shape: tuple[int, ...]) -> Level:
    """Random timesteps between two fractions of T, both included."""
    t = torch.randint(round(least * len(SCHEDULE)), min(round(most * len(SCHEDULE)), len(SCHEDULE) - 1) + 1, shape)
    return Level(torch.from_numpy(SCHEDULE.alpha)[t], torch.from_numpy(SCHEDULE.sigma)[t], t)


def noise_loss(fake: Fake, x: Tensor) -> Tensor:
    """The squared error of the noise, at all timesteps."""
    alpha, sigma = noisy = level(0, 1, x.shape)
    return (alpha / sigma * (fake(alpha * x + sigma * torch.randn_like(x), noisy) - x)).square().mean()


def train(case: str, data: Data, start: float, steps: int, weighting: ScoreWeighting) -> Generator:
    generator, fake = Generator(start), Fake(float(data.modes[1]))
    z = torch.randn(PAIRS)
    y = data.quantile(z)
    optimizers = [
        torch.optim.Adam(network.parameters(), rate, betas=(0.9, 0.99), fused=True)
        for network, rate in zip((generator, fake), RATES, strict=True)
    ]

    def take(turn: int, loss: Tensor) -> None:
        optimizers[turn].zero_grad()
        loss.backward()
        optimizers[turn].step()

    if case != CASES[0]:
        for _ in range(500):
            take(1, noise_loss(fake, data.draw(*SHAPE)))
    for step in range(steps):
        for optimizer, rate in zip(optimizers, RATES, strict=True):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        x = generator(torch.randn(SHAPE))
        alpha, sigma = noisy = level(0.02, 0.98, (len(x), 1, 1, 1))
        with torch.no_grad():
            noised = alpha * x + sigma * torch.randn_like(x)
            mu_fake = noised / alpha if case == CASES[0] else fake(noised, noisy)
            gradient = difference(x, data.x0(noised, noisy), mu_fake, noisy, weighting)
        loss = matching_loss(x, gradient).mean()
        if case == CASES[2]:
            some = torch.randint(PAIRS, (x.numel(),))
            loss = loss + 0.25 * (generator(z[some]) - y[some]).square().mean()
        take(0, loss)
        if case != CASES[0]:
            take(1, noise_loss(fake, x.detach()))
    return generator


def figures(x: Tensor, distance: float) -> list[float]:
    between = (x.abs() - distance).abs() > 4
    rest = x[~between].abs()
    return [float(value) for value in ((x < 0).double().mean(), (x > 0).double().mean(), between.double().mean())] + [
        float(rest.mean()),
        float(rest.std()),
    ]


def words(runs: list[list[float]]) -> Iterator[str]:
    for values in zip(*runs, strict=True):
        mean, least, most = (f"{value:.2f}" for value in (np.mean(values), min(values), max(values)))
        yield mean if least == most else f"{mean} ({least} to {most})"


def draw(panels: dict[str, Tensor], data: Data, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    reach, top = float(data.modes[1]) + 5, 0.5
    line = torch.linspace(-reach, reach, 1000)
    drawing, axes = pyplot.subplots(1, len(panels), figsize=(16, 3.6), dpi=100, sharey=True, layout="constrained")
    for ax, (title, x) in zip(axes, panels.items(), strict=True):
        heights, _, _ = ax.hist(x, np.linspace(-reach, reach, 101), density=True, color="#8fb8de", label="generator")
        ax.plot(line, data.density(line), color="#c0392b", linewidth=2, label="data")
        if max(heights) > top:
            least, most = (f"{float(x.quantile(part)):.2f}" for part in (0.025, 0.975))
            note = f"higher than the axis:\n95% are within {least} … {most}"
            ax.text(0.8, 0.94, note, ha="right", va="top", fontsize=12, transform=ax.transAxes)
        ax.set(ylim=(0, top), xlim=(-reach, reach), xlabel="x")
        ax.set_title(title, fontsize=16)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("density")
    axes[0].legend(loc="upper left", frameon=False, fontsize=12)
    drawing.savefig(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--distance", type=float, default=10.0)
    parser.add_argument("--inwards", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--weighting", choices=get_args(ScoreWeighting), default="dmd")
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    data, start = Data(given.distance), given.distance - given.inwards
    noise = torch.randn(DRAWN)
    print("| | x < 0 | x > 0 | between | mean of abs(x) | deviation |\n|---|---|---|---|---|---|")
    panels = {"start": noise + start}
    for name, x in ({"data": data.draw(DRAWN)} | panels).items():
        print(f"| {name} |", " | ".join(words([figures(x, given.distance)])), "|", flush=True)
    for case in CASES:
        runs = []
        for seed in range(SEEDS):
            torch.manual_seed(seed)
            generator = train(case, data, start, given.steps, given.weighting)
            with torch.no_grad():
                x = generator(noise)
            runs.append(figures(x, given.distance))
            panels.setdefault(case, x)
        print(f"| {case} |", " | ".join(words(runs)), "|", flush=True)
    print(f"\n{time.process_time():.0f} seconds of one core")
    if given.figure:
        draw(panels, data, given.figure)


if __name__ == "__main__":
    main()
