"""Compares distances with closed forms and known properties."""

import numpy as np
import pytest

from stages.metrics.distances import (
    diversity,
    frechet_distance,
    kernel_distance,
    precision_recall,
    standard_error,
)

rng = np.random.default_rng(0)
A = rng.standard_normal((2000, 8))


def whitened(x):
    """Transform samples so that their mean is exactly 0 and their covariance exactly the identity."""
    x = x - x.mean(0)
    return x @ np.linalg.inv(np.linalg.cholesky(np.cov(x, rowvar=False))).T


def test_frechet_distance_in_closed_form():
    x = whitened(A)
    mu = np.arange(8.0)
    assert frechet_distance(x, x) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(x, x + mu) == pytest.approx((mu**2).sum())
    assert frechet_distance(x, 3.0 * x) == pytest.approx(8 * (3 - 1) ** 2)


def test_frechet_distance_of_any_two_covariances_in_two_dimensions():
    """The eigenvalues of S_a S_b are real and not negative, so Tr(S_a S_b)^(1/2) = sqrt(Tr S_a S_b + 2 sqrt(det))."""
    x, skew = whitened(rng.standard_normal((500, 2))), np.array([[2.0, 0.5], [-1.0, 1.0]])
    stretch, mu, nu = np.diag([3.0, 0.5]), np.array([1.0, 2.0]), np.array([-2.0, 3.0])
    a, b = skew.T @ skew, stretch.T @ stretch
    root = (np.trace(a @ b) + 2 * np.linalg.det(a @ b) ** 0.5) ** 0.5
    expected = ((mu - nu) ** 2).sum() + np.trace(a + b) - 2 * root
    assert frechet_distance(x @ skew + mu, x @ stretch + nu) == pytest.approx(expected)


def test_frechet_distance_ignores_rotation():
    q, _ = np.linalg.qr(rng.standard_normal((8, 8)))
    b = rng.standard_normal((500, 8)) * 2 + 1
    assert frechet_distance(A @ q, b @ q) == pytest.approx(frechet_distance(A, b))


def test_frechet_distance_has_its_known_bias():
    d, n = 16, 1000
    found = [frechet_distance(rng.standard_normal((n, d)), rng.standard_normal((n, d))) for _ in range(20)]
    assert np.mean(found) == pytest.approx(2 * d / n + d * (d + 1) / (2 * n), rel=0.1)


def test_kernel_distance_is_unbiased():
    found = np.array([kernel_distance(rng.standard_normal((200, 8)), rng.standard_normal((200, 8))) for _ in range(60)])
    assert abs(found.mean()) < 3 * found.std() / 60**0.5
    assert kernel_distance(A, A + 1) > 10 * found.std()


def test_kernel_distance_equals_a_hand_computed_value():
    """Within a: (4 / 2 + 1)^3 = 27; within b: (-4 / 2 + 1)^3 = -1; across: (1 + 1 + 27 - 1) / 4 = 7."""
    a, b = np.array([[2.0, 0.0], [2.0, 2.0]]), np.array([[0.0, 2.0], [0.0, -2.0]])
    assert kernel_distance(a, b) == pytest.approx(27 - 1 - 2 * 7)


def test_kernel_distance_weighs_all_pairs_equally():
    """Two of three pairs within a have x.y = 0 and k = 1, one has x.y = 1 and k = 8; b is at the origin: k = 1."""
    assert kernel_distance(np.array([[1.0], [1.0], [0.0]]), np.zeros((2, 1))) == pytest.approx((8 + 1 + 1) / 3 + 1 - 2)


@pytest.mark.parametrize(("k", "share"), [(1, 1 / 3), (2, 2 / 3)])
def test_precision_and_recall_equal_hand_computed_values(k, share):
    """The radii of a are 1, 1, 2, 4 for k = 1 and 3, 2, 3, 6 for k = 2. The points of b lie 2, 3.5 and 7 beyond the
    ends of a. The ball around -2 has a radius of at least 12.5 and contains all of a."""
    a, b = np.array([[0.0], [1.0], [3.0], [7.0]]), np.array([[-2.0], [10.5], [14.0]])
    assert precision_recall(a, b, k) == pytest.approx((share, 1.0))
    assert precision_recall(b, a, k) == pytest.approx((1.0, share))


def test_precision_and_recall():
    assert precision_recall(A[:500], A[:500]) == (1.0, 1.0)
    assert precision_recall(A[:500], A[:500] + 100) == (0.0, 0.0)
    flat = A[:, :2]
    modes = np.concatenate([flat[:500], flat[500:1000] + 50])
    precision, recall = precision_recall(modes, flat[1000:1500])
    assert precision > 0.9 and recall == pytest.approx(0.5, abs=0.05)


def test_diversity_is_within_groups():
    points = np.array([[0.0], [2.0], [100.0], [104.0]])
    assert diversity(points, ["a", "a", "b", "b"]) == pytest.approx((2 + 4) / 2)
    assert diversity(points, ["a", "b", "c", "d"]) is None
    assert diversity(np.array([[0.0, 0.0], [3.0, 4.0]]), ["a", "a"]) == pytest.approx(5.0)


def test_the_standard_error_is_the_deviation_over_new_samples():
    def difference(a, b):
        return float(a.mean() - b.mean())

    estimate = np.mean(
        [standard_error(difference, rng.standard_normal((400, 1)), rng.standard_normal((400, 1))) for _ in range(30)]
    )
    assert estimate == pytest.approx((2 / 400) ** 0.5, rel=0.15)


def test_the_standard_error_treats_copies_of_one_original_as_one_group():
    """One set has ten copies of each of forty originals, in random order. The other set has 400 originals."""

    def difference(a, b):
        return float(a.mean() - b.mean())

    originals = rng.permutation(np.repeat(np.arange(40), 10))
    alone, known = [], []
    for _ in range(40):
        a, b = rng.standard_normal((40, 1))[originals], rng.standard_normal((400, 1))
        alone.append(standard_error(difference, a, b))
        known.append(standard_error(difference, a, b, originals_of_a=originals))
    spread = (1 / 40 + 1 / 400) ** 0.5
    assert np.mean(known) == pytest.approx(spread, rel=0.15)
    assert np.mean(alone) < 0.6 * spread
