"""What another prompt changes in a volume from the same noise: pairs of samples, and the effect of what they were asked for.

The effect is stated as a share of the difference between real volumes: 0 if the prompt changes nothing, 1 if asking for the
other class moves the reading as far as real volumes of both classes are apart.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np

from ccella_fast.errors import DataError
from ccella_fast.evaluation.conditions import Label, cross_fit, quotient_interval, readability
from ccella_fast.evaluation.paired import sign_flip_p
from ccella_fast.evaluation.statistics import feature_matrix
from ccella_fast.evaluation.volumes import VolumeSet
from ccella_fast.quantities import counted
from ccella_fast.storage import read_json

logger = logging.getLogger("ccella_fast")
_RESAMPLES = 1000
_REPORT = {"report", "report_id", "report_sha256"}
_CLASS = {"class_given", "class_override", "class_probabilities", "identity", "files"}


# ---- Pairs of samples


def pair_samples(samples: VolumeSet, others: VolumeSet, *, field: str) -> VolumeSet:
    """The volumes of `others` under the ids of those of `samples` that have the same noise, weights and settings.

    The sidecars of two paired samples differ in the class that was asked for, or else in the report. If a seed was used for
    several reports, the report must be the same.

    Args:
        samples: of a folder of `ccella-fast sample`.
        others: of another such folder.
        field: what names it, for messages.

    Raises:
        DataError: a folder does not contain samples, or no two samples form a pair.
    """
    for volumes in (samples, others):
        if volumes.sources and not (volumes.path / f"{volumes.sources[0].id}.json").is_file():
            why = "pairs are found by the sidecars of samples, and this folder has none"
            raise DataError(why, path=volumes.path, field=field, fix="give folders of `ccella-fast sample`")
    for left_out in (_CLASS, _CLASS | _REPORT):
        first, second = (_by_noise(volumes, left_out) for volumes in (samples, others))
        pairs = {
            second[key].id: first[key].id
            for key in second
            if key in first and (first[key].pirads, first[key].prompt) != (second[key].pirads, second[key].prompt)
        }
        if pairs:
            break
    else:
        why = f"no sample of this folder has the seed and the settings of one of '{samples.name}' and another class or report"
        fix = "generate it with the same command and another --class_override, --pirads or --report"
        raise DataError(why, path=others.path, field=field, fix=fix)
    unpaired = len({source.id for source in others.sources}) - len(pairs)
    if unpaired:
        logger.warning("%s: %s without a counterpart left out", others.path, counted(unpaired, "sample"))
    kept = [source._replace(id=pairs[source.id]) for source in others.sources if source.id in pairs]
    return VolumeSet(others.name, kept, others.path, others.scaling)


class _Sample(NamedTuple):
    id: str
    pirads: str | None
    prompt: str | None


def _by_noise(volumes: VolumeSet, left_out: set[str]) -> dict[str, _Sample]:
    """The samples by all that their sidecars state besides `left_out`; those that it does not tell apart are left out."""
    found: dict[str, list[_Sample]] = {}
    for source in {source.id: source for source in volumes.sources}.values():
        sidecar = read_json(volumes.path / f"{source.id}.json")
        key = json.dumps({name: value for name, value in sidecar.items() if name not in left_out}, sort_keys=True)
        found.setdefault(key, []).append(_Sample(source.id, source.pirads, source.prompt))
    return {key: same[0] for key, same in found.items() if len(same) == 1}


# ---- Effect


class Effect(NamedTuple):
    """What asking for another value of a property changes in its reading.

    Attributes:
        name: the property.
        value: mean change of the reading towards what was asked for, over the difference that real volumes with these values
            have: (value - floor) / (ceiling - floor), with no change as floor. None if real volumes cannot be read.
        ci95: interval, from resampled pairs and real volumes.
        p: of no common direction of the changes (sign-flip test).
        moved: share of the pairs whose reading moved towards what was asked for.
        n_real: real volumes of which the property is known.
        pairs: pairs that were asked for different values.
        guards: "few" (fewer than 20 pairs or real volumes), "unreadable" as for `Agreement`.
    """

    name: str
    value: float | None
    ci95: tuple[float, float] | None
    p: float
    moved: float
    n_real: int
    pairs: int
    guards: list[str]


class Drift(NamedTuple):
    """How far the reading of a property moves in pairs that were asked for the same value of it.

    Attributes:
        name: the property.
        value: mean absolute change in standard deviations of the reading among real volumes.
        p: of no common direction of the changes.
    """

    name: str
    value: float
    p: float


def counterfactual_effect(
    name: str,
    real: Any,
    known: Sequence[Label],
    before: Any,
    after: Any,
    asked_before: Sequence[Label],
    asked_after: Sequence[Label],
    *,
    patients: Sequence[Hashable] | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Effect | Drift | None:
    """Read a property from pairs of volumes of the same noise, with probes that were fitted on real volumes.

    Args:
        name: of the property.
        real: (n, d) features.
        known: the property of each real volume: a class, a number, or None if it is not known.
        before: (m, d) features.
        after: (m, d) features of volumes from the same noise.
        asked_before: what each was asked for, or None.
        asked_after: likewise.
        patients: of the real volumes.
        folds: number of probes. The readings of a pair are means over all.
        seed: of folds, orders, resamples and sign flips.

    Returns:
        The effect on the pairs that were asked for different values. If there are fewer than two, the drift in all pairs. None
        if fewer than two values are known of real volumes.

    Raises:
        DataError: the two sets differ in size or features, or a list has another length than its features.
    """
    real, before, after = (
        feature_matrix(each, what, 1) for each, what in ((real, "real"), (before, "before"), (after, "after"))
    )
    if before.shape != after.shape or not len(asked_before) == len(asked_after) == len(before):
        why = f"pairs need equal numbers of volumes and of what they were asked for, got {len(before)} and {len(after)}"
        raise DataError(why, fix="give the same volumes in the same order")
    rng = np.random.default_rng(seed)
    fitted = cross_fit(real, known, patients, folds, rng)
    if fitted is None:
        return None
    first, second = (np.mean([probe.read(x) for probe in fitted.probes], axis=0) for x in (before, after))
    rows = [
        row
        for row, pair in enumerate(zip(asked_before, asked_after, strict=True))
        if None not in pair
        and pair[0] != pair[1]
        and all(not fitted.classes or each in fitted.classes for each in pair)
    ]
    if len(rows) < 2:
        change = (second - first) / np.maximum(fitted.readings.std(0), np.finfo(float).tiny)
        return Drift(name, float(np.abs(change).mean()), sign_flip_p(change, seed))
    asked = [(asked_before[row], asked_after[row]) for row in rows]
    towards = np.array(
        [
            _contrast(second[[row]] - first[[row]], pair, fitted.classes)[0]
            for row, pair in zip(rows, asked, strict=True)
        ]
    )
    labels = [known[row] for row in fitted.rows]
    guards = ["few"] if min(len(rows), len(labels)) < 20 else []
    value = interval = None
    if readability(fitted.readings, labels, fitted.classes, rng)[1] > 0.05:
        guards.append("unreadable")
    else:
        apart = _differences(fitted.readings, labels, asked, fitted.classes)
        value = float(towards.mean() / apart.mean())
        drawn = []
        for _ in range(_RESAMPLES):
            pairs, cases = rng.integers(len(rows), size=len(rows)), rng.integers(len(labels), size=len(labels))
            of_cases = [labels[case] for case in cases]
            asked_of = [asked[pair] for pair in pairs]
            apart = _differences(fitted.readings[cases], of_cases, asked_of, fitted.classes)
            drawn.append((float(towards[pairs].mean()), float(apart.mean())))
        interval = quotient_interval(drawn)
    return Effect(
        name, value, interval, sign_flip_p(towards[:, None], seed), float((towards > 0).mean()), len(labels), len(rows),
        guards,
    )  # fmt: skip


def _contrast(readings: np.ndarray, pair: tuple[Label, Label], classes: Sequence[str]) -> np.ndarray:
    """How far readings are towards the second value of a pair: of its class against the first one, or the signed number."""
    first, second = pair
    if classes:
        return readings[:, classes.index(str(second))] - readings[:, classes.index(str(first))]
    return readings[:, 0] * np.sign(float(second) - float(first))  # type: ignore[arg-type]


def _differences(
    readings: np.ndarray, known: Sequence[Label], asked: Sequence[tuple[Label, Label]], classes: Sequence[str]
) -> np.ndarray:
    """For each pair of values, how far the readings of real volumes with these values are apart."""
    if not classes:
        numbers = np.array(known, np.float64)
        slope = np.cov(numbers, readings[:, 0])[0, 1] / max(float(numbers.var(ddof=1)), np.finfo(float).tiny)
        return np.array([slope * abs(float(second) - float(first)) for first, second in asked])  # type: ignore[arg-type]
    found: dict[tuple[Label, Label], float] = {}
    labels = np.array([str(label) for label in known])
    for pair in set(asked):
        contrast = _contrast(readings, pair, classes)
        of = [contrast[labels == str(each)] for each in pair]
        found[pair] = float(of[1].mean() - of[0].mean()) if min(map(len, of)) else np.nan
    return np.array([found[pair] for pair in asked])
