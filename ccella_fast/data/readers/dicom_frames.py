"""The images of a DICOM file: their place, scale and b-value, and their voxels.

A classic file holds one image. An enhanced file (PS3.3 A.36) holds many, with attributes in functional groups, either shared by
all or one per frame. Both give the same `Frame`, so that everything that follows is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ccella_fast.data.readers.dicom_files import PRIVATE_B_VALUES, DicomFile, value_of
from ccella_fast.data.readers.dicom_pixels import check_pixels
from ccella_fast.data.readers.volume_checks import TOLERANCE
from ccella_fast.errors import DataError
from ccella_fast.quantities import counted

_GE_BIAS = 10**9  # added to the b-value of a GE series of several b-values (dcm2niix issue 602)

#: Attributes that tell images at one position apart, and what there is several of.
DIMENSIONS = {
    "DiffusionGradientOrientation": "diffusion directions",
    "TemporalPositionIdentifier": "time points",
    "EchoTime": "echo times",
    "ImageType": "kinds of image, such as magnitude and phase",
    "AcquisitionNumber": "acquisitions",
    "StackID": "stacks",
}
#: Where an enhanced file has an attribute: its functional group and, if that differs, its name there.
_GROUPS = {
    "ImagePositionPatient": ("PlanePositionSequence", None),
    "ImageOrientationPatient": ("PlaneOrientationSequence", None),
    "PixelSpacing": ("PixelMeasuresSequence", None),
    "RescaleSlope": ("PixelValueTransformationSequence", None),
    "RescaleIntercept": ("PixelValueTransformationSequence", None),
    "DiffusionBValue": ("MRDiffusionSequence", None),
    "DiffusionDirectionality": ("MRDiffusionSequence", None),
    "TemporalPositionIdentifier": ("FrameContentSequence", "TemporalPositionIndex"),
    "EchoTime": ("MREchoSequence", "EffectiveEchoTime"),
    "ImageType": ("MRImageFrameTypeSequence", "FrameType"),
    "AcquisitionNumber": ("FrameContentSequence", "FrameAcquisitionNumber"),
    "StackID": ("FrameContentSequence", "StackID"),
}


@dataclass(frozen=True, eq=False)
class Frame:
    """One image of a series.

    Attributes:
        file: The file that holds it.
        number: Its index in the file, from 0.
        position: (3,) the center of its first voxel in mm, LPS.
        orientation: (2, 3) unit vectors along a row and along a column, as stated.
        spacing: (2,) distances in mm between rows and between columns.
        slope: What a stored value is multiplied with.
        intercept: What is then added.
        b_value: In s/mm2; None if the header states none.
        is_trace: Whether the header says that it is the trace of all diffusion directions.
        labels: Values of DIMENSIONS, as text that is only compared.
    """

    file: DicomFile
    number: int
    position: np.ndarray
    orientation: np.ndarray
    spacing: np.ndarray
    slope: float
    intercept: float
    b_value: float | None
    is_trace: bool
    labels: dict[str, str]


def read_frames(file: DicomFile) -> list[Frame]:
    """The frames of a file whose header passes all checks, in their stored order.

    Raises:
        DataError: If an attribute of the pixels or of their place is missing, implausible or contradicts the file's length.
    """
    count = check_pixels(file)
    try:
        per_frame = list(value_of(file, "PerFrameFunctionalGroupsSequence") or [])
        shared = (value_of(file, "SharedFunctionalGroupsSequence") or [None])[0]
    except Exception:  # pydicom raises many types for damaged headers
        raise _defect(file, "its functional groups cannot be parsed", "PerFrameFunctionalGroupsSequence") from None
    if per_frame and len(per_frame) != count:
        why = f"it has {counted(count, 'frame')}, but attributes of {len(per_frame)}"
        raise _defect(file, why, "PerFrameFunctionalGroupsSequence")
    if count > 1 and not per_frame:
        why = f"it has {count} frames without a position of each"
        raise _defect(file, why, "PerFrameFunctionalGroupsSequence")
    if not per_frame and shared is None:
        return [_frame(file, 0, None)]
    return [_frame(file, number, [per_frame[number] if per_frame else None, shared]) for number in range(count)]


def _frame(file: DicomFile, number: int, groups: list[Any] | None) -> Frame:
    def value(keyword: str) -> Any:
        """The value of an attribute, None if it is absent or empty."""
        try:
            found = _look_up(file.header, groups, keyword)
        except Exception:  # see above
            raise _defect(file, f"{keyword} cannot be parsed", keyword) from None
        return None if found is None or found == "" else found

    def numbers(keyword: str, count: int) -> np.ndarray:
        found = value(keyword)
        try:
            array = np.array([found] if isinstance(found, int | float) else found, np.float64)
        except (TypeError, ValueError):
            array = np.array(np.nan)
        if array.shape != (count,) or not np.isfinite(array).all():
            where = "" if groups is None else f" of frame {number + 1}"
            state = "is missing" if found is None else f"is not {count} finite numbers"
            raise _defect(file, f"{keyword}{where} {state}", keyword)
        return array

    spacing = numbers("PixelSpacing", 2)
    if spacing.min() <= 0:
        raise _defect(file, f"PixelSpacing is {spacing[0]:g} and {spacing[1]:g} mm, not positive", "PixelSpacing")
    orientation = numbers("ImageOrientationPatient", 6).reshape(2, 3)
    lengths = np.linalg.norm(orientation, axis=1)
    if np.abs(lengths - 1).max() > TOLERANCE or abs(orientation[0] @ orientation[1]) > TOLERANCE:
        why = "ImageOrientationPatient is not two unit vectors at right angles"
        raise _defect(file, why, "ImageOrientationPatient")
    has_rescale = value("RescaleSlope") is not None, value("RescaleIntercept") is not None
    if has_rescale[0] != has_rescale[1]:
        raise _defect(file, "only one of RescaleSlope and RescaleIntercept is stated", "RescaleSlope")
    slope, intercept = 1.0, 0.0
    if has_rescale[0]:
        slope, intercept = float(numbers("RescaleSlope", 1)[0]), float(numbers("RescaleIntercept", 1)[0])
    if slope == 0:
        raise _defect(file, "RescaleSlope is 0", "RescaleSlope")
    b_value = float(numbers("DiffusionBValue", 1)[0]) if value("DiffusionBValue") is not None else None
    labels = {keyword: str(value(keyword)) for keyword in DIMENSIONS}
    return Frame(
        file, number, numbers("ImagePositionPatient", 3), orientation, spacing, slope,
        intercept, _private_b_value(file) if b_value is None else b_value,
        value("DiffusionDirectionality") == "ISOTROPIC" or "TRACEW" in labels["ImageType"], labels,
    )  # fmt: skip


def _look_up(header: Any, groups: list[Any] | None, keyword: str) -> Any:
    """An attribute of a classic header or, if there are functional groups, of the first of them that has it."""
    if groups is None:
        return header.get(keyword)
    if keyword == "DiffusionGradientOrientation":
        diffusion = _look_up_group(groups, "MRDiffusionSequence")
        directions = None if diffusion is None else diffusion.get("DiffusionGradientDirectionSequence")
        return directions[0].get(keyword) if directions else None
    sequence, name = _GROUPS[keyword]
    group = _look_up_group(groups, sequence)
    return None if group is None else group.get(name or keyword)


def _look_up_group(groups: list[Any], sequence: str) -> Any:
    return next((group.get(sequence)[0] for group in groups if group is not None and group.get(sequence)), None)


def _private_b_value(file: DicomFile) -> float | None:
    """The b-value where scanners put it before there was an attribute for it; None if it is nowhere."""
    for group, (creator, element) in PRIVATE_B_VALUES.items():
        try:
            found = file.header.private_block(group, creator)[element].value
        except Exception:  # KeyError for an absent element, many types for damaged ones
            continue
        if isinstance(found, bytes):  # of unknown representation: a text but for Philips, which writes a float
            is_float = group == 0x2001 and len(found) == 4
            found = np.frombuffer(found, "<f4")[0] if is_float else found.decode("latin-1").split("\\")[0].strip(" \0")
        elif not isinstance(found, int | float | str):
            found = found[0] if found else None
        try:
            number = float(found)
        except (TypeError, ValueError):
            continue
        if np.isfinite(number) and number >= 0:
            return number % _GE_BIAS
    return None


def _defect(file: DicomFile, why: str, field: str) -> DataError:
    return DataError(
        f"this DICOM file cannot be used: {why}", path=file.path, field=field, fix="export the series again"
    )
