"""Distances between two sets of feature vectors, each (N, D) float64. Uses only NumPy.

Reports name each distance with the features that it uses. Only distances of Inception features may be called FID.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

Features = NDArray[np.float64]
ROWS = 1024
"""Rows of a matrix of distances that are in memory at once."""


def frechet_distance(a: Features, b: Features) -> float:
    """Return |mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al. 2017, 1706.08500, eq. 6).

    It has a positive bias of order 1/N, so compare distances only at equal numbers of samples.
    """
    root = _symmetric_root(np.cov(a, rowvar=False))
    cov_b = np.cov(b, rowvar=False)
    cross = np.sqrt(np.clip(np.linalg.eigvalsh(root @ cov_b @ root), 0.0, None)).sum()
    distance = np.square(a.mean(0) - b.mean(0)).sum() + np.square(root).sum() + np.trace(cov_b) - 2.0 * cross
    return float(distance)


def _symmetric_root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    root: NDArray[np.float64] = (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T
    return root


def kernel_distance(a: Features, b: Features) -> float:
    """Return the unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018, 1801.01401, section 3).

    Its expectation is 0 if both distributions are equal, so it may be negative.
    """

    def total(x: Features, y: Features) -> float:
        return sum(float(((rows @ y.T / x.shape[1] + 1.0) ** 3).sum()) for rows in _in_rows(x))

    def mean_of_different(x: Features) -> float:
        n, equal = len(x), ((np.square(x).sum(1) / x.shape[1] + 1.0) ** 3).sum()
        return (total(x, x) - float(equal)) / (n * (n - 1))

    return mean_of_different(a) + mean_of_different(b) - 2.0 * total(a, b) / (len(a) * len(b))


def kernel_distance_of_subsets(made: Features, real: Features, subsets: int, size: int) -> float:
    """Return KID: the mean of `kernel_distance` over random subsets of `size` samples (1801.01401).

    The subsets are those of torch-fidelity with `made` as its first input. They overlap, so their spread is no standard
    error."""
    random = np.random.RandomState(2020)

    def drawn(features: Features) -> Features:
        return features[random.choice(len(features), size, replace=False)]

    return sum(kernel_distance(drawn(made), drawn(real)) for _ in range(subsets)) / subsets


def precision_recall(real: Features, made: Features, k: int = 3) -> tuple[float, float]:
    """Return precision, the share of `made` in the k-nearest-neighbour manifold of `real`, and recall, the reverse.

    Source: Kynkäänniemi et al. 2019, 1904.06991, eq. 1 and 2.
    """
    return _inside(made, real, k), _inside(real, made, k)


def _inside(points: Features, manifold: Features, k: int) -> float:
    """Return the share of `points` within the k-th-neighbour radius of some point of `manifold`."""
    radii, squares = _radii(manifold, k)[None, :], np.square(manifold).sum(1)
    inside = [(_squared_distances(rows, manifold, squares) <= radii).any(1) for rows in _in_rows(points)]
    return float(np.concatenate(inside).mean())


def _in_rows(points: Features) -> Iterator[Features]:
    return (points[start : start + ROWS] for start in range(0, len(points), ROWS))


def _squared_distances(
    a: Features, b: Features, squares_of_b: NDArray[np.float64] | None = None
) -> NDArray[np.float64]:
    squares_of_b = np.square(b).sum(1) if squares_of_b is None else squares_of_b
    squares = np.square(a).sum(1)[:, None] + squares_of_b[None, :] - 2.0 * a @ b.T
    distances: NDArray[np.float64] = np.clip(squares, 0.0, None)
    return distances


def _radii(points: Features, k: int) -> NDArray[np.float64]:
    """Return the squared distance (N,) from each point to its k-th nearest neighbour."""
    radii, squares = [], np.square(points).sum(1)
    for start, rows in zip(range(0, len(points), ROWS), _in_rows(points), strict=True):
        distances = _squared_distances(rows, points, squares)
        np.fill_diagonal(distances[:, start:], np.inf)
        radii.append(np.partition(distances, k - 1, axis=1)[:, k - 1])
    return np.concatenate(radii)


def diversity(features: Features, groups: list[str]) -> float | None:
    """Return the mean Euclidean distance between two samples of the same group; None if no group has two samples.

    groups: N names, such as the prompts that the samples were made from.
    """
    names = np.array(groups)
    total, pairs = 0.0, 0
    for name in dict.fromkeys(groups):
        members = features[names == name]
        for start, rows in zip(range(0, len(members), ROWS), _in_rows(members), strict=True):
            total += float(np.triu(np.sqrt(_squared_distances(rows, members[start:])), 1).sum())
        pairs += len(members) * (len(members) - 1) // 2
    return total / pairs if pairs else None


def standard_error(
    statistic: Callable[[Features, Features], float],
    a: Features,
    b: Features,
    groups: int = 10,
    originals_of_a: NDArray[np.int64] | None = None,
    originals_of_b: NDArray[np.int64] | None = None,
) -> float:
    """Estimate the standard error of a statistic of two sets, by the delete-a-group jackknife (Kott 2001).

    Each replicate omits one of the `groups` groups from both sets. Samples are assigned to groups at random, because
    prompts often repeat in a cycle. Samples with equal numbers in `originals_of_a` or `originals_of_b` (N,) were made
    from one original. They are not independent, so they are in the same group.
    """
    of_a, of_b = _groups(len(a), groups, originals_of_a), _groups(len(b), groups, originals_of_b)
    values = [statistic(a[of_a != g], b[of_b != g]) for g in range(groups)]
    return float(np.sqrt((groups - 1) / groups * np.square(np.array(values) - np.mean(values)).sum()))


def _groups(count: int, groups: int, originals: NDArray[np.int64] | None) -> NDArray[np.int64]:
    numbers = np.arange(count) if originals is None else np.unique(originals, return_inverse=True)[1]
    return np.random.default_rng(0).permutation(int(numbers.max()) + 1)[numbers] % groups
