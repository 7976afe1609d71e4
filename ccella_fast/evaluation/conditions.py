"""Do generated volumes show what they were asked for? Read by linear probes that have seen real volumes only.

Every score is stated as (value - floor) / (ceiling - floor). The floor is what the same readings score against prompts in
random order; the ceiling is what the same kind of probe scores on real cases that it was not fitted on. 0 means that the prompt
has no influence, 1 that generated volumes show it as clearly as real ones.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ccella_fast.errors import DataError
from ccella_fast.evaluation.classifier_test import area_under_curve, fit_logistic
from ccella_fast.evaluation.paired import sign_flip_p
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
    is_number = not any(isinstance(label, str) for label in labels)
    classes = () if is_number else tuple(sorted({str(label) for label in labels}))
    asked = [prompts[i] for i in rows_s]
    if min(len(set(labels)), len(set(asked) if is_number else set(asked) & set(classes))) < 2:
        return _nothing(name, is_number, len(rows_r), len(rows_s))
    rng = np.random.default_rng(seed)
    if fit is not None:
        probe = fit_probe(fit[0], fit[1], classes)
        read_real, read_synthetic = probe.read(real[rows_r]), probe.read(synthetic[rows_s])
    else:
        groups = group_numbers(patients, len(real))[rows_r]
        number = min(folds, len(np.unique(groups)))
        if number < 2:
            return _nothing(name, is_number, len(rows_r), len(rows_s))
        fold_r = grouped_folds(np.unique(groups, return_inverse=True)[1], number, rng)
        place = {int(row): int(fold) for row, fold in zip(rows_r, fold_r, strict=True)}
        fold_s = rng.permutation(np.arange(len(rows_s)) % number)
        for i, row in enumerate(rows_s):
            fold_s[i] = place.get(prompted_by[row], fold_s[i])
        width = max(1, len(classes))
        read_real, read_synthetic = np.empty((len(rows_r), width)), np.empty((len(rows_s), width))
        for fold in range(number):
            others = rows_r[fold_r != fold]
            probe = fit_probe(real[others], [known[i] for i in others], classes)
            for read, rows, where, matrix in (
                (read_real, rows_r, fold_r == fold, real),
                (read_synthetic, rows_s, fold_s == fold, synthetic),
            ):
                if where.any():
                    read[where] = probe.read(matrix[rows[where]])
    return agreement(name, read_synthetic, asked, read_real, labels, classes, permutations=permutations, rng=rng)


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
    value, ceiling = score(read, truth), score(read_real, truth_real)
    shuffled = np.array([score(read, rng.permutation(truth)) for _ in range(permutations)])
    shuffled_real = np.array([score(read_real, rng.permutation(truth_real)) for _ in range(permutations)])
    floor = float(np.nanmean(shuffled))
    guards = ["few"] if min(len(read), len(read_real)) < 20 else []
    normalized = interval = None
    if (1 + (shuffled_real >= ceiling).sum()) / (1 + permutations) > 0.05:
        guards.append("unreadable")
    else:
        normalized = (value - floor) / (ceiling - floor)
        drawn = [
            (_resampled(score, read, truth, rng) - floor) / (_resampled(score, read_real, truth_real, rng) - floor)
            for _ in range(_RESAMPLES)
        ]
        low, high = np.nanquantile(drawn, (0.025, 0.975))
        interval = float(low), float(high)
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


# ---- Counterfactuals


class Change(NamedTuple):
    """What another prompt with the same noise changes in one reading.

    Attributes:
        name: the property.
        asked: whether it is the one that the prompts differ in.
        shift: mean change of the reading, in standard deviations of that reading among real volumes. Of the asked property:
            towards what was asked for; of another: the mean absolute change of its readings.
        p: of no common direction of the changes (sign-flip test).
        moved: share of the pairs whose reading moved towards what was asked for; of another property: whose class is read
            differently, None for a number.
    """

    name: str
    asked: bool
    shift: float
    p: float
    moved: float | None


def counterfactual_changes(
    before: Any, after: Any, asked: str, wanted: Sequence[Label], probes: Mapping[str, Probe], real: Any, seed: int = 0
) -> list[Change]:
    """Does a prompt that differs in one property change the reading of that property, and no other?

    Args:
        before: (n, d) features of generated volumes.
        after: (n, d) features of volumes from the same noise and prompts that differ in one property.
        asked: the name of that property.
        wanted: what `after` was asked for: a class, or 1 and -1 for a larger and a smaller number.
        probes: by the name of their property, fitted on real volumes.
        real: (m, d) features of real volumes that gives the readings a scale.
        seed: of the sign flips.

    Raises:
        DataError: the two sets differ in size, or no probe reads the requested property.
    """
    before, after = feature_matrix(before, "before", 1), feature_matrix(after, "after", 1)
    if before.shape != after.shape or len(wanted) != len(after) or asked not in probes:
        why = (
            f"pairs need equal numbers of volumes and a probe of '{asked}', got {len(before)} and {len(after)} volumes"
        )
        raise DataError(why, fix="give the same volumes in the same order, and fit a probe of what was changed")
    changes = []
    for name, probe in probes.items():
        first, second = probe.read(before), probe.read(after)
        change = (second - first) / np.maximum(probe.read(real).std(0), np.finfo(float).tiny)
        if name == asked:
            towards = [
                row[probe.classes.index(str(label))] if probe.classes else row[0] * np.sign(float(label))  # type: ignore[arg-type]
                for row, label in zip(change, wanted, strict=True)
            ]
            shift, moved = float(np.mean(towards)), float(np.mean(np.array(towards) > 0))
            p = sign_flip_p(np.array(towards)[:, None], seed)
        else:
            shift = float(np.abs(change).mean())
            p = sign_flip_p(change, seed)
            other = float((first.argmax(1) != second.argmax(1)).mean())
        changes.append(
            Change(name, name == asked, shift, p, moved if name == asked else other if probe.classes else None)
        )
    return changes
