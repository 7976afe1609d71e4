"""Anatomical plausibility: what a prostate's mask must look like, counted in generated and in real volumes.

A segmenter is any function `segment(volume) -> (mask, spacing)` with a bool array (X, Y, Z) and its voxel size in mm.
Whether it works on the volumes at hand is judged by the real ones (`compare_glands`): otherwise its masks say nothing
about generated ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ccella_fast.evaluation.statistics import share_interval

if TYPE_CHECKING:
    from ccella_fast.evaluation.volumes import Volume

VOLUME_CC = (15.0, 80.0)  # of a gland that is plausible
EXTENT_MM = (10.0, 150.0)
APPLICABLE = 0.9  # share of the real volumes in which the segmenter must find one component of a plausible volume

Segmenter = Callable[["Volume"], tuple[np.ndarray, Sequence[float]]]


class Gland(NamedTuple):
    """The shape of a mask. A blank mask has zeros everywhere.

    Attributes:
        volume_cc: of all voxels.
        left_right_mm: extent from the first to the last voxel, inclusive, along x.
        front_back_mm: along y.
        foot_head_mm: along z.
        components: parts that do not share a face.
        largest_share: of the volume, in the largest part.
        hole_cc: volume that is enclosed by the mask.
        border_voxels: that are at an edge of the mask's array.
        slice_gaps: slices without a voxel between the first and the last slice with one.
    """

    volume_cc: float
    left_right_mm: float
    front_back_mm: float
    foot_head_mm: float
    components: int
    largest_share: float
    hole_cc: float
    border_voxels: int
    slice_gaps: int


#: What a plausible gland fulfils, by name.
RULES: dict[str, Callable[[Gland], bool]] = {
    "found": lambda gland: gland.components > 0,
    "volume": lambda gland: VOLUME_CC[0] <= gland.volume_cc <= VOLUME_CC[1],
    "extents": lambda gland: all(EXTENT_MM[0] <= extent <= EXTENT_MM[1] for extent in gland[1:4]),
    "one_component": lambda gland: gland.components == 1,
    "no_hole": lambda gland: gland.components > 0 and gland.hole_cc == 0,
    "no_border_contact": lambda gland: gland.components > 0 and gland.border_voxels == 0,
    "no_slice_gap": lambda gland: gland.components > 0 and gland.slice_gaps == 0,
}


def measure_gland(mask: np.ndarray, spacing: Sequence[float]) -> Gland:
    """Measure a mask.

    Args:
        mask: (X, Y, Z) bool, axes R, A, S.
        spacing: voxel size in mm.
    """
    mask = np.asarray(mask, bool)
    count = int(mask.sum())
    if not count:
        return Gland(0.0, 0.0, 0.0, 0.0, 0, 0.0, 0.0, 0, 0)
    voxel_cc = math.prod(spacing) / 1000
    occupied = [np.flatnonzero(mask.any(tuple({0, 1, 2} - {axis}))) for axis in range(3)]
    x, y, z = (float((inside[-1] - inside[0] + 1) * step) for inside, step in zip(occupied, spacing, strict=True))
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(mask.astype(np.uint8))
    parts = np.bincount(sitk.GetArrayFromImage(sitk.ConnectedComponent(image)).ravel())[1:]
    holes = int(sitk.GetArrayFromImage(sitk.BinaryFillhole(image)).astype(bool).sum()) - count
    inner = mask[1:-1, 1:-1, 1:-1]
    gaps = int(occupied[2][-1] - occupied[2][0] + 1 - len(occupied[2]))
    return Gland(
        count * voxel_cc,
        x,
        y,
        z,
        len(parts),
        float(parts.max() / count),
        holes * voxel_cc,
        count - int(inner.sum()),
        gaps,
    )


def in_field_of_view(mask: np.ndarray, spacing: Sequence[float], volume: Volume) -> np.ndarray:
    """The part of a mask that the volume covers.

    A window of the segmenter may be larger, and its edge is not where a gland is cut off.

    Args:
        mask: (X, Y, Z) bool, with the centre of the volume.
        spacing: of the mask, mm.
        volume: what was segmented.
    """
    part = []
    for size, step, voxels, length in zip(mask.shape, spacing, volume.array.shape, volume.spacing, strict=True):
        count = min(size, max(1, round(voxels * length / step)))
        part.append(slice((size - count) // 2, (size - count) // 2 + count))
    return mask[tuple(part)]


class GlandFeatures:
    """A segmenter as an extractor, so that what it measures is cached as features are.

    Args:
        segment: the segmenter.
        identity: of its weights and preprocessing, as JSON.
        sequences: that it can read; None for all.
    """

    spaces = {"gland": len(Gland._fields)}

    def __init__(self, segment: Segmenter, identity: dict[str, object], sequences: frozenset[str] | None = None):
        self.segment, self.sequences = segment, sequences
        self.identity = {"extractor": "gland", "version": 1, "segmenter": identity}

    def __call__(self, volume: Volume) -> dict[str, np.ndarray]:
        """The numbers of `Gland` as one vector (9,) float32."""
        mask, spacing = self.segment(volume)
        return {"gland": np.array(measure_gland(in_field_of_view(mask, spacing, volume), spacing), np.float32)}


def glands(features: np.ndarray) -> list[Gland]:
    """The rows of `GlandFeatures`, (n, 9), as `Gland`s."""
    counts = {Gland._fields.index(name) for name in ("components", "border_voxels", "slice_gaps")}
    return [
        Gland._make(round(value) if place in counts else value for place, value in enumerate(row))
        for row in features.tolist()
    ]


class Share(NamedTuple):
    """A share of n volumes with its 95 % interval (`statistics.share_interval`).

    Attributes:
        value: The share; None for an empty set.
        ci95: of the probability.
        n: the volumes.
    """

    value: float | None
    ci95: tuple[float, float]
    n: int


class Anatomy(NamedTuple):
    """Plausible glands among real and generated volumes.

    Attributes:
        applicable: whether the segmenter works on the real volumes: at least 90 % have one component of 15 to 80 cc.
            Otherwise nothing follows from the other numbers.
        segmented: the share that this is decided by.
        rules: for each of `RULES` and for "plausible", which is all of them, the shares of the real and of the generated
            volumes.
        volume_cc: quantiles 5, 50 and 95 % of the volumes of the real and of the generated glands that were found; None if
            none were.
    """

    applicable: bool
    segmented: Share
    rules: dict[str, tuple[Share, Share]]
    volume_cc: tuple[tuple[float, float, float] | None, tuple[float, float, float] | None]


def compare_glands(real: Sequence[Gland], synthetic: Sequence[Gland]) -> Anatomy:
    """Count the plausible glands of two sets of volumes; see `Anatomy`."""
    segmented = segmented_share(real)
    rules = {**RULES, "plausible": is_plausible}
    return Anatomy(
        is_applicable(real),
        segmented,
        {name: (_share(list(map(rule, real))), _share(list(map(rule, synthetic)))) for name, rule in rules.items()},
        (_quantiles(real), _quantiles(synthetic)),
    )


def segmented_share(real: Sequence[Gland]) -> Share:
    """The share of real volumes with a gland in one component and of a possible volume."""
    return _share([RULES["one_component"](gland) and RULES["volume"](gland) for gland in real])


def is_applicable(real: Sequence[Gland]) -> bool:
    """Whether the segmenter works on these real volumes; see `Anatomy`."""
    share = segmented_share(real).value
    return share is not None and share >= APPLICABLE


def is_plausible(gland: Gland) -> bool:
    """Whether a gland fulfils all `RULES`."""
    return all(rule(gland) for rule in RULES.values())


def _share(passed: list[bool]) -> Share:
    n = len(passed)
    return Share(sum(passed) / n, share_interval(sum(passed), n), n) if n else Share(None, (0.0, 1.0), 0)


def _quantiles(found: Sequence[Gland]) -> tuple[float, float, float] | None:
    volumes = [gland.volume_cc for gland in found if gland.components]
    if not volumes:
        return None
    low, middle, high = np.quantile(volumes, [0.05, 0.5, 0.95])
    return float(low), float(middle), float(high)
