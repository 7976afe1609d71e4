"""Arrays of images that ITK has read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ccella_fast.data.readers.volume_checks import check_number_type, check_size
from ccella_fast.errors import DataError


def arrays_of_itk_image(image: Any, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Convert an image in ITK's order (Z, Y, X) and LPS coordinates to (X, Y, Z) float32 and an affine in RAS."""
    import SimpleITK as sitk

    shape, components = image.GetSize(), image.GetNumberOfComponentsPerPixel()
    if len(shape) != 3 or components != 1:
        why = f"the image has {len(shape)} dimensions and {components} values per voxel, but 3 and 1 are expected"
        raise DataError(why, path=path, field="sizes", fix="give one 3D volume per file")
    check_size(shape, path, "sizes")
    array = sitk.GetArrayViewFromImage(image)
    check_number_type(array.dtype, path, "voxels")
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return array.transpose(2, 1, 0).astype(np.float32), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine


def last_words(error: RuntimeError) -> str:
    """The last words of an ITK message, at most 90 characters; source lines and pointers come first."""
    message = " ".join(str(error).split())
    return message if len(message) <= 90 else message[-90:].partition(" ")[2]
