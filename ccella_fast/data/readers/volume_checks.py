"""Checks that a volume of any file format must pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ccella_fast.errors import DataError

MAX_VOXELS = 2**28  # 1 GiB as float32; the largest clinical series has a tenth of it
TOLERANCE = 1e-3  # of direction cosines, and relative of voxel sizes
_SMALLEST, _LARGEST = 0.01, 100  # mm; a header outside counts in other units, such as m or um


def check_size(shape: tuple[int, ...], path: Path, field: str) -> None:
    """Raise DataError unless the first three axes have at least 2 voxels, further ones at least 1, and all fit into memory."""
    if min(shape[:3]) < 2 or min(shape) < 1 or int(np.prod(shape, dtype=object)) > MAX_VOXELS:
        size = " x ".join(map(str, shape))
        why = f"the header claims a size of {size} voxels; at least 2 per axis and at most {MAX_VOXELS} in all are expected"
        raise DataError(why, path=path, field=field, fix="export the series again")


def check_number_type(dtype: np.dtype, path: Path, field: str) -> None:
    """Raise DataError unless voxels are integers or floating-point numbers."""
    if dtype.kind not in "iuf":
        why, fix = f"the voxels are of type {dtype}, plain numbers are expected", "export the series as grayscale"
        raise DataError(why, path=path, field=field, fix=fix)


def check_affine(affine: np.ndarray, path: Path) -> None:
    """Raise DataError unless `affine`, (4, 4) voxel index -> mm, has plausible voxel sizes and axes at right angles."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    if not np.isfinite(affine).all() or spacing.min() < _SMALLEST or spacing.max() > _LARGEST:
        why = f"the voxel size is {np.round(spacing, 4).tolist()} mm, but {_SMALLEST} to {_LARGEST} mm is expected"
        raise DataError(why, path=path, field="spacing", fix="export the series again with its voxel size in mm")
    direction = affine[:3, :3] / spacing
    if np.abs(direction.T @ direction - np.eye(3)).max() > TOLERANCE:
        why = "the axes of the volume are not at right angles"
        raise DataError(why, path=path, field="direction", fix="resample the series without shear")


def check_voxels(array: np.ndarray, path: Path) -> None:
    """Raise DataError unless all voxels are finite and not all are equal."""
    finite = np.isfinite(array)
    if not finite.all():
        why = f"voxels that are not finite (NaN or infinity): {np.count_nonzero(~finite)} of {array.size}"
        raise DataError(why, path=path, field="voxels", fix="export the series again")
    if array.min() == array.max():
        why = f"all voxels are equal ({array.min():g})"
        raise DataError(why, path=path, field="voxels", fix="export the series again")
