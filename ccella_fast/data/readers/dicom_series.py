"""Read a folder that holds one DICOM series: classic files of one slice each, or enhanced files of many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ccella_fast.data.readers.b_values import choose_b_value
from ccella_fast.data.readers.dicom_files import DicomFile, quiet_pydicom, read_dicom_files, value_of
from ccella_fast.data.readers.dicom_frames import DIMENSIONS, Frame, read_frames
from ccella_fast.data.readers.dicom_geometry import by_position, stack_affine
from ccella_fast.data.readers.dicom_pixels import read_pixels
from ccella_fast.data.readers.volume import StoredVolume
from ccella_fast.data.readers.volume_checks import MAX_VOXELS
from ccella_fast.errors import DataError
from ccella_fast.quantities import counted

#: How a note begins that says that slices may be missing.
MAY_BE_MISSING = "images may be missing"


def read_dicom_series(folder: Path, b_value: float | None = None) -> StoredVolume:
    """Read a series, axes in the order column, row, slice.

    Args:
        folder: The folder. Files in it that are not DICOM images are named in a note.
        b_value: Which image to read of a diffusion series that holds several, in s/mm2; None reads that of the highest.

    Raises:
        DataError: If an image file is damaged, or if the images are anything but one series of equal, parallel and evenly
            spaced slices whose headers state their place.
    """
    with quiet_pydicom():
        files, notes = read_dicom_files(folder)
        frames = [frame for file in files for frame in read_frames(file)]
        _check_one_series(files, folder)
        positions = by_position(frames, folder)
        chosen, chosen_notes = _one_per_position(positions, b_value, folder)
        affine, geometry_notes = stack_affine(chosen, folder)
        header = chosen[0].file.header
        if len(chosen) * header.Rows * header.Columns > MAX_VOXELS:
            why = f"the series has more than {MAX_VOXELS} voxels"
            raise DataError(why, path=folder, field="Rows", fix="give an MR series")
        array, scale_notes = _scaled_voxels(chosen)
        notes = [*notes, *chosen_notes, *_notes_on_missing(files), *geometry_notes, *scale_notes]
    return StoredVolume(array, affine, tuple(notes))


def _check_one_series(files: Sequence[DicomFile], folder: Path) -> None:
    for keyword, what in (("SeriesInstanceUID", "DICOM series"), ("FrameOfReferenceUID", "frames of reference")):
        names: dict[str, list[str]] = {}
        for file in files:
            value = value_of(file, keyword)
            names.setdefault("" if value is None else str(value), []).append(file.path.name)
        if len(names) > 1:
            without = names.pop("", None)
            parts = [f"{counted(len(each), 'file')} such as {each[0]}" for each in sorted(names.values(), key=len)[:3]]
            why = f"this folder holds {len(names)} {what}, but one is expected: {', '.join(parts)}"
            if without:
                why = f"files that do not state {keyword}, such as {without[0]}: {len(without)} of {len(files)}"
            raise DataError(why, path=folder, field=keyword, fix="keep one series per folder")


def _one_per_position(
    positions: list[list[Frame]], wanted: float | None, folder: Path
) -> tuple[list[Frame], tuple[str, ...]]:
    """The images of one b-value, one at each position, and notes on the choice."""
    frames = [frame for group in positions for frame in group]
    values = [frame.b_value for frame in frames if frame.b_value is not None]
    notes: tuple[str, ...] = ()
    # A b-value of 0 in all images says no more than that this is not a diffusion series.
    if len(values) == len(frames) and any(values):
        b_value, notes = choose_b_value(values, wanted, folder)
        positions = [[frame for frame in group if frame.b_value == b_value] for group in positions]
        covered = sum(map(bool, positions))
        if covered < len(positions):
            why = f"the series has images of b-value {b_value:g} at {covered} of {len(positions)} positions only"
            raise DataError(why, path=folder, field="DiffusionBValue", fix="add the missing slices")
    if max(map(len, positions)) > 1:
        traces = [[frame for frame in group if frame.is_trace] for group in positions]
        if all(len(group) == 1 for group in traces):
            notes = (*notes, f"of {max(map(len, positions))} images at a position the trace image was read")
            positions = traces
    several = [group for group in positions if len(group) > 1]
    if several:
        raise _several_at_one_position(several[0], len(values), len(frames), folder)
    return [group[0] for group in positions], notes


def _several_at_one_position(group: list[Frame], stated: int, total: int, folder: Path) -> DataError:
    """An error that names the dimension in which images at one position differ."""
    names = " and ".join(
        f"{frame.file.path.name}{f', frame {frame.number + 1}' if frame.number else ''}" for frame in group[:2]
    )
    why = f"{len(group)} images are at the same position ({names})"
    fix = "keep one volume per folder"
    if 0 < stated < total:
        return DataError(
            f"{why}, and only {stated} of {total} state a b-value", path=folder, field="DiffusionBValue", fix=fix
        )
    for keyword, what in DIMENSIONS.items():
        count = len({frame.labels[keyword] for frame in group})
        if count > 1:
            if keyword == "DiffusionGradientOrientation":
                fix = "give the trace images, not those of single directions"
            return DataError(f"{why}: {count} {what}", path=folder, field=keyword, fix=fix)
    if group[0].b_value:
        why, fix = f"{why} and have one b-value, {group[0].b_value:g}", "give the trace images, one at each position"
    return DataError(why, path=folder, field="ImagePositionPatient", fix=fix)


def _notes_on_missing(files: Sequence[DicomFile]) -> list[str]:
    """What the headers say about slices that are not there; missing ones at an end of a stack leave no other trace."""
    numbers: list[int] = []
    expected: list[int] = []
    for file in files:
        for keyword, found in (("InstanceNumber", numbers), ("ImagesInAcquisition", expected)):
            value = value_of(file, keyword)
            if isinstance(value, int):
                found.append(int(value))
    notes = []
    if len(numbers) == len(files) > 1 and len(set(numbers)) == len(numbers):
        missing = max(numbers) - min(numbers) + 1 - len(numbers)
        if missing or min(numbers) > 1:
            gap = f", {missing} numbers are missing" if missing else ""
            notes.append(f"{MAY_BE_MISSING}: InstanceNumber runs from {min(numbers)} to {max(numbers)}{gap}")
    if expected and max(expected) > len(files) > 1:
        notes.append(f"{MAY_BE_MISSING}: ImagesInAcquisition is {max(expected)}, the folder holds {len(files)}")
    return notes


def _scaled_voxels(frames: list[Frame]) -> tuple[np.ndarray, list[str]]:
    """(columns, rows, slices) float32 voxels, each slice with its own scale in float64, and notes on scale and padding."""
    header = frames[0].file.header
    array = np.empty((header.Columns, header.Rows, len(frames)), np.float32)
    padded = 0
    numbers: dict[Path, list[int]] = {}
    for index, frame in enumerate(frames):
        numbers.setdefault(frame.file.path, []).append(index)
    for indices in numbers.values():
        file = frames[indices[0]].file
        stored = read_pixels(file, [frames[index].number for index in indices])
        padding = value_of(file, "PixelPaddingValue")
        padded += int(np.count_nonzero(stored == padding)) if isinstance(padding, int) else 0
        for index, slice_ in zip(indices, stored, strict=True):
            scaled = slice_ * np.float64(frames[index].slope) + frames[index].intercept
            with np.errstate(over="ignore"):  # becomes infinite, which check_voxels reports
                array[:, :, index] = scaled.T
    notes = []
    if padded:
        notes.append(f"voxels with the value of PixelPaddingValue: {padded} of {array.size}")
    if len({frame.file.header.PixelRepresentation for frame in frames}) > 1:
        notes.append("PixelRepresentation differs: some slices are signed, others are not")
    scales = Counter((frame.slope, frame.intercept) for frame in frames)
    if len(scales) > 1:
        notes.append(f"the slices have {len(scales)} different pairs of RescaleSlope and RescaleIntercept")
    return array, notes
