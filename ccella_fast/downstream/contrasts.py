"""Differences between arms, with intervals that hold beyond these generators, these classifiers and these test cases.

Every arm has predictions of the same test cases by classifiers of the same seeds, which are paired. What varies at random is
crossed: training seeds of the generator, seeds of the classifier, and test cases. Each is resampled on its own and by whole
patients (Owen 2007, arXiv 0709.1648).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ccella_fast.downstream.metrics import METRICS
from ccella_fast.evaluation.statistics import group_numbers
from ccella_fast.evaluation.student import student_quantile, student_tail

_COLUMNS = 500  # resamplings of the cases that are looked at together: their arrays stay in the cache
_LEVEL = 0.05


class ArmPredictions(NamedTuple):
    """The predictions of an arm for the test cases.

    Attributes:
        p_positive: (generators, seeds, cases); an arm without a generator has one row.
        family: what the generators are called, so that arms of the same generators are paired; None without a generator.
    """

    p_positive: np.ndarray
    family: str | None = None


@dataclass(frozen=True)
class Resampling:
    """Weights of cases, seeds and generators in each resampling, shared by all arms and metrics so that differences are paired.

    Of n things, n - 1 are drawn with replacement: the variance of their mean is then that of the mean of n, without the factor
    (n - 1)/n by which drawing n would make it too small, a fifth for 5 seeds (Rao and Wu 1988). A single thing is not
    resampled.

    Args:
        patients: of each test case; those of one patient are drawn together.
        seeds: number of classifier seeds.
        generators: family -> number of generators.
        draws: number of resamplings.
        seed: of the draws.
    """

    patients: Sequence[str]
    seeds: int
    generators: dict[str, int]
    draws: int = 10_000
    seed: int = 0

    @cached_property
    def cases(self) -> np.ndarray:
        """(cases, draws) float32, how often each case was drawn."""
        groups = group_numbers(self.patients, len(self.patients))
        return self._counts(int(groups.max()) + 1, 0)[groups]

    @cached_property
    def of_seeds(self) -> np.ndarray:
        """(seeds, draws), shares."""
        return self._shares(self.seeds, 1)

    def of_generators(self, family: str | None) -> np.ndarray:
        """(generators, draws), shares."""
        if family is None:
            return np.ones((1, self.draws), np.float32)
        return self._shares(self.generators[family], 2 + sorted(self.generators).index(family))

    def _counts(self, n: int, stream: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, stream])
        return rng.multinomial(max(1, n - 1), np.full(n, 1 / n), size=self.draws).T.astype(np.float32)

    def _shares(self, n: int, stream: int) -> np.ndarray:
        return self._counts(n, stream) / max(1, n - 1)


class _Resampled(NamedTuple):
    """A metric of an arm, (generators, seeds), and the same with resampled cases, (generators, seeds, draws)."""

    value: np.ndarray
    draws: np.ndarray


class Contrasts:
    """Differences between arms.

    Args:
        labels: (cases,) 0 or 1.
        arms: name -> predictions.
        resampling: for the same cases, seeds and families.
    """

    def __init__(self, labels: np.ndarray, arms: dict[str, ArmPredictions], resampling: Resampling):
        self._labels, self._arms, self._resampling = labels, arms, resampling
        self._resampled: dict[str, dict[str, _Resampled]] = {}

    def difference(self, first: str, second: str, metric: str) -> dict[str, Any]:
        """`metric` of the arm `first` minus that of `second`.

        The interval is that of the resamplings, widened as Student's distribution is wider than the normal one: few seeds or
        generators state their own spread inexactly. Its degrees of freedom are Satterthwaite's (1946), from the variance that
        cases, seeds and generators contribute.

        Returns:
            difference, standard_error, df, ci95, p (two-sided), verdict (`yes`: larger, `no`: smaller, `undecided`), and
            guards: `one_seed`, `one_generator` (the interval does not extend to others), `too_few_cases` (a set of resampled
            cases lacks a class; there is no interval) and `no_variation`.
        """
        a, b = (self._metrics(name)[metric] for name in (first, second))
        families = [self._arms[name].family for name in (first, second)]
        difference = float(a.value.mean() - b.value.mean())
        guards = ["one_seed"] if self._resampling.seeds == 1 else []
        counts = self._resampling.generators
        guards += ["one_generator"] if any(counts[family] == 1 for family in families if family is not None) else []
        result: dict[str, Any] = {"difference": difference}
        if not (math.isfinite(difference) and np.isfinite(a.draws).all() and np.isfinite(b.draws).all()):
            undefined = dict.fromkeys(("standard_error", "df", "ci95", "p"))
            known = difference if math.isfinite(difference) else None
            return {"difference": known, **undefined, "verdict": "undecided", "guards": [*guards, "too_few_cases"]}
        draws = self._resampled_mean(a, families[0]) - self._resampled_mean(b, families[1])
        error, df = float(draws.std(ddof=1)), self._degrees_of_freedom(a, b, families)
        if error < 1e-9:
            guards, error = [*guards, "no_variation"], 0.0
        wider = student_quantile(_LEVEL / 2, df) / student_quantile(_LEVEL / 2, math.inf)
        low, high = (difference + wider * (np.quantile(draws, (0.025, 0.975)) - draws.mean())).tolist()
        verdict = "yes" if low > 0 else "no" if high < 0 else "undecided"
        result |= {"standard_error": error, "df": None if math.isinf(df) else df, "ci95": [low, high]}
        return {**result, "p": two_sided(difference, error, df), "verdict": verdict, "guards": guards}

    def mcnemar(self, first: str, second: str) -> dict[str, Any]:
        """Exact McNemar test of the majority votes of all classifiers of two arms."""
        right = [self.majority(name) == (self._labels == 1) for name in (first, second)]
        only = int((right[0] & ~right[1]).sum()), int((right[1] & ~right[0]).sum())
        return {"only_first_right": only[0], "only_second_right": only[1], "p": mcnemar_p(*only)}

    def majority(self, name: str) -> np.ndarray:
        """Which cases most classifiers of an arm call positive; if the votes are equal, the mean probability decides."""
        p = self._arms[name].p_positive.reshape(-1, len(self._labels)).astype(np.float64)
        votes = (p >= 0.5).sum(axis=0) * 2 - len(p)
        return np.where(votes == 0, p.mean(axis=0) >= 0.5, votes > 0)

    def _metrics(self, name: str) -> dict[str, _Resampled]:
        """The metrics of an arm, computed once."""
        if name not in self._resampled:
            p = self._arms[name].p_positive
            as_they_are = np.ones((len(self._labels), 1), np.float32)
            both = [
                np.stack([[weighted_metrics(self._labels, each, weights) for each in row] for row in p])
                for weights in (as_they_are, self._resampling.cases)
            ]  # (generators, seeds, metrics, draws)
            self._resampled[name] = {
                metric: _Resampled(both[0][:, :, place, 0], both[1][:, :, place])
                for place, metric in enumerate(METRICS)
            }
        return self._resampled[name]

    def _resampled_mean(self, metric: _Resampled, family: str | None) -> np.ndarray:
        return np.einsum(
            "gsd,gd,sd->d", metric.draws, self._resampling.of_generators(family), self._resampling.of_seeds
        )

    def _degrees_of_freedom(self, a: _Resampled, b: _Resampled, families: Sequence[str | None]) -> float:
        """Satterthwaite's degrees of freedom of the sum of the variances that cases, seeds and generators contribute."""
        patients = len(set(self._resampling.patients))
        contributions = [(float((a.draws.mean((0, 1)) - b.draws.mean((0, 1))).var()), patients - 1)]
        by_seed = a.value.mean(0) - b.value.mean(0)
        of_generators = (
            [a.value.mean(1) - b.value.mean(1)] if families[0] == families[1] else [a.value.mean(1), b.value.mean(1)]
        )
        for values in (by_seed, *of_generators):
            if len(values) > 1:
                contributions.append((float(values.var(ddof=1)) / len(values), len(values) - 1))
        total = sum(variance for variance, _ in contributions)
        spread = sum(variance**2 / max(1, df) for variance, df in contributions)
        return total**2 / spread if spread > 0 else math.inf


def weighted_metrics(labels: np.ndarray, p_positive: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Accuracy at 0.5, area under the ROC curve and average precision with weighted cases, for many weightings at once.

    Args:
        labels: (n,) 0 or 1.
        p_positive: (n,).
        weights: (n, draws) float32, such as how often each case was drawn.

    Returns:
        (3, draws) in the order of METRICS; NaN where a class, or every case, has the weight 0.
    """
    order = np.argsort(-p_positive, kind="stable")
    starts = np.flatnonzero(np.diff(p_positive[order], prepend=np.inf))  # of groups of equal scores
    positive = (labels[order] == 1)[:, None]
    right = ((p_positive >= 0.5) == (labels == 1)).astype(np.float32)
    found = []
    for first in range(0, weights.shape[1], _COLUMNS):
        columns = weights[:, first : first + _COLUMNS]
        all_ = columns[order]
        hits = all_ * positive
        if len(starts) < len(order):
            all_, hits = np.add.reduceat(all_, starts, axis=0), np.add.reduceat(hits, starts, axis=0)
        above, n, n_hits = np.cumsum(hits, axis=0), columns.sum(0), hits.sum(0)
        precision = above / np.maximum(np.cumsum(all_, axis=0), 1e-30)  # 0 before the first case that was drawn
        with np.errstate(divide="ignore", invalid="ignore"):
            area = ((all_ - hits) * (above - hits / 2)).sum(0) / (n_hits * (n - n_hits))
            found.append(np.stack([right @ columns / n, area, (hits * precision).sum(0) / n_hits]))
    stacked = np.concatenate(found, axis=1)
    stacked[1:, ~np.isfinite(stacked).all(0)] = np.nan
    return stacked


def two_sided(difference: float, standard_error: float, df: float) -> float:
    """The p-value of a difference of 0."""
    if standard_error == 0:
        return 1.0 if difference == 0 else 0.0
    return min(1.0, 2 * student_tail(abs(difference) / standard_error, df))


def equivalence(difference: float, standard_error: float, df: float, margin: float) -> dict[str, Any]:
    """Two one-sided tests that the difference is within ±margin (Schuirmann 1987).

    Returns:
        margin, p (the larger of the two), ci90, which is within the margin if p is below 0.05, and verdict: `yes` (it is),
        `no` (as surely beyond the margin) or `undecided`.
    """
    if standard_error == 0:
        inside = abs(difference) < margin
        verdict = "yes" if inside else "no"
        return {"margin": margin, "p": 0.0 if inside else 1.0, "ci90": [difference, difference], "verdict": verdict}
    p = max(student_tail((margin + sign * difference) / standard_error, df) for sign in (1, -1))
    verdict = "yes" if p < _LEVEL else "no" if 1 - p < _LEVEL else "undecided"
    half = student_quantile(_LEVEL, df) * standard_error
    return {"margin": margin, "p": p, "ci90": [difference - half, difference + half], "verdict": verdict}


def mcnemar_p(first: int, second: int) -> float:
    """The exact two-sided p-value of two counts of discordant pairs: binomial with probability one half."""
    n = first + second
    tail = sum(math.comb(n, k) for k in range(min(first, second) + 1))
    return min(1.0, 2 * tail / 2**n)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the given order."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted
