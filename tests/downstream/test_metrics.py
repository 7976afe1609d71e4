"""Metrics against loops over pairs and ranks, and what is not defined."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ccella_fast.downstream.metrics import average_precision, best_threshold, classification_metrics, roc_curve


def sets(count: int):
    """Random labels and scores, with and without ties."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        n = int(rng.integers(2, 30))
        labels = rng.integers(0, 2, n)
        labels[:2] = 0, 1
        scores = rng.random(n) if seed % 2 else rng.integers(0, 4, n) / 4
        yield labels, scores.astype(np.float32)


def test_area_precision_and_shares_equal_plain_loops():
    for labels, p in sets(60):
        found = classification_metrics(labels, p, None)
        pairs = [(a > b) + 0.5 * (a == b) for a in p[labels == 1] for b in p[labels == 0]]
        assert found["auc"] == pytest.approx(np.mean(pairs))
        # Average precision: the sum over thresholds of the gain in recall times the precision there.
        expected, recall = 0.0, 0.0
        for threshold in sorted(set(p.tolist()), reverse=True):
            called = p >= threshold
            gained = labels[called].sum() / labels.sum()
            expected += (gained - recall) * labels[called].mean()
            recall = gained
        assert found["average_precision"] == pytest.approx(expected)
        right = [(score >= 0.5) == label for score, label in zip(p, labels, strict=True)]
        assert found["accuracy"] == pytest.approx(np.mean(right))
        assert found["sensitivity"] == pytest.approx(
            np.mean([r for r, label in zip(right, labels, strict=True) if label])
        )
        assert found["specificity"] == pytest.approx(
            np.mean([r for r, label in zip(right, labels, strict=True) if not label])
        )
        assert found["brier"] == pytest.approx(np.mean([(s - x) ** 2 for s, x in zip(p, labels, strict=True)]))


def test_known_values():
    labels, p = np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])
    found = classification_metrics(labels, p, 0.35)
    assert found["auc"] == 0.75 and found["average_precision"] == pytest.approx(0.8333333)  # of scikit-learn's manual
    assert (found["accuracy"], found["sensitivity"], found["specificity"]) == (0.75, 0.5, 1.0)
    assert found["at_validation_threshold"] == {
        "threshold": 0.35, "accuracy": 0.75, "sensitivity": 1.0, "specificity": 0.5
    }  # fmt: skip


def test_a_roc_curve_passes_through_what_every_threshold_gives_and_has_the_auc_as_its_area():
    for labels, p in sets(60):
        negative, positive = p[labels == 0], p[labels == 1]
        for threshold in [*p.tolist(), 2.0]:
            rate, sensitivity = (negative >= threshold).mean(), (positive >= threshold).mean()
            above = max((positive >= t).mean() for t in [*p.tolist(), 2.0] if (negative >= t).mean() == rate)
            (found,) = roc_curve(labels, p, np.array([rate]))
            assert found == pytest.approx(above) and found >= sensitivity
        # Between multiples of 1/n the curve is straight, so that its middles give the area.
        middles = (np.arange(len(negative)) + 0.5) / len(negative)
        pairs = [(a > b) + 0.5 * (a == b) for a in positive for b in negative]
        assert roc_curve(labels, p, middles).mean() == pytest.approx(np.mean(pairs))


def test_a_roc_curve_by_hand():
    labels, p = np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8])
    rates = np.array([0.0, 0.25, 0.5, 0.75, 1.0])
    np.testing.assert_allclose(roc_curve(labels, p, rates), [0.5, 0.5, 1, 1, 1])
    np.testing.assert_allclose(roc_curve(labels, np.full(4, 0.3), rates), rates)
    np.testing.assert_allclose(roc_curve(labels, -p, rates), [0, 0, 0.5, 0.5, 1])


def test_the_threshold_has_the_largest_youden_index_and_is_near_one_half():
    for labels, p in sets(40):
        threshold = best_threshold(labels, p)
        assert threshold is not None

        def youden(at: float, labels=labels, p=p) -> float:
            return (p[labels == 1] >= at).mean() + (p[labels == 0] < at).mean()

        assert youden(threshold) >= max(youden(at) for at in [*np.unique(p)[1:], 0.5]) - 1e-9
    assert best_threshold(np.array([0, 1]), np.array([0.2, 0.9])) == 0.5
    assert best_threshold(np.array([0, 1]), np.array([0.1, 0.3])) == pytest.approx(0.2)


@pytest.mark.parametrize(("labels", "word"), [([], "empty"), ([1, 1], "one_class"), ([0], "one_class")])
def test_what_is_not_defined_is_none_with_a_word(labels, word):
    p = np.full(len(labels), 0.7, np.float32)
    found = classification_metrics(np.array(labels, int), p, None)
    assert found["auc"] is None and found["average_precision"] is None and word in found["guards"]
    assert found["at_validation_threshold"] is None and "no_threshold" in found["guards"]
    assert (found["accuracy"] is None) == (not labels)
    assert "NaN" not in json.dumps(found)
    assert best_threshold(np.array(labels, int), p) is None


def test_equal_scores_do_not_depend_on_the_order():
    p, labels = np.array([0.5, 0.5, 0.5, 0.5]), np.array([1, 0, 0, 1])
    values = {average_precision(labels[order], p) for order in ([0, 1, 2, 3], [1, 2, 0, 3], [0, 3, 1, 2])}
    assert values == {0.5}
