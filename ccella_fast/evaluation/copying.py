"""Does a generator copy its training set? Distances to the nearest training volume, against those of held-out real volumes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ccella_fast.errors import DataError
from ccella_fast.evaluation.neighbours import squared_distances
from ccella_fast.evaluation.statistics import feature_matrix, share_interval

_NEIGHBOURS = 10  # following training volumes, whose mean distance a nearest distance is compared with
_FALSE_ALARMS = 0.05  # probability of any call in a set without copies
_EULER = 0.5772156649


class Nearest(NamedTuple):
    """The nearest training volume of each of m volumes."""

    row: np.ndarray  # (m,) row in the training set
    distance: np.ndarray  # (m,)
    percentile: (
        np.ndarray
    )  # (m,) percent of held-out volumes that are at most as far from their nearest training volume
    calibrated: np.ndarray  # (m,) (mean of the null - distance) / its standard deviation: positive is nearer than usual
    is_copy: np.ndarray  # (m,) bool


@dataclasses.dataclass(frozen=True)
class Memorisation:
    """How near synthetic volumes are to training volumes; the null is the same distance of held-out real volumes.

    Attributes:
        share_below_1pct: share of synthetic volumes nearer than the 1st percentile of the null; 0.01 is expected.
        share_below_5pct: nearer than the 5th percentile; 0.05 is expected.
        copies: share of synthetic volumes that are called copies.
        copies_ci95: interval of this share.
        nearest: per synthetic volume, in the order given.
        index: mean calibrated index of the synthetic volumes, about 0 for new ones.
        ct: C_T, strongly negative for copies; None if no cell has enough volumes.
        null: (n,) sorted distances of the held-out volumes.
        guards: `few_held_out` (fewer than 99: the 1st percentile is below the smallest null value, which is used instead).
    """

    share_below_1pct: float
    share_below_5pct: float
    copies: float
    copies_ci95: tuple[float, float]
    nearest: Nearest
    index: float
    ct: float | None
    null: np.ndarray
    guards: list[str]


def memorisation(train: Any, held_out: Any, synthetic: Any, *, seed: int = 0) -> Memorisation:
    """Copies of training volumes among synthetic ones, with the false alarms of real volumes that were never trained on.

    A synthetic volume is called a copy if it is nearer to its nearest training volume than every held-out volume is to its
    own, and if that distance is also improbable next to those to the 10 following training volumes: the relative distance of
    Carlini et al. 2023 (arXiv 2301.13188, section 4.2). An average volume without detail is near to all training volumes, a
    copy to one. Improbable means that a set of this size without copies has any call with a probability of about 5 %. A
    nearest distance is the minimum of many, so its lower tail is that of a Weibull distribution, which is fitted to the
    held-out volumes.

    Args:
        train: (n, d) features of the generator's training volumes, n at least 3.
        held_out: (h, d) features of real volumes that the generator was not trained on, h at least 3.
        synthetic: (m, d) features.
        seed: of the cells of C_T.

    Raises:
        DataError: if a held-out volume is among the training volumes, or a set cannot be used.
    """
    train, held_out = feature_matrix(train, "training", 3), feature_matrix(held_out, "held-out", 3)
    synthetic = feature_matrix(synthetic, "synthetic", 1)
    if len(widths := {x.shape[1] for x in (train, held_out, synthetic)}) > 1:
        raise DataError(f"the sets have different numbers of features: {sorted(widths)}", fix="use one extractor")
    distances = [np.sqrt(squared_distances(volumes, train)) for volumes in (held_out, synthetic)]
    ct = data_copying(train, held_out, synthetic, seed=seed)
    return dataclasses.replace(memorisation_of_distances(*distances), ct=ct)


def memorisation_of_distances(held_out: np.ndarray, synthetic: np.ndarray) -> Memorisation:
    """As `memorisation`, from any distances to the training volumes; without C_T, which needs features.

    Args:
        held_out: (h, n) distances of held-out real volumes to training volumes, h and n at least 3.
        synthetic: (m, n) distances of synthetic volumes.

    Raises:
        DataError: if a held-out volume is among the training volumes.
    """
    null, null_relative, _ = _nearest(held_out)
    if (leaked := np.flatnonzero(null == 0)).size:
        why = f"{len(leaked)} held-out volumes are also training volumes; the first is row {leaked[0]}"
        raise DataError(why, field="held_out", fix="remove them from the held-out set: they would hide every copy")
    distance, relative, row = _nearest(synthetic)
    improbable = _weibull_tail(relative, null_relative) < _FALSE_ALARMS / len(synthetic)
    is_copy = improbable & (distance < null.min())
    null = np.sort(null)
    percentile = 100 * np.searchsorted(null, distance, side="right") / len(null)
    spread = max(null.std(ddof=1), np.finfo(float).eps * null.mean())  # held-out distances may all be equal
    calibrated = (null.mean() - distance) / spread
    # The k-th smallest of n values is the k / (n + 1) quantile: a new value is below it with just this probability.
    low, lowest = np.quantile(null, (0.05, 0.01), method="weibull")
    return Memorisation(
        share_below_1pct=float((distance < lowest).mean()),
        share_below_5pct=float((distance < low).mean()),
        copies=float(is_copy.mean()),
        copies_ci95=share_interval(int(is_copy.sum()), len(is_copy)),
        nearest=Nearest(row, distance, percentile, calibrated, is_copy),
        index=float(calibrated.mean()),
        ct=None,
        null=null,
        guards=["few_held_out"] if len(null) < 99 else [],
    )


def _nearest(distances: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distance to the nearest training volume, the same over the mean of those to the next ones, and its row."""
    row = distances.argmin(axis=1)
    count = min(_NEIGHBOURS + 1, distances.shape[1])
    near = np.sort(np.partition(distances, count - 1, axis=1)[:, :count], axis=1)
    following = near[:, 1:].mean(axis=1)
    return near[:, 0], near[:, 0] / np.where(following > 0, following, 1), row


def _weibull_tail(values: np.ndarray, null: np.ndarray) -> np.ndarray:
    """Probability of a value at most as large, from a Weibull distribution with the moments of log(null).

    Its shape is lowered by the sampling error of the fit, so that few held-out volumes give fewer calls and not more.
    """
    logs = np.log(null)
    shape = np.pi / np.sqrt(6) / max(logs.std(ddof=1), 1e-12) / (1 + 1.7 / np.sqrt(len(null)))
    centre = logs.mean() + _EULER / shape
    with np.errstate(divide="ignore"):
        return -np.expm1(-np.exp(np.minimum(shape * (np.log(values) - centre), 700)))


def data_copying(
    train: np.ndarray, held_out: np.ndarray, synthetic: np.ndarray, *, cells: int = 3, least: int = 20, seed: int = 0
) -> float | None:
    """C_T (Meehan et al. 2020, arXiv 2004.05675, section 4): are synthetic volumes nearer to training volumes than real ones?

    Space is divided into k-means cells of the training set. In each, the Mann-Whitney statistic of the nearest distances of
    synthetic and held-out volumes becomes a z-score. C_T is the mean over cells, weighted by the held-out volumes in them:
    about 0 for a generator of new volumes (standard deviation at most 1), below for copies, above for volumes that are far from
    all training volumes.

    Args:
        train: (n, d) float64 features.
        held_out: (h, d) float64 features.
        synthetic: (m, d) float64 features.
        cells: number of cells.
        least: cells with fewer synthetic volumes are left out.
        seed: of the initial cells.

    Returns:
        C_T, or None if no cell has enough synthetic volumes and any training and held-out ones.
    """
    centres = k_means(train, min(cells, len(train)), seed)
    cell = [squared_distances(x, centres).argmin(axis=1) for x in (train, held_out, synthetic)]
    total, weights = 0.0, 0
    for i in range(len(centres)):
        known, real, made = (x[c == i] for x, c in zip((train, held_out, synthetic), cell, strict=True))
        if len(made) < least or not len(known) or not len(real):
            continue
        near_real, near_made = (squared_distances(x, known).min(axis=1) for x in (real, made))
        total += len(real) * mann_whitney_z(near_made, near_real)
        weights += len(real)
    return total / weights if weights else None


def mann_whitney_z(a: np.ndarray, b: np.ndarray) -> float:
    """The number of pairs with a above b (ties count one half), minus its mean, over its standard deviation without ties."""
    n, m, ordered = len(a), len(b), np.sort(b)
    above = (np.searchsorted(ordered, a, side="left") + np.searchsorted(ordered, a, side="right")).sum() / 2
    return float((above - n * m / 2) / np.sqrt(n * m * (n + m + 1) / 12))


def k_means(points: np.ndarray, k: int, seed: int = 0) -> np.ndarray:
    """Centres (k, d) of Lloyd's algorithm from a k-means++ start (Arthur and Vassilvitskii 2007); fewer for equal points."""
    rng = np.random.default_rng(seed)
    centres = points[rng.integers(len(points))][None]
    while len(centres) < k:
        nearest = squared_distances(points, centres).min(axis=1)
        if not nearest.any():
            return centres
        centres = np.concatenate([centres, points[rng.choice(len(points), p=nearest / nearest.sum())][None]])
    label = np.full(len(points), -1)
    while (label != (nearest := squared_distances(points, centres).argmin(axis=1))).any():
        label = nearest
        centres = np.stack([points[label == i].mean(axis=0) if (label == i).any() else centres[i] for i in range(k)])
    return centres


class OwnStudyRetrieval(NamedTuple):
    """How often the nearest training volume is the study whose report was the prompt.

    Attributes:
        rate: for synthetic volumes.
        ci95: interval of this rate.
        held_out_rate: for held-out real volumes and the training study with matching findings; None if none were given.
        chance: of a volume without any relation to its prompt.
        median_rank: of the own study among all training volumes by distance, 1 is the nearest.
    """

    rate: float
    ci95: tuple[float, float]
    held_out_rate: float | None
    chance: float
    median_rank: float


def own_study_retrieval(
    train: Any, synthetic: Any, own: Sequence[int], held_out: Any = None, matched: Sequence[int] | None = None
) -> OwnStudyRetrieval:
    """Do prompts that come from training reports act as keys to their own studies?

    Volumes with equal findings are alike without any memory, so the rate is read next to that of held-out real volumes, which
    retrieve a training study with the same findings. A rate above both this and chance means that prompts retrieve studies.

    Args:
        train: (n, d) features, n at least 2.
        synthetic: (m, d) features of volumes that were generated from training reports.
        own: row in `train` of the study whose report prompted each synthetic volume.
        held_out: (h, d) features of real volumes that the generator was not trained on.
        matched: row in `train` of the study that matches the findings of each held-out volume.
    """
    train = feature_matrix(train, "training", 2)
    ranks = _own_ranks(train, feature_matrix(synthetic, "synthetic", 1), own, "synthetic")
    control = None
    if held_out is not None and matched is not None:
        control = _own_ranks(train, feature_matrix(held_out, "held-out", 1), matched, "held-out")
    return OwnStudyRetrieval(
        rate=float((ranks == 1).mean()),
        ci95=share_interval(int((ranks == 1).sum()), len(ranks)),
        held_out_rate=None if control is None else float((control == 1).mean()),
        chance=1 / len(train),
        median_rank=float(np.median(ranks)),
    )


def _own_ranks(train: np.ndarray, volumes: np.ndarray, own: Sequence[int], name: str) -> np.ndarray:
    rows = np.asarray(own)
    if rows.shape != (len(volumes),) or rows.dtype.kind not in "iu" or rows.min() < 0 or rows.max() >= len(train):
        why = f"the {name} set needs one row of the training set per volume, from 0 to {len(train) - 1}"
        raise DataError(why, field=name)
    squared = squared_distances(volumes, train)
    return 1 + (squared < squared[np.arange(len(volumes)), rows][:, None]).sum(axis=1)
