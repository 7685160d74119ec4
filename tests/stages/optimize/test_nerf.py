"""Radiance fields: volume rendering, encodings of positions, gradients, and files."""

import math

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch.testing import assert_close

from stages.networks.pixel import PixelDiffusion
from stages.optimize.cameras import Cameras
from stages.optimize.config import RepresentationMaterials
from stages.optimize.representations import base
from stages.optimize.representations.base import Views
from stages.optimize.representations.nerf import volume
from stages.optimize.representations.nerf.config import NerfConfig
from stages.optimize.representations.nerf.field import Field, Frequencies, HashGrid
from stages.optimize.representations.nerf.volume import composite, march, strata
from tests.support.networks import adapter_around, pixel_unet

TINY = {"levels": 2, "features": 1, "log2_table_size": 4, "coarsest": 1, "finest": 3, "hidden": 4, "samples": 3}
"""One grid with 8 vertices, and one with 64 vertices that share 16 entries."""


@pytest.fixture(scope="module")
def teacher():
    adapter = adapter_around(pixel_unet(), PixelDiffusion)
    adapter.latent_shape = (3, 8, 8)
    return adapter


def nerf_of(teacher, tmp_path, count=1, **settings):
    """Particles in evaluation mode, float64, with parameters that are far from zero."""
    torch.manual_seed(0)
    config = NerfConfig(**{**TINY, "shown": 8, "resolution": 8, **settings})
    nerf = config.create(RepresentationMaterials(teacher, count, tmp_path)).double().eval()
    with torch.no_grad():
        for parameter in nerf.parameters():
            parameter.normal_(0, 0.7)
    return nerf


def homogeneous(nerf, density, colour):
    """Make all fields constant, except for the blob."""
    for field in nerf.fields:
        torch.nn.init.zeros_(field.network[-1].weight)
        bias = [math.log(math.expm1(density)), *[math.log(colour / (1 - colour))] * 3]
        field.network[-1].bias.data = torch.tensor(bias, dtype=torch.float64)
    return nerf


def seen_from(*azimuths, particles=None, distance=2.5, field_of_view=60.0):
    """Views from these sides, of particle 0 unless said otherwise."""
    azimuth = torch.tensor(azimuths, dtype=torch.float64)
    others = (torch.full_like(azimuth, value) for value in (20.0, distance, field_of_view))
    return Views(torch.tensor(particles or [0] * len(azimuths)), Cameras(azimuth, *others))


def rays(count=50):
    """Rays from outside the unit ball to points in it."""
    generator = torch.Generator().manual_seed(0)
    origins, inside = torch.randn(2, count, 3, generator=generator, dtype=torch.float64)
    origins = 2 * torch.nn.functional.normalize(origins, dim=-1)
    inside = 0.9 * torch.nn.functional.normalize(inside, dim=-1)
    return origins, torch.nn.functional.normalize(inside - origins, dim=-1)


# --- Volume rendering ---


@pytest.mark.parametrize("density", [0.3, 4.0])
def test_the_opacity_of_a_homogeneous_ball_follows_the_length_of_the_chord(teacher, tmp_path, density):
    nerf = homogeneous(nerf_of(teacher, tmp_path, blob=0, samples=64, background="grey"), density, colour=0.8)
    side, distance = 16, 2.5
    images, opacity, depth, _ = nerf.look(seen_from(40.0), side)
    steps = (torch.arange(side, dtype=torch.float64) + 0.5) / side * 2 - 1
    off = torch.atan(torch.hypot(steps[:, None], steps) * math.tan(math.pi / 6))  # angle from the middle of the image
    chord = 2 * (1 - (distance * off.sin()) ** 2).clamp_min(0).sqrt()
    stopped = -torch.expm1(-density * chord)
    assert 0 < (chord == 0).sum() < side**2
    assert_close(opacity[0, 0], stopped, rtol=0, atol=1e-9)
    assert_close(images[0], (0.8 * stopped + 0.5 * (1 - stopped)).expand(3, -1, -1), rtol=0, atol=1e-6)
    within = 1 / density - chord * (1 - stopped) / stopped  # the mean of an exponential distribution cut at the chord
    expected = torch.where(chord > 0, distance * off.cos() - chord / 2 + within, 0.0)
    assert_close(depth[0, 0], expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("samples", [1, 7])
def test_the_opacity_of_a_linear_density_follows_the_middle_of_the_chord(samples):
    origins, directions = rays()
    found = march(lambda x: (2 + x @ SLOPE, torch.ones_like(x)), origins, directions, samples, random=False)
    nearest = origins - (origins * directions).sum(-1, keepdim=True) * directions
    chord = 2 * (1 - nearest.square().sum(-1)).sqrt()
    assert_close(found[:, 3], 1 - torch.exp(-chord * (2 + nearest @ SLOPE)))


SLOPE = torch.tensor([0.5, -0.7, 1.0], dtype=torch.float64)


def test_the_quadrature_is_equation_3_of_nerf():
    generator = torch.Generator().manual_seed(0)
    density, colour, widths = (torch.rand(*shape, generator=generator) for shape in ((4, 6), (4, 6, 3), (4, 7)))
    edges = widths.cumsum(-1)
    found = composite(3 * density, colour, edges)
    for ray in range(4):
        passed, total, weights, distance = 1.0, torch.zeros(3), 0.0, 0.0
        for part in range(6):
            begin, end = edges[ray, part : part + 2].tolist()
            weight = passed * (1 - math.exp(-3 * density[ray, part].item() * (end - begin)))
            passed *= math.exp(-3 * density[ray, part].item() * (end - begin))
            total, weights, distance = (
                total + weight * colour[ray, part],
                weights + weight,
                distance + weight * (begin + end) / 2,
            )
        assert_close(found[0][ray], total)
        assert found[1][ray].item() == pytest.approx(weights, rel=1e-5)
        assert found[2][ray].item() == pytest.approx(distance / weights, rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weights_sum_to_the_opacity(dtype):
    density = torch.tensor([[0.0, 0, 0], [1e-9, 0, 0], [0.2, 5, 1], [1e9, 1, 0]], dtype=dtype)
    edges = torch.arange(4).to(dtype).expand(4, 4)
    shares, opacity, depth = composite(density, torch.eye(3, dtype=dtype).expand(4, 3, 3), edges)
    assert_close(shares.sum(-1), opacity)
    assert opacity.dtype == dtype and opacity[0] == depth[0] == 0
    assert_close(opacity[1:], -torch.expm1(-density[1:].sum(-1)))
    assert_close(depth[3], torch.tensor(0.5, dtype=dtype))


def test_rays_that_miss_or_leave_the_ball_see_nothing():
    origins = torch.tensor([[2.0, 0, 0], [2.0, 0, 0], [0.0, 0, 0]], dtype=torch.float64)
    directions = torch.tensor([[0.0, 1, 0], [1.0, 0, 0], [0.0, 0, 1]], dtype=torch.float64)
    field = lambda x: (torch.ones(len(x)).to(x), torch.ones_like(x))  # noqa: E731
    found = march(field, origins, directions, 4, random=False)
    assert not found[:2].any()
    assert found[2, 3].item() == pytest.approx(1 - math.exp(-1))  # from the middle of the ball on
    assert not march(field, origins[:2], directions[:2], 4, random=True).any()


@pytest.mark.parametrize(("background", "value"), [("white", 1), ("black", 0), ("grey", 0.5), ("random", 0.5)])
def test_the_background_is_seen_past_the_ball(teacher, tmp_path, background, value):
    nerf = nerf_of(teacher, tmp_path, background=background)
    images, opacity, depth, _ = nerf.look(seen_from(0.0, 90.0), 8)
    missed = (opacity == 0).expand_as(images)
    assert 0 < missed.sum() < missed.numel()
    assert (images[missed] == value).all() and not depth[opacity == 0].any()
    colours = nerf.train().look(seen_from(0.0, 90.0), 8).images[:, :, 0, 0]
    assert len(colours.unique()) == (6 if background == "random" else 1)


def test_samples_stay_in_their_strata():
    near, far = torch.rand(2, 200)
    far = near + far
    edges, places = strata(near, far, 5, random=True)
    assert_close(edges[:, 0], near)
    assert_close(edges[:, -1], far)
    assert (places >= edges[:, :-1]).all() and (places <= edges[:, 1:]).all()
    parts = (places - edges[:, :-1]) / edges.diff()
    assert parts.min() < 0.05 and parts.max() > 0.95 and abs(parts.mean() - 0.5) < 0.05
    assert_close(strata(near, far, 5, random=False)[1], (edges[:, 1:] + edges[:, :-1]) / 2)


def test_sampling_is_random_in_training_only(teacher, tmp_path):
    nerf = nerf_of(teacher, tmp_path, background="white")
    views = seen_from(0.0, 120.0)
    images = nerf.look(views, 8).images
    assert torch.equal(images, nerf.look(views, 8).images)
    nerf.train()
    assert not torch.equal(nerf.look(views, 8).images, nerf.look(views, 8).images)


def test_memory_is_bounded_in_evaluation_mode(teacher, tmp_path, monkeypatch):
    nerf = nerf_of(teacher, tmp_path)
    images = nerf.look(seen_from(0.0, 120.0), 8).images
    together = []
    nerf.fields[0].register_forward_hook(lambda _field, positions, _made: together.append(len(positions[0])))
    monkeypatch.setattr(volume, "CHUNK", 20)  # six rays of three samples
    assert_close(nerf.look(seen_from(0.0, 120.0), 8).images, images)
    assert 0 < max(together) <= 20


def test_regularisation_terms_follow_the_opacity(teacher, tmp_path):
    nerf = nerf_of(teacher, tmp_path, sparsity=2.0, opaque=3.0)
    _, opacity, _, terms = nerf.look(seen_from(0.0, 90.0), 6)
    for row in range(2):
        shares = opacity[row].flatten().tolist()
        assert terms["sparsity"][row].item() == pytest.approx(2 * sum((p * p + 0.01) ** 0.5 for p in shares) / 36)
        clamped = [min(max(p, 1e-3), 1 - 1e-3) for p in shares]
        entropy = sum(-p * math.log(p) - (1 - p) * math.log(1 - p) for p in clamped) / 36
        assert terms["opaque"][row].item() == pytest.approx(3 * entropy)
    assert nerf_of(teacher, tmp_path, sparsity=0.0).look(seen_from(0.0), 4).terms == {}


# --- Fields ---


def test_a_new_field_is_a_blob_in_the_unit_ball():
    torch.manual_seed(0)
    field = Field(NerfConfig(blob=10, blob_radius=0.5))
    density, colour = field(torch.tensor([[0.0, 0, 0], [0, 0.25, 0], [0, 0, -0.9], [0.8, 0.8, 0]]))
    assert_close(density[:2], torch.tensor([10.0, 5.0]), rtol=0, atol=0.5)
    assert density[2] < 1e-3 and density[3] == 0
    assert ((colour > 0.3) & (colour < 0.7)).all()


@pytest.fixture
def grid():
    """A grid of 27 vertices, and one of 1000 that share 32 entries, with two features each."""
    torch.manual_seed(0)
    grid = HashGrid(NerfConfig(levels=2, features=2, log2_table_size=5, coarsest=2, finest=9)).double()
    for table in grid.tables:
        table.data.normal_()
    assert [table.shape[1] for table in grid.tables] == [27, 32]
    return grid


@pytest.mark.parametrize(("level", "cells"), [(0, 2), (1, 9)])
def test_a_vertex_of_the_hash_grid_has_its_features(grid, level, cells):
    vertices = torch.cartesian_prod(*[torch.arange(cells + 1)] * 3)
    found = grid(vertices.double() / cells * 2 - 1)[:, 2 * level : 2 * level + 2]
    entries = [
        x + 3 * y + 9 * z if level == 0 else (x ^ y * 2654435761 ^ z * 805459861) % 32 for x, y, z in vertices.tolist()
    ]
    assert_close(found, grid.tables[level][:, entries].t())


@pytest.mark.parametrize(("level", "cells"), [(0, 2), (1, 9)])
@pytest.mark.parametrize("axis", range(3))
def test_the_hash_grid_is_continuous_and_linear_along_an_axis_in_a_cell(grid, level, cells, axis):
    low = torch.randint(cells, (40, 3)).double()
    step = torch.eye(3, dtype=torch.float64)[axis]
    begin = low + torch.rand(40, 3).double() * (1 - step)  # on a face of the cell

    def at(part):
        return grid((begin + part * step) / cells * 2 - 1)[:, 2 * level : 2 * level + 2]

    first, last, beyond = at(0.0), at(1 - 1e-9), at(1 + 1e-9)
    for part in (0.3, 0.8):
        assert_close(at(part), (1 - part) * first + part * last)
    assert_close(beyond, last, rtol=0, atol=1e-7)
    assert (last - first).abs().mean() > 0.1


def test_the_frequency_encoding_equals_nerfs():
    x = torch.tensor([[0.3, -0.6, 0.9]], dtype=torch.float64)
    wanted = [of(2**k * math.pi * value) for of in (math.sin, math.cos) for value in x[0].tolist() for k in range(4)]
    assert_close(Frequencies(4).double()(x)[0], torch.tensor(wanted, dtype=torch.float64))


# --- Particles ---


@pytest.mark.parametrize("encoding", ["hash", "frequency"])
def test_gradients_equal_finite_differences(teacher, tmp_path, encoding):
    nerf = nerf_of(teacher, tmp_path, encoding=encoding, sparsity=1.0, opaque=1.0)

    def seen(*_):
        images, opacity, depth, terms = nerf.look(seen_from(30.0), 3)
        return images[..., 1:], opacity, depth, terms["sparsity"] + terms["opaque"]

    assert torch.autograd.gradcheck(seen, tuple(nerf.parameters()), fast_mode=True)


def test_only_the_viewed_particles_get_gradients(teacher, tmp_path):
    nerf = nerf_of(teacher, tmp_path, count=4)
    images = nerf.look(seen_from(0.0, 70.0, 200.0, particles=[3, 0, 3]), 6).images
    for row, (azimuth, particle) in enumerate([(0.0, 3), (70.0, 0), (200.0, 3)]):
        assert_close(images[row], nerf.look(seen_from(azimuth, particles=[particle]), 6).images[0])
    images.sum().backward()
    for number, field in enumerate(nerf.fields):
        assert all((parameter.grad is not None) == (number in (0, 3)) for parameter in field.parameters())


def test_particles_start_differently(teacher, tmp_path):
    torch.manual_seed(0)
    nerf = NerfConfig(**TINY).create(RepresentationMaterials(teacher, 2, tmp_path)).eval()
    first, second = nerf.look(seen_from(0.0, 0.0, particles=[0, 1]), 8).images
    assert (first - second).abs().max() > 0.01


def test_a_rendering_is_an_input_of_the_teacher_with_gradients(teacher, tmp_path):
    nerf = nerf_of(teacher, tmp_path, resolution=12, background="white").float()
    x, terms = nerf.render(seen_from(0.0, 90.0))
    assert x.shape == (2, 3, 8, 8) and x.abs().max() <= 1 and terms["sparsity"].shape == (2,)
    x.sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in nerf.parameters())


def test_loaded_particles_render_the_same_images(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "FRAMES", 3)
    nerf = nerf_of(teacher, tmp_path, count=2).float()
    nerf.save(tmp_path)
    other = nerf_of(teacher, tmp_path, count=2).float()
    for parameter in other.parameters():
        parameter.data.zero_()
    views = nerf.fixed(4)
    assert not torch.equal(other.images(views), nerf.images(views))
    other.load(tmp_path)
    assert torch.equal(other.images(views), nerf.images(views))
    for particle in ("0000", "0001"):
        for kind in ("frames", "depth"):
            found = sorted((tmp_path / particle / kind).iterdir())
            assert [path.name for path in found] == ["000.png", "001.png", "002.png"]
            assert Image.open(found[0]).size == (8, 8)
        assert Image.open(tmp_path / particle / "turntable.webp").n_frames == 3


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("levels", 0, "greater than or equal to 1"),
        ("samples", 0, "greater than or equal to 1"),
        ("blob_radius", 0.0, "greater than 0"),
        ("sparsity", -1.0, "greater than or equal to 0"),
        ("encoding", "grid", "'hash' or 'frequency'"),
    ],
)
def test_settings_that_cannot_work_are_refused(field, value, problem):
    with pytest.raises(ValidationError, match=problem) as caught:
        NerfConfig(**{field: value})
    assert caught.value.errors()[0]["loc"] == (field,)


def test_grids_become_finer():
    assert list(NerfConfig(coarsest=16, finest=8).check()) == [("coarsest", "16 is above finest: 8")]
    assert not list(NerfConfig().check()) and not list(NerfConfig(coarsest=256, encoding="frequency").check())
    assert HashGrid(NerfConfig()).cells == [8, 12, 18, 26, 39, 58, 86, 128]
