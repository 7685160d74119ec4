"""The ensemble's random transformations: some are compared exactly, others with smooth functions and distributions."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from stages.losses.augmentation import GROUPS, HOLE, Augmentation, Draw

SUBSETS = ["".join(chosen) for n in range(1, 5) for chosen in itertools.combinations(GROUPS, n)]
SIZES = [(8, 8), (16, 16), (8, 12), (12, 8), (5, 8), (9, 6), (7, 11)]


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def moved(x, matrix, groups="g"):
    """Transform `x` by one given matrix. It maps points of the output to points of the input, in pixels from the
    middle."""
    augmentation = Augmentation(groups)
    matrix = torch.as_tensor(matrix, dtype=torch.float32).expand(len(x), 3, 3)
    return augmentation(x, Draw(augmentation._grid(matrix, *x.shape[2:]), None, None))


def linear(turn=0.0, scale=1.0, stretch=1.0, shift=(0.0, 0.0)):
    cos, sin = math.cos(turn), math.sin(turn)
    matrix = np.eye(3)
    matrix[:2, :2] = np.array([[cos, -sin], [sin, cos]]) @ np.diag([stretch, 1 / stretch]) / scale
    matrix[:2, 2] = shift
    return matrix


def matrices(groups, size=(32, 32), count=20_000):
    torch.manual_seed(0)
    return Augmentation(groups)._matrix(count, *size, torch.device("cpu")).double().numpy()


def assert_distribution(samples, quantile, tolerance=0.03):
    """Assert that the quantiles of the samples at 5%, 10%, ... 95% are those of the distribution, in units of its
    spread."""
    at = np.arange(1, 20) / 20
    expected = np.array([quantile(p) for p in at])
    np.testing.assert_allclose(np.quantile(samples, at), expected, atol=tolerance * np.ptp(expected))


def uniform(low, high):
    return lambda p: low + (high - low) * p


def normal(std):
    return lambda p: std * 2**0.5 * float(torch.erfinv(torch.tensor(2 * p - 1)))


# --- draws ---------------------------------------------------------------------------------------------


@given(
    st.sampled_from(SUBSETS).flatmap(st.permutations).map("".join),
    st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(3, 13), st.integers(3, 13)),
    st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_equal_inputs_stay_equal_and_samples_apart(groups, shape, seed):
    augmentation, x = Augmentation(groups), noise(*shape, seed=seed)
    draw = augmentation.draw(x)
    y = augmentation(x, draw)
    assert y.shape == x.shape and y.dtype == x.dtype and y.isfinite().all()
    assert torch.equal(y, augmentation(x.clone(), draw))
    other = x.clone()
    other[0] += 1.0
    assert torch.equal(augmentation(other, draw)[1:], y[1:])


@pytest.mark.parametrize("groups", SUBSETS)
def test_a_draw_is_fresh_for_each_call_and_sample_and_follows_the_seed(groups):
    augmentation, x = Augmentation(groups), noise(1, 3, 16, 16).expand(6, -1, -1, -1)
    torch.manual_seed(0)
    first, second = augmentation.draw(x), augmentation.draw(x)
    torch.manual_seed(0)
    again = augmentation.draw(x)
    assert [part is None for part in first] == [part is None for part in again]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if a is not None)
    outputs = [*augmentation(x, first), *augmentation(x, second)]
    same = sum(torch.equal(a, b) for a, b in itertools.combinations(outputs, 2))
    assert same <= (4 if groups == "b" else 0)  # one of 200 possible transformations


def test_an_added_group_does_not_change_the_draws_of_earlier_groups():
    x = noise(2, 3, 8, 8)
    draws = []
    for groups in ("bg", "bgc", "gbco"):
        torch.manual_seed(0)
        draws.append(Augmentation(groups).draw(x))
    assert all(torch.equal(draws[0].grid, draw.grid) for draw in draws)
    assert torch.equal(draws[1].colour, draws[2].colour)


def test_a_draw_has_no_gradient_and_only_what_its_groups_need():
    x = noise(2, 3, 8, 8).requires_grad_()
    for groups in SUBSETS:
        draw = Augmentation(groups).draw(x)
        assert [part is not None for part in draw] == ["b" in groups or "g" in groups, "c" in groups, "o" in groups]
        assert not any(part.requires_grad for part in draw if part is not None)


@pytest.mark.parametrize("groups", ["", "x", "bgx", "bb", "B"])
def test_unknown_groups_are_refused(groups):
    with pytest.raises(ValueError, match=f"some of bgco, each once, not '{groups}'"):
        Augmentation(groups)


def test_it_holds_no_weights_and_moves_with_its_model():
    augmentation = Augmentation("bgco")
    assert not augmentation.state_dict() and not list(augmentation.parameters())
    assert {buffer.device.type for buffer in augmentation.to("meta").buffers()} == {"meta"}
    draw = augmentation.draw(torch.zeros(2, 3, 8, 8, device="meta"))
    assert [part.device.type for part in draw] == ["meta"] * 3


# --- whole pixels --------------------------------------------------------------------------------------


def rearranged(x, reach):
    """Return every version of `x` (H, W) that is mirrored or not, turned by quarters, and seen through a window moved
    by up to `reach` (y, x): (mirrored, quarters, down, across) -> list of (H, W). If a turn puts an odd side on an even
    one, the middle lies between two pixels, and the windows at both are in the list."""
    height, width = x.shape
    margin = 2 * max(x.shape)
    found = {}
    for mirror, quarters in itertools.product((False, True), range(4)):
        turned = np.rot90(np.pad(x[:, ::-1] if mirror else x, margin, mode="reflect"), quarters)
        start = [(a - b) / 2 for a, b in zip(turned.shape, x.shape, strict=True)]
        ends = [{math.floor(s), math.ceil(s)} for s in start]
        for down, across in itertools.product(*(range(-r, r + 1) for r in reach)):
            for y, z in itertools.product(*ends):
                window = turned[y + down : y + down + height, z + across : z + across + width]
                found.setdefault((mirror, quarters, down, across), []).append(window)
    return found


@pytest.mark.parametrize("size", SIZES)
def test_blitting_mirrors_turns_and_shifts_whole_pixels(size):
    x = np.arange(math.prod(size), dtype=np.float32).reshape(size)
    reach = [math.ceil(side / 8 - 0.5) for side in size]
    candidates = [(key, window) for key, windows in rearranged(x, reach).items() for window in windows]
    torch.manual_seed(0)
    augmentation = Augmentation("b")
    batch = torch.from_numpy(x).expand(300, 1, *size)
    outputs = augmentation(batch, augmentation.draw(batch))[:, 0].numpy()
    windows = np.stack([window for _, window in candidates])
    equal = (outputs[:, None] == windows[None]).all((2, 3))
    assert equal.any(1).all()
    seen = {candidates[i][0] for row in equal for i in row.nonzero()[0]}
    assert len({key[:2] for key in seen}) == 8
    assert {key[2] for key in seen} == set(range(-reach[0], reach[0] + 1))
    assert {key[3] for key in seen} == set(range(-reach[1], reach[1] + 1))


def test_blitting_is_evenly_distributed():
    """Mirroring and turn are in the linear part of the matrix. The shift comes before them."""
    found = matrices("b", (32, 64))
    turns = np.rint(found[:, :2, :2]).astype(int)
    np.testing.assert_allclose(found[:, :2, :2], turns, atol=1e-6)
    _, counts = np.unique(turns.reshape(-1, 4), axis=0, return_counts=True)
    np.testing.assert_allclose(counts / 20_000, np.full(8, 1 / 8), atol=0.01)
    shifts = np.einsum("nji,nj->ni", turns, found[:, :2, 2])
    for axis, most in ((0, 8), (1, 4)):
        values, counts = np.unique(np.rint(shifts[:, axis]), return_counts=True)
        assert values.tolist() == list(range(-most, most + 1))
        expected = np.array([0.5, *[1.0] * (2 * most - 1), 0.5]) / (2 * most)
        np.testing.assert_allclose(counts / 20_000, expected, atol=0.01)


@pytest.mark.parametrize("groups", ["b", "bg"])
@pytest.mark.parametrize("size", [(8, 8), (7, 7), (8, 16)])
def test_a_shift_far_beyond_the_border_reflects_again_and_again(groups, size):
    x = noise(1, 2, *size)
    period = 2 * (size[1] - 1)
    for by in (1, 5, period, 3 * period + 2):
        index = [period - i if i >= size[1] else i for i in ((j + by) % period for j in range(size[1]))]
        torch.testing.assert_close(moved(x, linear(shift=(by, 0)), groups), x[..., index], rtol=0, atol=1e-4)


# --- resampling ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(3, 3), (4, 4), (5, 5), (4, 9), (32, 32), (64, 48)])
def test_the_identity_returns_the_input(size):
    x = noise(2, 3, *size)
    torch.testing.assert_close(moved(x, np.eye(3), "g"), x, rtol=0, atol=1e-4)
    assert torch.equal(moved(x, np.eye(3), "b"), x)


@pytest.mark.parametrize("size", [(16, 16), (5, 9), (6, 9)])
def test_pixels_that_map_to_pixels_are_exact(size):
    x = noise(2, 3, *size)
    mirror = np.diag([-1.0, 1.0, 1.0])
    torch.testing.assert_close(moved(x, mirror), x.flip(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(moved(x, linear(math.pi)), x.flip(2, 3), rtol=0, atol=1e-4)
    if size[0] == size[1]:
        torch.testing.assert_close(moved(x, linear(math.pi / 2)), x.rot90(1, (2, 3)), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (31, 32)])
def test_a_smooth_function_is_transformed_by_the_matrix(size):
    """The function is a sum of cosines that are symmetric about the outermost pixels. Reflected borders continue it
    exactly, so the test also holds beyond the borders."""
    height, width = size
    y, x = np.mgrid[:height, :width].astype(float)

    def function(x, y):
        return np.cos(np.pi * x / (width - 1)) + np.cos(2 * np.pi * y / (height - 1)) * np.cos(np.pi * x / (width - 1))

    torch.manual_seed(0)
    augmentation = Augmentation("bg")
    image = torch.tensor(function(x, y), dtype=torch.float32).expand(16, 1, height, width)
    matrix = augmentation._matrix(16, height, width, image.device)
    found = augmentation(image, Draw(augmentation._grid(matrix, height, width), None, None))[:, 0]
    middle = np.array([(width - 1) / 2, (height - 1) / 2])
    points = np.stack([x - middle[0], y - middle[1], np.ones_like(x)], -1)
    mapped = np.einsum("nij,hwj->nhwi", matrix.double().numpy(), points)[..., :2] + middle
    np.testing.assert_allclose(found, function(mapped[..., 0], mapped[..., 1]), atol=0.01)


@pytest.mark.parametrize("turn, scale", [(0.0, 0.6), (0.3, 0.6), (1.1, 0.55), (math.pi / 4, 0.55)])
def test_shrinking_does_not_alias(turn, scale):
    """If the finest possible pattern is scaled down, only its mean remains. Without a filter it would alias into
    another pattern."""
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    for fine in ((x + y) % 2, x % 2):
        image = (2.0 * fine - 0.7)[None, None]
        matrix = linear(turn, scale)
        found = moved(image, matrix) - 0.3
        theta = torch.tensor(matrix[None, :2], dtype=torch.float32)
        plain = functional.grid_sample(
            image, functional.affine_grid(theta, [1, 1, 32, 32], align_corners=True), "bilinear", "reflection", True
        )
        assert found.square().mean() < min(0.025, (plain - 0.3).square().mean() / 5)


def test_geometry_follows_its_distributions():
    """The linear part is L = R(a) diag(1/t, t) R(b) / s. Its determinant gives s, its singular values t, and its polar
    part a + b."""
    found = matrices("g", (32, 64))
    left, singular, right = np.linalg.svd(found[:, :2, :2])
    assert (np.linalg.det(found[:, :2, :2]) > 0).all()
    assert_distribution(-np.log2(singular.prod(1)) / 2, normal(0.2))
    assert_distribution(np.log2(singular[:, 0] / singular[:, 1]) / 2, lambda p: normal(0.2)((1 + p) / 2))
    polar = left @ right
    assert_distribution(np.arctan2(polar[:, 1, 0], polar[:, 0, 0]), uniform(-np.pi, np.pi))
    for axis in (left[:, :, 0], right[:, 0]):
        assert_distribution(np.arctan2(axis[:, 1], axis[:, 0]) % np.pi, uniform(0, np.pi))
    shift = np.linalg.solve(found[:, :2, :2], found[:, :2, 2:])[..., 0]
    assert_distribution(shift[:, 0], normal(0.125 * 64))
    assert_distribution(shift[:, 1], normal(0.125 * 32))
    assert abs(np.corrcoef(shift.T)[0, 1]) < 0.03


# --- colour --------------------------------------------------------------------------------------------


def test_colours_in_closed_form():
    """The image has two pixels and two channels. Its mean is 2.5, and the means over channels are 1.5 and 3.5."""
    x = torch.tensor([[[[1.0, 3.0]], [[2.0, 4.0]]]])
    recolour = Augmentation("c")

    def by(*colour):
        return recolour(x, Draw(None, torch.tensor([colour]), None)).flatten().tolist()

    assert by(0.0, 1.0, 1.0) == [1.0, 3.0, 2.0, 4.0]
    assert by(0.25, 1.0, 1.0) == [1.25, 3.25, 2.25, 4.25]
    assert by(0.0, 0.5, 1.0) == [1.75, 2.75, 2.25, 3.25]
    assert by(0.0, 1.0, 0.0) == [1.5, 3.5, 1.5, 3.5]
    assert by(0.0, 1.0, 2.0) == [0.5, 2.5, 2.5, 4.5]
    assert by(0.25, 0.0, 2.0) == [2.75] * 4
    assert by(0.0, 0.0, 1.0) == [2.5] * 4


def test_colour_changes_commute_and_use_each_inputs_own_mean():
    """Applies brightness, contrast about the input's mean, and saturation about the pixel's mean, in turn."""
    x = noise(2, 4, 6, 5, seed=1) + torch.tensor([0.0, 3.0])[:, None, None, None]
    colour = torch.tensor([[0.3, 0.6, 1.7], [-0.4, 1.4, 0.2]])
    brightness, contrast, saturation = colour.T[:, :, None, None, None]
    steps = [
        lambda y: y + brightness,
        lambda y: y.mean((1, 2, 3), True) + contrast * (y - y.mean((1, 2, 3), True)),
        lambda y: y.mean(1, True) + saturation * (y - y.mean(1, True)),
    ]
    found = Augmentation("c")(x, Draw(None, colour, None))
    for order in itertools.permutations(steps):
        y = x
        for step in order:
            y = step(y)
        torch.testing.assert_close(found, y)
    alone = [Augmentation("c")(x[i : i + 1], Draw(None, colour[i : i + 1], None)) for i in range(2)]
    torch.testing.assert_close(found, torch.cat(alone))


def test_colours_follow_their_distributions():
    torch.manual_seed(0)
    colour = Augmentation("c").draw(torch.empty(20_000, 1, 4, 4)).colour.numpy()
    for values, (low, high) in zip(colour.T, [(-0.5, 0.5), (0.5, 1.5), (0.0, 2.0)], strict=True):
        assert_distribution(values, uniform(low, high))
        assert low <= values.min() and values.max() <= high
    assert np.abs(np.corrcoef(colour.T) - np.eye(3)).max() < 0.03


# --- cutout --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(16, 16), (12, 20)])
def test_the_cutout_is_a_square_of_zeros_with_half_the_side(size):
    torch.manual_seed(0)
    x = 1 + noise(200, 3, *size).abs()
    augmentation = Augmentation("o")
    draw = augmentation.draw(x)
    y = augmentation(x, draw)
    for image, original, (across, down) in zip(y, x, draw.hole.tolist(), strict=True):
        hole = (image == 0).all(0)
        assert torch.equal(hole, (image == 0).any(0)) and torch.equal(image[:, ~hole], original[:, ~hole])
        rows, columns = hole.any(1), hole.any(0)
        assert torch.equal(hole, rows[:, None] & columns)
        for line, middle in ((rows, down), (columns, across)):
            side = len(line)
            inside = [i for i in range(side) if abs((i + 0.5) / side - middle) < 0.25]
            assert line.nonzero().flatten().tolist() == inside
            if 0.25 <= middle <= 0.75:
                assert len(inside) == side // 2


def test_the_position_of_the_cutout_is_uniform():
    """The expected share of each side is 1/2 minus the part beyond the two borders, 1/32 at each."""
    torch.manual_seed(0)
    x = torch.ones(20_000, 1, 16, 16)
    augmentation = Augmentation("o")
    draw = augmentation.draw(x)
    for values in draw.hole.T.numpy():
        assert_distribution(values, uniform(0, 1))
    at = (np.arange(16) + 0.5) / 16
    share = np.minimum(at + HOLE / 2, 1) - np.maximum(at - HOLE / 2, 0)
    assert share.mean() == pytest.approx(1 / 2 - 2 / 32, abs=1e-3)
    holes = (augmentation(x, draw) == 0).float().mean(0)[0].numpy()
    np.testing.assert_allclose(holes, np.outer(share, share), atol=0.02)


# --- gradients, precision, compilation -----------------------------------------------------------------


@pytest.mark.parametrize("groups", ["b", "g", "bg", "c", "o", "bgco"])
def test_the_gradient_is_that_of_a_linear_map(groups):
    """f(x) - f(0) is linear, so <v, f(x) - f(0)> = <x, gradient of <v, f>>, and the gradient is the same at every x."""
    torch.manual_seed(0)
    augmentation, (x, z, v) = Augmentation(groups), noise(3, 4, 3, 9, 12).unbind()
    draw = augmentation.draw(x)
    zero = augmentation(torch.zeros_like(x), draw)
    f = [augmentation(y, draw) - zero for y in (x, z, 2 * x - 3 * z)]
    torch.testing.assert_close(2 * f[0] - 3 * f[1], f[2], rtol=1e-4, atol=1e-5)
    at = z.clone().requires_grad_()
    (augmentation(at, draw) * v).sum().backward()
    torch.testing.assert_close((f[0] * v).sum((1, 2, 3)), (at.grad * x).sum((1, 2, 3)), rtol=1e-4, atol=1e-4)
    assert (zero == 0).all() or "c" in groups


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_dtype_is_kept_and_computation_is_float32(dtype):
    torch.manual_seed(0)
    augmentation, x = Augmentation("bgco"), noise(4, 3, 16, 16).to(dtype)
    draw = augmentation.draw(x)
    assert all(part.dtype == torch.float32 for part in draw)
    with torch.autocast("cpu", torch.bfloat16):
        y = augmentation(x, draw)
    assert y.dtype == dtype and torch.equal(y, augmentation(x.float(), draw).to(dtype))


def test_compiling_breaks_no_graph_and_changes_nothing():
    augmentation, x = Augmentation("bgco"), noise(2, 3, 8, 12)
    draw = augmentation.draw(x)
    compiled = torch.compile(augmentation, backend="eager", fullgraph=True)
    results = []
    for function in (augmentation, compiled):
        at = x.clone().requires_grad_()
        y = function(at, draw)
        y.square().sum().backward()
        results.append((y.detach(), at.grad))
    torch.testing.assert_close(*results)


def test_memory_order_does_not_matter():
    torch.manual_seed(0)
    augmentation, x = Augmentation("bgco"), noise(2, 3, 8, 12)
    draw = augmentation.draw(x)
    y = augmentation(x, draw)
    torch.testing.assert_close(augmentation(x.contiguous(memory_format=torch.channels_last), draw), y)
    torch.testing.assert_close(augmentation(x.mT.contiguous().mT, draw), y)
    assert torch.equal(x, noise(2, 3, 8, 12))
