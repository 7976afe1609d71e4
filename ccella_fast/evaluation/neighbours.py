"""Precision, recall, density and coverage: fidelity and diversity by balls around nearest neighbours.

The ball of a volume reaches to its k-th nearest neighbour within its own set. All values depend on n and k, so they are read
next to those of real against real at the same n (`statistics.compare_with_floor`).
"""

from __future__ import annotations

from functools import lru_cache
from math import lgamma
from typing import Any, NamedTuple

import numpy as np

from ccella_fast.errors import DataError
from ccella_fast.evaluation.statistics import feature_pair

_CANCELLED = 1e-8  # squared distance over squared norms, below which the quick formula has lost most of its digits
_VALUES = 2**20  # differences that are in memory at once


def squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances (n, m) between the rows of two float64 arrays; exactly 0 between equal rows.

    Rows that are near to each other and far from the centre, as all are if there is an outlier, are subtracted one by one.
    """
    centre = b.mean(axis=0)
    a, b = a - centre, b - centre
    norms = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)
    squared = norms - 2 * (a @ b.T)
    rows, columns = np.nonzero(squared <= _CANCELLED * norms)
    step = max(1, _VALUES // a.shape[1])
    for start in range(0, len(rows), step):
        i, j = rows[start : start + step], columns[start : start + step]
        squared[i, j] = np.square(a[i] - b[j]).sum(axis=1)
    return squared


class PrecisionRecall(NamedTuple):
    """Shares of volumes; all but `density` are at most 1."""

    precision: float  # synthetic volumes inside the ball of a real one (Kynkäänniemi et al. 2019, equation 2)
    recall: float  # real volumes inside the ball of a synthetic one (the same, equation 3)
    density: float  # real balls that contain a synthetic volume, on average, over k (Naeem et al. 2020, equation 3)
    coverage: float  # real balls that contain a synthetic volume (the same, equation 4)


def precision_recall(real: Any, synthetic: Any, k: int = 5) -> PrecisionRecall:
    """Precision and recall (arXiv 1904.06991), density and coverage (arXiv 2002.09797).

    A real outlier has a large ball, which raises the precision of any generator; density and coverage are robust against it.

    Args:
        real: (n, d) features, n above k.
        synthetic: (m, d) features, m above k.
        k: the neighbour that a ball reaches to, not counting the volume itself.

    Raises:
        DataError: if a set has at most k rows or cannot be used.
    """
    _check_neighbours(k)
    a, b = feature_pair(real, synthetic, ("real", "synthetic"), least=k + 1)
    squared = squared_distances(stacked := np.concatenate([a, b]), stacked)
    return precision_recall_of_rows(squared, np.arange(len(a)), len(a) + np.arange(len(b)), k)


def precision_recall_of_rows(
    squared: np.ndarray, rows_real: np.ndarray, rows_synthetic: np.ndarray, k: int = 5
) -> PrecisionRecall:
    """`precision_recall` for subsets of stacked sets.

    Args:
        squared: squared distances between all rows of the stacked sets, from `squared_distances`.
        rows_real: row numbers.
        rows_synthetic: row numbers.
        k: the neighbour that a ball reaches to.
    """
    between = squared[np.ix_(rows_real, rows_synthetic)]
    real_radius = _radii(squared[np.ix_(rows_real, rows_real)], k)
    synthetic_radius = _radii(squared[np.ix_(rows_synthetic, rows_synthetic)], k)
    in_real = between <= real_radius[:, None]
    return PrecisionRecall(
        precision=float(in_real.any(axis=0).mean()),
        recall=float((between <= synthetic_radius).any(axis=1).mean()),
        density=float(in_real.sum(axis=0).mean() / k),
        coverage=float(in_real.any(axis=1).mean()),
    )


class ClippedDensityCoverage(NamedTuple):
    """Shares of good volumes, from 0 to 1."""

    density: float
    coverage: float


def clipped_density_coverage(real: Any, synthetic: Any, k: int = 5) -> ClippedDensityCoverage:
    """Clipped density and clipped coverage (Salvy et al. 2025, arXiv 2507.01761): calibrated and robust against outliers.

    Density: radii are at most their median, a synthetic volume counts at most once, and the sum is divided by what real
    volumes reach among themselves. Coverage: each real ball counts up to k synthetic volumes, and the mean is translated into
    the share of good volumes that has this expectation, which is known for any distribution: the probability of a ball is
    Beta(k, n - k).

    Args:
        real: (n, d) features, n above k.
        synthetic: (m, d) features, m at least k.
        k: the neighbour that a ball reaches to, not counting the volume itself.
    """
    _check_neighbours(k)
    a, b = feature_pair(real, synthetic, ("real", "synthetic"), least=k + 1)
    squared = squared_distances(stacked := np.concatenate([a, b]), stacked)
    return clipped_density_coverage_of_rows(squared, np.arange(len(a)), len(a) + np.arange(len(b)), k)


def clipped_density_coverage_of_rows(
    squared: np.ndarray, rows_real: np.ndarray, rows_synthetic: np.ndarray, k: int = 5
) -> ClippedDensityCoverage:
    """`clipped_density_coverage` for subsets of stacked sets; arguments as of `precision_recall_of_rows`."""
    among, between = squared[np.ix_(rows_real, rows_real)], squared[np.ix_(rows_real, rows_synthetic)]
    n, m = between.shape
    radius = _radii(among, k)
    clipped = np.minimum(radius, np.median(radius))
    np.fill_diagonal(among, np.inf)
    real_density = np.minimum((among <= clipped[:, None]).sum(axis=0) / k, 1).mean()
    density = np.minimum((between <= clipped[:, None]).sum(axis=0) / k, 1).mean() / real_density
    covered = np.minimum((between <= radius[:, None]).sum(axis=1), k).mean() / k
    coverage = np.interp(covered, _expected_coverage(n, m, k), np.arange(m + 1) / m)
    return ClippedDensityCoverage(float(min(density, 1.0)), float(coverage))


@lru_cache
def _expected_coverage(n: int, m: int, k: int) -> np.ndarray:
    """Mean of min(volumes in a real ball, k) / k for 0 to m good volumes: their number is beta-binomial."""
    log_gamma = np.array([0.0] + [lgamma(i) for i in range(1, n + m + 1)])  # at 0, which is never used, 0
    good, missing = np.arange(m + 1), np.zeros(m + 1)
    for j in range(k):
        i = good[j:]
        log_p = log_gamma[i + 1] - log_gamma[j + 1] - log_gamma[i - j + 1]  # binomial coefficient
        log_p = log_p + log_gamma[k + j] + log_gamma[n - k + i - j] - log_gamma[n + i]  # Beta(k + j, n - k + i - j)
        log_p = log_p + log_gamma[n] - log_gamma[k] - log_gamma[n - k]  # over Beta(k, n - k)
        missing[j:] += (k - j) / k * np.exp(log_p)
    return 1 - missing


def _check_neighbours(k: int) -> None:
    if k < 1:
        raise DataError(f"the number of neighbours must be at least 1, got {k}", field="k", fix="use 5")


def _radii(squared: np.ndarray, k: int) -> np.ndarray:
    """Squared distance of each row to its k-th nearest other row, from squared distances within one set."""
    return np.partition(squared, k, axis=1)[:, k]  # the distance to itself is the smallest
