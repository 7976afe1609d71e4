"""Around a network: resampling, windows and standardisation before it, means of slices after it; plain functions on arrays.

All of it is linear algebra along single axes, so results differ between machines by rounding only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ccella_fast.errors import DataError

if TYPE_CHECKING:
    from ccella_fast.evaluation.volumes import Volume


def check_volume(volume: Volume) -> None:
    """Raise DataError for a volume from which no features can be computed."""
    if volume.array.ndim != 3 or 0 in volume.array.shape:
        raise DataError(
            f"the volume '{volume.id}' has shape {list(volume.array.shape)}, three axes are expected",
            fix="give volumes of one channel",
        )
    low, high = float(volume.array.min()), float(volume.array.max())
    if not np.isfinite([low, high]).all():  # min and max hand on NaN
        why = f"the volume '{volume.id}' has voxels that are not finite"
        raise DataError(why, fix="remove the volume, or generate it again")
    if low == high:
        why = f"all voxels of the volume '{volume.id}' have the value {low:g}"
        raise DataError(why, fix="remove the volume, or generate it again")


def resample(array: np.ndarray, spacing: Sequence[float], target: Sequence[float]) -> np.ndarray:
    """Linear interpolation to the spacing `target` in mm. Both grids have the same centre; the field of view is kept.

    A sample beyond the outermost voxel centres, by at most half a voxel, takes the value of the nearest one.
    """
    order = sorted(range(array.ndim), key=lambda axis: spacing[axis] / target[axis])
    for axis in order:  # the axis that shrinks most first: the least work
        size, old, new = array.shape[axis], spacing[axis], target[axis]
        count = max(1, round(size * old / new))
        place = ((size - 1) / 2 + (np.arange(count) - (count - 1) / 2) * new / old).clip(0, size - 1)
        lower = place.astype(int)
        share = (place - lower).astype(array.dtype).reshape([-1 if axis == other else 1 for other in range(array.ndim)])
        below, result = (array.take(places, axis) for places in (lower, np.minimum(lower + 1, size - 1)))
        result -= below
        result *= share
        result += below
        array = result
    return array


def along_axes(array: np.ndarray, matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Multiply each axis of `array` by its matrix (new size, old size), in the precision of `array`.

    By PyTorch: the threads of NumPy's OpenBLAS stay busy for a while after a product and slow the networks down that follow.
    """
    order = sorted(range(array.ndim), key=lambda axis: matrices[axis].shape[0] / matrices[axis].shape[1])
    result = torch.from_numpy(np.ascontiguousarray(array))
    for axis in order:  # the axis that shrinks most first: the least work
        matrix = torch.from_numpy(matrices[axis]).to(result.dtype)
        result = torch.tensordot(matrix, result, dims=([1], [axis])).movedim(0, axis)
    return result.contiguous().numpy()


def gaussian(sigma: float, derivative: int = 0) -> np.ndarray:
    """A sampled Gaussian of `sigma` voxels, or its second derivative, cut off at 4 sigma.

    The Gaussian sums to 1. The second derivative sums to 0 and has the second moment 2, so that it is exact for parabolas.
    """
    radius = int(4 * sigma + 0.5)
    x = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (x / sigma) ** 2)
    kernel /= kernel.sum()
    if derivative == 2:
        kernel = kernel * (x**2 / sigma**4 - 1 / sigma**2)
        kernel -= kernel.mean()
        kernel *= 2 / (kernel * x**2).sum()
    return kernel


def filter_matrix(size: int, kernel: np.ndarray) -> np.ndarray:
    """The (size, size) matrix of a correlation with `kernel`, whose edges repeat the outermost voxel."""
    matrix = np.zeros((size, size))
    radius = len(kernel) // 2
    rows = np.arange(size)
    for offset, weight in zip(range(-radius, radius + 1), kernel, strict=True):
        np.add.at(matrix, (rows, (rows + offset).clip(0, size - 1)), weight)
    return matrix


def crop_or_pad(array: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    """The central part of `array`, with zeros around it where `array` is smaller."""
    result = np.zeros(shape, array.dtype)
    source, target = [], []
    for old, new in zip(array.shape, shape, strict=True):
        count = min(old, new)
        source.append(slice((old - count) // 2, (old - count) // 2 + count))
        target.append(slice((new - count) // 2, (new - count) // 2 + count))
    result[tuple(target)] = array[tuple(source)]
    return result


def standardise(array: np.ndarray, name: str) -> np.ndarray:
    """Z-scores over the voxels that are not zero; zeros stay zero. As MONAI's `NormalizeIntensity(nonzero=True)`.

    Raises:
        DataError: these voxels all have the same value; the error calls the volume `name`.
    """
    inside = array != 0
    values = array[inside].astype(np.float64)
    deviation = values.std() if values.size else 0.0
    if deviation <= 1e-6 * np.abs(values).max(initial=1e-30):
        why = f"all voxels of the volume '{name}' that are not zero have the same value"
        raise DataError(why, fix="give images, not masks")
    result = np.zeros_like(array)
    result[inside] = (values - values.mean()) / deviation
    return result


def mean_of_slices(slices: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The vectors of a volume from those of its slices."""
    return {name: rows.mean(0, dtype=np.float64).astype(np.float32) for name, rows in slices.items()}


class Window(NamedTuple):
    """The central part of a volume on a grid in mm, as z-scores.

    Attributes:
        spacing: mm.
        shape: voxels; zeros, the mean, are added where the field of view is smaller.
    """

    spacing: tuple[float, float, float]
    shape: tuple[int, int, int]

    def __call__(self, volume: Volume) -> np.ndarray:
        """The float32 window of `volume`. Raises DataError for a volume that is constant or not finite."""
        check_volume(volume)
        array = resample(volume.array.astype(np.float32, copy=False), volume.spacing, self.spacing)
        return crop_or_pad(standardise(array, volume.id), self.shape)

    @property
    def identity(self) -> dict[str, object]:
        """All of the above as JSON values."""
        return {
            "axes": "RAS",
            "spacing_mm": list(self.spacing),
            "interpolation": "linear, same centre",
            "intensities": "z-score over non-zero voxels of the resampled volume",
            "window": list(self.shape),
            "outside": 0,
        }
