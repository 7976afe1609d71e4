"""Bring the series of a study onto one grid and into [0, 1] (section 1.3).

The grid keeps the T2 series' directions and centre: its spacing becomes the configured one, then whole voxels are cropped or
added evenly at both ends (the odd one at the high end). So where the spacing is already right no voxel is interpolated.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ccella_fast.data.volume import Volume
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
    import SimpleITK as sitk

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
    image = _to_itk(volume)
    old, new = volume.spacing, np.linalg.norm(affine[:3, :3], axis=0)
    # Widths at half height add in squares: a voxel of `old` mm becomes one of `new` mm (Cardoso et al. 2015).
    variance = np.maximum(new**2 - old**2, 0) / (8 * np.log(2))
    if (new > 1.001 * old).any():
        image = sitk.DiscreteGaussian(
            image, variance.tolist(), maximumKernelWidth=64, maximumError=1e-3, useImageSpacing=True
        )
    target = _to_itk(Volume(np.zeros(inner_shape, np.uint8), affine))
    moved = sitk.Resample(image, target, sitk.Transform(), sitk.sitkBSpline, low, sitk.sitkFloat32)
    return np.clip(sitk.GetArrayViewFromImage(moved).transpose(2, 1, 0), low, high)


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
        low, high = (float(value) for value in np.percentile(values.astype(np.float64), PERCENTILES))
        if not high > max(low, 0):
            why, fix = (
                f"{sequence} has no contrast, or no positive values, inside the grid",
                "check data.spacing, data.dim and the series' position",
            )
            raise DataError(why, path=path, field="voxels", fix=fix)
    image = np.zeros(grid.shape, np.float32)
    image[grid.inner] = np.clip((values.astype(np.float64) - low) / (high - low), 0, 1)
    return image, (low, high)


def _to_itk(volume: Volume) -> Any:
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.array.transpose(2, 1, 0)))
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ volume.affine
    image.SetSpacing(volume.spacing.tolist())
    image.SetOrigin(affine[:3, 3].tolist())
    image.SetDirection((affine[:3, :3] / volume.spacing).ravel().tolist())
    return image
