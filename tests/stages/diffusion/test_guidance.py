"""Guidance of normal distributions in closed form, and how its strength is embedded."""

import pytest
import torch

from stages.diffusion.grid import Grid
from stages.diffusion.guidance import embed, guide_by_w
from tests.support.samplers import sample

MEAN, OTHER_MEAN, STD = 1.5, -0.5, 0.6


def denoised(z, alpha, sigma, mean, std=STD):
    """Return the estimate of the optimal denoiser of N(mean, std^2) at z."""
    return mean + alpha * std**2 / (alpha**2 * std**2 + sigma**2) * (z - alpha * mean)


def test_guidance_of_normals_with_equal_deviation_shifts_only_the_mean():
    z = torch.linspace(-3, 3, 7, dtype=torch.float64)
    for alpha, sigma in ((0.9, 0.19**0.5), (0.1, 0.99**0.5)):
        of, none = (denoised(z, alpha, sigma, mean) for mean in (MEAN, OTHER_MEAN))
        for w in (0.0, 1.0, 4.0):
            shifted = denoised(z, alpha, sigma, MEAN + w * (MEAN - OTHER_MEAN))
            torch.testing.assert_close(guide_by_w(none, of, w), shifted, atol=1e-12, rtol=0)
        assert torch.equal(guide_by_w(none, of, 0.0), of)
        wide = denoised(z, alpha, sigma, OTHER_MEAN, std=1.2)
        gains = [alpha * s**2 / (alpha**2 * s**2 + sigma**2) for s in (STD, 1.2)]
        found = guide_by_w(wide, of, 2.0)
        assert float((found[-1] - found[0]) / (z[-1] - z[0])) == pytest.approx(3 * gains[0] - 2 * gains[1])


def test_the_gain_of_a_linear_student_is_affine_in_w():
    """The gain of the exact student is (1 + w) times the conditional gain minus w times the unconditional gain."""
    alpha, sigma, wide = 0.6, 0.8, 1.2
    z, w = (torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64).view(2, -1) * 4).unbind()
    target = guide_by_w(denoised(z, alpha, sigma, OTHER_MEAN, wide), denoised(z, alpha, sigma, MEAN), w)
    gain, by_w, *_ = torch.linalg.lstsq(torch.stack([z, w * z, torch.ones_like(z), w], 1), target[:, None]).solution
    own, none = (alpha * std**2 / (alpha**2 * std**2 + sigma**2) for std in (STD, wide))
    assert float(gain) == pytest.approx(own, abs=1e-10) and float(by_w) == pytest.approx(own - none, abs=1e-10)
    assert own + 4 * (own - none) < 0, "at w = 4 it is turned round"


def test_stronger_guidance_gives_purer_and_narrower_classes():
    """Two equally likely classes, N(1, 0.6^2) and N(-1, 0.6^2). The first is sampled in 64 steps."""
    grid = Grid.cosine(64)

    def classes(z, alpha=1.0, sigma=0.0):
        """Return the probability of the first class given z: a logistic function of the difference of two squares."""
        return torch.sigmoid(2 * alpha * z / (alpha**2 * STD**2 + sigma**2))

    def sampled(w):
        def denoise(z, i):
            first, second = (denoised(z, *grid.level(i), mean) for mean in (1.0, -1.0))
            p = classes(z, *grid.level(i))
            return guide_by_w(p * first + (1 - p) * second, first, w)

        noise = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return sample("ddim", denoise, noise, grid)

    found = [sampled(w) for w in (0.0, 1.0, 4.0)]
    sure, wide = [float(classes(x).mean()) for x in found], [float(x.std()) for x in found]
    assert float(found[0].mean()) == pytest.approx(1.0, abs=0.02) and wide[0] == pytest.approx(STD, abs=0.02)
    assert sure[0] + 0.02 < sure[1] < sure[2] and wide[0] > wide[1] + 0.02 > wide[2] + 0.04


def test_w_is_embedded_as_diffusers_embeds_it():
    from diffusers import StableDiffusionPipeline

    w = torch.tensor([0.0, 0.5, 3.0])
    expected = StableDiffusionPipeline.get_guidance_scale_embedding(None, w, embedding_dim=256)
    torch.testing.assert_close(embed(w, 256), expected)
