"""How well a classifier separates the classes. What is not defined is None, and a word says why."""

from __future__ import annotations

from typing import Any

import numpy as np

from ccella_fast.evaluation.classifier_test import area_under_curve

METRICS = ("accuracy", "auc", "average_precision")  # those whose differences are tested


def classification_metrics(labels: np.ndarray, p_positive: np.ndarray, threshold: float | None) -> dict[str, Any]:
    """The metrics of one classifier on one set.

    Args:
        labels: (n,) 0 or 1.
        p_positive: (n,) probability of class 1.
        threshold: that of the validation set; None if there is none.

    Returns:
        n, n_positive, accuracy, auc, average_precision, sensitivity, specificity and brier; at_validation_threshold with
        threshold, accuracy, sensitivity and specificity; and guards: `empty` (no study), `one_class` (some of these need both)
        and `no_threshold`.
    """
    positive, negative = p_positive[labels == 1].astype(np.float64), p_positive[labels == 0].astype(np.float64)
    both = len(positive) > 0 and len(negative) > 0
    guards = ["empty"] if not len(labels) else [] if both else ["one_class"]
    return {
        "n": len(labels),
        "n_positive": len(positive),
        **_at(positive, negative, 0.5),
        "auc": area_under_curve(positive, negative) if both else None,
        "average_precision": average_precision(labels, p_positive) if both else None,
        "brier": float(np.mean((p_positive.astype(np.float64) - labels) ** 2)) if len(labels) else None,
        "at_validation_threshold": None
        if threshold is None
        else {"threshold": threshold, **_at(positive, negative, threshold)},
        "guards": guards + (["no_threshold"] if threshold is None else []),
    }


def average_precision(labels: np.ndarray, p_positive: np.ndarray) -> float:
    """The mean of the precision at the rank of each positive study; studies with equal scores share the last rank of them."""
    order = np.argsort(-p_positive, kind="stable")
    scores, found = p_positive[order], np.cumsum(labels[order])
    last = np.searchsorted(-scores, -scores, side="right") - 1  # of those with the same score
    precision = found[last] / (last + 1)
    return float(precision[labels[order] == 1].mean())


def roc_curve(labels: np.ndarray, p_positive: np.ndarray, false_positive_rates: np.ndarray) -> np.ndarray:
    """The sensitivity at each false positive rate, with straight lines where studies of both classes have the same score.

    The area under it is the AUC. Where the curve is vertical, its upper end counts.

    Args:
        labels: (n,) 0 or 1, of both classes.
        p_positive: (n,) probability of class 1.
        false_positive_rates: (m,) from 0 to 1.
    """
    scores = -np.unique(-p_positive.astype(np.float64))  # from the highest on
    positive, negative = (-np.sort(-p_positive[labels == label].astype(np.float64)) for label in (1, 0))
    x, y = (
        np.append(0, np.searchsorted(-of_class, -scores, side="right") / len(of_class))
        for of_class in (negative, positive)
    )
    place = np.searchsorted(x, false_positive_rates, side="right") - 1
    following = np.minimum(place + 1, len(x) - 1)
    width = np.where(following > place, x[following] - x[place], 1)
    return y[place] + (y[following] - y[place]) * (false_positive_rates - x[place]) / width


def best_threshold(labels: np.ndarray, p_positive: np.ndarray) -> float | None:
    """The threshold with the largest sum of sensitivity and specificity; of several, the nearest to 0.5.

    Scores of at least the threshold are positive. Candidates are 0.5 and the means of neighbouring scores. None without both
    classes.
    """
    positive, negative = np.sort(p_positive[labels == 1]), np.sort(p_positive[labels == 0])
    if not len(positive) or not len(negative):
        return None
    scores = np.unique(p_positive.astype(np.float64))
    candidates = np.append((scores[1:] + scores[:-1]) / 2, 0.5)
    sensitivity = 1 - np.searchsorted(positive, candidates, side="left") / len(positive)
    specificity = np.searchsorted(negative, candidates, side="left") / len(negative)
    gain = np.round(sensitivity + specificity, 9)
    best = candidates[gain == gain.max()]
    return float(best[np.argmin(np.abs(best - 0.5))])


def _at(positive: np.ndarray, negative: np.ndarray, threshold: float) -> dict[str, float | None]:
    """Accuracy, sensitivity and specificity. A score equal to the threshold is positive."""
    hits, rejections = int((positive >= threshold).sum()), int((negative < threshold).sum())
    n = len(positive) + len(negative)
    return {
        "accuracy": (hits + rejections) / n if n else None,
        "sensitivity": hits / len(positive) if len(positive) else None,
        "specificity": rejections / len(negative) if len(negative) else None,
    }
