"""The target of step halving: one student step ends where two teacher steps end. Tested in closed form, and learned."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from stages.diffusion.few_step import ddim_step, implied_x0
from stages.diffusion.grid import Grid
from stages.diffusion.halving import two_step_target
from tests.support.samplers import sample

TABLE = {
    1.0: {1: 0.0, 2: 0.5, 4: 0.72855, 8: 0.85623, 16: 0.92568, 64: 0.98091, 1024: 0.99880, 8192: 0.99985},
    0.6: {1: 0.0, 2: 0.26471, 4: 0.41725, 8: 0.50297, 16: 0.54968, 64: 0.58703, 1024: 0.59918, 8192: 0.59990},
}
"""S -> N -> standard deviation of the samples of N steps of DDIM, for data N(m, S^2) on the cosine schedule."""
MEAN = 1.5


class Linear:
    """Estimates x0 as a + b z at each point of a grid: exactly for data N(MEAN, S^2), or fitted."""

    def __init__(self, grid, a, b):
        self.grid, self.a, self.b = grid, a, b

    @classmethod
    def exact(cls, steps, std):
        grid = Grid.cosine(steps)
        alpha, sigma = torch.from_numpy(grid.alpha), torch.from_numpy(grid.sigma)
        b = alpha * std**2 / (alpha**2 * std**2 + sigma**2)
        return cls(grid, MEAN - b * alpha * MEAN, b)

    def __call__(self, z, j):
        a, b = (table[j].view(-1, 1, 1, 1) for table in (self.a, self.b))
        return a + b * z

    def halved(self):
        """Fit a student by least squares to the targets at three z of each point. The fit is exact."""
        steps, seen = self.grid.steps // 2, torch.tensor([-2.0, 0.0, 2.0], dtype=torch.float64)
        i, z = torch.arange(1, steps + 1).repeat_interleave(3), seen.repeat(steps).view(-1, 1, 1, 1)
        target = two_step_target(self, z, i, self.grid).view(steps, 3)
        slope = (target[:, 2] - target[:, 0]) / 4
        assert (target[:, 1] - target.mean(1)).abs().max() < 1e-9
        a, b = (torch.cat([torch.zeros(1, dtype=torch.float64), table]) for table in (target[:, 1], slope))
        return Linear(Grid.cosine(steps), a, b)

    def std(self):
        z = torch.tensor([-1.0, 1.0], dtype=torch.float64).view(-1, 1, 1, 1)
        low, high = sample("ddim", self, z, self.grid).flatten().tolist()
        assert low + high == pytest.approx(2 * MEAN)
        return (high - low) / 2


@pytest.mark.parametrize("std", TABLE)
def test_exactly_fitted_students_reproduce_their_first_teacher(std):
    """This holds for every N and any number of steps, even for a one-step student whose first teacher has 8,192
    steps."""
    for steps, expected in TABLE[std].items():
        teacher = Linear.exact(steps, std)
        alpha, sigma = teacher.grid.alpha * std, teacher.grid.sigma
        dots = (alpha[1:] * alpha[:-1] + sigma[1:] * sigma[:-1]) / (alpha[1:] ** 2 + sigma[1:] ** 2)
        assert teacher.std() == pytest.approx(float(np.prod(dots)), abs=1e-9)
        assert teacher.std() == pytest.approx(expected, abs=1e-5)
    student, halvings = teacher, 0
    while student.grid.steps > 1:
        student, halvings = student.halved(), halvings + 1
        if student.grid.steps <= 1024:
            assert student.std() == pytest.approx(teacher.std(), abs=1e-6)
    assert halvings == 13


def test_one_step_with_the_target_equals_two_of_the_teachers():
    generator = torch.Generator().manual_seed(0)
    noise = {j: torch.randn(64, 4, 2, 2, generator=generator, dtype=torch.float64) for j in "zab"}
    estimates = iter((noise["a"], noise["b"]))
    grid, i = Grid.cosine(64), torch.arange(1, 33).repeat(2)
    target = two_step_target(lambda z, j: next(estimates), noise["z"], i, grid)
    level = [[torch.from_numpy(t)[2 * i - k].view(-1, 1, 1, 1) for t in (grid.alpha, grid.sigma)] for k in (0, 1, 2)]
    half = ddim_step(noise["z"], noise["a"], level[0], level[1])
    end = ddim_step(half, noise["b"], level[1], level[2])
    torch.testing.assert_close(ddim_step(noise["z"], target, level[0], level[2]), end, atol=1e-12, rtol=0)
    assert torch.equal(target[i == 1], noise["b"][i == 1])  # to clean data: the teacher's own estimate
    torch.testing.assert_close(implied_x0(noise["z"], half, level[0], level[1]), noise["a"], atol=1e-9, rtol=0)


def test_the_target_of_a_gaussian_in_closed_form():
    std, steps = 0.6, 8
    teacher, i = Linear.exact(2 * steps, std), torch.arange(1, steps + 1)
    z = torch.randn(steps, 1, 1, 1, dtype=torch.float64)
    target = two_step_target(teacher, z, i, teacher.grid).flatten()
    alpha, sigma = torch.from_numpy(teacher.grid.alpha), torch.from_numpy(teacher.grid.sigma)

    def factor(t, s):
        return (alpha[t] * alpha[s] * std**2 + sigma[t] * sigma[s]) / (alpha[t] ** 2 * std**2 + sigma[t] ** 2)

    here, middle, there = 2 * i, 2 * i - 1, 2 * i - 2
    r = sigma[there] / sigma[here]
    slope = (factor(here, middle) * factor(middle, there) - r) / (alpha[there] - r * alpha[here])
    torch.testing.assert_close(target, MEAN + slope * (z.flatten() - alpha[here] * MEAN), atol=1e-12, rtol=0)


def test_a_student_for_stochastic_sampling_jumps_twice_as_far():
    """The target leads to the end of two double-length steps of the teacher. At the last point, it leads to the end of
    two steps of normal length, which is the teacher's estimate at point 1. In this test, the teacher's estimate is the
    number of the point."""
    grid, asked, z = Grid.cosine(8), [], torch.randn(4, 1, 1, 1, dtype=torch.float64)

    def denoise(z, j):
        asked.append(j.tolist())
        return j.double().view(-1, 1, 1, 1).expand_as(z)

    found = two_step_target(denoise, z, torch.tensor([4, 3, 2, 1]), grid, stochastic=True)
    assert asked == [[8, 6, 4, 2], [6, 4, 2, 1]]
    for target, start, i in zip(found.flatten().tolist(), z.flatten().tolist(), (8, 6, 4), strict=False):
        (a, s), (a_2, s_2), (a_4, s_4) = (grid.level(j) for j in (i, i - 2, i - 4))
        middle = a_2 * i + s_2 / s * (start - a * i)
        end = a_4 * (i - 2) + s_4 / s_2 * (middle - a_2 * (i - 2))
        assert a_4 * target + s_4 / s * (start - a * target) == pytest.approx(end)
    assert float(found[3]) == pytest.approx(1.0)


def test_few_steps_follow_the_ode_of_a_mixture_better_than_one_step():
    """Small networks learn a mixture of four normals in two dimensions, from 8 steps down to 1."""
    torch.manual_seed(0)
    means, std = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]), 0.2

    def exact(grid):
        def denoise(z, j):
            alpha, sigma = (torch.from_numpy(t).float()[j].view(-1, 1) for t in (grid.alpha, grid.sigma))
            flat, variance = z.flatten(1), alpha**2 * std**2 + sigma**2
            away = flat[:, None] - alpha[:, None] * means
            share = (-away.square().sum(2) / (2 * variance)).softmax(1)[..., None]
            return (share * (means + (alpha * std**2 / variance)[:, None] * away)).sum(1).view_as(z)

        return denoise

    def learned(network, grid):
        def denoise(z, j):
            flat = z.flatten(1)
            level = (j * torch.ones(len(z)) / grid.steps).view(-1, 1)
            return network(torch.cat([flat, level, torch.sin(3 * level)], 1)).view_as(z)

        return denoise

    noise = torch.randn(500, 2, 1, 1)
    grid = Grid.cosine(8)
    teacher = exact(grid)
    truth = sample("ddim", lambda z, j: teacher(z, torch.full((len(z),), j)), noise, grid)
    network = nn.Sequential(nn.Linear(4, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    errors = {}
    for steps in (4, 2, 1):
        optimizer = torch.optim.Adam(network.parameters(), 3e-3)
        own = Grid.cosine(steps)
        for _ in range(300):
            x = means[torch.randint(4, (256,))] + std * torch.randn(256, 2)
            i = torch.randint(1, steps + 1, (256,))
            alpha, sigma = (torch.from_numpy(t).float()[i].view(-1, 1) for t in (own.alpha, own.sigma))
            z = (alpha * x + sigma * torch.randn_like(x)).view(-1, 2, 1, 1)
            with torch.no_grad():
                target = two_step_target(teacher, z, i, grid).float()
            (learned(network, own)(z, i) - target).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        grid, teacher = own, learned(copy.deepcopy(network).requires_grad_(False), own)
        errors[steps] = float((sample("ddim", teacher, noise, own) - truth).square().mean())
    plain = exact(Grid.cosine(1))
    collapsed = sample("ddim", lambda z, j: plain(z, torch.full((len(z),), j)), noise, Grid.cosine(1))
    assert errors[2] < errors[1] < 0.3 * float((collapsed - truth).square().mean())
