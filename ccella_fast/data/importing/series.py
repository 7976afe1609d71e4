"""Group headers into studies and volumes. A volume is one image per position: a series may hold several.

An interleaved diffusion series, for example, is one volume per b-value. Files are grouped by StudyInstanceUID and
SeriesInstanceUID, and within a series by image type, orientation, size, echo time and b-value.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from ccella_fast.data.importing.scan import FileHeader, FrameHeader, Identity

_SAME_DIRECTION = 0.02  # largest difference of direction cosines within a volume; a rounded header differs by less
_SAME_POSITION = 0.01  # mm


class Volume3D(NamedTuple):
    """The files of one volume.

    Attributes:
        name: What tells it from the other volumes of the study: the series number, and more if that is not enough.
        headers: Of its files; the first stands for all.
        b_value: In s/mm2; None if the header states none.
        slices: Number of positions.
        images_per_position: More than one for dynamic series, several diffusion directions, and repetitions.
        trace: Whether its images are means over diffusion directions.
        echoes: Number of echo times in the series.
        diffusion: Whether an image of the series has a b-value above 0.
    """

    name: str
    series_uid: str
    headers: tuple[FileHeader, ...]
    b_value: float | None
    slices: int
    images_per_position: int
    trace: bool
    echoes: int
    diffusion: bool

    @property
    def normal(self) -> np.ndarray | None:
        """The unit vector across the slices, LPS; None if the header states no orientation."""
        if self.headers[0].orientation is None:
            return None
        cosines = np.array(self.headers[0].orientation)
        normal = np.cross(cosines[:3], cosines[3:])
        length = np.linalg.norm(normal)
        return normal / length if length > 0.5 else None

    @property
    def field_of_view(self) -> float | None:
        """The longer side of a slice in mm."""
        first = self.headers[0]
        if first.pixel_spacing is None:
            return None
        return max(first.rows * first.pixel_spacing[0], first.columns * first.pixel_spacing[1])


class ExportedStudy(NamedTuple):
    """A study of an export. identities: the distinct ones of its files; more than one patient in them is a defect."""

    uid: str
    identities: tuple[Identity, ...]
    volumes: tuple[Volume3D, ...]


def group_studies(headers: Iterable[FileHeader]) -> tuple[list[ExportedStudy], int]:
    """The studies, sorted by UID, and the number of files that are copies of others (equal SOPInstanceUID)."""
    by_study: dict[str, dict[str, dict[str, FileHeader]]] = defaultdict(lambda: defaultdict(dict))
    copies = 0
    for header in headers:
        files = by_study[header.study_uid][header.series_uid]
        copies += header.instance_uid in files
        files.setdefault(header.instance_uid, header)
    studies = []
    for uid, by_series in sorted(by_study.items()):
        series = {name: list(files.values()) for name, files in by_series.items()}
        numbers = Counter(images[0].series_number for images in series.values())
        volumes: list[Volume3D] = []
        for series_uid, images in sorted(series.items(), key=lambda item: (item[1][0].series_number or 0, item[0])):
            number = images[0].series_number
            name = "none" if number is None else str(number)
            if numbers[number] > 1:  # not a counter, which would name another series when one more is exported later
                name = f"{name} ({hashlib.sha256(series_uid.encode()).hexdigest()[:4]})"
            volumes += _volumes(name, series_uid, images)
        identities = {image.identity for images in series.values() for image in images}
        studies.append(ExportedStudy(uid, tuple(sorted(identities)), tuple(volumes)))
    return studies, copies


def _volumes(name: str, series_uid: str, files: list[FileHeader]) -> list[Volume3D]:
    groups: list[tuple[tuple, FileHeader, list[tuple[FileHeader, FrameHeader]]]] = []
    echoes = len({round(file.echo_time) for file in files if file.echo_time})
    diffusion = any(frame.b_value for file in files for frame in file.frames)
    for file in files:
        for frame in file.frames:
            key = (file.image_type, file.rows, file.columns, file.echo_time, frame.b_value, frame.trace, file.storage)
            for known, first, images in groups:
                if known == key and _parallel(first, file):
                    images.append((file, frame))
                    break
            else:
                groups.append((key, file, [(file, frame)]))
    groups.sort(key=lambda group: (group[0][4] or 0, group[0][0], group[0][3] or 0, not group[0][5]))
    volumes, taken = [], Counter[str]()
    for key, first, images in groups:
        own = name if len(groups) == 1 or key[4] is None else f"{name} b{key[4]:g}"
        taken[own] += 1
        own = own if taken[own] == 1 else f"{own} part {taken[own]}"
        slices, each = _positions(first, [frame for _, frame in images])
        headers = tuple({file.path: file for file, _ in images}.values())
        volumes.append(Volume3D(own, series_uid, headers, key[4], slices, each, key[5], echoes, diffusion))
    return volumes


def _parallel(first: FileHeader, second: FileHeader) -> bool:
    if first.orientation is None or second.orientation is None:
        return first.orientation is second.orientation
    return bool(np.abs(np.subtract(first.orientation, second.orientation)).max() < _SAME_DIRECTION)


def _positions(file: FileHeader, frames: list[FrameHeader]) -> tuple[int, int]:
    """Number of positions along the normal, and the largest number of images at one of them."""
    if file.orientation is None or any(frame.position is None for frame in frames):
        return len(frames), 1
    normal = np.cross(file.orientation[:3], file.orientation[3:])
    heights = np.sort(np.array([frame.position for frame in frames]) @ normal)
    starts = np.flatnonzero(np.diff(heights, prepend=-np.inf) > _SAME_POSITION)
    return len(starts), int(np.diff(starts, append=len(heights)).max())
