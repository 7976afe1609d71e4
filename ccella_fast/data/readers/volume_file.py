"""Read one series from disk, completely and checked, as an array in RAS order with its affine.

Common readers of medical images stop at the last voxel, so that a flipped bit in a gzip stream goes unnoticed, and they repair
or guess what a header lacks. Here nothing is repaired: a file that is not a valid 3D volume raises a DataError with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ccella_fast.data.readers.dicom_series import read_dicom_series
from ccella_fast.data.readers.metaimage import parse_metaimage, read_metaimage
from ccella_fast.data.readers.nifti import b_value_file, read_nifti_file, read_nifti_geometry
from ccella_fast.data.readers.nrrd import parse_nrrd, read_nrrd
from ccella_fast.data.readers.pointers import check_is_data
from ccella_fast.data.readers.raw_voxels import RawImage
from ccella_fast.data.readers.volume import StoredVolume
from ccella_fast.data.readers.volume_checks import check_affine, check_voxels
from ccella_fast.errors import DataError

#: Suffix -> reader(path, b_value) of a volume in its stored order of axes. A format is one row.
FORMATS: dict[str, Callable[[Path, float | None], StoredVolume]] = {
    ".nii.gz": read_nifti_file,
    ".nii": read_nifti_file,
    ".mha": read_metaimage,
    ".mhd": read_metaimage,
    ".nrrd": read_nrrd,
    ".nhdr": read_nrrd,
}
#: Suffix -> parser of the header of a format whose header says where the voxels are.
_RAW_HEADERS: dict[str, Callable[[Path], RawImage]] = {
    ".mha": parse_metaimage,
    ".mhd": parse_metaimage,
    ".nrrd": parse_nrrd,
    ".nhdr": parse_nrrd,
}
FORMAT_NAMES = f"{', '.join(FORMATS)} or a folder of DICOM files"  # for messages
_PLANES = ("sagittal", "coronal", "axial")


def volume_suffix(name: str) -> str | None:
    """The suffix in FORMATS that a file name ends with, in any case; None for other files."""
    return next((suffix for suffix in FORMATS if name.lower().endswith(suffix)), None)


def read_volume(path: str | Path, *, b_value: float | None = None) -> StoredVolume:
    """Read a file of one of the FORMATS, or a folder that holds one DICOM series.

    Args:
        path: The file or folder.
        b_value: Which image to read of a diffusion series that holds several, in s/mm2; None reads that of the highest.

    Raises:
        DataError: If the file is damaged or cut off, or is anything but a finite, non-constant 3D volume of plain numbers with
            positive spacing and orthonormal directions.
    """
    path = Path(path)
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        check_is_data(file)
    if not path.exists():
        raise DataError("this file does not exist", path=path, fix="check the path, or copy the file again")
    suffix = volume_suffix(path.name)
    if path.is_dir():
        volume = read_dicom_series(path, b_value)
    elif suffix is not None:
        volume = FORMATS[suffix](path, b_value)
    else:
        why = f"the file format {path.suffix!r} is not supported"
        raise DataError(why, path=path, fix=f"give {FORMAT_NAMES}")
    check_affine(volume.affine, path)
    check_voxels(volume.array, path)
    return closest_ras(volume)


def files_of_volume(path: Path) -> list[Path]:
    """The files that `read_volume` reads for `path`: that file, then those that its header or its name refers to.

    For a folder these are the files in it, sorted.

    Raises:
        DataError: If the header that names the other file is damaged, or if that file is missing or outside its folder.
    """
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))
    suffix = volume_suffix(path.name)
    other = _RAW_HEADERS[suffix](path).path if suffix in _RAW_HEADERS else b_value_file(path)
    return [path, other] if other != path and other.is_file() else [path]


def read_geometry(path: Path) -> tuple[tuple[int, ...], np.ndarray] | None:
    """Shape and affine by the header alone, axes as stored; None where that does not say which 3D volume will be read.

    Raises:
        DataError: If the header is damaged or invalid.
    """
    suffix = volume_suffix(path.name) if path.is_file() else None
    check_is_data(path)
    if suffix in (".nii.gz", ".nii"):
        shape, affine = read_nifti_geometry(path)
        return (shape, affine) if len(shape) == 3 else None
    if suffix in _RAW_HEADERS:
        image = _RAW_HEADERS[suffix](path)
        return image.shape, image.affine
    return None


def check_axial(volume: StoredVolume, path: Path) -> None:
    """Raise DataError unless slices are axial. A volume that is nearly isotropic has no slice direction and passes."""
    order = np.argsort(volume.spacing)
    thickest = int(order[-1])
    if volume.spacing[thickest] > 1.2 * volume.spacing[order[-2]] and thickest != 2:
        why = f"this series is {_PLANES[thickest]}, not axial"
        raise DataError(why, path=path, field="direction", fix="give the axial series")


def closest_ras(volume: StoredVolume) -> StoredVolume:
    """Permute and flip axes (no interpolation) so that each points most nearly to Right, Anterior, Superior."""
    from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation

    orientation = io_orientation(volume.affine)
    array = np.ascontiguousarray(apply_orientation(volume.array, orientation))
    return StoredVolume(array, volume.affine @ inv_ornt_aff(orientation, volume.array.shape), volume.notes)
