"""Kernel distances: the definition as a double loop, no bias, and p-values that are uniform for equal distributions."""

from __future__ import annotations

import numpy as np
import pytest

from ccella_fast.errors import DataError
from ccella_fast.evaluation import kernel_distance
from ccella_fast.evaluation.mmd import (
    gaussian_distance,
    gaussian_kernel,
    kernel_test,
    permutation_p,
    polynomial_kernel,
    unbiased_mmd,
)


def normal(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (n, d))


def loops(a, b, kernel, unbiased: bool = True) -> float:
    """Equation 3 of Gretton et al., term by term."""

    def mean(x, y, same):
        terms = [kernel(x[i], y[j]) for i in range(len(x)) for j in range(len(y)) if not (same and i == j)]
        return sum(terms) / len(terms)

    return mean(a, a, unbiased) + mean(b, b, unbiased) - 2 * mean(a, b, False)


def cubic(x, y) -> float:
    return (sum(p * q for p, q in zip(x.tolist(), y.tolist(), strict=True)) / len(x) + 1) ** 3


@pytest.mark.parametrize(("n", "m", "d"), [(2, 2, 1), (7, 12, 3), (12, 7, 30)])
def test_kid_equals_the_double_loop(n, m, d, monkeypatch):
    a, b = normal(n, d, 1), normal(m, d, 2, 0.5)
    assert kernel_distance(a, b) == pytest.approx(loops(a, b, cubic), rel=1e-10)
    assert kernel_distance(a, b) != pytest.approx(loops(a, b, cubic, unbiased=False), rel=1e-3)  # negative control
    monkeypatch.setattr("ccella_fast.evaluation.mmd._BLOCK", 5)
    assert kernel_distance(a.astype(np.float32), b) == pytest.approx(loops(a, b, cubic), rel=1e-4)
    stacked = polynomial_kernel(np.concatenate([a, b]))
    assert unbiased_mmd(stacked, np.arange(n), n + np.arange(m)) == pytest.approx(loops(a, b, cubic), rel=1e-10)


def test_gaussian_distance_equals_the_double_loop_with_the_median_of_the_real_set():
    a, b = normal(9, 4, 1), normal(6, 4, 2, 0.5)
    pairs = [np.linalg.norm(a[i] - a[j]) for i in range(9) for j in range(i)]
    width = np.median(pairs)

    def gaussian(x, y):
        return np.exp(-np.square(x - y).sum() / (2 * width**2))

    assert gaussian_distance(a, b) == pytest.approx(loops(a, b, gaussian), rel=1e-10)
    far = np.concatenate([b[:-1], b[-1:] + 1e3])  # the synthetic set does not change the width
    kernels = [gaussian_kernel(np.concatenate([a, x]), 9)[:9, :9] for x in (b, far)]
    assert (abs(kernels[0] - kernels[1]) < 1e-9).all()
    with pytest.raises(DataError, match="median distance between real volumes is 0"):
        gaussian_distance(np.zeros((5, 2)), b[:, :2])


@pytest.mark.parametrize("distance", [kernel_distance, gaussian_distance])
def test_unbiased_and_often_negative_for_one_distribution(distance):
    values = np.array([distance(normal(25, 4, 2 * seed), normal(20, 4, 2 * seed + 1)) for seed in range(200)])
    error = values.std(ddof=1) / np.sqrt(len(values))
    assert abs(values.mean()) < 2 * error
    assert 0.3 < (values < 0).mean() < 0.8
    shifted = np.array([distance(normal(25, 4, 2 * seed), normal(20, 4, 2 * seed + 1, 0.4)) for seed in range(200)])
    assert shifted.mean() > 5 * error  # negative control


def uniformity(p: np.ndarray) -> float:
    """The Kolmogorov-Smirnov distance to the uniform distribution, times the root of n: below 1.63 with probability 0.99."""
    p = np.sort(p)
    steps = np.arange(len(p) + 1) / len(p)
    return float(np.sqrt(len(p)) * max((steps[1:] - p).max(), (p - steps[:-1]).max()))


def p_values(make, groups, runs: int = 150) -> np.ndarray:
    found = []
    for seed in range(runs):
        rng = np.random.default_rng(seed)
        kernel = polynomial_kernel(make(rng))
        found.append(permutation_p(kernel, groups, 199, rng))
    return np.array(found)


def test_p_is_uniform_for_one_distribution_and_small_for_two():
    alone = np.arange(14)
    assert uniformity(p_values(lambda rng: rng.normal(size=(24, 3)), alone)) < 1.63
    shifted = p_values(lambda rng: np.concatenate([rng.normal(size=(14, 3)), rng.normal(1, 1, (10, 3))]), alone, 50)
    assert uniformity(shifted) > 3 and np.median(shifted) < 0.02


@pytest.mark.parametrize("groups", [[0, 1, 2, 3], [0, 0, 1, 1, 1, 2]])
def test_p_equals_explicit_permutations_of_patients(groups):
    n, m = len(groups), 3
    x = normal(n + m, 2, 3)
    x[n:] += 0.5
    units = [np.flatnonzero(np.array(groups) == g).tolist() for g in range(max(groups) + 1)] + [
        [n + i] for i in range(m)
    ]
    is_real = np.arange(len(units)) <= max(groups)
    drawn = np.random.default_rng(5).permuted(np.tile(is_real[:, None], (1, 60)), axis=0).T
    values = []
    for labels in [is_real, *drawn]:
        rows = [
            [i for unit, label in zip(units, labels, strict=True) if label == side for i in unit] for side in (1, 0)
        ]
        values.append(loops(x[rows[0]], x[rows[1]], cubic))
    expected = np.mean(np.array(values) >= values[0] - 1e-9)
    assert permutation_p(polynomial_kernel(x), np.array(groups), 60, np.random.default_rng(5)) == pytest.approx(
        expected
    )
    assert 0.05 < expected < 0.95


def test_p_needs_the_patients_of_clustered_volumes():
    """Three nearly equal volumes per patient. Permuting single volumes finds a difference where there is none."""

    def make(rng):
        patients = np.repeat(rng.normal(size=(7, 3)), 3, axis=0) + 0.05 * rng.normal(size=(21, 3))
        return np.concatenate([patients, rng.normal(size=(10, 3))])

    by_patient, by_volume = p_values(make, np.repeat(np.arange(7), 3)), p_values(make, np.arange(21))
    assert (by_patient <= 0.05).mean() < 0.12 < (by_volume <= 0.05).mean()


def test_smallest_p_and_blocks():
    a, b = normal(60, 3, 1), normal(50, 3, 2, 2.0)
    found = kernel_test(a, b, permutations=49)
    assert found.p == 1 / 50 and found.block_size == 25
    assert found.value == pytest.approx(kernel_distance(a, b), rel=1e-10)
    assert abs(found.block_mean - found.value) < 3 * found.block_sd / 5 and found.block_sd > 0
    assert kernel_test(a, b, permutations=49) == found
    same = kernel_test(a, a, "gaussian", permutations=49)
    assert same.p == 1.0 and same.value < 0  # the smallest of all values


@pytest.mark.parametrize("function", [kernel_distance, gaussian_distance, kernel_test])
def test_one_volume_is_refused(function):
    with pytest.raises(DataError, match="1 volume; this needs at least 2"):
        function(normal(1, 3, 1), normal(5, 3, 2))
