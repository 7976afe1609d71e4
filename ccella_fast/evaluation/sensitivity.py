"""The sensitivity gate: does a feature space order known degradations of real volumes?

A space that does not see that a blur of 2 mm is worse than one of 1 mm cannot judge a generator. Spaces are judged before any
generated volume is looked at.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ccella_fast.errors import DataError
from ccella_fast.evaluation.degradations import CENTRAL, DEGRADATIONS, region_of, remove_lesion
from ccella_fast.evaluation.frechet import frechet_distance
from ccella_fast.evaluation.paired import sign_flip_p
from ccella_fast.evaluation.statistics import disjoint_rows, group_numbers, largest_half, standardisation
from ccella_fast.pirads import CLASS_NAMES

if TYPE_CHECKING:
    from ccella_fast.evaluation.features.extractor import Extractor
    from ccella_fast.evaluation.volumes import Volume

IN_ORDER = 0.9  # share of the volumes in which a family must be ordered
GATING = ("blur", "noise", "gland")  # families that decide
FEWEST = 3  # volumes


class GateRow(NamedTuple):
    """One degradation in one feature space.

    Attributes:
        family: "blur", "noise", "gland", "shift" or "lesion".
        strength: of the degradation.
        unit: of the strength.
        n: volumes.
        paired: mean distance of a volume to its worse copy, over the mean distance of two patients' volumes.
        frechet_ratio: Fréchet distance of a degraded half of the volumes to the other half, over that of the same half as
            it was, mean over random halves; None below four volumes.
        detected: share of the halves in which this distance is above the 95th percentile of the undegraded ones; None
            likewise.
    """

    family: str
    strength: float
    unit: str
    n: int
    paired: float
    frechet_ratio: float | None
    detected: float | None


class ClassRatio(NamedTuple):
    """Whether a space notices that 80 instead of 50 % of a set's volumes are positive. Reported; it does not decide.

    Attributes:
        frechet_ratio: mean Fréchet distance of an 80 % set to a 50 % set over that of two 50 % sets.
        detected: share of the draws in which the former is larger.
        m: volumes in each set.
    """

    frechet_ratio: float
    detected: float
    m: int


class Gate(NamedTuple):
    """The result of the gate for one feature space.

    Attributes:
        space: its name.
        passed: whether blur, noise and gland are each in order in at least 90 % of the volumes.
        in_order: for each of these families, the share of the volumes whose distance to their worse copies grows at each
            step, from the distance to an unchanged copy on.
        rows: one for each degradation.
        lesion_p: p-value of a common direction in which removed lesions move the features (sign-flip test); None if no
            lesion is known.
        class_ratio: None if the classes of too few volumes are known.
        guards: "few" below 20 volumes.
    """

    space: str
    passed: bool
    in_order: dict[str, float]
    rows: list[GateRow]
    lesion_p: float | None
    class_ratio: ClassRatio | None
    guards: list[str]


def sensitivity_gate(
    volumes: Iterable[Volume],
    extractor: Extractor,
    *,
    segment: Callable[[Volume], tuple[np.ndarray, Sequence[float]]] | None = None,
    lesions: Callable[[Volume], np.ndarray | None] | None = None,
    draws: int = 50,
    seed: int = 0,
) -> list[Gate]:
    """Degrade real volumes in known ways and look at what an extractor makes of them.

    Two volumes are in memory at a time. The features are standardised by the volumes as they are.

    Args:
        volumes: real ones, of at least three patients, read once.
        extractor: as in `features.extractor`; it is called ten times a volume.
        segment: finds the gland that is scaled; default: an ellipsoid in the centre of the volume.
        lesions: the lesion of a volume as a mask of its shape, or None.
        draws: number of random halves.
        seed: of the halves.

    Returns:
        One `Gate` for each of the extractor's spaces that could be judged.

    Raises:
        DataError: there are fewer than three volumes, or all are of one patient.
    """
    found: dict[str, list[np.ndarray]] = {space: [] for space in extractor.spaces}
    removed: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {space: [] for space in extractor.spaces}
    patients, classes = [], []
    for volume in volumes:
        gland = CENTRAL if segment is None else region_of(*segment(volume))
        for space, rows in _features(volume, extractor, gland).items():
            found[space].append(rows)
        lesion = None if lesions is None else lesions(volume)
        if lesion is not None and lesion.any():
            without = extractor(volume._replace(array=remove_lesion(volume.array, volume.spacing, lesion)))
            for space, vector in without.items():
                removed[space].append((found[space][-1][0], vector))
        patients.append(volume.patient)
        classes.append(volume.pirads)
    groups = group_numbers(patients, len(patients))
    if len(patients) < FEWEST or not groups.any():
        why = f"the sensitivity gate needs at least {FEWEST} real volumes of two patients, got {len(patients)}"
        raise DataError(why, fix="give more real volumes")
    return [
        _judge(space, np.stack(rows, 1).astype(np.float64), groups, removed[space], classes, draws, seed)
        for space, rows in found.items()
    ]


def _features(volume: Volume, extractor: Extractor, gland) -> dict[str, np.ndarray]:
    """The features (2 + degradations, d) of a volume in each space: as it is, a copy of it, and its worse copies."""
    copies = itertools.chain([volume.array, volume.array.copy()], (each.apply(volume, gland) for each in DEGRADATIONS))
    vectors = [extractor(volume._replace(array=array)) for array in copies]
    return {space: np.stack([found[space] for found in vectors]) for space in extractor.spaces}


def _judge(
    space: str,
    features: np.ndarray,
    groups: np.ndarray,
    removed: list[tuple[np.ndarray, np.ndarray]],
    classes: Sequence[str | None],
    draws: int,
    seed: int,
) -> Gate:
    """Judge one space from its features (2 + degradations, n, d)."""
    reference = standardisation(features[0])
    original, copy, *worse = (reference.apply(rows) for rows in features)
    n = len(original)
    first, second = np.triu_indices(n, 1)
    apart = groups[first] != groups[second]
    unit = np.linalg.norm(original[first] - original[second], axis=1)[apart].mean()
    paired = np.stack([np.linalg.norm(rows - original, axis=1) for rows in (copy, *worse)]) / unit
    in_order = {}
    for family in GATING:
        steps = paired[[0, *(1 + i for i, each in enumerate(DEGRADATIONS) if each.family == family)]]
        in_order[family] = float((np.diff(steps, axis=0) > 0).all(0).mean())
    rng = np.random.default_rng(seed)
    m = largest_half(groups)
    halves = [disjoint_rows(groups, (m, m), rng) for _ in range(draws)] if m >= 2 else []
    clean = np.array([frechet_distance(original[a], original[b]) for a, b in halves])
    rows = [
        _row(degradation[:3], distances, _halved(original, changed, halves), clean)
        for degradation, distances, changed in zip(DEGRADATIONS, paired[1:], worse, strict=True)
    ]
    lesion_p = None
    if removed:
        before, after = (reference.apply(np.stack(side)) for side in zip(*removed, strict=True))
        distances = np.linalg.norm(after - before, axis=1) / unit
        rows.append(_row(("lesion", 1.0, ""), distances, None, clean))
        lesion_p = sign_flip_p(after - before, seed)
    return Gate(
        space,
        all(share >= IN_ORDER for share in in_order.values()),
        in_order,
        rows,
        lesion_p,
        _class_ratio(original, classes, draws, rng),
        ["few"] if n < 20 else [],
    )


def _halved(original: np.ndarray, changed: np.ndarray, halves: list[list[np.ndarray]]) -> np.ndarray:
    return np.array([frechet_distance(original[a], changed[b]) for a, b in halves])


def _row(name: tuple[str, float, str], distances: np.ndarray, frechet: np.ndarray | None, clean: np.ndarray) -> GateRow:
    ratio = detected = None
    if frechet is not None and len(frechet):
        ratio = float(frechet.mean() / clean.mean())
        detected = float((frechet > np.quantile(clean, 0.95)).mean())
    return GateRow(*name, len(distances), float(distances.mean()), ratio, detected)


def _class_ratio(
    original: np.ndarray, classes: Sequence[str | None], draws: int, rng: np.random.Generator
) -> ClassRatio | None:
    negative, positive = (np.array([i for i, each in enumerate(classes) if each == name], int) for name in CLASS_NAMES)
    # A set of m = 10 k volumes with 5 k positive ones as reference, and at most 8 k others of one class: 13 k positive, 10
    # k negative.
    k = min(len(positive) // 13, len(negative) // 10)
    if not k:
        return None
    balanced, shifted = [], []
    for _ in range(draws):
        pos, neg = rng.permutation(positive), rng.permutation(negative)
        reference = original[np.r_[pos[: 5 * k], neg[: 5 * k]]]
        pos, neg = pos[5 * k :], neg[5 * k :]
        balanced.append(frechet_distance(reference, original[np.r_[pos[: 5 * k], neg[: 5 * k]]]))
        shifted.append(frechet_distance(reference, original[np.r_[pos[: 8 * k], neg[: 2 * k]]]))
    ratio = float(np.mean(shifted) / np.mean(balanced))
    return ClassRatio(ratio, float(np.mean(np.array(shifted) > np.array(balanced))), 10 * k)


def gate_table(gates: Sequence[Gate]) -> str:
    """The results as text, a column for each degradation and a row for each space."""
    if not gates:
        return ""
    names = [f"{row.family} {row.strength:g} {row.unit}".strip() for row in gates[0].rows]
    lines = [["space", *names, *(f"{family} in order" for family in GATING), "passed"]]
    for gate in gates:
        shares = [f"{gate.in_order[family]:.2f}" for family in GATING]
        lines.append([gate.space, *(f"{row.paired:.2f}" for row in gate.rows), *shares, "yes" if gate.passed else "no"])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )
