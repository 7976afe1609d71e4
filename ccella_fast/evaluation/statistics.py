"""What every metric shares: checked arrays, standardisation, splits by patient, floors, intervals and guards.

The floor of a distance is its value between two disjoint halves of the real set. It is compared with the distance between one
of these halves and as many synthetic volumes: at equal n the bias of both is alike, and their ratio says how far from real a
set is. No draw contains a volume twice: duplicates, as in the ordinary bootstrap, make every distance larger.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ccella_fast.errors import DataError
from ccella_fast.evaluation.student import student_quantile

_Z = 1.959964  # 97.5 % quantile of the normal distribution
_ROUNDING = 1e-6  # relative to a feature's largest value: a smaller spread is the rounding of float32


def feature_matrix(features: Any, name: str, least: int = 2) -> np.ndarray:
    """The features of one set, checked, as a new float64 array of shape (n, d).

    Args:
        features: (n, d), one row per volume.
        name: of the set, for messages.
        least: smallest number of rows that the caller can use.

    Raises:
        DataError: if the array has another shape, fewer rows, or a value that is not finite.
    """
    try:
        array = np.asarray(features)
    except ValueError:
        why = f"the rows of the {name} set have different numbers of features"
        raise DataError(why, field=name, fix="compute all with the same extractor") from None
    if array.ndim != 2 or array.shape[1] == 0:
        why = f"the features of the {name} set must have the shape (n, d), one row per volume; they have {array.shape}"
        raise DataError(why, field=name, fix="give one row per volume, also for a single feature: x[:, None]")
    if array.dtype.kind not in "fiu":
        raise DataError(f"the features of the {name} set must be real numbers, not {array.dtype}", field=name)
    if len(array) < least:
        why = f"the {name} set has {len(array)} volume{'s' * (len(array) != 1)}; this needs at least {least}"
        raise DataError(why, field=name, fix="add volumes, or leave this metric out")
    if not (finite := np.isfinite(array).all(axis=1)).all():
        rows = np.flatnonzero(~finite)
        why = f"{len(rows)} of {len(array)} rows of the {name} set are not finite; the first is row {rows[0]}"
        raise DataError(why, field=name, fix="find out why the extractor gave NaN or infinity for these volumes")
    return array.astype(np.float64)


def feature_pair(a: Any, b: Any, names: tuple[str, str] = ("first", "second"), least: int = 2):
    """Two sets of the same feature space, checked; see `feature_matrix`."""
    first, second = feature_matrix(a, names[0], least), feature_matrix(b, names[1], least)
    if first.shape[1] != second.shape[1]:
        why = f"the {names[0]} set has {first.shape[1]} features per volume and the {names[1]} set {second.shape[1]}"
        raise DataError(why, fix="compute both with the same extractor")
    return first, second


class Standardisation(NamedTuple):
    """Mean and standard deviation of each feature of a reference set."""

    mean: np.ndarray  # (d,)
    scale: np.ndarray  # (d,)
    kept: np.ndarray  # (d,) bool: false for features that are constant in the reference set

    def apply(self, features: Any, name: str = "given") -> np.ndarray:
        """Features minus the mean over the standard deviation, without constant ones: (n, kept features), float64."""
        matrix = feature_matrix(features, name, least=1)
        if matrix.shape[1] != len(self.kept):
            why = f"the {name} set has {matrix.shape[1]} features per volume and the reference set {len(self.kept)}"
            raise DataError(why, fix="compute both with the same extractor")
        return (matrix[:, self.kept] - self.mean[self.kept]) / self.scale[self.kept]


def standardisation(reference: Any, name: str = "reference") -> Standardisation:
    """The standardisation that a reference set defines: independent real volumes, never the synthetic ones.

    Args:
        reference: (n, d), n at least 2.
        name: of the set, for messages.

    Raises:
        DataError: if every feature is constant in the reference set.
    """
    matrix = feature_matrix(reference, name)
    mean, scale = matrix.mean(axis=0), matrix.std(axis=0, ddof=1)
    kept = scale > _ROUNDING * np.abs(matrix).max(axis=0)
    if not kept.any():
        why = f"all {len(kept)} features are constant in the {name} set of {len(matrix)} volumes"
        raise DataError(why, field=name, fix="check that the volumes differ and that the extractor fits them")
    return Standardisation(mean, scale, kept)


def guards(n_real: int, n_synthetic: int, dimensions: int) -> list[str]:
    """Words that qualify a distance between sets of these sizes in a space of this many dimensions.

    `one_volume` (nothing can be computed), `few` (a set has fewer than 20 volumes), `n<d` (no more volumes than dimensions: a
    Fréchet distance is mostly bias) or `biased` (fewer than three times as many).
    """
    n = min(n_real, n_synthetic)
    found = ["one_volume"] if n < 2 else []
    found += ["few"] if n < 20 else []
    return found + (["n<d"] if n <= dimensions else ["biased"] if n < 3 * dimensions else [])


def group_numbers(groups: Sequence[Hashable] | None, n: int) -> np.ndarray:
    """The group of each of n volumes as a number from 0; None, for all or for one, is a group of its own."""
    if groups is None:
        return np.arange(n)
    if len(groups) != n:
        raise DataError(f"there are {len(groups)} patients for {n} volumes", fix="name the patient of every volume")
    known: dict[Hashable, int] = {}
    return np.array([known.setdefault(object() if g is None else g, len(known)) for g in groups], dtype=int)


def disjoint_rows(groups: np.ndarray, sizes: Sequence[int], rng: np.random.Generator) -> list[np.ndarray]:
    """Random disjoint sets of rows of the given sizes; no group is in two of them.

    Groups are taken whole and in random order until a set has its size. What exceeds it of the last group is left out.
    """
    place = rng.permutation(groups.max() + 1)[groups]
    rows = np.lexsort((rng.random(len(groups)), place))
    place, sets, start = place[rows], [], 0
    for size in sizes:
        end = start + size
        assert end <= len(rows), "see `largest_half`"
        sets.append(rows[start:end])
        start = int(np.searchsorted(place, place[end - 1], side="right")) if size else start
    return sets


def largest_half(groups: np.ndarray) -> int:
    """The largest m for which `disjoint_rows(groups, (m, m))` exists in every order of the groups."""
    return (len(groups) - int(np.bincount(groups).max()) + 1) // 2


def grouped_folds(groups: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """A fold from 0 to `folds` - 1 for each row: groups in random order, the next one into the smallest fold."""
    sizes, fold_sizes = np.bincount(groups), np.zeros(folds, dtype=int)
    fold_of = np.empty(len(sizes), dtype=int)
    for group in rng.permutation(len(sizes)):
        fold_of[group] = np.argmin(fold_sizes)
        fold_sizes[fold_of[group]] += sizes[group]
    return fold_of[groups]


class Comparison(NamedTuple):
    """A metric of a synthetic set with what is needed to read it.

    Attributes:
        value: between all real and all synthetic volumes.
        ci95: interval for its expectation over sets of these sizes; None for fewer than 4 volumes in a set.
        value_equal_n: mean over draws between half of the real set and as many synthetic volumes.
        floor: mean over the same draws between this half and the other half of the real set; None if there is none.
        floor_ci95: the central 95 % of the floor's draws: single real sets of this size are this far apart.
        ratio: `value_equal_n` / `floor`; None if the floor is zero within its spread, as for unbiased distances.
        ratio_ci95: interval of the ratio; None for fewer than 8 volumes in the real set, or if a half was drawn that cannot be
            split in turn, since most of its volumes are of one patient.
        m: volumes in each set of a draw.
        draws: number of draws.
        guards: `no_floor` if a half has fewer than the required volumes.
    """

    value: float
    ci95: tuple[float, float] | None
    value_equal_n: float | None
    floor: float | None
    floor_ci95: tuple[float, float] | None
    ratio: float | None
    ratio_ci95: tuple[float, float] | None
    m: int
    draws: int
    guards: list[str]


Statistic = Callable[[np.ndarray, np.ndarray], Any]


def compare_with_floor(
    statistic: Statistic,
    n_real: int,
    n_synthetic: int,
    *,
    patients: Sequence[Hashable] | None = None,
    synthetic_groups: Sequence[Hashable] | None = None,
    least: int = 2,
    draws: int = 100,
    seed: int = 0,
    map_calls: Callable[..., Iterable[Any]] = map,
) -> Any:
    """A metric with its floor at equal n and its interval, all by draws without replacement.

    In draw k the real set is split at random, never within a patient, into A and B of m = min(n_real // 2, n_synthetic)
    volumes, and S is m synthetic volumes: D(A, S) and D(A, B) have the same n on both sides.

    The interval comes from half-samples of both sets, which A and S are if both sets have 2m volumes. For a statistic that is
    linear to first order, the deviation of a random half from the mean of all halves has the variance of the full statistic:
    the m of n rows of a half have the variance V/m (1 - m/n), and m = n/2 makes this V/n. So no scaling is needed (Politis,
    Romano and Wolf 1999, chapter 2; half-sampling: McCarthy 1969). For degenerate statistics, such as the MMD of two equal
    distributions, the interval is too wide by a factor of up to the square root of three, never too narrow. It is an interval
    of the expectation at this n, bias included. That of the ratio combines the deviations of the value in the same half-samples
    with those of the floor within the real half.

    Args:
        statistic: D(rows_a, rows_b) on rows of the stacked features, real ones first: a float or a NamedTuple of floats.
        n_real: number of real volumes.
        n_synthetic: number of synthetic volumes.
        patients: of the real volumes.
        synthetic_groups: of the synthetic volumes, such as the report that each was prompted with.
        least: smallest number of volumes in a set that the statistic can use.
        draws: number of draws.
        seed: of the draws.
        map_calls: calls the statistic for all draws, as the built-in `map`; that of an executor calls it in several threads.

    Returns:
        A `Comparison`, or the statistic's NamedTuple with a `Comparison` in each field.
    """
    rng = np.random.default_rng(seed)
    real, synthetic = group_numbers(patients, n_real), group_numbers(synthetic_groups, n_synthetic)
    m, h_real, h_synthetic = min(largest_half(real), n_synthetic), n_real // 2, n_synthetic // 2
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {"value": [], "floor": [], "half": [], "floor in half": []}
    are_halves = (m, m) == (h_real, h_synthetic)
    for _ in range(draws):
        if m >= least:
            a, b = disjoint_rows(real, (m, m), rng)
            (s,) = disjoint_rows(synthetic, (m,), rng)
            pairs["value"].append((a, n_real + s))
            pairs["floor"].append((a, b))
        if min(h_real, h_synthetic) >= least:
            r = a if are_halves else disjoint_rows(real, (h_real,), rng)[0]
            if not are_halves:
                pairs["half"].append((r, n_real + disjoint_rows(synthetic, (h_synthetic,), rng)[0]))
            of_r = np.unique(real[r], return_inverse=True)[1]
            if (q := largest_half(of_r)) >= least:
                a, b = disjoint_rows(of_r, (q, q), rng)
                pairs["floor in half"].append((r[a], r[b]))
    everything = (np.arange(n_real), n_real + np.arange(n_synthetic))
    whole, *found = map_calls(statistic, *zip(everything, *(pair for of in pairs.values() for pair in of), strict=True))
    drawn = {name: [found.pop(0) for _ in of] for name, of in pairs.items()}
    drawn["half"] = drawn["value"] if are_halves else drawn["half"]
    fields = np.atleast_1d(np.array(whole, dtype=float))
    columns = {name: np.array(found, float).reshape(len(found), len(fields)) for name, found in drawn.items()}
    results = [
        _comparison(float(fields[i]), {name: column[:, i] for name, column in columns.items()}, m)
        for i in range(len(fields))
    ]
    return type(whole)._make(results) if isinstance(whole, tuple) else results[0]  # type: ignore[attr-defined]


def _comparison(value: float, drawn: dict[str, np.ndarray], m: int) -> Comparison:
    halves, floor, floor_in_half = drawn["half"], drawn["floor"], drawn["floor in half"]
    of_value = halves - halves.mean() if len(halves) else halves
    ci95 = _around(value, of_value) if len(halves) else None
    if not len(floor):
        return Comparison(value, ci95, None, None, None, None, None, m, len(halves), ["no_floor"])
    equal_n, level = float(drawn["value"].mean()), float(floor.mean())
    low, high = _central(floor)
    ratio = ratio_ci95 = None
    # The floor of an unbiased distance is zero: what is left is the draws' spread, and a multiple of it has no meaning.
    if level > floor.std():
        ratio = equal_n / level
        if 0 < len(floor_in_half) == len(halves) and floor_in_half.mean() > 0:
            of_floor = floor_in_half / floor_in_half.mean() - 1
            ratio_ci95 = _around(ratio, of_value / level - ratio * of_floor)
    return Comparison(value, ci95, equal_n, level, (low, high), ratio, ratio_ci95, m, len(floor), [])


def _around(estimate: float, deviations: np.ndarray) -> tuple[float, float]:
    """The interval of an expectation, from an estimate and the deviations of such estimates from theirs."""
    below, above = _central(deviations)
    return estimate - above, estimate - below


def _central(values: np.ndarray) -> tuple[float, float]:
    """The central 95 %: quantiles, or with fewer than 39 values, all of which are inside, those of Student's distribution.

    Of n values, the k-th smallest is the k / (n + 1) quantile.
    """
    n = len(values)
    if n >= 39 or n < 2:
        low, high = np.quantile(values, (0.025, 0.975), method="weibull")
        return float(low), float(high)
    half = student_quantile(0.025, n - 1) * float(values.std(ddof=1)) * (1 + 1 / n) ** 0.5
    mean = float(values.mean())
    return mean - half, mean + half


def share_interval(count: int, n: int) -> tuple[float, float]:
    """95 % interval of a share of n volumes (Wilson 1927), which is never empty, also for a count of 0 or n."""
    z, share = _Z, count / n
    centre, width = share + z * z / (2 * n), z * float(np.sqrt(share * (1 - share) / n + z * z / (4 * n * n)))
    return max(0.0, (centre - width) / (1 + z * z / n)), min(1.0, (centre + width) / (1 + z * z / n))
