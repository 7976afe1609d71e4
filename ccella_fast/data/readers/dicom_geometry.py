"""The place of a stack of DICOM slices (PS3.3 C.7.6.2: the image plane), and whether they form one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ccella_fast.data.readers.dicom_frames import Frame
from ccella_fast.data.readers.volume_checks import TOLERANCE
from ccella_fast.errors import DataError

_SAME_POSITION = 0.05  # mm along the normal
_UNEVEN = 0.05  # of the distance between slices
#: In mm: positions that are written to 0.01 mm are off by at most 0.005 in each of three coordinates at each of two slices.
_ROUNDING = 2 * 0.005 * 3**0.5


def by_position(frames: Sequence[Frame], folder: Path) -> list[list[Frame]]:
    """The frames at each position along the normal of their plane, from its lowest position to its highest.

    Raises:
        DataError: If frames differ in size, voxel size or orientation, beyond what rounding in the headers explains.
    """
    first = frames[0]
    for frame in frames:
        sizes = [(each.file.header.Rows, each.file.header.Columns) for each in (first, frame)]
        if (
            sizes[0] != sizes[1]
            or np.abs(frame.spacing / first.spacing - 1).max() > TOLERANCE
            or np.abs(frame.orientation - first.orientation).max() > TOLERANCE
        ):
            names = _names([first, frame])
            why = f"the slices differ in size, voxel size or orientation: {names}"
            raise DataError(why, path=folder, field="ImageOrientationPatient", fix="keep one series per folder")
    normal = np.cross(*first.orientation)
    heights = np.array([frame.position @ normal for frame in frames])
    order = np.argsort(heights, kind="stable")
    groups = [[frames[order[0]]]]
    for before, index in zip(order, order[1:], strict=False):
        if heights[index] - heights[before] > _SAME_POSITION:
            groups.append([])
        groups[-1].append(frames[index])
    return groups


def stack_affine(frames: Sequence[Frame], folder: Path) -> tuple[np.ndarray, list[str]]:
    """The affine (4, 4), voxel index (column, row, slice) -> RAS mm, of frames in order of their positions, and notes on it.

    Raises:
        DataError: If positions are not even and in line along the normal.
    """
    if len(frames) < 2:
        why = f"this folder holds a single slice ({_names(frames)}), a 3D volume is expected"
        raise DataError(why, path=folder, field="DICOM files", fix="give the whole series")
    axes = _right_angles(np.median([frame.orientation for frame in frames], axis=0))
    positions = np.stack([frame.position for frame in frames])
    steps = np.diff(positions @ axes[:, 2])
    typical = float(np.median(steps))
    if np.abs(steps - typical).max() > _UNEVEN * typical:
        gap = int(np.abs(steps - typical).argmax())
        between = _names(frames[gap : gap + 2])
        step = f"{steps[gap]:.2f} mm after slice {gap + 1}, {typical:.2f} mm elsewhere"
        why = f"the slices are spaced unevenly: {step}: {between}"
        raise DataError(why, path=folder, field="ImagePositionPatient", fix="add the missing slices")
    in_plane = positions @ axes[:, :2]
    # A stack may lean by TOLERANCE, as in every other format; each slice may be off by rounding.
    allowed = TOLERANCE * float(steps.sum()) + _ROUNDING
    shift = float(np.ptp(in_plane, axis=0).max())
    if shift > allowed:
        worst = int(np.abs(in_plane - np.median(in_plane, axis=0)).max(axis=1).argmax())
        why = (
            f"the slices are shifted against each other by {shift:.2f} mm within their plane, at most {allowed:.2f} mm "
            f"is allowed: {_names(frames[worst : worst + 1])}"
        )
        raise DataError(why, path=folder, field="ImagePositionPatient", fix="export the series again")
    row_spacing, column_spacing = np.median([frame.spacing for frame in frames], axis=0)
    distance = np.linalg.norm(positions[-1] - positions[0]) / (len(frames) - 1)
    affine = np.eye(4)
    affine[:3, :3] = axes * [column_spacing, row_spacing, distance]
    affine[:3, 3] = positions[0]
    uneven = float(np.abs(steps - typical).max())
    notes = (
        [f"the distances of the slices differ by up to {uneven:.3f} mm; they are taken as even"]
        if uneven > _ROUNDING
        else []
    )
    return np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine, notes


def _right_angles(orientation: np.ndarray) -> np.ndarray:
    """The unit vectors (columns of (3, 3)) along rows, columns and normal of an image; stated ones are rounded."""
    row, column = orientation
    normal = np.cross(row, column)
    normal /= np.linalg.norm(normal)
    row = np.cross(column, normal)
    row /= np.linalg.norm(row)
    return np.stack([row, np.cross(normal, row), normal], axis=1)


def _names(frames: Sequence[Frame]) -> str:
    """The files of frames, for messages, and their numbers if a file holds several."""
    several = len({frame.file.path for frame in frames}) < len(frames)
    return " and ".join(f"{frame.file.path.name}{f', frame {frame.number + 1}' if several else ''}" for frame in frames)
