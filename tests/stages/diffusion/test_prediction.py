"""Prediction types and samplers on all kinds of schedules: round trips in float64, and closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.diffusion.few_step import ddim_step, implied_x0, noising, states
from stages.diffusion.form import Form
from stages.diffusion.grid import Grid
from stages.diffusion.halving import two_step_target
from stages.diffusion.prediction import both_to_x0, power, target, to_noise, to_x0
from stages.diffusion.samplers import ddim, timesteps
from stages.diffusion.schedule import Level, NoiseSchedule
from stages.networks.solvers import dpmpp_2m, heun
from tests.support.samplers import sample

TYPES = ("epsilon", "v_prediction", "sample", "flow_prediction")
FLOW = NoiseSchedule.flow(1000, shift=3.0)
ANY = NoiseSchedule(
    np.linspace(0.999, 0.2, 1000), np.linspace(0.002, 1.7, 1000)
)  # neither variance preserving nor a flow


@pytest.mark.parametrize("prediction", TYPES)
@given(alpha=st.floats(0.05, 2.0), sigma=st.floats(0.05, 2.0), seed=st.integers(0, 99))
def test_converting_a_target_gives_x0_and_noise_back(prediction, alpha, sigma, seed):
    x0, noise = np.random.default_rng(seed).standard_normal((2, 3, 4))
    z = alpha * x0 + sigma * noise
    output = target(prediction, x0, noise, alpha, sigma)
    np.testing.assert_allclose(to_x0(prediction, output, z, alpha, sigma), x0, atol=1e-12)
    np.testing.assert_allclose(to_noise(prediction, output, z, alpha, sigma), noise, atol=1e-12)
    np.testing.assert_allclose(both_to_x0(x0, noise, z, alpha, sigma), x0, atol=1e-12)


@given(st.floats(0, np.pi / 2))
def test_a_variance_preserving_level_is_divided_by_exactly_one(angle):
    alpha, sigma = np.cos(angle), np.sin(angle)
    assert power(float(alpha), float(sigma)) == 1.0
    for dtype in (torch.float64, torch.float32):
        assert power(torch.tensor(alpha, dtype=dtype), torch.tensor(sigma, dtype=dtype)) == 1.0


def test_power_is_exact_where_it_is_not_1():
    assert power(0.5, 0.5) == 0.5 and power(0.9, 0.1) == 0.9**2 + 0.1**2
    level = torch.tensor([0.5, 1.0], dtype=torch.float64), torch.tensor([0.5, 0.0], dtype=torch.float64)
    assert power(*level).tolist() == [0.5, 1.0]


def test_a_flow_ends_in_pure_noise_and_shifts_towards_it():
    plain = NoiseSchedule.flow(1000)
    assert plain.at(999).sigma == 1.0 and plain.at(999).alpha == 0.0 and plain.at(0).sigma == 0.001
    np.testing.assert_allclose(FLOW.alpha + FLOW.sigma, 1.0, atol=1e-15)
    r = (np.arange(1000) + 1) / 1000
    np.testing.assert_allclose(FLOW.sigma, 3 * r / (1 + 2 * r))  # Esser et al. 2024, eq. 23
    assert (np.diff(FLOW.log_snr[:-1]) < 0).all() and FLOW.log_snr[-1] == -np.inf


def test_ddim_on_a_flow_is_the_euler_step():
    rng, schedule = np.random.default_rng(0), NoiseSchedule.flow(100)
    z, u = rng.standard_normal((2, 2, 3, 4, 4))
    for t, s in ((99, 74), (49, 24), (24, -1)):
        here, there = schedule.at(t), schedule.at(s)
        euler = z + (there.sigma - here.sigma) * u
        x0 = to_x0("flow_prediction", u, z, *here)
        np.testing.assert_allclose(ddim_step(z, x0, here, there), euler, atol=1e-12)
    grid = timesteps(100, 4)
    *_, (_, solved) = ddim(lambda z, t: np.sin(z) + t / 100, z, schedule, "flow_prediction", grid)
    for t, s in zip(grid, [*grid[1:], -1], strict=True):
        z = z + (schedule.at(s).sigma - schedule.at(t).sigma) * (np.sin(z) + t / 100)
    np.testing.assert_allclose(solved, z, atol=1e-12)


def exact(schedule, mean=0.4, std=0.3):
    """Return two functions for data N(mean, std^2): the exact x0, and the state at timestep t of the ODE from
    `noise`."""

    def x0(z, t):
        alpha, sigma = schedule.at(t)
        return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (z - alpha * mean)

    def end(noise, t):
        alpha, sigma = schedule.at(t)
        return mean + std * (noise - alpha * mean) / np.sqrt(alpha**2 * std**2 + sigma**2)

    return x0, end


@pytest.mark.parametrize("schedule", [FLOW, ANY, NoiseSchedule.stable_diffusion()], ids=["flow", "any", "preserving"])
def test_solvers_reach_the_end_of_the_ode_on_every_schedule(schedule):
    noise = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x0, end = exact(schedule)
    for solver in (ddim, dpmpp_2m, heun):
        last = 1000 if solver is ddim else 990  # where sigma/alpha is finite on all of them
        errors = []
        for steps in (30, 120):
            points = timesteps(last, steps)
            *_, (_, found) = solver(x0, noise, schedule, "sample", points)
            errors.append(float((found - end(noise, points[0])).square().mean().sqrt()))
        assert errors[1] < max(0.4 * errors[0], 1e-3), (solver.__name__, errors)  # diffusers' tables are float32


@pytest.mark.parametrize("schedule", [FLOW, ANY], ids=["flow", "any"])
def test_one_step_of_the_halving_target_equals_two_of_its_teacher(schedule):
    fine, coarse = Grid.trailing(schedule, 8), Grid.trailing(schedule, 4)
    x0, _ = exact(schedule)
    z, i = torch.randn(4, 2, 3, 3, dtype=torch.float64), torch.tensor([4, 3, 2, 1])

    def denoise(z, j):
        return torch.stack([x0(one, int(fine.timesteps[k])) for one, k in zip(z, j.tolist(), strict=True)])

    found = two_step_target(denoise, z, i, fine)
    for k, point in enumerate(i.tolist()):
        here, half, there = fine.level(2 * point), fine.level(2 * point - 1), fine.level(2 * point - 2)
        middle = ddim_step(z[k], x0(z[k], int(fine.timesteps[2 * point])), here, half)
        end = ddim_step(middle, x0(middle, int(fine.timesteps[2 * point - 1])), half, there)
        torch.testing.assert_close(ddim_step(z[k], found[k], coarse.level(point), coarse.level(point - 1)), end)
        torch.testing.assert_close(implied_x0(z[k], end, here, there), found[k])


def test_noising_keeps_the_distribution_on_any_schedule():
    for schedule in (FLOW, ANY, NoiseSchedule.stable_diffusion()):
        near, far = schedule.at(300), schedule.at(700)
        scale, std = noising(near, far)
        assert scale * near.alpha == pytest.approx(far.alpha)
        assert (scale * near.sigma) ** 2 + std**2 == pytest.approx(far.sigma**2)


def test_states_are_the_inputs_of_the_network_and_end_in_the_sample():
    grid, noise, called = Grid.trailing(FLOW, 4), torch.randn(2, 3, 4, 4), []

    def denoise(z, i):
        called.append((i, z))
        return z * 0.5

    found = list(states("ddim", denoise, noise, grid))
    assert [i for i, _, _ in found] == [4, 3, 2, 1] and torch.equal(found[0][1], noise)
    for (i, z, x0), (j, seen) in zip(found, called, strict=True):
        assert i == j and torch.equal(z, seen) and torch.equal(x0, z * 0.5)
    assert torch.equal(sample("ddim", denoise, noise, grid), found[-1][2])


def test_explicit_levels_are_the_grid():
    form = Form(steps=4, levels=(999, 749, 499, 249))
    schedule = NoiseSchedule.stable_diffusion()
    grid = Grid.of(form, schedule)
    assert grid.timesteps.tolist() == [-1, 249, 499, 749, 999] == Grid.trailing(schedule, 4).timesteps.tolist()
    alone = Grid.of(Form(steps=1, levels=[399]), schedule)
    assert alone.steps == 1 and tuple(alone.level(1)) == tuple(schedule.at(399)) and alone.level(0) == Level(1, 0, -1)
    with pytest.raises(ValueError, match="do not fit 8 steps"):
        Grid.of(form, schedule, 8)
    with pytest.raises(ValueError, match="do not fit 4 steps and 500 timesteps"):
        Grid.of(form, NoiseSchedule.flow(500))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps": 2, "levels": [999]}, "steps: 2 needs 2 levels, not 1"),
        ({"steps": 2, "levels": [499, 999]}, "levels should descend"),
        ({"steps": 1, "levels": [-1]}, "levels should descend"),
        ({"steps": 1, "levels": [999], "schedule": "cosine"}, "levels are timesteps of the teacher's schedule"),
    ],
)
def test_invalid_levels_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        Form(**settings)


def test_the_boundary_follows_the_sampler_unless_it_is_set():
    assert Form(sampler="consistency").boundary == "lcm" and Form().boundary == "none"
    assert Form(sampler="consistency", boundary="none").boundary == "none"
