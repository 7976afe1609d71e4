"""Classifier two-sample test: the fit, the area under the curve, chance under the null, and patients in one fold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ccella_fast.errors import DataError
from ccella_fast.evaluation.classifier_test import (
    _PENALTY,
    area_under_curve,
    classifier_test,
    fit_logistic,
    standardised_products,
)


def normal(n: int, d: int, seed: int, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1, (n, d))


@pytest.mark.parametrize(("n", "m", "d"), [(30, 20, 5), (15, 40, 80)])
def test_the_fit_is_the_minimum_of_the_penalised_loss(n, m, d):
    """The gradient of the primal problem, by autograd in float64, is zero at the weights that the dual solution defines."""
    x = torch.from_numpy(np.concatenate([normal(n, d, 1, 0.3), normal(m, d, 2)]))
    is_real = np.arange(n + m) < n
    coefficients = torch.from_numpy(fit_logistic((x @ x.T).numpy() + 1, is_real))
    weights = (x.T @ coefficients).requires_grad_()
    intercept = coefficients.sum().requires_grad_()
    sign = torch.where(torch.from_numpy(is_real), 1.0, -1.0).double()
    weight = torch.where(sign > 0, (n + m) / (2 * n), (n + m) / (2 * m)).double()
    loss = -(weight * torch.nn.functional.logsigmoid(sign * (x @ weights + intercept))).sum()
    (loss + _PENALTY / 2 * (weights.square().sum() + intercept.square())).backward()
    assert weights.grad.abs().max() < 1e-6 and intercept.grad.abs() < 1e-6
    assert loss < 0.9 * weight.sum() * np.log(2)  # it has learned something


def test_area_equals_the_pairs():
    rng = np.random.default_rng(1)
    positive, negative = rng.integers(0, 5, 20) * 1.0, rng.integers(0, 4, 15) * 1.0
    pairs = [(p > q) + 0.5 * (p == q) for p in positive for q in negative]
    assert area_under_curve(positive, negative) == pytest.approx(np.mean(pairs))
    assert area_under_curve(np.array([2.0, 3]), np.array([0.0, 1])) == 1.0


def test_chance_for_one_distribution_and_certainty_for_distant_ones():
    found = np.array([classifier_test(normal(40, 10, 2 * s), normal(24, 10, 2 * s + 1), seed=s) for s in range(80)])
    errors = found.std(0, ddof=1) / np.sqrt(len(found))
    assert (abs(found.mean(0) - 0.5) < 2.5 * errors).all() and (errors < 0.015).all()
    assert classifier_test(normal(40, 10, 1), normal(24, 10, 2, 5.0)) == (1.0, 1.0)
    weak = classifier_test(normal(200, 10, 1), normal(200, 10, 2, 0.3))
    assert weak.auc == pytest.approx(0.749, abs=0.04)  # the best possible values, up to the errors of 200 volumes
    assert weak.accuracy == pytest.approx(0.682, abs=0.04)


def test_products_are_those_of_standardised_features():
    x = 3 * normal(12, 5, 1) + 7
    x[:, 2] = 4
    z = (x - x.mean(0))[:, [0, 1, 3, 4]] / x.std(0)[[0, 1, 3, 4]]
    assert standardised_products(x) == pytest.approx(np.array([[(a * b).sum() / 4 for b in z] for a in z]))


def test_scale_and_offset_of_features_do_not_matter():
    real, synthetic, factors = normal(40, 6, 1), normal(40, 6, 2, 0.5), 10.0 ** np.arange(-3, 3)
    plain = classifier_test(real, synthetic)
    assert classifier_test(real * factors + 7, synthetic * factors + 7) == pytest.approx(plain)
    constant = np.ones((40, 1))
    assert classifier_test(np.hstack([real, constant]), np.hstack([synthetic, constant])) == pytest.approx(plain)
    assert classifier_test(real, synthetic) == plain


def test_copies_of_a_patient_in_two_folds_would_be_recognized():
    """Many features and few patients: a fold that knows the patient recognizes the volume, one that does not cannot."""
    seen, unseen = [], []
    for seed in range(12):
        real = np.repeat(normal(10, 100, seed), 6, axis=0) + 0.01 * normal(60, 100, seed + 50)
        synthetic = normal(60, 100, seed + 100)
        unseen.append(classifier_test(real, synthetic, patients=np.repeat(np.arange(10), 6).tolist()).auc)
        seen.append(classifier_test(real, synthetic).auc)
    assert np.mean(seen) > 0.95 and abs(np.mean(unseen) - 0.5) < 0.15


def test_few_volumes():
    assert 0 <= classifier_test(normal(2, 3, 1), normal(2, 3, 2)).auc <= 1
    with pytest.raises(DataError, match="two patients"):
        classifier_test(normal(4, 3, 1), normal(4, 3, 2), patients=["p"] * 4)
    with pytest.raises(DataError, match="real set has 1 volume"):
        classifier_test(normal(1, 3, 1), normal(4, 3, 2))
