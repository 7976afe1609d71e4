"""The metrics of an evaluation: from tables of features to rows of numbers, each with its floor, interval and guards.

A metric is a statistic D(rows of the real set, rows of another set) on products or distances that are computed once per feature
space. `statistics.compare_with_floor` draws the rows; here is what is drawn from.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from ccella_fast.evaluation.anatomy import compare_glands, glands
from ccella_fast.evaluation.classifier_test import classifier_test_of_rows, standardised_products
from ccella_fast.evaluation.collecting import FeatureTable
from ccella_fast.evaluation.copying import memorisation
from ccella_fast.evaluation.frechet import FrechetDistances, can_extrapolate, frechet_distance_at_infinity
from ccella_fast.evaluation.images import image_memorisation, intensity_distance, spectral_distance
from ccella_fast.evaluation.mmd import gaussian_kernel, kernel_test, polynomial_kernel, unbiased_mmd
from ccella_fast.evaluation.neighbours import (
    clipped_density_coverage_of_rows,
    precision_recall_of_rows,
    squared_distances,
)
from ccella_fast.evaluation.results import Better, Row
from ccella_fast.evaluation.statistics import (
    Comparison,
    Statistic,
    compare_with_floor,
    disjoint_rows,
    group_numbers,
    guards,
    standardisation,
)

NEIGHBOURS = 5  # of precision, recall, density and coverage, also the clipped ones
_SHARES = {"precision", "recall", "coverage", "clipped_density", "clipped_coverage", "c2st"}  # from 0 to 1
_NOT_NEGATIVE = {"fd", "fd_slices", "density", "intensity", "spectrum"}
_CLASSIFIER_DRAWS = 20  # a classifier is trained five times in each
_CLASSIFIED = 300  # volumes of a set that the classifier test uses; the time grows with their third power
_LIMIT_DRAWS = 20  # only their mean is reported


class Sets(NamedTuple):
    """The features of one sequence.

    Attributes:
        real: the real volumes that synthetic ones are compared with.
        synthetic: the generated volumes.
        train: the volumes that the generator was trained on; None if they were not given.
        reconstructed: `real`, row for row, after the autoencoder; None without one.
        counterfactual: volumes with the noise of synthetic ones, whose ids they have, and another prompt; None without any.
    """

    real: FeatureTable
    synthetic: FeatureTable
    train: FeatureTable | None = None
    reconstructed: FeatureTable | None = None
    counterfactual: FeatureTable | None = None


class Draws(NamedTuple):
    """How often sets are split at random, and from which seed."""

    number: int
    seed: int


#: Metric -> the statistic on two sets of stacked, standardised features, from (stacked features, number of the real ones).
Maker = Callable[[np.ndarray, int], Statistic]


def _fd(stacked: np.ndarray, n_real: int) -> Statistic:
    return FrechetDistances(stacked[:n_real], stacked[n_real:])


def _kid(stacked: np.ndarray, n_real: int) -> Statistic:
    kernel = polynomial_kernel(stacked)
    return lambda a, b: unbiased_mmd(kernel, a, b)


def _mmd(stacked: np.ndarray, n_real: int) -> Statistic:
    kernel = gaussian_kernel(stacked, n_real)
    return lambda a, b: unbiased_mmd(kernel, a, b)


class _Neighbours(NamedTuple):
    precision: float
    recall: float
    density: float
    coverage: float
    clipped_density: float
    clipped_coverage: float


def _prdc(stacked: np.ndarray, n_real: int) -> Statistic:
    squared = squared_distances(stacked, stacked)

    def neighbours(a: np.ndarray, b: np.ndarray) -> _Neighbours:
        clipped = clipped_density_coverage_of_rows(squared, a, b, NEIGHBOURS)
        return _Neighbours(*precision_recall_of_rows(squared, a, b, NEIGHBOURS), *clipped)

    return neighbours


class _Distance(NamedTuple):
    make: Maker
    better: dict[str, Better]  # row -> which values are better
    least: int = 2
    by_dimension: bool = False  # whether the number of dimensions biases it


_DISTANCES = {
    "fd": _Distance(_fd, {"fd": "lower"}, by_dimension=True),
    "kid": _Distance(_kid, {"kid": "lower"}),
    "mmd": _Distance(_mmd, {"mmd": "lower"}),
    "prdc": _Distance(
        _prdc,
        {
            "precision": "higher",
            "recall": "higher",
            "density": "floor",
            "coverage": "higher",
            "clipped_density": "higher",
            "clipped_coverage": "higher",
        },
        least=NEIGHBOURS + 1,
    ),
}
FEATURE_METRICS = (*_DISTANCES, "c2st")
IMAGE_METRICS = ("intensity", "spectrum")
SMALL_IMAGES = "image-4mm"  # the space of `images.ImageFeatures` in which copies are looked for


def feature_rows(sets: Sets, space: str, metrics: set[str], draws: Draws, about: dict[str, Any]) -> Iterator[Row]:
    """The rows of the distances and of the classifier test in one feature space.

    Args:
        sets: the features.
        space: the name of the feature space.
        metrics: those of FEATURE_METRICS that are wanted.
        draws: of the floors and intervals.
        about: weights_sha256 and preprocessing of the features.
    """
    standard = standardisation((sets.train if sets.train is not None else sets.real).spaces[space])
    real, synthetic = (standard.apply(each.spaces[space]) for each in (sets.real, sets.synthetic))
    reconstructed = None if sets.reconstructed is None else standard.apply(sets.reconstructed.spaces[space])
    itself = [] if sets.train is not None else ["standardised_by_itself"]
    dim = real.shape[1]
    sizes = guards(len(real), len(synthetic), dim)
    common = {**set_names(sets), "features": space, "dim": dim, **about}
    for metric, distance in _DISTANCES.items():
        if metric not in metrics:
            continue
        start = time.perf_counter()
        if min(len(real), len(synthetic)) < distance.least:
            continue
        compared = _compare(distance.make, real, synthetic, sets.real.patients, draws, distance.least)
        limits = _limit(distance.make, real, reconstructed, compared, sets.real.patients, draws)
        details = _kernel_details(metric, real, synthetic, sets, draws)
        seconds = time.perf_counter() - start
        words = [*(word for word in sizes if word == "few" or distance.by_dimension), *itself]
        for name, comparison, limit in zip(distance.better, _fields(compared), _fields(limits), strict=True):
            yield compared_row(name, comparison, distance.better[name], limit, words, common, seconds, details)
    if "fd" in metrics and can_extrapolate(len(real), len(synthetic), dim):
        start = time.perf_counter()
        at_infinity = frechet_distance_at_infinity(real, synthetic, seed=draws.seed)
        yield Row(
            "fd_infinity", value=at_infinity.value, floor=0.0, better="lower",
            guards=(*(word for word in sizes if word == "few"), *itself),
            details={"slope": at_infinity.slope, "standard_error": at_infinity.standard_error},
            seconds=round(time.perf_counter() - start, 3), **common,
        )  # fmt: skip
    if "c2st" in metrics and min(len(real), len(synthetic)) >= 2:
        yield from _classifier_rows(real, synthetic, reconstructed, sets, draws, common, sizes, itself)


def _compare(
    make: Maker, real: np.ndarray, synthetic: np.ndarray, patients: Sequence[str | None], draws: Draws, least: int
) -> Any:
    statistic = make(np.concatenate([real, synthetic]), len(real))
    return compare_with_floor(
        statistic, len(real), len(synthetic), patients=patients, least=least, draws=draws.number, seed=draws.seed,
    )  # fmt: skip


def autoencoder_limit(
    statistic: Statistic | None,
    n_real: int,
    compared: Any,
    patients: Sequence[str | None] | None,
    draws: Draws,
    map_calls: Callable[..., Iterable[Any]] = map,
) -> Any:
    """The mean distance of a half of the real set to the reconstructions of the other half, at the n of the floor.

    Args:
        statistic: on the rows of the real set, and behind them those of the reconstructions; None without reconstructions.
        n_real: the number of real rows.
        compared: the comparison with synthetic volumes, whose n is used.
        patients: of the real rows.
        draws: as of the comparison.
        map_calls: as of the comparison.

    Returns:
        The limit of each statistic that was compared: a number, or None if there is no limit.
    """
    first: Comparison = _fields(compared)[0]
    if statistic is None or first.floor is None:
        return tuple(None for _ in _fields(compared)) if _is_several(compared) else None
    groups, rng = group_numbers(patients, n_real), np.random.default_rng(draws.seed)
    halves = [disjoint_rows(groups, (first.m, first.m), rng) for _ in range(min(draws.number, _LIMIT_DRAWS))]
    values = list(map_calls(statistic, [a for a, _ in halves], [n_real + b for _, b in halves]))
    means = np.array(values, float).reshape(len(values), -1).mean(0)
    return tuple(map(float, means)) if _is_several(compared) else float(means[0])


def _limit(
    make: Maker,
    real: np.ndarray,
    reconstructed: np.ndarray | None,
    compared: Any,
    patients: Sequence[str | None],
    draws: Draws,
) -> Any:
    statistic = None if reconstructed is None else make(np.concatenate([real, reconstructed]), len(real))
    return autoencoder_limit(statistic, len(real), compared, patients, draws)


def _is_several(value: Any) -> bool:
    """Whether a statistic has several fields, of which each has a value."""
    return isinstance(value, tuple) and not isinstance(value, Comparison)


def _fields(value: Any) -> tuple[Any, ...]:
    return tuple(value) if _is_several(value) else (value,)


def _kernel_details(metric: str, real: np.ndarray, synthetic: np.ndarray, sets: Sets, draws: Draws) -> dict[str, Any]:
    if metric not in ("kid", "mmd"):
        return {}
    kernel: Literal["polynomial", "gaussian"] = "polynomial" if metric == "kid" else "gaussian"
    test = kernel_test(real, synthetic, kernel, patients=sets.real.patients, seed=draws.seed)
    return {"p": test.p, "block_mean": test.block_mean, "block_sd": test.block_sd, "block_size": test.block_size}


def _classifier_rows(
    real: np.ndarray,
    synthetic: np.ndarray,
    reconstructed: np.ndarray | None,
    sets: Sets,
    draws: Draws,
    common: dict[str, Any],
    sizes: list[str],
    itself: list[str],
) -> Iterator[Row]:
    start = time.perf_counter()
    rng = np.random.default_rng(draws.seed)
    of_real, of_synthetic = (np.sort(rng.permutation(len(each))[:_CLASSIFIED]) for each in (real, synthetic))
    patients = [sets.real.patients[int(row)] for row in of_real]
    real, synthetic = real[of_real], synthetic[of_synthetic]
    reconstructed = None if reconstructed is None else reconstructed[of_real]
    groups = group_numbers(patients, len(real))

    def make(stacked: np.ndarray, n_real: int) -> Statistic:
        products = standardised_products(stacked)

        def auc(a: np.ndarray, b: np.ndarray) -> float:
            of_a = group_numbers(groups[a].tolist(), len(a))
            return classifier_test_of_rows(products, a, b, of_a, seed=draws.seed).auc

        return auc

    if groups.max() == 0:  # one patient
        return
    few = Draws(min(draws.number, _CLASSIFIER_DRAWS), draws.seed)
    compared = _compare(make, real, synthetic, patients, few, 4)
    limit = _limit(make, real, reconstructed, compared, patients, few)
    words = [*(word for word in sizes if word == "few"), *itself]
    details = {"n_real_used": len(real), "n_synthetic_used": len(synthetic)}
    yield compared_row("c2st", compared, "lower", limit, words, common, time.perf_counter() - start, details)


def image_rows(sets: Sets, metrics: set[str], draws: Draws) -> Iterator[Row]:
    """The rows of the distances of intensities and of power spectra."""
    common = {**set_names(sets), "features": None}
    for metric in IMAGE_METRICS:
        if metric not in metrics:
            continue
        start = time.perf_counter()
        real, synthetic = sets.real.spaces[metric], sets.synthetic.spaces[metric]
        reconstructed = None if sets.reconstructed is None else sets.reconstructed.spaces[metric]
        make = _intensity if metric == "intensity" else _spectrum
        compared = _compare(make, real, synthetic, sets.real.patients, draws, 2)
        limit = _limit(make, real, reconstructed, compared, sets.real.patients, draws)
        curves = {"real": _mean(real), "synthetic": _mean(synthetic)}
        curves |= {} if reconstructed is None else {"autoencoder": _mean(reconstructed)}
        details: dict[str, Any] = {"curves": curves}
        if metric == "spectrum":
            details |= {"high": spectral_distance(real, synthetic).high}
        words = [word for word in guards(len(real), len(synthetic), 1) if word == "few"]
        yield compared_row(metric, compared, "lower", limit, words, common, time.perf_counter() - start, details)


def _intensity(stacked: np.ndarray, n_real: int) -> Statistic:
    return lambda a, b: intensity_distance(stacked[a], stacked[b])


def _spectrum(stacked: np.ndarray, n_real: int) -> Statistic:
    return lambda a, b: spectral_distance(stacked[a], stacked[b]).total


def _mean(array: np.ndarray) -> list[float]:
    return [float(f"{value:.5g}") for value in array.mean(0, dtype=np.float64)]


def memorisation_rows(
    sets: Sets, space: str, draws: Draws, about: dict[str, Any]
) -> tuple[list[Row], list[dict[str, Any]]]:
    """The rows of memorisation in one space, and for each synthetic volume its nearest training volume.

    The distance is that of standardised features, or that of small images where they agree best (`image_memorisation`).
    """
    assert sets.train is not None
    start = time.perf_counter()
    train, real, synthetic = (each.spaces[space] for each in (sets.train, sets.real, sets.synthetic))
    if space == SMALL_IMAGES:
        found = image_memorisation(train, real, synthetic)
    else:
        standard = standardisation(train)
        found = memorisation(*(standard.apply(each) for each in (train, real, synthetic)), seed=draws.seed)
    seconds = time.perf_counter() - start
    words = tuple(found.guards)
    common = {
        **set_names(sets),
        "features": space,
        "dim": real.shape[1],
        "guards": words,
        "seconds": round(seconds, 3),
        **about,
    }
    details: dict[str, Any] = {"null": [float(f"{value:.6g}") for value in found.null], "n_train": len(train)}
    rows = [
        Row("copies", value=found.copies, ci95=found.copies_ci95, floor=0.0, better="lower", details=details, **common),
        Row("below_1pct", value=found.share_below_1pct, floor=0.01, better="floor", **common),
        Row("below_5pct", value=found.share_below_5pct, floor=0.05, better="floor", **common),
        Row("memorisation_index", value=found.index, floor=0.0, better="floor", **common),
        *([] if found.ct is None else [Row("ct", value=found.ct, floor=0.0, better="floor", **common)]),
    ]
    near = found.nearest
    nearest = [
        {
            "features": space,
            "nearest_train": case_name("train", int(near.row[case])),
            "distance": float(near.distance[case]),
            "null_percentile": float(near.percentile[case]),
            "memorisation_index": float(near.calibrated[case]),
            "copy": bool(near.is_copy[case]),
        }
        for case in range(len(sets.synthetic))
    ]
    return rows, nearest


def case_name(kind: str, row: int) -> str:
    """What a volume is called in results: by its number, since ids and file names may name patients."""
    return f"{kind}-{row + 1:03d}"


def set_names(sets: Sets) -> dict[str, Any]:
    """The fields of a `Row` that say what is compared."""
    return {
        "sequence": sets.real.sequence, "set": sets.synthetic.name, "reference": sets.real.name,
        "n_real": len(sets.real), "n_synthetic": len(sets.synthetic),
    }  # fmt: skip


def compared_row(
    metric: str,
    comparison: Comparison,
    better: Better,
    limit: float | None,
    words: list[str],
    common: dict[str, Any],
    seconds: float,
    details: dict[str, Any],
) -> Row:
    """The row of a metric that was compared with its floor; common: the fields that rows of the same sets share."""
    interval, of_floor = (_possible(metric, each) for each in (comparison.ci95, comparison.floor_ci95))
    counts = {"m": comparison.m, "draws": comparison.draws}
    more = {**counts, "floor_ci95": of_floor, "ratio_ci95": comparison.ratio_ci95}
    return Row(
        metric, value=comparison.value, value_equal_n=comparison.value_equal_n, ci95=interval,
        floor=comparison.floor, ratio=comparison.ratio, limit_autoencoder=limit, better=better,
        guards=tuple(dict.fromkeys([*words, *comparison.guards])), details={**details, **more},
        seconds=round(seconds, 3), **common,
    )  # fmt: skip


def _possible(metric: str, interval: tuple[float, float] | None) -> tuple[float, float] | None:
    """The part of an interval that the metric can reach, which draws do not know."""
    if interval is None or metric not in _SHARES | _NOT_NEGATIVE:
        return interval
    highest = 1.0 if metric in _SHARES else np.inf
    return float(np.clip(interval[0], 0, highest)), float(np.clip(interval[1], 0, highest))


def anatomy_rows(sets: Sets) -> list[Row]:
    """The shares of volumes whose gland, as segmented, follows each rule; the floor is that of the real volumes.

    There is no value where the segmenter fails on the real volumes and the others were not segmented.
    """
    start = time.perf_counter()
    real_glands = glands(sets.real.spaces["gland"])
    found = compare_glands(
        real_glands, glands(sets.synthetic.spaces["gland"]) if "gland" in sets.synthetic.spaces else []
    )
    words = () if found.applicable else ("segmenter_fails_on_real",)
    volumes = dict(zip(("real", "synthetic"), found.volume_cc, strict=True))
    seconds = round(time.perf_counter() - start, 3)
    limit = (
        None
        if sets.reconstructed is None or "gland" not in sets.reconstructed.spaces
        else compare_glands(real_glands, glands(sets.reconstructed.spaces["gland"]))
    )
    return [
        Row(
            f"gland_{rule}",
            **set_names(sets),
            features=None,
            value=synthetic.value,
            ci95=None if synthetic.value is None else synthetic.ci95,
            floor=real.value,
            limit_autoencoder=limit.rules[rule][1].value if limit else None,
            better="floor",
            guards=(*words, *(("few",) if min(real.n, synthetic.n) < 20 else ())),
            details={"floor_ci95": real.ci95, **({"volume_cc": volumes} if rule == "plausible" else {})},
            seconds=seconds,
        )  # fmt: skip
        for rule, (real, synthetic) in found.rules.items()
    ]
