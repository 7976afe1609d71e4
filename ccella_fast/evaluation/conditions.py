"""Do generated volumes show what they were asked for? Read by linear probes that have seen real volumes only.

Every score is stated as (value - floor) / (ceiling - floor). The floor is what the same readings score against prompts in
random order; the ceiling is what the same kind of probe scores on real cases that it was not fitted on. 0 means that the prompt
has no influence, 1 that generated volumes show it as clearly as real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ccella_fast.errors import DataError
from ccella_fast.evaluation.classifier_test import area_under_curve, fit_logistic
from ccella_fast.evaluation.statistics import (
    Standardisation,
    feature_matrix,
    group_numbers,
    grouped_folds,
    standardisation,
)

Label = str | float | None  # None: not known

_RIDGE = 1.0  # on the squared weights of a number, in units of its variance
_RESAMPLES = 1000


class Agreement(NamedTuple):
    """How well readings agree with prompts.

    Attributes:
        name: the property.
        score: what is measured: "auc" (mean over the classes of the area under the ROC curve of one class against the
            others) or "spearman" (rank correlation).
        value: the score of the generated volumes against their prompts; None if it is not defined.
        floor: its mean over prompts in random order.
        ceiling: the score of real volumes against what is known of them.
        normalized: (value - floor) / (ceiling - floor); None if the property cannot be read from real volumes.
        normalized_ci95: interval, from resampled generated and real volumes.
        p: share of random orders with a score at least as high.
        accuracy: mean over the classes of the share that is recognized, of the generated volumes; None for a number.
        ceiling_accuracy: likewise, of the real ones.
        n_real: real volumes of which the property is known.
        n_synthetic: generated volumes of which it was asked for.
        guards: "few" (fewer than 20 volumes on one side), "one_class" (nothing to tell apart: no value) or "unreadable" (the
            probe reads real volumes no better than chance: no normalized value).
    """

    name: str
    score: str
    value: float | None
    floor: float | None
    ceiling: float | None
    normalized: float | None
    normalized_ci95: tuple[float, float] | None
    p: float | None
    accuracy: float | None
    ceiling_accuracy: float | None
    n_real: int
    n_synthetic: int
    guards: list[str]


# ---- Probes


class Probe(NamedTuple):
    """A linear reader of one property.

    Attributes:
        classes: its names, in order; empty for a number.
        scale: standardization by the real volumes of the fit.
        weights: (kept features, classes), or (kept features, 1) for a number.
        intercepts: (classes,) or (1,).
    """

    classes: tuple[str, ...]
    scale: Standardisation
    weights: np.ndarray
    intercepts: np.ndarray

    def read(self, features: Any) -> np.ndarray:
        """Readings (n, classes): logits of each class against the others; or (n, 1): the number."""
        return self.scale.apply(features, "read") @ self.weights + self.intercepts


def fit_probe(features: Any, labels: Sequence[Label], classes: Sequence[str] = ()) -> Probe:
    """Fit a probe on real volumes, in float64: logistic regression with an L2 penalty, or ridge regression for numbers.

    The classes of a category have equal weight. A category with more than two classes is read one class against the others.

    Args:
        features: (n, d).
        labels: a class or a number of each volume, None where it is not known; these volumes are left out.
        classes: all classes, also those that are not among the labels; none for a number.

    Raises:
        DataError: the property of fewer than two volumes is known, or all features are constant.
    """
    known = [i for i, label in enumerate(labels) if label is not None]
    matrix = feature_matrix(features, "real", 1)
    if len(known) < 2:
        raise DataError(f"a probe needs two volumes whose property is known, got {len(known)}", fix="add real volumes")
    scale = standardisation(matrix[known], "real")
    x = scale.apply(matrix[known], "real") / np.sqrt(scale.kept.sum())
    if not classes:
        y = np.array([labels[i] for i in known], dtype=np.float64)
        weights = x.T @ np.linalg.solve(x @ x.T + _RIDGE * np.eye(len(x)), y - y.mean())
        return Probe((), scale, weights[:, None] / np.sqrt(scale.kept.sum()), np.array([y.mean()]))
    columns = [_one_against_others(x, np.array([labels[i] == name for i in known])) for name in classes]
    weights, intercepts = (np.stack(parts, -1) for parts in zip(*columns, strict=True))
    return Probe(tuple(classes), scale, weights / np.sqrt(scale.kept.sum()), intercepts)


def _one_against_others(x: np.ndarray, inside: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights and intercept; zeros if only one of both is there."""
    if inside.all() or not inside.any():
        return np.zeros(x.shape[1]), np.array(0.0)
    coefficients = fit_logistic(x @ x.T + 1, inside)
    return x.T @ coefficients, coefficients.sum()


# ---- Agreement


def condition_agreement(
    name: str,
    real: Any,
    known: Sequence[Label],
    synthetic: Any,
    prompts: Sequence[Label],
    *,
    fit: tuple[Any, Sequence[Label]] | None = None,
    patients: Sequence[Hashable] | None = None,
    prompted_by: Sequence[int | None] | None = None,
    folds: int = 5,
    permutations: int = 1000,
    seed: int = 0,
) -> Agreement:
    """Read a property (class, side, zone, size) from generated volumes and compare it with the prompts.

    The real volumes must not be among those that the generator was trained on. Without `fit`, probes are cross-fitted: each
    real volume is read by a probe that was fitted on other patients, and each generated volume by one of these probes as well;
    if the case of its prompt is known, by a probe that was not fitted on that case.

    Args:
        name: of the property, for the result.
        real: (n, d) features.
        known: the property of each real volume: a class, a number, or None if it is not known.
        synthetic: (m, d) features.
        prompts: what each generated volume was asked for, or None.
        fit: features and property of other real volumes, on which one probe is fitted that reads all volumes.
        patients: of the real volumes; those of one patient are read by the same probe.
        prompted_by: for each generated volume the row of the real one whose report was its prompt, or None.
        folds: number of probes.
        permutations: random orders of the prompts.
        seed: of folds, orders and resamples.

    Raises:
        DataError: the features of two sets do not fit together, or a list has another length than its features.
    """
    real, synthetic = feature_matrix(real, "real", 1), feature_matrix(synthetic, "synthetic", 1)
    prompted_by = [None] * len(synthetic) if prompted_by is None else list(prompted_by)
    for matrix, values, what in (
        (real, known, "known"),
        (synthetic, prompts, "prompts"),
        (synthetic, prompted_by, "prompted_by"),
    ):
        if len(matrix) != len(values):
            why = f"there are {len(values)} values for {len(matrix)} volumes"
            raise DataError(why, field=what, fix="give one value per volume, None where it is not known")
    rows_r = np.array([i for i, value in enumerate(known) if value is not None], int)
    rows_s = np.array([i for i, value in enumerate(prompts) if value is not None], int)
    labels = [known[i] for i in rows_r]
    classes = _classes(labels)
    is_number = not classes
    asked = [prompts[i] for i in rows_s]
    if min(len(set(labels)), len(set(asked) if is_number else set(asked) & set(classes))) < 2:
        return _nothing(name, is_number, len(rows_r), len(rows_s))
    rng = np.random.default_rng(seed)
    if fit is not None:
        probe = fit_probe(fit[0], fit[1], classes)
        read_real, read_synthetic = probe.read(real[rows_r]), probe.read(synthetic[rows_s])
    else:
        fitted = cross_fit(real, known, patients, folds, rng)
        if fitted is None:
            return _nothing(name, is_number, len(rows_r), len(rows_s))
        place = {int(row): int(fold) for row, fold in zip(rows_r, fitted.folds, strict=True)}
        fold_s = rng.permutation(np.arange(len(rows_s)) % len(fitted.probes))
        for i, row in enumerate(rows_s):
            fold_s[i] = place.get(prompted_by[row], fold_s[i])
        read_real, read_synthetic = fitted.readings, np.empty((len(rows_s), fitted.readings.shape[1]))
        for fold, probe in enumerate(fitted.probes):
            if (fold_s == fold).any():
                read_synthetic[fold_s == fold] = probe.read(synthetic[rows_s[fold_s == fold]])
    return agreement(name, read_synthetic, asked, read_real, labels, classes, permutations=permutations, rng=rng)


class CrossFit(NamedTuple):
    """Probes of which each real volume is read by one that was fitted on other patients.

    Attributes:
        classes: of the property; none for a number.
        rows: the real volumes of which it is known.
        folds: of each of them, the probe that reads it.
        probes: one for each fold.
        readings: (rows, classes) or (rows, 1).
    """

    classes: tuple[str, ...]
    rows: np.ndarray
    folds: np.ndarray
    probes: list[Probe]
    readings: np.ndarray


def cross_fit(
    real: np.ndarray, known: Sequence[Label], patients: Sequence[Hashable] | None, folds: int, rng: np.random.Generator
) -> CrossFit | None:
    """Fit a probe for each fold of real volumes.

    None if there is nothing to tell apart, or if there is at most one volume of patients other than those of a fold.
    """
    rows = np.array([i for i, value in enumerate(known) if value is not None], int)
    labels = [known[i] for i in rows]
    groups = group_numbers(patients, len(real))[rows]
    number = min(folds, len(np.unique(groups)))
    if number < 2 or len(set(labels)) < 2:
        return None
    classes = _classes(labels)
    fold_of = grouped_folds(np.unique(groups, return_inverse=True)[1], number, rng)
    if len(rows) - np.bincount(fold_of).max() < 2:
        return None
    probes, readings = [], np.empty((len(rows), max(1, len(classes))))
    for fold in range(number):
        others = rows[fold_of != fold]
        probes.append(fit_probe(real[others], [known[i] for i in others], classes))
        readings[fold_of == fold] = probes[-1].read(real[rows[fold_of == fold]])
    return CrossFit(classes, rows, fold_of, probes, readings)


def _classes(labels: Sequence[Label]) -> tuple[str, ...]:
    """The classes among the labels; none if these are numbers."""
    return tuple(sorted({str(label) for label in labels})) if any(isinstance(each, str) for each in labels) else ()


def readability(
    readings: np.ndarray,
    known: Sequence[Label],
    classes: Sequence[str],
    rng: np.random.Generator,
    permutations: int = 1000,
) -> tuple[float, float]:
    """The score of cross-fitted readings of real volumes, and the share of random orders with one at least as high."""
    score = _class_score if classes else _rank_score
    truth = _codes(known, classes)
    value = score(readings, truth)
    shuffled = np.array([score(readings, rng.permutation(truth)) for _ in range(permutations)])
    return value, float((1 + (shuffled >= value).sum()) / (1 + permutations))


def agreement(
    name: str,
    read: np.ndarray,
    asked: Sequence[Label],
    read_real: np.ndarray,
    known: Sequence[Label],
    classes: Sequence[str] = (),
    *,
    permutations: int = 1000,
    rng: np.random.Generator | None = None,
) -> Agreement:
    """Score readings of generated and of real volumes; see `Agreement`.

    Args:
        name: of the property.
        read: (m, classes) readings of the generated volumes, or (m, 1) for a number.
        asked: what they were asked for.
        read_real: (n, classes) or (n, 1) readings of real volumes, each by a probe that was not fitted on that volume.
        known: what is known of them.
        classes: the columns of the readings; none for a number.
        permutations: random orders of the prompts.
        rng: source of random numbers.
    """
    rng = rng or np.random.default_rng(0)
    score = _class_score if classes else _rank_score
    truth, truth_real = (_codes(labels, classes) for labels in (asked, known))
    value = score(read, truth)
    shuffled = np.array([score(read, rng.permutation(truth)) for _ in range(permutations)])
    ceiling, p_real = readability(read_real, known, classes, rng, permutations)
    floor = float(np.nanmean(shuffled))
    guards = ["few"] if min(len(read), len(read_real)) < 20 else []
    normalized = interval = None
    if p_real > 0.05:
        guards.append("unreadable")
    else:
        normalized = (value - floor) / (ceiling - floor)
        drawn = [
            (_resampled(score, read, truth, rng) - floor, _resampled(score, read_real, truth_real, rng) - floor)
            for _ in range(_RESAMPLES)
        ]
        interval = quotient_interval(drawn)
    return Agreement(
        name,
        "auc" if classes else "spearman",
        value,
        floor,
        ceiling,
        normalized,
        interval,
        float((1 + (shuffled >= value).sum()) / (1 + permutations)),
        _accuracy(read, truth) if classes else None,
        _accuracy(read_real, truth_real) if classes else None,
        len(read_real),
        len(read),
        guards,
    )


def quotient_interval(drawn: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The central 95 % of quotients, from their numerators and denominators. What is not a number or over zero is left out."""
    over, under = np.array(drawn, np.float64).T
    defined = np.isfinite(over) & np.isfinite(under) & (under != 0)
    low, high = np.quantile(over[defined] / under[defined], (0.025, 0.975))
    return float(low), float(high)


def _nothing(name: str, is_number: bool, n_real: int, n_synthetic: int) -> Agreement:
    guards = ["few", "one_class"] if min(n_real, n_synthetic) < 20 else ["one_class"]
    score = "spearman" if is_number else "auc"
    return Agreement(name, score, None, None, None, None, None, None, None, None, n_real, n_synthetic, guards)


def _codes(labels: Sequence[Label], classes: Sequence[str]) -> np.ndarray:
    """Numbers of the classes, -1 for a class that no real volume has; or the numbers themselves."""
    if not classes:
        return np.array(labels, dtype=np.float64)
    return np.array([classes.index(str(label)) if label in classes else -1 for label in labels])


def _class_score(read: np.ndarray, truth: np.ndarray) -> float:
    codes = range(read.shape[1]) if read.shape[1] > 2 else (1,)  # of two classes, both areas are equal
    areas = [
        area_under_curve(read[truth == code, code], read[truth != code, code])
        for code in codes
        if 0 < (truth == code).sum() < len(truth)
    ]
    return float(np.mean(areas)) if areas else np.nan


def _accuracy(read: np.ndarray, truth: np.ndarray) -> float:
    recognized = read.argmax(1) == truth
    return float(np.mean([recognized[truth == code].mean() for code in np.unique(truth)]))


def _rank_score(read: np.ndarray, truth: np.ndarray) -> float:
    return spearman(read[:, 0], truth)


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's rank correlation, equal values with their mean rank; NaN if all values of one side are equal."""
    ranks = []
    for values in (a, b):
        ordered = np.sort(values)
        ranks.append(np.searchsorted(ordered, values, "left") + np.searchsorted(ordered, values, "right"))
    x, y = (rank - rank.mean() for rank in ranks)
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else np.nan


def _resampled(
    score: Callable[[np.ndarray, np.ndarray], float], read: np.ndarray, truth: np.ndarray, rng: np.random.Generator
) -> float:
    rows = rng.integers(len(read), size=len(read))
    return score(read[rows], truth[rows])
