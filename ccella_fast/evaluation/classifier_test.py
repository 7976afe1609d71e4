"""Classifier two-sample test: can real be separated from synthetic features? (Lopez-Paz and Oquab 2017, arXiv 1610.06545)."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ccella_fast.errors import DataError
from ccella_fast.evaluation.statistics import feature_pair, group_numbers, grouped_folds

_PENALTY = 0.1  # on the squared weights; the kernel of a standardised volume with itself is about 1
_STEPS = 50
_RESIDUAL = 1e-10  # of a linear system, relative
_CONVERGED = 1e-3  # last change of a logit; Newton's method converges quadratically, so the next would be about 1e-6


class ClassifierTest(NamedTuple):
    """How well held-out volumes are classified: 0.5 is chance level, 1 is perfect."""

    auc: float  # mean over folds of the area under the ROC curve
    accuracy: float  # mean of the shares of real and of synthetic volumes that are recognized, over all folds


def classifier_test(
    real: Any, synthetic: Any, *, patients: Sequence[Hashable] | None = None, folds: int = 5, seed: int = 0
) -> ClassifierTest:
    """Real against synthetic by logistic regression with an L2 penalty, cross-validated by patient, in float64.

    Features are standardised by both sets together, without their labels. Both classes have the same weight whatever their
    sizes. The result is near 1 for any visible defect, such as the blur of an autoencoder, so it is read next to the same test
    of real against real and of real against reconstructed volumes.

    Args:
        real: (n, d) features; at least two patients.
        synthetic: (m, d) features, m at least 2.
        patients: of the real volumes; those of one patient are in one fold.
        folds: number of folds, at most the number of patients and of synthetic volumes.
        seed: of the folds.
    """
    a, b = feature_pair(real, synthetic, ("real", "synthetic"))
    products = standardised_products(np.concatenate([a, b]))
    rows_a, rows_b = np.arange(len(a)), len(a) + np.arange(len(b))
    return classifier_test_of_rows(products, rows_a, rows_b, group_numbers(patients, len(a)), folds, seed)


def standardised_products(stacked: np.ndarray) -> np.ndarray:
    """Products between all rows after standardisation by all rows, over the number of features: about 1 on the diagonal."""
    scale = stacked.std(axis=0)
    varies = scale > 0
    standard = (stacked[:, varies] - stacked[:, varies].mean(axis=0)) / scale[varies]
    return standard @ standard.T / max(1, varies.sum())


def classifier_test_of_rows(
    products: np.ndarray,
    rows_real: np.ndarray,
    rows_synthetic: np.ndarray,
    real_groups: np.ndarray | None = None,
    folds: int = 5,
    seed: int = 0,
) -> ClassifierTest:
    """`classifier_test` for subsets of stacked sets.

    Args:
        products: between all rows of the stacked sets, from `standardised_products`.
        rows_real: row numbers.
        rows_synthetic: row numbers.
        real_groups: groups of these real rows, from 0; by default each is its own.
        folds: number of folds.
        seed: of the folds.
    """
    groups = np.arange(len(rows_real)) if real_groups is None else real_groups
    folds = min(folds, int(groups.max()) + 1, len(rows_synthetic))
    if folds < 2:
        raise DataError("a classifier test needs two patients and two synthetic volumes", fix="add volumes")
    rng = np.random.default_rng(seed)
    both = groups, np.arange(len(rows_synthetic))
    fold = np.concatenate([grouped_folds(each, folds, rng) for each in both])
    rows = np.concatenate([rows_real, rows_synthetic])
    is_real = np.arange(len(rows)) < len(rows_real)
    kernel = products[np.ix_(rows, rows)] + 1  # 1: a constant feature, whose weight is the intercept
    logits, areas = np.empty(len(rows)), []
    for held_out in (fold == i for i in range(folds)):
        coefficients = fit_logistic(kernel[np.ix_(~held_out, ~held_out)], is_real[~held_out])
        logits[held_out] = kernel[np.ix_(held_out, ~held_out)] @ coefficients
        areas.append(area_under_curve(logits[held_out & is_real], logits[held_out & ~is_real]))
    correct = np.where(logits == 0, 0.5, (logits > 0) == is_real)
    accuracy = (correct[is_real].mean() + correct[~is_real].mean()) / 2
    return ClassifierTest(float(np.mean(areas)), float(accuracy))


def area_under_curve(positive: np.ndarray, negative: np.ndarray) -> float:
    """Share of pairs in which the positive score is the larger one; ties count one half."""
    ordered = np.sort(negative)
    below = np.searchsorted(ordered, positive, side="left") + np.searchsorted(ordered, positive, side="right")
    return float(below.mean() / (2 * len(negative)))


def fit_logistic(kernel: np.ndarray, is_real: np.ndarray) -> np.ndarray:
    """Coefficients of the rows in the weighted logistic regression with penalty `_PENALTY`/2 times the squared weights.

    Newton's method in the dual: the mode of a Gaussian process with this kernel (Rasmussen and Williams 2006, algorithm 3.1).
    """
    sign = np.where(is_real, 1.0, -1.0)
    weight = np.where(is_real, 0.5 / is_real.mean(), 0.5 / (~is_real).mean())
    prior = kernel / _PENALTY
    logits = coefficients = np.zeros(len(sign))
    for _ in range(_STEPS):
        wrong = 1 / (1 + np.exp(np.clip(sign * logits, -500, 500)))
        curvature = weight * wrong * (1 - wrong)
        root = np.sqrt(curvature)
        target = curvature * logits + weight * sign * wrong
        coefficients = target - root * _conjugate_gradients(prior, root, root * (prior @ target))
        previous, logits = logits, prior @ coefficients
        if np.abs(logits - previous).max() < _CONVERGED:
            break
    return coefficients / _PENALTY


def _conjugate_gradients(prior: np.ndarray, root: np.ndarray, right: np.ndarray) -> np.ndarray:
    """x in (1 + R P R) x = right with R = diag(root): about 30 products with P, a fifth of the time of a factorization."""
    x = np.zeros_like(right)
    residual = direction = right
    squared = first = right @ right
    for _ in range(len(right)):
        if squared <= _RESIDUAL**2 * first:
            break
        product = direction + root * (prior @ (root * direction))
        step = squared / (direction @ product)
        x, residual = x + step * direction, residual - step * product
        previous, squared = squared, residual @ residual
        direction = residual + squared / previous * direction
    return x
