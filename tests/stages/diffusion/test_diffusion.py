"""Conversions, weights, grids and samplers against closed forms, in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.diffusion.config import Sampler
from stages.diffusion.grid import Grid
from stages.diffusion.guidance import guide
from stages.diffusion.prediction import both_to_x0, target, to_noise, to_x0
from stages.diffusion.samplers import ddim, timesteps
from stages.diffusion.schedule import NoiseSchedule
from stages.diffusion.weighting import weights
from stages.networks.gaussian import GaussianTeacher


def final(states):
    *_, (t, x0) = states
    assert t == -1
    return x0


PREDICTIONS = ("epsilon", "v_prediction", "sample")


@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(log_snr=st.floats(-8, 8), seed=st.integers(0, 1000))
def test_x0_and_noise_are_recovered_from_a_perfect_network(prediction, log_snr, seed):
    alpha, sigma = (1 / (1 + np.exp(-log_snr))) ** 0.5, (1 / (1 + np.exp(log_snr))) ** 0.5
    x0, noise = np.random.default_rng(seed).standard_normal((2, 5))
    z = alpha * x0 + sigma * noise
    output = target(prediction, x0, noise, alpha, sigma)
    np.testing.assert_allclose(to_x0(prediction, output, z, alpha, sigma), x0, atol=1e-10)
    np.testing.assert_allclose(to_noise(prediction, output, z, alpha, sigma), noise, atol=1e-10)


def test_v_at_the_ends_is_noise_and_minus_x0():
    x0, noise = np.array([2.0]), np.array([3.0])
    assert target("v_prediction", x0, noise, 1.0, 0.0) == noise
    assert target("v_prediction", x0, noise, 0.0, 1.0) == -x0


def test_the_schedule_equals_that_of_diffusers():
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    theirs = NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod.double().numpy())
    ours = NoiseSchedule.stable_diffusion()
    np.testing.assert_allclose(ours.alpha, theirs.alpha, rtol=1e-5)
    np.testing.assert_allclose(ours.alpha**2 + ours.sigma**2, 1.0, atol=1e-14)
    assert tuple(ours.at(-1)) == (1.0, 0.0)


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 8, 10, 20, 25, 40, 50])
def test_timesteps_equal_those_of_diffusers(steps):
    from diffusers import DDIMScheduler

    for spacing in ("trailing", "leading"):
        scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=1)
        scheduler.set_timesteps(steps)
        assert timesteps(1000, steps, spacing) == scheduler.timesteps.tolist()


@given(st.integers(1, 1000))
def test_trailing_timesteps_start_at_the_noise_and_descend(steps):
    grid = timesteps(1000, steps)
    assert grid[0] == 999 and grid[-1] >= 0 and len(grid) == steps
    assert all(a > b for a, b in itertools.pairwise(grid))


def test_too_many_steps_are_refused():
    with pytest.raises(ValueError, match="between 1 and 1000"):
        timesteps(1000, 1001)


def test_leading_timesteps_are_for_at_most_500_steps():
    assert Sampler(steps=500, timestep_spacing="leading").steps == 500
    assert Sampler(steps=1000).steps == 1000
    with pytest.raises(ValueError, match="exist for at most 500 steps"):
        Sampler(steps=501, timestep_spacing="leading")


@pytest.mark.parametrize(("name", "scale", "calls"), [
    ("ddim", 1.0, 10), ("ddim", 3.0, 20), ("dpmpp_2m", 1.0, 10), ("heun", 1.0, 19), ("heun", 3.0, 38)
])  # fmt: skip
def test_network_calls_of_ten_steps(name, scale, calls):
    """Heun's last step is of first order; guidance calls twice."""
    assert Sampler(name=name, steps=10, guidance_scale=scale).network_calls == calls


COSINE_STD = {  # methods.md 0.2: output std of N-step DDIM with a perfect denoiser of N(0, S^2), alpha = cos(pi t / 2)
    1.0: {1: 0.0, 2: 0.5, 4: 0.72855, 8: 0.85623, 16: 0.92568, 64: 0.98091},
    0.6: {1: 0.0, 2: 0.26471, 4: 0.41725, 8: 0.50297, 16: 0.54968, 64: 0.58703},
}


@pytest.mark.parametrize("std", COSINE_STD)
@pytest.mark.parametrize("steps", [1, 2, 4, 8, 16, 64])
def test_ddim_of_a_gaussian_teacher_has_the_known_std(std, steps):
    t = np.arange(1, 65) / 64
    schedule = NoiseSchedule(np.cos(np.pi * t / 2), np.sin(np.pi * t / 2))
    schedule.alpha[-1], schedule.sigma[-1] = 0.0, 1.0
    teacher = GaussianTeacher(0.7, std, (1, 1, 1))

    def predict_v(z, i):
        alpha, sigma = schedule.at(i)
        variance = alpha**2 * std**2 + sigma**2
        return alpha * sigma * (1 - std**2) / variance * (z - alpha * teacher.mean) - sigma * teacher.mean

    noise = np.array([-1.0, 0.0, 2.0])
    out = final(ddim(predict_v, noise, schedule, "v_prediction", timesteps(64, steps)))
    np.testing.assert_allclose(out, 0.7 + COSINE_STD[std][steps] * noise, atol=1e-5)


def test_one_ddim_step_from_pure_noise_returns_the_mean():
    teacher = GaussianTeacher(0.3, 0.8, (1, 2, 2))
    teacher.schedule.alpha[-1], teacher.schedule.sigma[-1] = 1e-9, 1.0
    out = final(ddim(teacher.denoiser([""], 1.0), np.ones((1, 1, 2, 2)) * 1.7, teacher.schedule, "epsilon", [999]))
    np.testing.assert_allclose(out, 0.3, atol=1e-6)


def test_many_steps_reach_the_exact_ode():
    """PF-ODE from t to 0: x = m + sqrt(S^2 / v_t) (z - alpha_t m)."""
    teacher = GaussianTeacher(0.5, 0.6, (1, 2, 2))
    alpha, sigma = teacher.schedule.at(999)
    noise = np.random.default_rng(0).standard_normal((1, 1, 2, 2))
    exact = 0.5 + 0.6 / (alpha**2 * 0.36 + sigma**2) ** 0.5 * (noise - alpha * 0.5)
    denoise = teacher.denoiser([""], 1.0)
    errors = [
        np.abs(final(ddim(denoise, noise, teacher.schedule, "epsilon", timesteps(1000, n))) - exact).max()
        for n in (10, 100, 1000)
    ]
    assert errors[0] > 5 * errors[1] > 5 * errors[2] > 0
    assert errors[2] < 3e-3


def test_guidance_scale_one_is_the_conditional_output():
    a, b = np.random.default_rng(0).standard_normal((2, 4))
    np.testing.assert_allclose(guide(a, b, 1.0), b, rtol=1e-15)
    np.testing.assert_allclose(guide(a, b, 3.0), b + 2.0 * (b - a), rtol=1e-12)


def test_weighted_errors_are_those_of_the_noise_and_of_v():
    generator = torch.Generator().manual_seed(0)
    x, other, noise = (torch.randn(5, 3, generator=generator, dtype=torch.float64) for _ in "abc")
    for t in (0.1, 0.5, 0.9):
        alpha, sigma = math.cos(t * math.pi / 2), math.sin(t * math.pi / 2)
        z = alpha * x + sigma * noise
        of_x = (other - x).square()
        of_noise = ((z - alpha * other) / sigma - noise).square()
        of_v = ((alpha * z - other) / sigma - (alpha * noise - sigma * x)).square()
        one = torch.tensor(alpha, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)
        torch.testing.assert_close(weights("snr", *one) * of_x, of_noise)
        torch.testing.assert_close(weights("snr_plus_one", *one) * of_x, of_v)
        torch.testing.assert_close(weights("truncated_snr", *one) * of_x, max(1.0, (alpha / sigma) ** 2) * of_x)
    alpha, sigma = (torch.sigmoid(torch.tensor(sign * 20.0, dtype=torch.float64)).sqrt() for sign in (-1, 1))
    assert float(weights("snr", alpha, sigma)) == pytest.approx(2.06e-9, rel=1e-2)
    assert float(weights("truncated_snr", alpha, sigma)) == 1.0
    torch.testing.assert_close(
        both_to_x0(x, noise, z, one[0], one[1]), x
    )  # both estimates are right, and so is their combination


def test_a_grid_contains_the_grid_of_half_its_steps():
    own = NoiseSchedule.stable_diffusion()
    for make in (lambda n: Grid.trailing(own, n), Grid.cosine):
        for n in (1, 3, 16, 125):
            fine, coarse = make(2 * n), make(n)
            for name in ("timesteps", "alpha", "sigma"):
                np.testing.assert_allclose(getattr(fine.subsample(2), name), getattr(coarse, name), atol=1e-15)
            assert fine.train_steps == coarse.train_steps
    assert Grid.trailing(own, 4).timesteps.tolist() == [-1, 249, 499, 749, 999]
    assert Grid.cosine(4).timesteps.tolist() == [-1, 255, 511, 767, 1023] and Grid.cosine(8192).train_steps == 1024
    assert tuple(Grid.cosine(8).level(8)) == (0.0, 1.0) and tuple(Grid.cosine(8).level(0)) == (1.0, 0.0)
    with pytest.raises(ValueError, match="has 1000 timesteps, too few for 1024 steps"):
        Grid.trailing(own, 1024)
