"""What the classifier sees of a volume: the same steps for real, reconstructed and generated ones.

Nothing here depends on where a volume comes from, and every volume is on one grid: a step that acts differently on two sources
would be a shortcut to tell them apart.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ccella_fast.data.augmentation.parameters import Augmentation
from ccella_fast.data.augmentation.torch_engine import warp
from ccella_fast.data.readers.volume import StoredVolume
from ccella_fast.downstream.arms import DrawnCase
from ccella_fast.downstream.data import LabelledCase
from ccella_fast.hardware import free_memory

_WINDOW = (1.0, 99.0)  # percentiles of a prepared volume that become 0 and 1
REFERENCE_WINDOW, REFERENCE_SPACING, REFERENCE_SHAPE = (0.0, 98.0), (0.5, 0.5, 3.0), (256, 256, 32)
# Each of these with probability 0.5, as in the reference implementation, where they are 25, 25 and 2 voxels.
_ROTATION, _TRANSLATION, _ZOOM = 15.0, (12.5, 12.5, 6.0), 0.1  # degrees about the axis to the head, mm, share
_SHARE_OF_MEMORY = 0.5  # of what is free, for volumes that are kept


class InputImage(NamedTuple):
    """A volume as the classifier sees it: (X, Y, Z) float32 in [0, 1], and the voxel size in mm."""

    voxels: Tensor
    spacing: tuple[float, float, float]


def on_prepared_grid(array: np.ndarray, spacing: Sequence[float]) -> InputImage:
    """The volume on its own grid, with its own percentiles 1 and 99 as 0 and 1."""
    return _image(_scaled(array, _WINDOW), spacing)


def as_the_reference(array: np.ndarray, spacing: Sequence[float]) -> InputImage:
    """0.5 x 0.5 x 3 mm, cropped to what is positive, percentiles 0 and 98 as 0 and 1, padded or cropped to 256 x 256 x 32."""
    from ccella_fast.data.preparation.resampling import make_grid, resample  # needs SimpleITK

    volume = StoredVolume(array, np.diag([*spacing, 1.0]))
    size = [max(1, round(n * old / new)) for n, old, new in zip(array.shape, spacing, REFERENCE_SPACING, strict=True)]
    resampled = resample(volume, make_grid(volume, list(REFERENCE_SPACING), size))
    return _image(crop_or_pad(_scaled(crop_to_positive(resampled), REFERENCE_WINDOW)), REFERENCE_SPACING)


def crop_to_positive(array: np.ndarray) -> np.ndarray:
    """The smallest box that contains all positive voxels."""
    for axis in range(array.ndim):
        places = np.flatnonzero((array > 0).any(axis=tuple(other for other in range(array.ndim) if other != axis)))
        array = np.take(array, range(places[0], places[-1] + 1), axis) if len(places) else array
    return array


def crop_or_pad(array: np.ndarray, shape: Sequence[int] = REFERENCE_SHAPE) -> np.ndarray:
    """The array with zeros on both sides of axes that are too short, and the center of those that are too long."""
    missing = [max(0, size - n) for n, size in zip(array.shape, shape, strict=True)]
    padded = np.pad(array, [(n // 2, n - n // 2) for n in missing])
    starts = [n // 2 - size // 2 for n, size in zip(padded.shape, shape, strict=True)]
    return padded[tuple(slice(start, start + size) for start, size in zip(starts, shape, strict=True))]


class Inputs:
    """The images of studies, kept in memory as far as half of what is free suffices.

    Args:
        prepare: `on_prepared_grid` or `as_the_reference`.
    """

    def __init__(self, prepare: Callable[[np.ndarray, Sequence[float]], InputImage]):
        self._prepare, self._kept = prepare, dict[str, InputImage]()
        self._left = int(_SHARE_OF_MEMORY * free_memory() / int(os.environ.get("LOCAL_WORLD_SIZE", "1")))

    def __call__(self, case: LabelledCase) -> InputImage:
        """The image of a study."""
        if (kept := self._kept.get(case.key)) is not None:
            return kept
        image = self._prepare(*case.read())
        size = image.voxels.numel() * image.voxels.element_size()
        if size <= self._left:
            self._left -= size
            self._kept[case.key] = image
        return image

    def batch(self, cases: Sequence[LabelledCase], device: torch.device) -> Tensor:
        """The images of some studies as they are, (B, 1, X, Y, Z)."""
        return torch.stack([self(case).voxels.to(device) for case in cases])[:, None]

    def augmented_batch(self, draws: Sequence[DrawnCase], seed: int, device: torch.device) -> Tensor:
        """The images of drawn studies, augmented, (B, 1, X, Y, Z)."""
        return torch.stack([self._augmented(draw, seed, device) for draw in draws])[:, None]

    def _augmented(self, draw: DrawnCase, seed: int, device: torch.device) -> Tensor:
        image = self(draw.case)
        voxels, size = image.voxels.to(device), image.voxels.shape
        drawn = draw_augmentation(seed, draw.stream, draw.number)
        if drawn == Augmentation():
            return voxels
        return warp(voxels, drawn.matrix(size, image.spacing), size, 0, size[0])


def draw_augmentation(seed: int, stream: int, number: int) -> Augmentation:
    """The augmentation of a draw, which depends on nothing but these numbers. Its parts are one interpolation."""
    random = Random(f"{seed} {stream} {number}")  # random() gives the same sequence in every version of Python
    # All numbers are drawn always, so that whether one part is used does not change the others.
    used = [random.random() < 0.5 for _ in range(4)]
    angle, *shift, zoom = (2 * random.random() - 1 for _ in range(5))
    return Augmentation(
        flip=used[0],
        rotation=(0.0, 0.0, _ROTATION * angle if used[1] else 0.0),
        shift=tuple(limit * part if used[2] else 0.0 for limit, part in zip(_TRANSLATION, shift, strict=True)),  # type: ignore[arg-type]
        scale=(1 / (1 + _ZOOM * zoom) if used[3] else 1.0,) * 3,
    )


def _scaled(array: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """The array with two of its percentiles as 0 and 1, clipped."""
    low, high = np.percentile(array, window)
    return np.clip((array - low) / max(high - low, 1e-6), 0, 1)


def _image(array: np.ndarray, spacing: Sequence[float]) -> InputImage:
    x, y, z = map(float, spacing)
    return InputImage(torch.from_numpy(np.ascontiguousarray(array, np.float32)), (x, y, z))
