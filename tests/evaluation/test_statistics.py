"""Splits by patient, standardisation, floors and ratios, and the coverage of the intervals by simulation."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pytest

from ccella_fast.errors import DataError
from ccella_fast.evaluation.frechet import FrechetDistances, frechet_distance
from ccella_fast.evaluation.mmd import polynomial_kernel, unbiased_mmd
from ccella_fast.evaluation.neighbours import precision_recall_of_rows, squared_distances
from ccella_fast.evaluation.statistics import (
    _central,
    compare_with_floor,
    disjoint_rows,
    feature_matrix,
    group_numbers,
    grouped_folds,
    guards,
    largest_half,
    share_interval,
    standardisation,
)


def test_rows_of_different_lengths_are_named():
    with pytest.raises(DataError, match="the rows of the odd set have different numbers of features"):
        feature_matrix([[1.0, 2.0], [3.0]], "odd")


def test_standardisation_is_that_of_the_reference_set():
    rng = np.random.default_rng(1)
    reference = rng.normal(3, 2, (50, 4)).astype(np.float32)
    reference[:, 1] = 1000.1  # constant up to the rounding of float32
    reference[::2, 1] = np.nextafter(np.float32(1000.1), np.float32(2000))
    reference[:, 3] *= 1e-5  # small, but not constant
    found = standardisation(reference)
    assert found.kept.tolist() == [True, False, True, True]
    inside = found.apply(reference)
    assert np.allclose(inside.mean(0), 0, atol=1e-6) and np.allclose(inside.std(0, ddof=1), 1)
    other = rng.normal(5, 1, (30, 4))
    expected = (other - reference.mean(0, dtype=float)) / reference.std(0, ddof=1, dtype=float)
    assert np.allclose(found.apply(other), expected[:, [0, 2, 3]], rtol=1e-6)
    assert found.apply(other[:1]).shape == (1, 3)
    with pytest.raises(DataError, match="all 4 features are constant in the training set of 5 volumes"):
        standardisation(np.ones((5, 4)), "training")
    with pytest.raises(DataError, match="5 features per volume and the reference set 4"):
        found.apply(np.ones((3, 5)))


def test_none_is_a_patient_of_its_own():
    assert group_numbers(["a", None, "b", "a", None], 5).tolist() == [0, 1, 2, 0, 3]
    assert group_numbers(None, 3).tolist() == [0, 1, 2]
    assert (
        len(set(group_numbers([(1,), None, "None"], 3))) == 3
    )  # the name of a patient is not taken for a row without one
    with pytest.raises(DataError, match="2 patients for 3 volumes"):
        group_numbers(["a", "b"], 3)


@pytest.mark.parametrize("seed", range(30))
def test_no_patient_is_split_and_no_row_is_used_twice(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 60))
    groups = np.unique(rng.integers(0, int(rng.integers(1, n + 1)), n), return_inverse=True)[1]
    m = largest_half(groups)
    for _ in range(20):
        a, b = disjoint_rows(groups, (m, m), rng)
        assert len(set(a)) == len(set(b)) == m
        assert not set(groups[a]) & set(groups[b])
    fold = grouped_folds(groups, 3, rng)
    assert all(len(set(fold[groups == group])) == 1 for group in range(groups.max() + 1))


def test_splits_are_uniform():
    """Each row is in the first half equally often, also one of a large group."""
    rng, groups = np.random.default_rng(1), np.array([0, 0, 0, 1, 2, 3, 4, 5])
    m, counts = largest_half(groups), np.zeros(8)
    assert m == 3
    for _ in range(4000):
        counts[disjoint_rows(groups, (m, m), rng)[0]] += 1
    assert np.ptp(counts[3:]) < 200 and np.ptp(counts[:3]) < 200
    assert largest_half(np.arange(9)) == 4 and largest_half(np.zeros(9, dtype=int)) == 0


def test_folds_have_nearly_equal_sizes():
    fold = grouped_folds(np.arange(23), 5, np.random.default_rng(1))
    assert sorted(np.bincount(fold)) == [4, 4, 5, 5, 5]


def test_the_draws_have_equal_sizes_and_no_duplicates():
    calls = []

    def statistic(a, b):
        calls.append((a, b))
        return float(len(a))

    patients = ["p", "p", "q", "q", "r", "s", "t", "u", "v", "w"]
    found = compare_with_floor(statistic, 10, 7, patients=patients, draws=40)
    (all_real, all_synthetic), rest = calls[0], calls[1:]
    assert all_real.tolist() == list(range(10)) and all_synthetic.tolist() == list(range(10, 17))
    assert found.m == 4 and found.draws == 40 and found.guards == []  # (10 - 2 + 1) // 2
    groups = group_numbers(patients, 10)
    for a, b in rest:
        assert len(set(a)) == len(a) and len(set(b)) == len(b) and not set(a) & set(b)
        assert (a < 10).all() and ((b < 10).all() or (b >= 10).all())
        if (b < 10).all():
            assert not set(groups[a]) & set(groups[b])
    sizes = {(len(a), len(b), bool((b < 10).all())) for a, b in rest}
    assert sizes == {(4, 4, False), (4, 4, True), (5, 3, False), (2, 2, True)}


def distances(a, b):
    return FrechetDistances(a, b), len(a), len(b)


def normal(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, scale, (n, d))


def test_the_ratio_is_one_for_real_volumes_and_larger_for_others():
    real = normal(80, 20, 1)
    same = compare_with_floor(*distances(real, normal(50, 20, 2)))
    assert same.ratio == pytest.approx(1, abs=0.15) and same.ratio_ci95[0] < 1 < same.ratio_ci95[1]
    assert same.m == 40 and same.value < same.value_equal_n  # fewer volumes, more bias
    assert same.floor_ci95[0] < same.floor < same.floor_ci95[1]
    other = compare_with_floor(*distances(real, normal(50, 20, 2, 1.3, 0.5)))
    assert other.ratio > 1.5 and other.ratio_ci95[0] > 1 and other.ci95[0] < other.value < other.ci95[1]
    assert other.floor == pytest.approx(same.floor)
    assert compare_with_floor(*distances(real, normal(50, 20, 2))) == same
    assert compare_with_floor(*distances(real, normal(50, 20, 2)), seed=1) != same


def test_an_unbiased_distance_has_a_floor_of_zero_and_no_ratio():
    kernel = polynomial_kernel(np.concatenate([normal(60, 5, 1), normal(40, 5, 2, 1.0, 1.0)]))
    found = compare_with_floor(lambda a, b: unbiased_mmd(kernel, a, b), 60, 40)
    assert abs(found.floor) < 0.2 * found.value and found.ratio is None and found.ratio_ci95 is None
    assert found.ci95[0] > 0


def test_a_statistic_of_several_fields_has_a_comparison_in_each():
    squared = squared_distances(x := np.concatenate([normal(40, 4, 1), normal(30, 4, 2)]), x)
    found = compare_with_floor(lambda a, b: precision_recall_of_rows(squared, a, b), 40, 30, least=6, draws=20)
    whole = precision_recall_of_rows(squared, np.arange(40), 40 + np.arange(30))
    assert found._fields == whole._fields and [c.value for c in found] == list(whole)
    assert found.recall.floor == pytest.approx(found.recall.value_equal_n, abs=0.15)
    assert found.precision.draws == 20 and len({c.floor for c in found}) > 1


def test_few_volumes_have_no_floor_and_no_interval():
    two = compare_with_floor(*distances(normal(3, 4, 1), normal(3, 4, 2)))
    assert (two.floor, two.ratio, two.ci95, two.guards) == (None, None, None, ["no_floor"]) and two.value > 0
    one_patient = compare_with_floor(*distances(normal(9, 4, 1), normal(9, 4, 2)), patients=["p"] * 9)
    assert one_patient.guards == ["no_floor"] and one_patient.m == 0
    four = compare_with_floor(*distances(normal(4, 4, 1), normal(2, 4, 2)))
    assert four.m == 2 and four.floor > 0 and four.ci95 is None and four.ratio_ci95 is None
    with pytest.raises(DataError, match="two volumes"):
        compare_with_floor(*distances(normal(1, 4, 1), normal(5, 4, 2)))


@pytest.mark.parametrize(
    ("n", "m", "d", "words"),
    [
        (1, 500, 3, ["one_volume", "few", "n<d"]),
        (19, 500, 3, ["few"]),
        (20, 500, 20, ["n<d"]),
        (500, 20, 19, ["biased"]),
        (60, 60, 20, []),
        (59, 60, 20, ["biased"]),
    ],
)
def test_guards(n, m, d, words):
    assert guards(n, m, d) == words


def coverage(real, synthetic, n, m, runs=80, truth_runs=250):
    """Shares of simulated studies whose intervals contain the expectation of the value and the ratio of expectations.

    And the mean width of the intervals of the value over the width of the central 95 % of the values of all studies."""
    rng, h = np.random.default_rng(1), min(n // 2, m)

    def values(draw_a, draw_b, size_a, size_b):
        sets = ((draw_a(size_a, rng), draw_b(size_b, rng)) for _ in range(truth_runs))
        return np.array([frechet_distance(a, b) for a, b in sets])

    truth = values(real, synthetic, n, m)
    ratio = values(real, synthetic, h, h).mean() / values(real, real, h, h).mean()
    found = [compare_with_floor(*distances(real(n, rng), synthetic(m, rng)), draws=40, seed=i) for i in range(runs)]
    return (
        np.mean([c.ci95[0] <= truth.mean() <= c.ci95[1] for c in found]),
        np.mean([c.ratio_ci95[0] <= ratio <= c.ratio_ci95[1] for c in found if c.ratio_ci95]),
        np.mean([c.ci95[1] - c.ci95[0] for c in found]) / np.ptp(np.quantile(truth, (0.025, 0.975))),
    )


@pytest.mark.parametrize(("n", "m", "d", "tail"), [(40, 24, 6, False), (40, 40, 4, True), (40, 15, 60, False)])
def test_intervals_cover_the_expectation(n, m, d, tail):
    """At least 93 % of the intervals of the value and of the ratio, and they are not much wider than necessary."""

    def real(count, rng):
        return rng.standard_t(5, (count, d)) if tail else rng.normal(size=(count, d))

    of_value, of_ratio, width = coverage(real, lambda c, rng: rng.normal(0.3, 1.2, (c, d)), n, m)
    assert of_value >= 0.93 and of_ratio >= 0.93 and 0.9 < width < 1.7


@pytest.mark.parametrize(("n", "t"), [(6, 2.5706), (12, 2.2010), (20, 2.0930), (38, 2.0262)])
def test_of_few_draws_the_interval_is_wider_than_their_range(n, t):
    """With the quantiles t of Student's distribution (n - 1 degrees of freedom), 19 of 20 new values are inside."""
    rng, hits, within_range = np.random.default_rng(n), [], []
    for _ in range(400):
        values, new = rng.normal(3, 2, n), rng.normal(3, 2)
        low, high = _central(values)
        assert high - low == pytest.approx(2 * t * values.std(ddof=1) * np.sqrt(1 + 1 / n), rel=1e-4)
        assert high + low == pytest.approx(2 * values.mean())
        hits.append(low <= new <= high)
        within_range.append(values.min() <= new <= values.max())
    assert np.mean(hits) > 0.92
    assert n > 20 or np.mean(within_range) < 0.92  # negative control: the smallest and the largest draw


@pytest.mark.parametrize(("n", "least"), [(2, 0.94), (3, 0.94)])
def test_two_draws_are_no_interval(n, least):
    """Two draws contain a third of all others, three a half."""
    rng = np.random.default_rng(n)
    values = rng.normal(3, 2, (4000, n + 1))
    intervals = [_central(row[:n]) for row in values]
    assert least < np.mean([low <= row[n] <= high for (low, high), row in zip(intervals, values, strict=True)]) < 0.97


def test_halves_of_both_sets_are_drawn_once():
    """With as many synthetic as real volumes, the draws of the value are the half-samples, and each pair is asked for once."""
    x, calls = normal(40, 1, 1)[:, 0], []

    def statistic(a, b):
        calls.append((tuple(a), tuple(b)))
        return float(x[a].mean() - x[b].mean())

    found = compare_with_floor(statistic, 20, 20, draws=50)
    assert len(calls) == len(set(calls)) == 1 + 3 * 50
    low, high = found.ci95
    assert (high - low) / (2 * 1.96) == pytest.approx(
        np.sqrt(x[:20].var(ddof=1) / 20 + x[20:].var(ddof=1) / 20), rel=0.35
    )
    calls.clear()
    compare_with_floor(
        statistic, 20, 16, draws=50
    )  # negative control: halves of 10 and of 8 volumes differ from draws of 10
    assert len(calls) == 1 + 4 * 50


def test_the_interval_of_the_ratio_contains_the_error_of_the_floor():
    """The value is always 2; the floor is a mean, so its relative standard error is that of the ratio."""
    x = 1 + 0.3 * normal(60, 1, 1)[:, 0]
    found = compare_with_floor(lambda a, b: 2.0 if b[0] >= 60 else x[[*a, *b]].mean(), 60, 40, draws=400)
    assert found.ratio == pytest.approx(2 / x.mean()) and found.ci95 == (2, 2)
    low, high = found.ratio_ci95
    assert (high - low) / found.ratio == pytest.approx(2 * 1.96 * x.std() / np.sqrt(60) / x.mean(), rel=0.2)


class Mean(NamedTuple):
    difference: float
    squared: float


def test_intervals_of_a_mean_have_the_width_of_its_standard_error():
    """For a linear statistic the half-samples give the classical standard error, without any factor."""
    widths, hits, n, m = [], 0, 40, 30
    for seed in range(60):
        x = normal(n + m, 1, seed)[:, 0]
        found = compare_with_floor(
            lambda a, b, x=x: Mean(x[a].mean() - x[b].mean(), x[a].mean() ** 2), n, m, draws=199, seed=seed
        )
        low, high = found.difference.ci95
        widths.append((high - low) / (2 * 1.96 * np.sqrt(x[:n].var(ddof=1) / n + x[n:].var(ddof=1) / m)))
        hits += low <= 0 <= high
    assert np.mean(widths) == pytest.approx(1, abs=0.06) and hits / 60 >= 0.87


@pytest.mark.parametrize(("count", "n"), [(0, 24), (1, 24), (12, 24), (24, 24), (10, 200)])
def test_share_interval_contains_exactly_the_shares_that_the_count_does_not_contradict(count, n):
    """Wilson's interval holds the shares p whose normal score |count/n - p| / sqrt(p (1 - p) / n) is below 1.96."""
    low, high = share_interval(count, n)
    shares = np.linspace(0.0005, 0.9995, 1000)
    inside = abs(count / n - shares) <= 1.959964 * np.sqrt(shares * (1 - shares) / n)
    assert (inside == ((shares >= low) & (shares <= high))).all()


@pytest.mark.parametrize("draws", [38, 40])
def test_a_patient_with_most_volumes_costs_only_the_interval_of_the_ratio(draws):
    """In some halves no two groups are left that could be compared."""
    x = np.random.default_rng(0).normal(size=24)
    patients = ["one"] * 15 + [None] * 5
    found = compare_with_floor(lambda a, b: abs(x[a].mean() - x[b].mean()), 20, 4, patients=patients, draws=draws)
    assert found.m == 3 and found.ratio is not None and found.ci95[0] < found.value < found.ci95[1]
    assert found.ratio_ci95 is None
    known = compare_with_floor(lambda a, b: abs(x[a].mean() - x[b].mean()), 20, 4, draws=draws)
    assert known.ratio_ci95[0] < known.ratio < known.ratio_ci95[1]
