"""Differences between arms: resampling against closed forms and loops, tests against tables, and coverage in simulations."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from ccella_fast.downstream.contrasts import (
    ArmPredictions,
    Contrasts,
    Resampling,
    equivalence,
    holm,
    mcnemar_p,
    two_sided,
    weighted_metrics,
)
from ccella_fast.downstream.metrics import METRICS, classification_metrics


def test_weighted_metrics_are_those_of_repeated_cases():
    rng = np.random.default_rng(0)
    labels, p = rng.integers(0, 2, 14), (rng.integers(0, 6, 14) / 5).astype(np.float32)
    weights = rng.multinomial(14, np.full(14, 1 / 14), size=1100).T.astype(np.float32)  # more than one block of columns
    found = weighted_metrics(labels, p, weights)
    for draw in (*range(40), 999, 1000, 1099):
        times = weights[:, draw].astype(int)
        expected = classification_metrics(np.repeat(labels, times), np.repeat(p, times), None)
        assert found[:, draw] == pytest.approx([expected[name] for name in METRICS], abs=1e-5)
    one_class = weighted_metrics(labels, p, (labels == 1).astype(np.float32)[:, None])
    assert np.isfinite(one_class[0, 0]) and np.isnan(one_class[1:, 0]).all()


def arms_of(*correct: np.ndarray, families: tuple[str | None, ...] = (None, None)) -> dict[str, ArmPredictions]:
    """Arms `a` and `b` whose classifiers are right where it says so. All cases are positive or negative by turns."""
    labels = np.arange(correct[0].shape[-1]) % 2
    each = (np.where(right, labels, 1 - labels).astype(np.float32) for right in correct)
    return {name: ArmPredictions(p, family) for name, p, family in zip("ab", each, families, strict=True)}


def contrasts_of(arms: dict[str, ArmPredictions], generators: dict[str, int], *, draws: int = 4000) -> Contrasts:
    _, seeds, n = arms["a"].p_positive.shape
    resampling = Resampling([str(i) for i in range(n)], seeds, generators, draws=draws)
    return Contrasts(np.arange(n) % 2, arms, resampling)


def test_with_one_classifier_the_interval_is_that_of_paired_cases():
    rng = np.random.default_rng(1)
    a, b = rng.random((1, 1, 400)) < 0.8, rng.random((1, 1, 400)) < 0.7
    found = contrasts_of(arms_of(a, b), {}).difference("a", "b", "accuracy")
    pairs = a[0, 0].astype(float) - b[0, 0]
    assert found["difference"] == pytest.approx(pairs.mean())
    assert found["standard_error"] == pytest.approx(pairs.std(ddof=1) / 20, rel=0.05)
    low, high = found["ci95"]
    assert (high - low) / 2 == pytest.approx(1.966 * found["standard_error"], rel=0.06)
    assert found["guards"] == ["one_seed"] and found["df"] == pytest.approx(399, rel=0.01)


def test_seeds_and_generators_have_the_spread_of_their_means():
    """All cases agree, so that each classifier is right everywhere or nowhere, and only seeds or generators vary."""
    a = np.repeat(np.array([[1, 1, 0, 1, 1]], bool)[..., None], 50, axis=2)
    found = contrasts_of(arms_of(a, np.zeros_like(a)), {}).difference("a", "b", "accuracy")
    expected = np.std([1, 1, 0, 1, 1], ddof=1) / math.sqrt(5)
    assert found["standard_error"] == pytest.approx(expected, rel=0.05) and found["df"] == pytest.approx(4)
    made = np.repeat(np.array([1, 0, 1], bool)[:, None, None], 50, axis=2).repeat(4, axis=1)
    arms = arms_of(made, np.zeros((1, 4, 50), bool), families=("synthetic", None))
    found = contrasts_of(arms, {"synthetic": 3}).difference("a", "b", "accuracy")
    assert found["standard_error"] == pytest.approx(np.std([1, 0, 1], ddof=1) / math.sqrt(3), rel=0.05)
    assert found["df"] == pytest.approx(2) and found["guards"] == []


def test_arms_of_the_same_generators_are_paired_and_others_are_not():
    made = np.repeat(np.array([1, 0, 1, 1], bool)[:, None, None], 50, axis=2).repeat(4, axis=1)
    paired = contrasts_of(arms_of(made, made, families=("synthetic", "synthetic")), {"synthetic": 4})
    found = paired.difference("a", "b", "accuracy")
    assert (found["difference"], found["standard_error"], found["p"]) == (0, 0, 1) and "no_variation" in found["guards"]
    arms = arms_of(made, made, families=("synthetic", "baseline"))
    other = contrasts_of(arms, {"synthetic": 4, "baseline": 4}).difference("a", "b", "accuracy")
    assert (
        other["standard_error"] == pytest.approx(math.sqrt(2) * 0.5 / 2, rel=0.05) and other["verdict"] == "undecided"
    )


def test_studies_of_a_patient_are_drawn_together():
    rng = np.random.default_rng(2)
    right = np.repeat(rng.random((1, 1, 60)) < 0.6, 4, axis=2)  # the four studies of a patient are alike
    arms = arms_of(right, np.zeros_like(right))
    labels = np.arange(240) % 2
    errors = [
        Contrasts(labels, arms, Resampling(patients, 1, {}, draws=3000)).difference("a", "b", "accuracy")[
            "standard_error"
        ]
        for patients in ([str(i // 4) for i in range(240)], [str(i) for i in range(240)])
    ]
    assert errors[0] == pytest.approx(2 * errors[1], rel=0.08)


def test_too_few_cases_have_no_interval():
    arms = arms_of(np.ones((1, 1, 3), bool), np.zeros((1, 1, 3), bool))
    found = contrasts_of(arms, {}).difference("a", "b", "auc")
    assert found["ci95"] is None and found["p"] is None and found["guards"] == ["one_seed", "too_few_cases"]
    assert found["difference"] == 1 and found["verdict"] == "undecided"


def test_verdicts_follow_the_interval():
    rng = np.random.default_rng(3)
    good, bad = rng.random((1, 4, 300)) < 0.9, rng.random((1, 4, 300)) < 0.6
    found = contrasts_of(arms_of(good, bad), {})
    assert found.difference("a", "b", "accuracy")["verdict"] == "yes"
    assert found.difference("b", "a", "accuracy")["verdict"] == "no"
    assert found.difference("a", "a", "accuracy")["verdict"] == "undecided"


def test_mcnemar_equals_an_enumeration_of_all_outcomes():
    for n in range(11):
        wins = [sum(outcome) for outcome in product((0, 1), repeat=n)]
        for first in range(n + 1):
            as_far = sum(abs(2 * each - n) >= abs(2 * first - n) for each in wins) / 2**n
            assert mcnemar_p(first, n - first) == pytest.approx(as_far)
    assert mcnemar_p(0, 2000) < 1e-300 or mcnemar_p(0, 2000) == 0


def test_majority_votes_are_those_of_all_classifiers():
    p = np.array([[[0.9, 0.6, 0.2], [0.4, 0.1, 0.3]], [[0.8, 0.2, 0.9], [0.7, 0.55, 0.1]]], np.float32)
    arms = {"a": ArmPredictions(p, "synthetic"), "b": ArmPredictions(p[:1, :1])}
    found = Contrasts(np.array([1, 1, 0]), arms, Resampling(list("xyz"), 2, {"synthetic": 2}, draws=10))
    assert found.majority("a").tolist() == [True, False, False]  # the second: two votes each, mean 0.3625
    assert found.majority("b").tolist() == [True, True, False]
    assert found.mcnemar("a", "b") == {"only_first_right": 0, "only_second_right": 1, "p": 1.0}


def test_two_one_sided_tests_equal_the_formula():
    def tail(t: float) -> float:  # of 2 degrees of freedom, in closed form
        return 0.5 * (1 - t / math.sqrt(2 + t * t))

    for difference, error in ((0.01, 0.005), (-0.03, 0.01), (0.2, 0.01), (0.0, 0.1), (0.05, 0.01)):
        expected = max(tail((0.05 + difference) / error), tail((0.05 - difference) / error))
        assert equivalence(difference, error, 2, 0.05)["p"] == pytest.approx(expected, rel=1e-6)
        assert two_sided(difference, error, 2) == pytest.approx(min(1, 2 * tail(abs(difference) / error)), rel=1e-6)
    words = [equivalence(difference, 0.01, 50, 0.05)["verdict"] for difference in (0.0, -0.03, 0.04, 0.06, 0.07, -0.07)]
    assert words == ["yes", "yes", "undecided", "undecided", "no", "no"]
    low, high = equivalence(0.01, 0.01, 2, 0.05)["ci90"]
    assert [tail((0.01 - low) / 0.01), tail((high - 0.01) / 0.01)] == pytest.approx([0.05, 0.05], rel=1e-6)
    assert equivalence(0.0, 0.0, 5, 0.05)["verdict"] == "yes" and equivalence(0.1, 0.0, 5, 0.05)["verdict"] == "no"


def test_holm_as_in_a_textbook():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def simulated(rng: np.random.Generator, *, generators: int, seeds: int, cases: int, effect: float) -> tuple[bool, bool]:
    """Whether the interval of an experiment with a known difference contains it, and whether one without seeds would.

    Scores are normal: a level of the arm, and parts of the case, of the seed (shared, and of the arm), of the generator, and of
    the single prediction.
    """
    parts = {"case": 1.0, "seed": 0.1, "arm and seed": 0.15, "generator": 0.12, "single": 0.5}
    shape = (generators, seeds, cases)
    case, seed = rng.normal(0, parts["case"], (1, 1, cases)), rng.normal(0, parts["seed"], (1, seeds, 1))
    levels, spreads, scores = (0.5 + effect, 0.5), [], []
    for level, count in zip(levels, (generators, 1), strict=True):
        score = level + case + seed + rng.normal(0, parts["arm and seed"], (1, seeds, 1))
        score = score + rng.normal(0, parts["single"], (count, *shape[1:]))
        variance = sum(parts[name] ** 2 for name in ("case", "seed", "arm and seed", "single"))
        if count > 1:
            score, variance = (
                score + rng.normal(0, parts["generator"], (count, 1, 1)),
                variance + parts["generator"] ** 2,
            )
        spreads.append(math.sqrt(variance))
        scores.append(score)
    truth = np.subtract(
        *[0.5 * math.erfc(-level / spread / math.sqrt(2)) for level, spread in zip(levels, spreads, strict=True)]
    )
    arms = arms_of(*(score > 0 for score in scores), families=("synthetic", None))
    resampling = Resampling(
        [str(i) for i in range(cases)], seeds, {"synthetic": generators}, draws=400, seed=int(rng.integers(2**31))
    )
    found = Contrasts(np.arange(cases) % 2, arms, resampling).difference("a", "b", "accuracy")
    pairs = (scores[0] > 0).mean((0, 1)) - (scores[1] > 0).mean((0, 1))
    cases_alone = abs(pairs.mean() - truth) < 1.96 * pairs.std(ddof=1) / math.sqrt(cases)
    return found["ci95"][0] <= truth <= found["ci95"][1], bool(cases_alone)


def coverage(experiments: int) -> tuple[float, float]:
    """Of the interval, and of one that resamples cases alone. Half of the experiments have no effect."""
    found = [
        simulated(np.random.default_rng([7, number]), generators=3, seeds=5, cases=200, effect=0.15 * (number % 2))
        for number in range(experiments)
    ]
    return float(np.mean([hit for hit, _ in found])), float(np.mean([hit for _, hit in found]))


def test_the_interval_contains_the_difference_in_most_simulated_experiments():
    interval, cases_alone = coverage(60)
    assert interval >= 0.88 > cases_alone  # three standard errors below 0.95 is 0.87


@pytest.mark.soak
def test_the_interval_contains_the_difference_in_93_percent_of_500_simulated_experiments():
    interval, cases_alone = coverage(500)
    assert interval >= 0.93 > 0.85 > cases_alone
