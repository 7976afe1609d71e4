"""A small signature of a volume by which copies are recognized: flipped, cropped, resampled or with other intensities.

It describes up to `POINTS` distinct places of the image, each by the signs of a difference of Gaussians around it within its
slice. Places move with the anatomy, so a crop loses some and changes none; signs do not depend on contrast, brightness or
gamma; each description is mirrored into one of its forms, so flips do not matter. Noise and texture have as many signs as
large organs do, so two patients have few descriptions in common although their anatomy is alike; of those, the ones that are
in another place do not count.
"""

from __future__ import annotations

import base64
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ccella_fast.data.readers.volume import StoredVolume

POINTS = 96
_STEP = 1.5  # mm between the samples of the filtered image; halved until a small field of view has room for it
_FIELD = 64.0  # mm, the smallest field of view that _STEP suits
_FINE, _COARSE = 1.0, 2.0  # standard deviations of the two Gaussians, in steps
_OFFSETS = 2 * np.arange(-6, 7)  # of the signs around a point, in steps, along both axes of a slice
_BITS = len(_OFFSETS) ** 2
_DISTANCE = 4  # steps between two points, within the slice plane
_EDGE_RATIO = 6.0  # a point with a larger ratio of curvatures is on an edge, and edges are alike everywhere
_AGREEMENT = 0.87  # of two descriptions, from -1 to 1: perhaps the same place
_TOLERANCE = 4.0  # mm between the same place in two copies, once they are moved onto each other
_SHARED = 0.085  # of the points: the same image
_STRONGEST = 32  # points of which at least one is in a copy; the others are compared only then
_MIN_SHARED = 9  # points
_FLIPS = np.array(list(itertools.product((1, -1), repeat=3)))


class Signature(NamedTuple):
    """Places of an image and what is around them.

    Attributes:
        signs: (points, bits) int8 of 1 and -1.
        places: (points, 3) int16, tenths of mm from the center of the image along R, A, S.
    """

    signs: np.ndarray
    places: np.ndarray


def make_signature(volume: StoredVolume) -> Signature:
    """The signature of a volume; it has fewer than `POINTS` points if the image has fewer distinct places."""
    array, spacing = volume.array, volume.spacing
    field = min(array.shape[0] * spacing[0], array.shape[1] * spacing[1])
    step = _STEP / 2 ** max(0, math.ceil(math.log2(_FIELD / field)))
    slices = np.ascontiguousarray(array.transpose(2, 0, 1))
    blurred = [
        _smoother(array.shape[0], spacing[0], step, sigma)
        @ slices
        @ _smoother(array.shape[1], spacing[1], step, sigma).T
        for sigma in (_FINE, _COARSE)
    ]
    filtered = blurred[0] - blurred[1]
    points = _find_points(filtered)
    places = (points - (np.array(filtered.shape) - 1) / 2)[:, [1, 2, 0]] * [step, step, spacing[2]]
    return Signature(_describe(filtered, points), np.rint(10 * places).astype(np.int16))


def encode_signature(signature: Signature) -> str:
    """The signature as ASCII text for a JSON file."""
    packed = np.packbits(signature.signs > 0, axis=1)
    places = np.ascontiguousarray(signature.places, "<i2").view(np.uint8)
    return base64.b64encode(np.hstack([packed, places]).tobytes()).decode()


def decode_signature(text: str) -> Signature:
    """The signature that `encode_signature` has written."""
    rows = np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, (_BITS + 7) // 8 + 6)
    signs = np.unpackbits(rows[:, :-6], axis=1, count=_BITS).astype(np.int8) * 2 - 1
    return Signature(signs, np.ascontiguousarray(rows[:, -6:]).view("<i2").astype(np.int16))


def find_copies(signatures: Sequence[Signature]) -> Iterator[tuple[int, int]]:
    """The pairs of volumes that are copies of each other, in order, each once."""
    if not signatures:
        return
    signs = [signature.signs.astype(np.float32) for signature in signatures]
    stacked = np.concatenate(signs)
    counts = np.array([len(each) for each in signs])
    owners, starts = np.repeat(np.arange(len(signs)), counts), np.cumsum(counts)
    for first, strongest in enumerate(each[:_STRONGEST] for each in signs):
        later = int(starts[first])
        near = (strongest @ stacked[later:].T >= _AGREEMENT * _BITS).any(axis=0)
        for second in np.unique(owners[later:][near]).tolist():
            here, there = np.nonzero(signs[first] @ signs[second].T >= _AGREEMENT * _BITS)
            needed = max(_MIN_SHARED, _SHARED * min(counts[first], counts[second]))
            places = signatures[first].places[here], signatures[second].places[there]
            if len(np.unique(here)) >= needed and _count_shared(here, *places) >= needed:
                yield first, second


def _count_shared(points: np.ndarray, here: np.ndarray, there: np.ndarray) -> int:
    """How many points of one image are where they are in the other, after the best of all flips and one translation."""
    best = 0
    for flip in _FLIPS:
        shift = (there - flip * here) / 10
        near = np.abs(shift[:, None] - shift).max(axis=2) <= _TOLERANCE
        best = max(best, len(np.unique(points[near[near.sum(axis=1).argmax()]])))
    return best


def _smoother(size: int, spacing: float, step: float, sigma: float) -> np.ndarray:
    """(samples, size) float32: Gaussian weights of the voxels of one axis around samples `step` mm apart."""
    position = (np.arange(size) - (size - 1) / 2) * spacing
    count = max(1, int(size * spacing / step))
    samples = (np.arange(count) - (count - 1) / 2) * step
    # A sample between coarse voxels has no voxel within a narrow Gaussian.
    width = max(sigma * step, spacing / 2)
    weights = np.exp(-0.5 * ((samples[:, None] - position) / width) ** 2)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


def _find_points(filtered: np.ndarray) -> np.ndarray:
    """Index (slice, x, y) of the strongest blobs of `filtered` (Z, X, Y) that have room for a description."""
    margin = int(_OFFSETS[-1]) + 1
    inside = filtered[:, margin - 1 : 1 - margin, margin - 1 : 1 - margin]
    if min(inside.shape[1:]) < 3:
        return np.zeros((0, 3), int)
    middle = inside[:, 1:-1, 1:-1]
    xx = inside[:, 2:, 1:-1] + inside[:, :-2, 1:-1] - 2 * middle
    yy = inside[:, 1:-1, 2:] + inside[:, 1:-1, :-2] - 2 * middle
    xy = (inside[:, 2:, 2:] + inside[:, :-2, :-2] - inside[:, 2:, :-2] - inside[:, :-2, 2:]) / 4
    determinant = xx * yy - xy**2
    is_blob = (determinant > 0) & ((xx + yy) ** 2 * _EDGE_RATIO < (_EDGE_RATIO + 1) ** 2 * determinant)
    for x, y in itertools.product(range(3), repeat=2):
        if (x, y) != (1, 1):
            neighbor = inside[:, x : x + middle.shape[1], y : y + middle.shape[2]]
            is_blob &= np.abs(middle) > neighbor * np.sign(middle)
    candidates = np.argwhere(is_blob)[np.argsort(-np.abs(middle[is_blob]), kind="stable")]
    points = _apart(candidates)
    z, x, y = points.T
    # Where the parabola through the neighbors has its extremum: a crop moves the samples by a part of a step.
    moved = np.stack([
        np.zeros(len(points)),
        (inside[z, x, y + 1] - inside[z, x + 2, y + 1]) / (2 * xx[z, x, y]),
        (inside[z, x + 1, y] - inside[z, x + 1, y + 2]) / (2 * yy[z, x, y]),
    ], axis=1)  # fmt: skip
    return points + [0, margin, margin] + np.clip(moved, -0.5, 0.5)


def _apart(candidates: np.ndarray) -> np.ndarray:
    """The first `POINTS` candidates (n, 3) with a distance within the slice plane: a vessel through many slices is one."""
    kept = np.zeros((0, 3), int)
    for candidate in candidates:
        if not len(kept) or np.abs(kept[:, 1:] - candidate[1:]).max(axis=1).min() >= _DISTANCE:
            kept = np.vstack([kept, candidate])
            if len(kept) == POINTS:
                break
    return kept


def _describe(filtered: np.ndarray, points: np.ndarray) -> np.ndarray:
    """(points, bits) int8: the signs around points, mirrored so that they are equal in a flipped image."""
    z = points[:, 0].astype(int)[:, None, None]
    x, y = (points[:, 1, None] + _OFFSETS)[:, :, None], (points[:, 2, None] + _OFFSETS)[:, None, :]
    low_x, low_y = np.floor(x).astype(int), np.floor(y).astype(int)
    high_x, high_y = (
        np.minimum(low + 1, size - 1) for low, size in zip((low_x, low_y), filtered.shape[1:], strict=True)
    )
    part_x, part_y = x - low_x, y - low_y
    around = (1 - part_x) * ((1 - part_y) * filtered[z, low_x, low_y] + part_y * filtered[z, low_x, high_y])
    around += part_x * ((1 - part_y) * filtered[z, high_x, low_y] + part_y * filtered[z, high_x, high_y])
    signs = np.where(around > 0, 1, -1).astype(np.int8)
    for axis in (1, 2):  # the mirror image with more positive signs in its upper half
        weights = np.sign(_OFFSETS).reshape((1, -1, 1) if axis == 1 else (1, 1, -1))
        tilted = (signs * weights).sum(axis=(1, 2), keepdims=True) < 0
        signs = np.where(tilted, np.flip(signs, axis), signs)
    return signs.reshape(len(signs), _BITS)
