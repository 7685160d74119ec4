"""The difference of two scores: the gradient of the KL divergence, its fixed points, its weights."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.diffusion.mixture import posterior
from stages.diffusion.prediction import to_noise
from stages.diffusion.schedule import Level, NoiseSchedule
from stages.losses.score import difference, matching_loss, weight_on_x0, with_gradient

SCHEDULE = NoiseSchedule.stable_diffusion()
NODES, WEIGHTS = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(40))
"""Gauss-Hermite quadrature: sum(WEIGHTS f(NODES)) / sum(WEIGHTS) is E[f(z)] for z ~ N(0, 1)."""


def level(t):
    return Level(*(torch.tensor(value, dtype=torch.float64).view(1, 1, 1, 1) for value in SCHEDULE.at(t)), t)


def images(values):
    return values.reshape(-1, 1, 1, 1)


def gaussian_x0(z, at, mean, std):
    """E[x | z] for x ~ N(mean, std^2) and z = alpha x + sigma noise."""
    alpha, sigma = at
    return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (z - alpha * mean)


def score(x0, z, at):
    return (at.alpha * x0 - z) / at.sigma**2


@pytest.mark.parametrize("t", [20, 300, 700, 980])
def test_the_difference_of_two_gaussian_scores_is_the_gradient_of_their_kl_divergence(t):
    """G = a + b z. Both moments of methods.md 6.7 and autograd's gradient of KL(N(alpha a, v_f) || N(alpha m, v_r))."""
    at, m, s = level(t), 1.5, 0.6
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-1.0, 1.5))
    alpha, sigma = (float(value) for value in at)
    fake_variance, real_variance = alpha**2 * b**2 + sigma**2, alpha**2 * s**2 + sigma**2
    kl = 0.5 * (
        (fake_variance + alpha**2 * (a - m) ** 2) / real_variance - 1 - torch.log(fake_variance / real_variance)
    )
    wanted = torch.autograd.grad(kl, [a, b])
    z, noise = torch.meshgrid(NODES, NODES, indexing="ij")
    weights = torch.outer(WEIGHTS, WEIGHTS).flatten() / WEIGHTS.sum() ** 2
    z, noise = images(z), images(noise)
    x = a.item() + b.item() * z
    noised = at.alpha * x + at.sigma * noise
    real, fake = gaussian_x0(noised, at, m, s), gaussian_x0(noised, at, a.item(), b.item())
    gradient = (difference(x, real, fake, at, "constant") * (at.alpha / at.sigma) ** 2).flatten()
    of_a, of_b = (weights * gradient).sum(), (weights * gradient * z.flatten()).sum()
    assert float(of_a) == pytest.approx(float(wanted[0]), rel=1e-9)
    assert float(of_b) == pytest.approx(float(wanted[1]), rel=1e-9)
    assert float(of_a) == pytest.approx(float((alpha**2 * (a - m) / real_variance).detach()), rel=1e-9)
    assert float(of_b) == pytest.approx(
        float((alpha**2 * b * (1 / real_variance - 1 / fake_variance)).detach()), rel=1e-9
    )


@pytest.mark.parametrize("t", [100, 500, 900])
def test_at_particles_it_is_the_kl_gradient_to_the_exact_teachers_density(t):
    """The generator has three particles, whose exact score has spread 0. The teacher's images have a spread. The
    gradient is compared with finite differences of the divergence, which is integrated over a line."""
    at, spread = level(t), 0.2
    alpha, sigma = float(at.alpha), float(at.sigma)
    data = torch.tensor([[-1.0], [0.3], [1.2]], dtype=torch.float64)
    particles = torch.tensor([[-0.4], [0.1], [1.0]], dtype=torch.float64)
    line = torch.linspace(-12, 12, 20001, dtype=torch.float64)[:, None]

    def look(z, at_data, width):
        columns = (torch.full((len(z), 1), value, dtype=torch.float64) for value in (alpha, sigma))
        return posterior(z, at_data, *columns, width)

    def kl(moved):
        fake, real = look(line, moved, 0.0)[1], look(line, data, spread)[1]
        return torch.trapezoid(fake.exp() * (fake - real), dx=float(line[1, 0] - line[0, 0]))

    noise = torch.linspace(-9, 9, 4001, dtype=torch.float64)[:, None]
    density = torch.exp(-(noise**2) / 2) / math.sqrt(2 * math.pi)
    for i in range(3):
        z = alpha * particles[i] + sigma * noise
        real, fake = look(z, data, spread)[0], look(z, particles, 0.0)[0]
        x = particles[i].expand(len(z), 1)
        gradient = difference(images(x), images(real), images(fake), at, "constant").view(-1, 1) * (alpha / sigma) ** 2
        ours = torch.trapezoid((density * gradient).flatten(), dx=float(noise[1, 0] - noise[0, 0])) / 3
        step = torch.zeros_like(particles)
        step[i] = 1e-5
        assert float(ours) == pytest.approx(float(kl(particles + step) - kl(particles - step)) / 2e-5, abs=1e-7)


def test_with_an_exact_fake_score_training_reaches_the_teachers_mean_and_deviation():
    """DMD's loss moves mean and deviation from (-1, 1.5) to (1.5, 0.6) within 1e-3."""
    a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (-1.0, 1.5))
    optimizer = torch.optim.Adam([a, b], 0.02)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 2000)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2000):
        z, noise = torch.randn(2, 256, 1, 1, 1, generator=generator, dtype=torch.float64)
        t = torch.randint(20, 981, (256,), generator=generator)
        at = Level(*(torch.from_numpy(table)[t].view(-1, 1, 1, 1) for table in (SCHEDULE.alpha, SCHEDULE.sigma)), t)
        x = a + b * z
        with torch.no_grad():
            noised = at.alpha * x + at.sigma * noise
            gradient = difference(x, gaussian_x0(noised, at, 1.5, 0.6), gaussian_x0(noised, at, a, b), at)
        optimizer.zero_grad()
        matching_loss(x, gradient).mean().backward()
        optimizer.step()
        fall.step()
    assert (float(a.detach()), float(b.detach())) == pytest.approx((1.5, 0.6), abs=1e-3)


@given(st.integers(0, 999), st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2))
def test_differences_of_x0_of_the_score_and_of_the_noise_agree(t, of_z, of_real, of_fake):
    """mu_fake - mu_real = (sigma^2 / alpha) (s_fake - s_real), and w on the noise is (alpha / sigma) w on x0."""
    at = level(t)
    z, real, fake = (torch.full((1, 1, 1, 1), value, dtype=torch.float64) for value in (of_z, of_real, of_fake))
    gradient = difference(z, real, fake, at, "constant")
    of_scores = at.sigma**2 / at.alpha * (score(fake, z, at) - score(real, z, at))
    torch.testing.assert_close(of_scores, gradient, atol=1e-9, rtol=1e-9)
    of_noise = 3.0 * (to_noise("sample", real, z, *at) - to_noise("sample", fake, z, *at))
    torch.testing.assert_close(weight_on_x0(3.0, at) * gradient, of_noise, atol=1e-9, rtol=1e-9)


def test_weights_equal_hand_computed_values():
    at = level(600)
    x, real, fake = torch.randn(3, 4, 2, 5, 5, generator=torch.Generator().manual_seed(0)).unbind()
    torch.testing.assert_close(difference(x, real, fake, at, "constant"), fake - real)
    stressed = difference(x, real, fake, at, "sigma2_over_alpha")
    torch.testing.assert_close(stressed, (fake - real) * float(at.sigma**2 / at.alpha))
    ours = difference(x, real, fake, at)
    for i in range(4):  # each sample is divided by its own mean
        torch.testing.assert_close(ours[i], (fake[i] - real[i]) / (x[i] - real[i]).abs().mean(), rtol=1e-4, atol=1e-5)
    half = difference(x.half(), real.half(), fake.half(), at)
    assert half.dtype == torch.float16 and torch.allclose(half.float(), ours, atol=0.05)
    assert difference(x, x, fake, at).isfinite().all()  # the teacher returns the sample itself
    assert not difference(x, real, real, at).any()


def test_the_gradient_of_the_loss_is_the_given_one():
    x = torch.randn(3, 2, 4, 4, requires_grad=True)
    gradient = torch.randn(3, 2, 4, 4, requires_grad=True)
    loss = matching_loss(x, gradient)
    torch.testing.assert_close(loss, 0.5 * gradient.square().mean((1, 2, 3)))
    loss.sum().backward()
    assert gradient.grad is None
    torch.testing.assert_close(x.grad, gradient.detach() / 32)
    x.grad, value = None, torch.tensor(7.0, requires_grad=True)
    loss = with_gradient(value, x, gradient)
    assert float(loss) == 7.0
    loss.backward()
    assert value.grad is None and gradient.grad is None
    torch.testing.assert_close(x.grad, gradient.detach())
