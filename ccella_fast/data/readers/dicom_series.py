"""Read a folder that holds the slices of one DICOM series (dicom.nema.org, PS3.3 C.7.6.2: the image plane)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ccella_fast.data.readers.itk_file import arrays_of_itk_image, last_words
from ccella_fast.data.readers.volume import Volume
from ccella_fast.data.readers.volume_checks import MAX_VOXELS
from ccella_fast.errors import DataError


def is_dicom_folder(folder: Path) -> bool:
    """Whether the first file directly in `folder`, by name, is a DICOM file."""
    for entry in sorted(folder.iterdir()):
        if entry.is_file() and not entry.name.startswith("."):
            with open(entry, "rb") as file:
                return file.read(132)[128:] == b"DICM"
    return False


def read_dicom_series(folder: Path, b_value: float | None = None) -> Volume:
    """Read a series in its stored order of axes.

    Raises:
        DataError: If the folder does not hold exactly one series of equal, parallel and evenly spaced slices.
    """
    import SimpleITK as sitk

    def defect(why: str, field: str, fix: str) -> DataError:
        return DataError(why, path=folder, field=field, fix=fix)

    reader = sitk.ImageSeriesReader()
    series = reader.GetGDCMSeriesIDs(str(folder))
    if len(series) != 1:
        why = f"this folder holds {len(series)} DICOM series, but one is expected"
        raise defect(why, "SeriesInstanceUID", "keep one series per folder")
    names = reader.GetGDCMSeriesFileNames(str(folder), series[0])
    try:
        distance = _check_slices(names, defect)
        reader.SetFileNames(names)
        reader.SetOutputPixelType(sitk.sitkFloat32)  # else that of the first slice, although others have other slopes
        image = reader.Execute()
    except RuntimeError as error:
        why = f"this series cannot be read: {last_words(error)}"
        raise defect(why, "DICOM file", "copy or export the series again") from None
    array, affine = arrays_of_itk_image(image, folder)
    as_read = np.linalg.norm(affine[:3, 2])  # ITK's is of the first two slices, `distance` the mean of all
    if abs(as_read - distance) > 0.01 * distance:
        why = f"the slices are {distance:.3f} mm apart by their positions, but {as_read:.3f} mm as read"
        raise defect(why, "ImagePositionPatient", "export the series again")
    return Volume(array, affine)


def _check_slices(names: tuple[str, ...], defect: Callable[[str, str, str], DataError]) -> float:
    """Check that slices have one orientation and size and that positions are even and in line; returns their distance in mm."""
    import SimpleITK as sitk

    if len(names) < 2:
        raise defect(
            "this folder holds a single slice, a 3D volume is expected", "DICOM files", "give the whole series"
        )
    heights, in_plane, planes = [], [], set()
    for name in names:
        reader = sitk.ImageFileReader()
        reader.SetFileName(name)
        reader.ReadImageInformation()
        try:
            position, cosines = (
                np.array([float(value) for value in reader.GetMetaData(tag).split("\\")])
                for tag in ("0020|0032", "0020|0037")
            )
            heights.append(float(position @ np.cross(cosines[:3], cosines[3:])))
            in_plane.append([position @ cosines[:3], position @ cosines[3:]])
        except (RuntimeError, ValueError):
            why = "a slice has no position or orientation"
            raise defect(why, "ImagePositionPatient", "export the series again") from None
        planes.add((reader.GetSize()[:2], reader.GetSpacing()[:2], tuple(np.round(cosines, 3))))
        voxels, components = len(names) * int(np.prod(reader.GetSize(), dtype=object)), reader.GetNumberOfComponents()
        if voxels > MAX_VOXELS or components != 1:
            why = (
                f"the series has {voxels} voxels of {components} values, at most {MAX_VOXELS} of one value are expected"
            )
            raise defect(why, "Rows", "give an MR series")
    if len(planes) > 1:
        why = "the slices differ in size, voxel size or orientation"
        raise defect(why, "ImageOrientationPatient", "keep one series per folder")
    steps = np.diff(np.sort(heights))
    typical = float(np.median(steps))
    if typical <= 0 or steps.min() < 0.5 * typical:
        raise defect("two slices are at the same position", "ImagePositionPatient", "keep one volume per folder")
    if np.abs(steps - typical).max() > 0.05 * typical:
        gap = int(np.abs(steps - typical).argmax()) + 1
        why = f"the slices are spaced unevenly: {steps[gap - 1]:.2f} mm after slice {gap}, {typical:.2f} mm elsewhere"
        raise defect(why, "ImagePositionPatient", "add the missing slices")
    shift = float(np.ptp(in_plane, axis=0).max())
    if shift > 0.05 * typical:
        why = f"the slices are shifted against each other by {shift:.2f} mm within their plane"
        raise defect(why, "ImagePositionPatient", "export the series again")
    return float(steps.mean())
