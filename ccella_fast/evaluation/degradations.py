"""Real volumes made worse in known ways: blur, noise, another size of the gland, a shift, lesions removed."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import SimpleITK as sitk

from ccella_fast.evaluation.features.preprocessing import along_axes, filter_matrix

if TYPE_CHECKING:
    from ccella_fast.evaluation.volumes import Volume

_GLAND_MM = (25.0, 20.0, 20.0)  # half axes around the centre of the volume where the gland is not segmented
_TAPER = 1.6  # half axes at which a scaled gland's surroundings are as they were
_SHELL_MM = (1.0, 4.0)  # around a lesion: the tissue that it is replaced by


class Region(NamedTuple):
    """An ellipsoid around the gland, in mm from the centre of the volume.

    Attributes:
        centre: mm along x, y, z.
        half_axes: mm.
    """

    centre: tuple[float, float, float]
    half_axes: tuple[float, float, float]


CENTRAL = Region((0.0, 0.0, 0.0), _GLAND_MM)


class Degradation(NamedTuple):
    """A way to make a volume worse.

    Attributes:
        family: "blur", "noise", "gland", "shift" or "lesion"; the members of the first three must be ordered by their
            strength.
        strength: in `unit`.
        unit: of the strength, "" if it has none.
        function: the array of the worse volume, from a volume, its gland and the strength.
    """

    family: str
    strength: float
    unit: str
    function: Callable[[Volume, Region, float], np.ndarray]

    def apply(self, volume: Volume, gland: Region) -> np.ndarray:
        """The array of the worse volume."""
        return self.function(volume, gland, self.strength)


def region_of(mask: np.ndarray, spacing: Sequence[float]) -> Region:
    """The ellipsoid with the centre and the extents of a mask, `CENTRAL` if it is blank.

    The mask's grid has the centre of the volume.
    """
    if not mask.any():
        return CENTRAL
    centre, half_axes = [], []
    for axis, (size, step) in enumerate(zip(mask.shape, spacing, strict=True)):
        inside = np.flatnonzero(mask.any(tuple({0, 1, 2} - {axis})))
        centre.append(((inside[0] + inside[-1]) / 2 - (size - 1) / 2) * step)
        half_axes.append((inside[-1] - inside[0] + 1) / 2 * step)
    return Region((centre[0], centre[1], centre[2]), (half_axes[0], half_axes[1], half_axes[2]))


def blur(array: np.ndarray, spacing: Sequence[float], sigma: float) -> np.ndarray:
    """Gaussian blur of `sigma` mm.

    The kernel is integrated over voxels, so that it also acts where sigma is below a voxel.
    """
    matrices = []
    for size, step in zip(array.shape, spacing, strict=True):
        radius = math.ceil(4 * sigma / step)
        edges = (np.arange(2 * radius + 2) - radius - 0.5) * step / sigma
        kernel = np.diff([math.erf(edge / math.sqrt(2)) for edge in edges])
        matrices.append(filter_matrix(size, kernel / kernel.sum()))
    return along_axes(array.astype(np.float32, copy=False), matrices)


def add_noise(array: np.ndarray, sigma: float, key: str) -> np.ndarray:
    """Add Gaussian noise; the window of intensities is 1. The same key gives the same noise, up to its size."""
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
    noise = np.random.default_rng(seed).standard_normal(array.shape, dtype=np.float32)
    return array + np.float32(sigma) * noise


def shift(array: np.ndarray, spacing: Sequence[float], distance: float) -> np.ndarray:
    """Move a volume along x by the whole number of voxels nearest to `distance` mm, at least one; the last voxel goes on."""
    step = max(1, round(distance / spacing[0]))
    return array[np.maximum(np.arange(array.shape[0]) - step, 0)]


def scale_gland(array: np.ndarray, spacing: Sequence[float], factor: float, gland: Region) -> np.ndarray:
    """Enlarge the gland by a factor in each direction, and compress what is around it up to 1.6 half axes.

    Cubic B-splines interpolate: a linear interpolation would blur, which is another degradation.
    """
    coordinates = [
        (np.arange(size) - (size - 1) / 2) * step - middle
        for size, step, middle in zip(array.shape, spacing, gland.centre, strict=True)
    ]
    box = []
    for along, half in zip(coordinates, gland.half_axes, strict=True):
        near = np.flatnonzero(np.abs(along) < _TAPER * half)
        if not len(near):
            return array.copy()
        box.append(slice(max(0, near[0] - 3), near[-1] + 4))
    part = array[tuple(box)].astype(np.float32)
    x, y, z = np.meshgrid(*(along[inside] for along, inside in zip(coordinates, box, strict=True)), indexing="ij")
    radius = np.sqrt(sum((axis / half) ** 2 for axis, half in zip((x, y, z), gland.half_axes, strict=True)))
    taper = 0.5 + 0.5 * np.cos(
        np.pi * np.clip((radius - 1) / (_TAPER - 1), 0, 1)
    )  # 1 in the gland, 0 from 1.6 half axes on
    field = np.stack([x, y, z], -1) * ((1 / factor - 1) * taper)[..., None]
    displacement = sitk.GetImageFromArray(np.ascontiguousarray(field.transpose(2, 1, 0, 3)), isVector=True)
    image = sitk.GetImageFromArray(np.ascontiguousarray(part.transpose(2, 1, 0)))
    for each in (displacement, image):
        each.SetSpacing([float(step) for step in spacing])
    transform = sitk.DisplacementFieldTransform(displacement)
    warped = sitk.Resample(image, image, transform, sitk.sitkBSpline, 0.0, sitk.sitkFloat32)
    result = array.astype(np.float32)
    result[tuple(box)] = np.where(taper > 0, sitk.GetArrayFromImage(warped).transpose(2, 1, 0), part)
    return result


def remove_lesion(array: np.ndarray, spacing: Sequence[float], lesion: np.ndarray) -> np.ndarray:
    """Give a lesion the median intensity of the tissue 1 to 4 mm around it; its texture and noise stay.

    Args:
        array: (X, Y, Z) float32.
        spacing: mm.
        lesion: (X, Y, Z) bool.
    """
    image = sitk.GetImageFromArray(lesion.astype(np.uint8).transpose(2, 1, 0))
    image.SetSpacing([float(step) for step in spacing])
    distances = sitk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=True)
    distance = sitk.GetArrayFromImage(distances).transpose(2, 1, 0)
    shell = (distance > _SHELL_MM[0]) & (distance <= _SHELL_MM[1])
    if not lesion.any() or not shell.any():
        return array.copy()
    contrast = np.median(array[shell]) - np.median(array[lesion])
    return array + np.float32(contrast) * blur(lesion.astype(np.float32), spacing, 1.0)


#: The degradations of the gate, in order. A shift is reported; features need not ignore it.
DEGRADATIONS: tuple[Degradation, ...] = (
    *(
        Degradation("blur", sigma, "mm", lambda v, gland, sigma: blur(v.array, v.spacing, sigma))
        for sigma in (0.5, 1, 2)
    ),
    *(
        Degradation("noise", sigma, "", lambda v, gland, sigma: add_noise(v.array, sigma, v.id))
        for sigma in (0.01, 0.05)
    ),
    *(
        Degradation("gland", more, "%", lambda v, gland, more: scale_gland(v.array, v.spacing, 1 + more / 100, gland))
        for more in (5, 15)
    ),
    Degradation("shift", 2.4, "mm", lambda v, gland, distance: shift(v.array, v.spacing, distance)),
)
