"""Precision, recall, density, coverage: double loops, known answers, outliers, and the calibration of the clipped pair."""

from __future__ import annotations

import numpy as np
import pytest

from ccella_fast.errors import DataError
from ccella_fast.evaluation import precision_recall
from ccella_fast.evaluation.neighbours import clipped_density_coverage, precision_recall_of_rows, squared_distances


def normal(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (n, d))


def loops(real, synthetic, k):
    """The definitions, one ball at a time."""

    def radius(x, i):
        return sorted(np.linalg.norm(x[i] - x[j]) for j in range(len(x)) if j != i)[k - 1]

    inside_real = [[np.linalg.norm(y - x) <= radius(real, i) for y in synthetic] for i, x in enumerate(real)]
    inside_synthetic = [[np.linalg.norm(x - y) <= radius(synthetic, j) for j, y in enumerate(synthetic)] for x in real]
    precision = np.mean([any(row[j] for row in inside_real) for j in range(len(synthetic))])
    density = np.mean([sum(row[j] for row in inside_real) / k for j in range(len(synthetic))])
    return (
        precision,
        np.mean([any(row) for row in inside_synthetic]),
        density,
        np.mean([any(row) for row in inside_real]),
    )


@pytest.mark.parametrize(("n", "m", "d", "k"), [(20, 12, 2, 3), (12, 20, 5, 5), (8, 7, 1, 1)])
def test_equals_the_loops(n, m, d, k):
    real, synthetic = normal(n, d, 1), normal(m, d, 2, 0.7)
    found = precision_recall(real, synthetic, k=k)
    assert found == pytest.approx(loops(real, synthetic, k))
    assert found._fields == ("precision", "recall", "density", "coverage")
    assert found != pytest.approx(loops(real, synthetic, k + 1))  # negative control
    stacked = np.concatenate([synthetic, real])
    rows = m + np.arange(n), np.arange(m)
    assert precision_recall_of_rows(squared_distances(stacked, stacked), *rows, k) == pytest.approx(found)


@pytest.mark.parametrize("distance", [1e8, 1e12])
def test_a_far_outlier_leaves_the_distances_of_the_others(distance):
    """In the quick formula it moves the centre so far away that all other rows become equal."""
    real, synthetic = normal(20, 3, 1), normal(15, 3, 2, 0.7)
    real[0] = synthetic[0] = distance
    assert precision_recall(real, synthetic) == pytest.approx(loops(real, synthetic, 5))
    expected = np.square(synthetic[1:, None] - real[None, 1:]).sum(axis=2)
    np.testing.assert_allclose(squared_distances(synthetic, real)[1:, 1:], expected, rtol=1e-3 * distance / 1e12)
    assert squared_distances(synthetic, real)[0, 0] == 0


def test_known_answers_on_a_line():
    """Balls of k = 1 around 0, 1, 3 have the radii 1, 1, 2; around 0.5, 10, 11 they have 9.5, 1, 1."""
    real, synthetic = np.array([[0.0], [1], [3]]), np.array([[0.5], [10], [11]])
    assert precision_recall(real, synthetic, k=1) == pytest.approx((1 / 3, 1.0, 2 / 3, 2 / 3))
    assert precision_recall(synthetic, real, k=1) == pytest.approx((1.0, 1 / 3, 1.0, 1 / 3))


def test_identical_sets_are_covered_and_distant_sets_are_not():
    real = normal(40, 6, 1)
    same = precision_recall(real, real[::-1])
    assert same.precision == same.recall == same.coverage == 1.0
    assert precision_recall(real, real + 100) == (0, 0, 0, 0)
    twice = np.concatenate([real, real])  # duplicates, at distance 0 of one another
    assert precision_recall(twice, twice, k=1)[:2] == (1.0, 1.0)


def test_a_real_outlier_raises_precision_and_not_density():
    """Bad synthetic volumes lie around one real outlier far from all others (Naeem et al., figure 3)."""
    real, outlier = normal(200, 8, 1), np.full((1, 8), 12.0)
    synthetic = np.concatenate([normal(100, 8, 2), 12 + normal(100, 8, 3)])
    before, after = precision_recall(real, synthetic), precision_recall(np.concatenate([real, outlier]), synthetic)
    assert after.precision - before.precision > 0.4
    assert after.density - before.density < 0.15 and abs(after.coverage - before.coverage) < 0.01
    clipped = [clipped_density_coverage(x, synthetic) for x in (real, np.concatenate([real, outlier]))]
    assert clipped[1] == pytest.approx(clipped[0], abs=0.1)


@pytest.mark.parametrize("good", [0.0, 0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("m", [300, 120])
def test_the_clipped_pair_is_the_share_of_good_volumes(good, m):
    found = []
    for seed in range(4):
        real, synthetic = normal(300, 6, 3 * seed), normal(m, 6, 3 * seed + 1)
        synthetic[: round(m * (1 - good))] += 50
        found.append(clipped_density_coverage(real, synthetic))
    density, coverage = np.mean(found, axis=0)
    assert density == pytest.approx(good, abs=0.06) and coverage == pytest.approx(good, abs=0.09)


def test_clipped_coverage_sees_repeated_volumes_that_density_does_not():
    real = normal(300, 6, 1)
    found = clipped_density_coverage(real, np.repeat(normal(10, 6, 2), 30, axis=0))
    assert found.coverage < 0.3 < found.density


def test_equal_rows_have_distance_zero():
    a = normal(30, 500, 1) + 1e3
    squared = squared_distances(a, a)
    assert (np.diag(squared) == 0).all()
    loops = np.array([[np.square(x - y).sum() for y in a] for x in a])
    assert np.allclose(squared, loops, rtol=1e-9, atol=1e-9)


def test_too_few_volumes_and_wrong_k_are_named():
    with pytest.raises(DataError, match="real set has 5 volumes; this needs at least 6"):
        precision_recall(normal(5, 2, 1), normal(9, 2, 2))
    with pytest.raises(DataError, match="synthetic set has 5 volumes"):
        precision_recall(normal(9, 2, 1), normal(5, 2, 2))
    with pytest.raises(DataError, match="at least 1, got 0"):
        precision_recall(normal(9, 2, 1), normal(9, 2, 2), k=0)
