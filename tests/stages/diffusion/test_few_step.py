"""Few-step samplers that draw noise: the distribution of their samples, and their network calls."""

import pytest
import torch

from stages.diffusion.consistency import boundary
from stages.diffusion.few_step import noising
from stages.diffusion.grid import Grid
from tests.support.samplers import sample

MEAN, STD = 1.5, 0.6


def test_noising_gives_the_right_variance():
    grid = Grid.cosine(16)
    for from_, to in ((0, 1), (3, 4), (13, 15)):
        scale, std = noising(grid.level(from_), grid.level(to))
        here, there = (level.alpha**2 * STD**2 + level.sigma**2 for level in (grid.level(from_), grid.level(to)))
        assert scale**2 * here + std**2 == pytest.approx(there, abs=1e-12)


def test_the_stochastic_sampler_calls_n_times_and_keeps_the_marginals():
    """Uses the exact map over two steps, and over one step at the end: N = 8, mean 1.5, standard deviation 0.6."""
    grid, calls = Grid.cosine(8), []

    def exact(z, i):
        """Return the x0 for which one DDIM step of double length equals the exact ODE."""
        calls.append(i)
        (alpha, sigma), (alpha_s, sigma_s) = grid.level(i), grid.level(max(i - 2, 0))
        here, there = (a**2 * STD**2 + s**2 for a, s in ((alpha, sigma), (alpha_s, sigma_s)))
        end = alpha_s * MEAN + (there / here) ** 0.5 * (z - alpha * MEAN)
        ratio = sigma_s / sigma
        return (end - ratio * z) / (alpha_s - ratio * alpha)

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    found = sample("stochastic", exact, noise, grid, generator)
    assert calls == [8, 7, 6, 5, 4, 3, 2, 1]
    assert float(found.mean()) == pytest.approx(MEAN, abs=0.005) and float(found.std()) == pytest.approx(STD, abs=0.004)
    assert not torch.equal(found, sample("stochastic", exact, noise, grid, generator))
    again = [sample("stochastic", exact, noise, grid, torch.Generator().manual_seed(1)) for _ in "ab"]
    assert torch.equal(*again)


def test_the_consistency_sampler_adds_new_noise_to_its_estimate():
    """The data are N(m, S^2), and the estimate at every point is the exact end of the ODE. Then samples have the
    distribution of the data, for any number of steps."""
    mean, std, grid, calls = 1.5, 0.6, Grid.cosine(4), []

    def end(z, i):
        calls.append(i)
        alpha, sigma = grid.level(i)
        return mean + std * (z - alpha * mean) / (alpha**2 * std**2 + sigma**2) ** 0.5

    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(200_000, 1, 1, 1, generator=generator, dtype=torch.float64)
    found = sample("consistency", end, noise, grid, generator)
    assert calls == [4, 3, 2, 1]
    assert float(found.mean()) == pytest.approx(mean, abs=0.005) and float(found.std()) == pytest.approx(std, abs=0.004)


def test_the_consistency_function_is_the_identity_on_clean_data():
    from diffusers import LCMScheduler

    assert boundary(0.0) == (1.0, 0.0)
    for t in (1, 249, 999):
        skip, out = boundary(float(t))
        assert (skip, out) == pytest.approx(LCMScheduler().get_scalings_for_boundary_condition_discrete(t))
