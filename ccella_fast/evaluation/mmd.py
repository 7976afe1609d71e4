"""Maximum mean discrepancy between two sets of features: the kernel distance KID and the MMD with a Gaussian kernel.

    MMD^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y),   x != x' from one set, y != y' from the other

(Gretton et al. 2012, JMLR 13, equation 3). Without the terms k(x, x) it is unbiased: its expectation is 0 for two sets of one
distribution at any n, and single values are then often negative.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from ccella_fast.errors import DataError
from ccella_fast.evaluation.neighbours import squared_distances
from ccella_fast.evaluation.statistics import feature_pair, group_numbers

_BLOCK = 2048  # rows of a kernel matrix that are in memory at once


def kernel_distance(a: Any, b: Any) -> float:
    """KID (Bińkowski et al. 2018, arXiv 1801.01401, section 4): unbiased MMD^2 with the kernel (x.y / d + 1)^3, in float64.

    Args:
        a: (n, d) features, n at least 2.
        b: (m, d) features, m at least 2.

    Returns:
        The squared discrepancy. It may be negative, which means: no difference was found.

    Raises:
        DataError: if a set has fewer than two rows, values that are not finite, or another number of features.
    """
    a, b = feature_pair(a, b)
    within = [(_kernel_sum(x, x) - float(_polynomial(np.square(x).sum(axis=1), x.shape[1]).sum())) for x in (a, b)]
    means = [total / (len(x) * (len(x) - 1)) for total, x in zip(within, (a, b), strict=True)]
    return means[0] + means[1] - 2 * _kernel_sum(a, b) / (len(a) * len(b))


def _polynomial(products: np.ndarray, d: int) -> np.ndarray:
    return (products / d + 1) ** 3


def _kernel_sum(a: np.ndarray, b: np.ndarray) -> float:
    blocks = (a[start : start + _BLOCK] for start in range(0, len(a), _BLOCK))
    return sum(float(_polynomial(block @ b.T, b.shape[1]).sum()) for block in blocks)


def polynomial_kernel(features: np.ndarray) -> np.ndarray:
    """(x.y / d + 1)^3 between all rows of (n, d) features: (n, n), float64."""
    return _polynomial(features @ features.T, features.shape[1])


def gaussian_kernel(features: np.ndarray, n_real: int) -> np.ndarray:
    """exp(-|x - y|^2 / (2 s^2)) between all rows; s is the median distance between real volumes, the first `n_real` rows.

    The width depends on the real set alone: a synthetic set cannot choose the ruler that measures it. The idea of a Gaussian
    kernel on features of volumes: Jayasumana et al. 2024 (CMMD, arXiv 2401.09603).

    Raises:
        DataError: if at least half of the pairs of real volumes are equal.
    """
    squared = squared_distances(features, features)
    median = float(np.median(np.sqrt(squared[:n_real, :n_real][np.triu_indices(n_real, 1)])))
    if median == 0:
        why = "the median distance between real volumes is 0: half of all pairs have the same features"
        raise DataError(why, field="real", fix="remove duplicates from the real set")
    return np.exp(squared / (-2 * median**2))


def gaussian_distance(real: Any, synthetic: Any) -> float:
    """Unbiased MMD^2 with the Gaussian kernel of `gaussian_kernel`; between -2 and 2, and 0 for equal distributions.

    Args:
        real: (n, d) features, n at least 2; they determine the width of the kernel.
        synthetic: (m, d) features, m at least 2.
    """
    a, b = feature_pair(real, synthetic, ("real", "synthetic"))
    kernel = gaussian_kernel(np.concatenate([a, b]), len(a))
    return unbiased_mmd(kernel, np.arange(len(a)), len(a) + np.arange(len(b)))


def unbiased_mmd(kernel: np.ndarray, rows_a: np.ndarray, rows_b: np.ndarray) -> float:
    """Unbiased MMD^2 between two subsets of the rows of a kernel matrix."""
    n, m = len(rows_a), len(rows_b)
    if min(n, m) < 2:
        raise DataError("an unbiased kernel distance needs at least two volumes in each set", fix="add volumes")
    aa, bb, ab = (kernel[np.ix_(*rows)] for rows in ((rows_a, rows_a), (rows_b, rows_b), (rows_a, rows_b)))
    within = (aa.sum() - np.trace(aa)) / (n * (n - 1)) + (bb.sum() - np.trace(bb)) / (m * (m - 1))
    return float(within - 2 * ab.mean())


class KernelTest(NamedTuple):
    """A kernel distance and how certain it is.

    Attributes:
        value: unbiased MMD^2 between the whole sets.
        block_mean: mean over random subsets.
        block_sd: standard deviation over these subsets, as KID is usually printed.
        block_size: volumes in each subset.
        p: probability of a value at least as large when real and synthetic labels are exchanged at random.
    """

    value: float
    block_mean: float
    block_sd: float
    block_size: int
    p: float


def kernel_test(
    real: Any,
    synthetic: Any,
    kernel: Literal["polynomial", "gaussian"] = "polynomial",
    *,
    patients: Sequence[Hashable] | None = None,
    blocks: int = 100,
    permutations: int = 999,
    seed: int = 0,
) -> KernelTest:
    """A kernel distance with its spread over subsets and the p-value of a permutation test.

    Args:
        real: (n, d) features, n at least 2.
        synthetic: (m, d) features, m at least 2.
        kernel: `polynomial` for KID, `gaussian` for the MMD with the width of the real set.
        patients: of the real volumes; a permutation keeps those of one patient together.
        blocks: number of subsets, of 100 volumes from each set or half of the smaller set, without replacement.
        permutations: number of permutations. The smallest possible p is 1 / (permutations + 1).
        seed: of subsets and permutations.
    """
    a, b = feature_pair(real, synthetic, ("real", "synthetic"))
    stacked = np.concatenate([a, b])
    matrix = polynomial_kernel(stacked) if kernel == "polynomial" else gaussian_kernel(stacked, len(a))
    rng, rows_a, rows_b = np.random.default_rng(seed), np.arange(len(a)), len(a) + np.arange(len(b))
    size = max(2, min(100, len(a) // 2, len(b) // 2))
    values = [
        unbiased_mmd(matrix, rng.permutation(rows_a)[:size], rng.permutation(rows_b)[:size]) for _ in range(blocks)
    ]
    p = permutation_p(matrix, group_numbers(patients, len(a)), permutations, rng)
    value = unbiased_mmd(matrix, rows_a, rows_b)
    return KernelTest(value, float(np.mean(values)), float(np.std(values, ddof=1)), size, p)


def permutation_p(kernel: np.ndarray, real_groups: np.ndarray, permutations: int, rng: np.random.Generator) -> float:
    """p-value of the hypothesis that both sets have one distribution, exact at any n (Phipson and Smyth 2010).

    Args:
        kernel: matrix of the stacked sets, real rows first.
        real_groups: group of each real row, from 0; each synthetic volume is a group of its own.
        permutations: number of random permutations.
        rng: their source.
    """
    n = len(kernel)
    off_diagonal = kernel - np.diag(np.diag(kernel))
    count = int(real_groups.max()) + 1
    groups = np.concatenate([real_groups, count + np.arange(n - len(real_groups))])
    labels = np.tile((np.arange(groups.max() + 1) < count)[:, None], (1, permutations + 1))
    labels[:, 1:] = rng.permuted(labels[:, 1:], axis=0)  # the first column is the observation
    is_a = labels[groups].astype(float)
    to_a = off_diagonal @ is_a
    sum_a, sum_all = (is_a * to_a).sum(axis=0), to_a.sum(axis=0)
    n_a, n_b = is_a.sum(axis=0), n - is_a.sum(axis=0)
    sum_ab = sum_all - sum_a
    sum_b = off_diagonal.sum() - 2 * sum_ab - sum_a
    with np.errstate(divide="ignore", invalid="ignore"):  # sets of one volume, which can only be whole groups
        values = sum_a / (n_a * (n_a - 1)) + sum_b / (n_b * (n_b - 1)) - 2 * sum_ab / (n_a * n_b)
    values = values[np.isfinite(values)]
    # Equal permutations differ by rounding: they count as at least as large.
    scale = np.abs(off_diagonal).max()
    return float((values >= values[0] - 1e-12 * scale).sum() / len(values))
