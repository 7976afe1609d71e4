"""Bring the series of a study onto one grid and into [0, 1] (docs/explanation/method.md, section 1.3).

The grid keeps the T2 series' directions and centre: its spacing becomes the configured one, then whole voxels are cropped or
added evenly at both ends (the odd one at the high end). So where the spacing is already right no voxel is interpolated.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ccella_fast.data.readers.volume_file import Volume
from ccella_fast.errors import DataError

ADC_WINDOW = (0.0, 3000.0)  # 1e-6 mm2/s
PERCENTILES = (0.0, 99.5)


class Grid(NamedTuple):
    """Where prepared voxels lie. `inner` is the part that the T2 series covers; the rest is padding."""

    shape: tuple[int, ...]
    affine: np.ndarray  # voxel index -> RAS mm
    inner: tuple[slice, slice, slice]


def make_grid(volume: Volume, spacing: list[float], dim: list[int]) -> Grid:
    """The grid of a study whose T2 series is `volume`. spacing in mm, dim in voxels, both along R, A, S."""
    old_shape, step = np.array(volume.array.shape), np.array(spacing, float)
    same = np.isclose(volume.spacing, step, rtol=1e-4)
    new_shape = np.where(same, old_shape, np.maximum(1, np.rint(old_shape * volume.spacing / step))).astype(int)
    direction = volume.affine[:3, :3] / volume.spacing
    middle = volume.affine[:3, :3] @ ((old_shape - 1) / 2) + volume.affine[:3, 3]
    spare = np.array(dim) - new_shape
    before = np.where(spare >= 0, spare // 2, -(-spare // 2))  # voxels added in front; negative: cut off
    affine = np.eye(4)
    affine[:3, :3] = direction * np.where(same, volume.spacing, step)
    affine[:3, 3] = middle - affine[:3, :3] @ ((new_shape - 1) / 2 + before)
    start, stop = np.maximum(before, 0), np.minimum(before + new_shape, dim)
    x, y, z = (slice(int(low), int(high)) for low, high in zip(start, stop, strict=True))
    return Grid(tuple(dim), affine, (x, y, z))


def resample(volume: Volume, grid: Grid) -> np.ndarray:
    """`volume` on the inner part of `grid`, float32: cubic B-spline, after a Gaussian where the grid is coarser; kept within
    the range of the input, whose minimum stands where the input does not reach."""
    inner_shape = [part.stop - part.start for part in grid.inner]
    affine = grid.affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [part.start for part in grid.inner]
    index = np.linalg.solve(volume.affine, affine)  # grid index -> index into the volume
    if np.allclose(index[:3, :3], np.eye(3), atol=1e-4) and np.allclose(index[:3, 3], np.rint(index[:3, 3]), atol=1e-3):
        offset = np.rint(index[:3, 3]).astype(int)
        if (offset >= 0).all() and (offset + inner_shape <= volume.array.shape).all():
            x, y, z = (slice(low, low + size) for low, size in zip(offset, inner_shape, strict=True))
            return volume.array[x, y, z].copy()

    low, high = float(volume.array.min()), float(volume.array.max())
    old, new = volume.spacing, np.linalg.norm(affine[:3, :3], axis=0)
    # Widths at half height add in squares: a voxel of `old` mm becomes one of `new` mm (Cardoso et al. 2015).
    variance = np.where(new > 1.001 * old, np.maximum(new**2 - old**2, 0) / (8 * np.log(2)), 0.0)
    aligned = np.abs(index[:3, :3] - np.diag(np.diag(index[:3, :3]))).max() < 1e-4
    moved = (_along_axes if aligned else _with_itk)(volume, affine, inner_shape, index, variance, low)
    return np.clip(moved, low, high, out=moved)


def _along_axes(
    volume: Volume, affine: np.ndarray, shape: list[int], index: np.ndarray, variance: np.ndarray, low: float
) -> np.ndarray:
    """Both grids run along the same axes, as they do for the leading series: so what ITK does is linear in each axis alone.
    Its effect on the unit impulses of an axis is a small matrix, and three matrices do the work of a whole volume."""
    values = volume.array
    ratios = [size / old for size, old in zip(shape, values.shape, strict=True)]
    for axis in np.argsort(ratios, kind="stable"):  # what shrinks first
        step, start = index[axis, axis], index[axis, 3]
        first, last = round(start), round(start) + shape[axis]
        if abs(step - 1) < 1e-4 and abs(start - first) < 1e-3 and first >= 0 and last <= values.shape[axis]:
            values = values[(slice(None),) * axis + (slice(first, last),)]
            continue
        sigma2 = variance[axis] / volume.spacing[axis] ** 2
        values = _apply(
            _axis_matrix(values.shape[axis], shape[axis], step, start, sigma2), values - np.float32(low), axis
        )
        values += np.float32(low)
    return values if values.base is None else values.copy()


def _apply(matrix: np.ndarray, values: np.ndarray, axis: int) -> np.ndarray:
    if axis == 2:
        return values @ matrix.T
    return np.matmul(matrix, values) if axis == 1 else np.tensordot(matrix, values, 1)


@lru_cache(maxsize=32)
def _axis_matrix(size: int, new_size: int, step: float, start: float, sigma2: float) -> np.ndarray:
    """(new_size, size) float32: what smoothing and interpolating along one axis makes of each of its unit impulses. sigma2 in
    voxels. Rows beyond the series are 0."""
    import SimpleITK as sitk

    impulses = sitk.GetImageFromArray(np.eye(size))  # ITK's first axis is the last of the array
    if sigma2:
        impulses = sitk.DiscreteGaussian(
            impulses, [sigma2, 0.0], maximumKernelWidth=64, maximumError=1e-3, useImageSpacing=False
        )
    target = sitk.Image([new_size, size], sitk.sitkUInt8)
    target.SetSpacing([step, 1.0])
    target.SetOrigin([start, 0.0])
    moved = sitk.Resample(
        impulses, target, sitk.Transform(2, sitk.sitkIdentity), sitk.sitkBSpline, 0.0, sitk.sitkFloat64
    )
    return np.ascontiguousarray(sitk.GetArrayViewFromImage(moved).T, np.float32)


def _with_itk(
    volume: Volume, affine: np.ndarray, shape: list[int], index: np.ndarray, variance: np.ndarray, low: float
) -> np.ndarray:
    """The same for any two grids, voxel by voxel."""
    import SimpleITK as sitk

    image = _to_itk(volume)
    if variance.any():
        image = sitk.DiscreteGaussian(
            image, variance.tolist(), maximumKernelWidth=64, maximumError=1e-3, useImageSpacing=True
        )
    target = _to_itk(Volume(np.zeros(shape, np.uint8), affine))
    moved = sitk.Resample(image, target, sitk.Transform(), sitk.sitkBSpline, low, sitk.sitkFloat32)
    return sitk.GetArrayFromImage(moved).transpose(2, 1, 0)


def covers_centre(volume: Volume, grid: Grid) -> bool:
    """Does the volume reach the middle of the grid?"""
    middle = grid.affine @ [*(np.array(grid.shape) - 1) / 2, 1]
    index = np.linalg.solve(volume.affine, middle)[:3]
    return bool((index >= -0.5).all() and (index <= np.array(volume.array.shape) - 0.5).all())


def normalise(
    values: np.ndarray, sequence: str, grid: Grid, *, path: object = None
) -> tuple[np.ndarray, tuple[float, float]]:
    """(voxels of the whole grid in [0, 1], float32, padding 0; the window that was mapped to [0, 1]).

    T2 and high b: the 0th to the 99.5th percentile of the voxels that are not padding, as the reference measured it on images
    already on their grid. ADC: 0 to 3000. Raises DataError, naming `path`, where the window is empty or below zero."""
    low, high = ADC_WINDOW
    if sequence != "adc":
        low, high = (_percentile(values, share) for share in PERCENTILES)
        if not high > max(low, 0):
            why, fix = (
                f"{sequence} has no contrast, or no positive values, inside the grid",
                "check data.spacing, data.dim and the series' position",
            )
            raise DataError(why, path=path, field="voxels", fix=fix)
    image = np.zeros(grid.shape, np.float32)
    inner = image[grid.inner]
    np.subtract(values, np.float32(low), out=inner)
    np.clip(np.divide(inner, np.float32(high - low), out=inner), 0, 1, out=inner)
    return image, (low, high)


def _percentile(values: np.ndarray, percent: float) -> float:
    """Linear between order statistics, as np.percentile in float64 gives it; of a volume 3 times as fast."""
    rank = percent / 100 * (values.size - 1)
    below = int(rank)
    if below == 0:
        lower, upper = float(values.min()), None
    else:
        parted = np.partition(values, below, axis=None)
        lower, upper = float(parted[below]), (float(parted[below + 1 :].min()) if rank > below else None)
    return lower if upper is None else lower + (upper - lower) * (rank - below)


def _to_itk(volume: Volume) -> Any:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.array.transpose(2, 1, 0)))
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    image.SetSpacing(volume.spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / volume.spacing).ravel().tolist())
    return image
