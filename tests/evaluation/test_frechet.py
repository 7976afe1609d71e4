"""Fréchet distance: closed forms, the dense matrix root, invariances, its known bias, and unusable input."""

from __future__ import annotations

import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch

from ccella_fast.errors import DataError
from ccella_fast.evaluation import frechet, frechet_distance
from ccella_fast.evaluation.frechet import FrechetDistances, frechet_distance_at_infinity


def normal(n: int, d: int, seed: int = 0, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, scale, (n, d))


def dense(a: np.ndarray, b: np.ndarray, ddof: int = 1) -> float:
    """The definition, with the symmetric matrix root by eigen-decomposition."""
    cov_a, cov_b = (np.atleast_2d(np.cov(x, rowvar=False, ddof=ddof)) for x in (a, b))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross)


def with_moments(n: int, mean: np.ndarray, variance: np.ndarray, seed: int) -> np.ndarray:
    """A sample whose mean is exactly `mean` and whose unbiased covariance is exactly diagonal."""
    x = normal(n, len(mean), seed)
    q, _ = np.linalg.qr(x - x.mean(0))
    return q * np.sqrt(n - 1) * np.sqrt(variance) + mean


@pytest.mark.parametrize(("n", "m", "d"), [(40, 60, 1), (40, 60, 7), (300, 200, 32)])
def test_equals_the_closed_form_of_diagonal_gaussians(n, m, d):
    rng = np.random.default_rng(1)
    mean_a, mean_b, var_a, var_b = rng.normal(size=d), rng.normal(size=d), rng.uniform(0.1, 3, d), rng.uniform(0, 2, d)
    expected = np.square(mean_a - mean_b).sum() + np.square(np.sqrt(var_a) - np.sqrt(var_b)).sum()
    found = frechet_distance(with_moments(n, mean_a, var_a, 2), with_moments(m, mean_b, var_b, 3))
    assert found == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("n", "m", "d"),
    [(2, 2, 5), (2, 9, 1), (20, 30, 50), (30, 30, 30), (31, 31, 30), (90, 20, 30), (20, 90, 30), (90, 80, 30)],
)
def test_equals_the_dense_form_for_any_shape(n, m, d):
    mix = normal(d, d, 5)
    a, b = normal(n, d, 6) @ mix, normal(m, d, 7, 1.3, 0.2) @ mix
    # The dense form takes square roots of rounding errors of rank-deficient matrices: its error, not ours.
    assert frechet_distance(a, b) == pytest.approx(dense(a, b), rel=1e-8 if min(n, m) > d else 2e-6)
    assert frechet_distance(a, b) != pytest.approx(dense(a, b, ddof=0), rel=1e-4)  # negative control: biased covariance


def test_the_case_of_monai():
    """The case of MONAI's own test of FIDMetric: 4/9."""
    a, b = np.array([[1.0, 2]] * 3), np.array([[2.0, 2], [1, 2], [1, 2]])
    assert frechet_distance(a, b) == pytest.approx(4 / 9, abs=1e-12)


@pytest.mark.parametrize(("n", "d"), [(2, 3), (400, 40), (50, 300), (300, 300)])
@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_identical_sets_in_any_order_have_distance_zero(n, d, scale):
    a = normal(n, d, 1, scale, 5 * scale)
    assert frechet_distance(a, a[::-1]) <= 1e-6 * min(1, scale**2)
    assert frechet_distance(a, 1.01 * a) > 0


@pytest.mark.parametrize(("n", "m", "d"), [(60, 40, 10), (20, 30, 80)])
def test_symmetry_and_invariances(n, m, d):
    a, b = normal(n, d, 1), normal(m, d, 2, 1.5, 0.3)
    value = frechet_distance(a, b)
    rng = np.random.default_rng(3)
    rotation, _ = np.linalg.qr(rng.normal(size=(d, d)))
    assert frechet_distance(b, a) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(rng.permutation(a), rng.permutation(b)) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(value, rel=1e-10)
    assert frechet_distance(a + 1e6, b + 1e6) == pytest.approx(value, rel=1e-6)
    for scale in (1e-150, 1e-30, 1e30, 1e150):
        assert frechet_distance(a * scale, b * scale) == pytest.approx(value * scale**2, rel=1e-10)
    assert frechet_distance(a + 1, b) != pytest.approx(value, rel=1e-3)  # negative control


def test_float32_and_lists_are_accepted_and_not_changed():
    a, b = normal(30, 8, 1).astype(np.float32), normal(40, 8, 2).astype(np.float32)
    before = a.copy()
    expected = dense(a.astype(np.float64), b.astype(np.float64))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(a.tolist(), b.tolist()) == pytest.approx(expected, rel=1e-8)
    assert isinstance(frechet_distance(a, b), float) and (a == before).all()


BIAS = [
    (100, 64, 0.17),
    (100, 256, 0.50),
    (100, 2048, 0.82),
    (200, 64, 0.09),
    (200, 256, 0.32),
    (400, 64, 0.04),
    (400, 256, 0.16),
]


@pytest.mark.parametrize(("n", "d", "share"), BIAS)
def test_bias_between_two_samples_of_one_distribution(n, d, share):
    """The share of both traces that two samples of one Gaussian are apart, to 10 % and the rounding of the table."""
    draws = [frechet_distance(normal(n, d, 2 * seed), normal(n, d, 2 * seed + 1)) for seed in range(3)]
    assert np.mean(draws) / (2 * d) == pytest.approx(share, abs=max(0.1 * share, 0.005))


@pytest.mark.parametrize(("n", "m", "d"), [(50, 40, 8), (50, 40, 100)])
def test_subsets_of_stacked_sets_equal_the_distance_of_the_subsets(n, m, d):
    a, b = normal(n, d, 1), normal(m, d, 2, 1.4, 0.2)
    distances, rng = FrechetDistances(a, b), np.random.default_rng(3)
    for size_a, size_b in ((2, 2), (20, 10), (15, 30)):
        rows_a, rows_b = rng.permutation(n)[:size_a], rng.permutation(m)[:size_b]
        expected = frechet_distance(a[rows_a], b[rows_b])
        assert distances(rows_a, n + rows_b) == pytest.approx(expected, rel=1e-9)
    assert distances(np.arange(20), np.arange(20, 40)) == pytest.approx(frechet_distance(a[:20], a[20:40]), rel=1e-9)


def test_large_sets_are_reduced_in_blocks(monkeypatch):
    a, b = normal(700, 12, 1), normal(500, 12, 2, 1.1)
    expected = frechet_distance(a, b)
    monkeypatch.setattr("ccella_fast.evaluation.frechet._QR_ROWS", 64)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_extrapolation_removes_the_bias_and_is_refused_for_few_volumes():
    d, n = 10, 400
    a, b = normal(n, d, 1), normal(n, d, 2, 1.2, 0.3)
    truth = d * (0.3**2 + 0.2**2)
    found = frechet_distance_at_infinity(a, b)
    plain = frechet_distance(a[: n // 3], b[: n // 3])
    assert abs(found.value - truth) < 0.25 * abs(plain - truth) and found.slope > 0
    assert frechet_distance_at_infinity(a, b) == found
    with pytest.raises(DataError, match="n = 19 volumes and d = 10 features"):
        frechet_distance_at_infinity(a[:19], b)
    frechet_distance_at_infinity(a[:20], b)


@pytest.mark.parametrize(
    ("a", "b", "words"),
    [
        (normal(1, 4), normal(5, 4), "first set has 1 volume; this needs at least 2"),
        (normal(5, 4), normal(0, 4), "second set has 0 volumes"),
        (normal(5, 4), normal(5, 3), "first set has 4 features per volume and the second set 3"),
        (
            np.where(np.eye(4) > 0, np.nan, 1.0),
            normal(5, 4),
            "4 of 4 rows of the first set are not finite; the first is row 0",
        ),
        (normal(5, 4), np.full((3, 4), np.inf), "not finite"),
        (normal(5, 4)[0], normal(5, 4), "must have the shape"),
        (normal(5, 4)[:, :0], normal(5, 4), "must have the shape"),
        (normal(5, 4) + 1j, normal(5, 4), "must be real numbers, not complex128"),
        (np.array([["a"]] * 3), normal(5, 1), "must be real numbers"),
    ],
)
def test_unusable_input_is_named(a, b, words):
    with pytest.raises(DataError, match=words):
        frechet_distance(a, b)


def test_the_other_metrics_need_neither_scipy_nor_torch():
    code = (
        "import sys; sys.modules['scipy'] = None\n"
        "import numpy as np, ccella_fast.evaluation as e\n"
        "x = np.random.default_rng(0).normal(size=(30, 3))\n"
        "e.kernel_distance(x, x); e.precision_recall(x, x); e.memorisation(x, x + 1, x)\n"
        "assert callable(e.memorisation) and callable(e.kernel_distance)\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_needs_no_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)  # its import fails
    fresh = runpy.run_path(frechet.__file__)
    assert fresh["frechet_distance"](normal(30, 3), normal(30, 3)) == 0


@pytest.mark.parametrize(("n", "d"), [(50, 80), (50, 20)], ids=["products", "triangles"])
def test_decomposes_on_one_thread_and_restores_the_number(monkeypatch, n, d):
    """With more threads, LAPACK is many times slower next to another program."""
    used, svdvals = [], torch.linalg.svdvals

    def observed(matrix):
        used.append(torch.get_num_threads())
        return svdvals(matrix)

    monkeypatch.setattr(torch.linalg, "svdvals", observed)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        frechet_distance(normal(n, d), normal(n, d, 1))
        assert used == [1] and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
