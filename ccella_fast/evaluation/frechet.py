"""Fréchet distance between two sets of features (Heusel et al. 2017, arXiv 1706.08500, equation 6).

    |mean_a - mean_b|^2 + Tr(C_a) + Tr(C_b) - 2 Tr (C_a C_b)^(1/2)

With the centred rows A (n, d) and B (m, d), so that C_a = A^T A / (n - 1), the last trace is the sum of the singular values of
A B^T over the square root of (n - 1)(m - 1): exact for any n, m and d, without the root of a matrix. A set with more rows than
features is replaced by the triangle R of its QR decomposition, since A^T A = R^T R. So the singular values are those of a
matrix of at most min(n, d) x min(m, d).

These small matrices are decomposed by PyTorch, on one thread. OpenBLAS in NumPy divides each of the thousands of products of a
decomposition among the cores; next to another program its threads mostly wait for each other, and two take longer than one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch

from ccella_fast.errors import DataError
from ccella_fast.evaluation.statistics import feature_pair

# What is left of equal sets in float64, relative to the traces: a smaller distance is zero.
_ROUNDING = 1e-12
_QR_ROWS = 4096


def frechet_distance(a: Any, b: Any) -> float:
    """Fréchet distance between the Gaussians with the means and unbiased covariances of two sets, in float64.

    It is biased upwards: with n below d most of it is bias (`statistics.guards`), so it is read as a multiple of the distance
    between real sets of the same n (`statistics.compare_with_floor`).

    Args:
        a: (n, d) features, n at least 2.
        b: (m, d) features, m at least 2.

    Returns:
        The distance, at least 0, in the square of the features' unit.

    Raises:
        DataError: if a set has fewer than two rows, values that are not finite, or another number of features.
    """
    distances = FrechetDistances(*feature_pair(a, b))
    return distances(*distances.all_rows)


class FrechetDistances:
    """Fréchet distances between subsets of the rows of two stacked sets, with the products of all rows computed once.

    Args:
        a: (n, d) float64 features, checked.
        b: (m, d) float64 features, checked.
    """

    def __init__(self, a: np.ndarray, b: np.ndarray):
        features = np.concatenate([a, b])
        features -= features.mean(axis=0)
        # A power of two, so that scaling is exact and squares neither overflow nor underflow.
        self.exponent = int(np.frexp(np.abs(features).max())[1])
        self.features = np.ldexp(features, -self.exponent)
        self.all_rows = np.arange(len(a)), len(a) + np.arange(len(b))
        self.products: np.ndarray | None = None

    def __call__(self, rows_a: np.ndarray, rows_b: np.ndarray) -> float:
        """The distance between two subsets, given as row numbers of the stacked sets."""
        if min(len(rows_a), len(rows_b)) < 2:
            raise DataError("a Fréchet distance needs at least two volumes in each set", fix="add volumes")
        wide = min(len(rows_a), len(rows_b)) < self.features.shape[1]
        distance = self._from_products(rows_a, rows_b) if wide else self._from_triangles(rows_a, rows_b)
        return float(np.ldexp(distance, 2 * self.exponent))

    def _from_products(self, rows_a: np.ndarray, rows_b: np.ndarray) -> float:
        if self.products is None:
            self.products = self.features @ self.features.T
        aa, bb, ab = (self.products[np.ix_(*rows)] for rows in ((rows_a, rows_a), (rows_b, rows_b), (rows_a, rows_b)))
        means = aa.mean() + bb.mean() - 2 * ab.mean()
        trace_a = (np.trace(aa) - len(aa) * aa.mean()) / (len(aa) - 1)
        trace_b = (np.trace(bb) - len(bb) * bb.mean()) / (len(bb) - 1)
        cross = ab - ab.mean(axis=0) - ab.mean(axis=1, keepdims=True) + ab.mean()
        return distance_of_parts(max(means, 0.0), trace_a, trace_b, cross / np.sqrt((len(aa) - 1) * (len(bb) - 1)))

    def _from_triangles(self, rows_a: np.ndarray, rows_b: np.ndarray) -> float:
        a, b = self.features[rows_a], self.features[rows_b]
        mean_a, mean_b = a.mean(axis=0), b.mean(axis=0)
        a, b = (a - mean_a) / np.sqrt(len(a) - 1), (b - mean_b) / np.sqrt(len(b) - 1)
        means = float(np.square(mean_a - mean_b).sum())
        return distance_of_parts(means, np.square(a).sum(), np.square(b).sum(), _triangle(a) @ _triangle(b).T)


def distance_of_parts(means: float, trace_a: float, trace_b: float, cross: np.ndarray) -> float:
    """The distance from the squared distance of the means, the traces and the matrix whose singular values are summed."""
    with one_thread():
        distance = means + trace_a + trace_b - 2 * float(torch.linalg.svdvals(torch.from_numpy(cross)).sum())
    return float(distance) if distance > _ROUNDING * (trace_a + trace_b) else 0.0


def _triangle(centred: np.ndarray) -> np.ndarray:
    """A matrix with the same product with itself and at most as many rows as columns."""
    rows = torch.from_numpy(centred)
    result = rows[:0]
    with one_thread():
        for part in rows.split(_QR_ROWS):
            result = torch.cat([result, part])
            if len(result) > result.shape[1]:
                result = torch.linalg.qr(result, mode="r").R
    return result.numpy()


@contextmanager
def one_thread() -> Iterator[int]:
    """Context manager in which PyTorch computes on one thread; it gives the number of threads outside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield threads
    finally:
        torch.set_num_threads(threads)


class FrechetAtInfinity(NamedTuple):
    """Fréchet distance extrapolated to infinitely many volumes."""

    value: float  # the intercept of the fit
    slope: float  # of the distance against 1 / n: the bias at n is slope / n
    standard_error: float  # of the intercept, from the residuals of the fit


def can_extrapolate(n: int, m: int, d: int) -> bool:
    """Whether sets of n and m volumes with d features are large enough for `frechet_distance_at_infinity`."""
    return min(n, m) >= 2 * d


def frechet_distance_at_infinity(
    a: Any, b: Any, *, sizes: int = 15, draws: int = 10, seed: int = 0
) -> FrechetAtInfinity:
    """FID_infinity: a line through the distances at several n against 1 / n (Chong and Forsyth 2020, arXiv 1911.07023).

    The bias depends on the generator, so an equal n does not remove it; the extrapolation does to first order in 1 / n. Both
    sets are subsampled, to 15 sizes from n/3 to n, where n is the size of the smaller set.

    Args:
        a: (n, d) features.
        b: (m, d) features.
        sizes: number of sizes in the fit.
        draws: subsets per size, without replacement.
        seed: of the subsets.

    Raises:
        DataError: if n is below 2 d, where the distance is not linear in 1 / n.
    """
    a, b = feature_pair(a, b)
    n, d = min(len(a), len(b)), a.shape[1]
    if not can_extrapolate(len(a), len(b), d):
        why = f"extrapolating to infinitely many volumes needs n >= 2 d; here n = {n} volumes and d = {d} features"
        raise DataError(why, fix="use the ratio to the real-real floor at equal n")
    rng, distance = np.random.default_rng(seed), FrechetDistances(a, b)
    counts = np.unique(np.linspace(max(n / 3, 2), n, sizes).astype(int))
    rows_a, rows_b = distance.all_rows
    means = [
        np.mean([distance(rng.permutation(rows_a)[:count], rng.permutation(rows_b)[:count]) for _ in range(draws)])
        for count in counts
    ]
    design = np.stack([np.ones(len(counts)), 1 / counts], axis=1)
    (value, slope), residual, *_ = np.linalg.lstsq(design, np.array(means), rcond=None)
    variance = float(residual[0]) / (len(counts) - 2) if len(residual) and len(counts) > 2 else 0.0
    error = np.sqrt(variance * np.linalg.inv(design.T @ design)[0, 0])
    return FrechetAtInfinity(float(value), float(slope), float(error))
