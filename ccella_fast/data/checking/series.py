"""The series of one study as the checks see them. Imported by worker processes, so it does not import torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ccella_fast.config import DataConfig
from ccella_fast.data.checking.signature import encode_signature, make_signature
from ccella_fast.data.checking.study_facts import SeriesFacts
from ccella_fast.data.preparation.images import leading_sequence, read_sequence, series_notes
from ccella_fast.data.preparation.plausibility import check_contrast, check_intensities
from ccella_fast.data.preparation.resampling import check_center, make_grid
from ccella_fast.data.readers.volume import StoredVolume
from ccella_fast.data.readers.volume_checks import check_affine
from ccella_fast.data.readers.volume_file import check_axial, closest_ras, read_geometry
from ccella_fast.errors import DataError

_EVERY = 3  # voxels along each axis that percentiles are measured on


class SeriesTask(NamedTuple):
    """What a worker process needs to know of one study.

    Attributes:
        id: The study's id.
        files: Sequence -> image file or folder of DICOM files.
        data: The configuration of the grid.
        headers_only: Whether voxels are left alone.
        b_value: Which image to read of a diffusion series that holds several; None reads that of the highest.
    """

    id: str
    files: dict[str, Path]
    data: DataConfig
    headers_only: bool
    b_value: float | None = None


class SeriesResult(NamedTuple):
    """What was found out about one study.

    Attributes:
        series: Facts of each readable series.
        signature: Of the leading series, encoded; None if voxels were not read.
        defects: What `prepare` would refuse.
        notes: (file, sentence) about what a reader did not use and what a series does not cover.
    """

    series: dict[str, SeriesFacts]
    signature: str | None
    defects: list[DataError]
    notes: list[tuple[str, str]]


def examine_series(task: SeriesTask) -> SeriesResult:
    """Read all series of a study; a defect of one does not keep the others from being read."""
    volumes: dict[str, StoredVolume] = {}
    series: dict[str, SeriesFacts] = {}
    defects = []
    for sequence, path in task.files.items():
        try:
            header = read_geometry(path) if task.headers_only else None
            if header is not None:
                series[sequence] = _facts_of_header(*header, path)
            else:
                volume = read_sequence(path, sequence, task.b_value)
                series[sequence], volumes[sequence] = _facts_of_volume(volume), volume
                check_intensities(volume, sequence, path)
        except DataError as defect:
            defects.append(defect)
    leading = leading_sequence(task.data)
    signature = None
    if leading in volumes:
        signature = encode_signature(make_signature(volumes[leading]))
        grid = make_grid(volumes[leading], task.data.spacing, task.data.dim)
        for sequence, volume in volumes.items():
            try:
                check_center(volume, grid, sequence, leading, path=task.files[sequence])
                check_contrast(volume, sequence, grid, task.files[sequence])
            except DataError as defect:
                defects.append(defect)
        found = series_notes(volumes, grid)
    else:
        found = {sequence: list(volume.notes) for sequence, volume in volumes.items()}
    notes = [(str(task.files[name]), note) for name, sentences in found.items() for note in sentences]
    return SeriesResult(series, signature, defects, notes)


def _facts_of_header(shape: tuple[int, ...], affine: np.ndarray, path: Path) -> SeriesFacts:
    check_affine(affine, path)
    empty = closest_ras(StoredVolume(np.broadcast_to(np.float32(0), shape), affine))
    check_axial(empty, path)
    return SeriesFacts(empty.array.shape, tuple(empty.spacing.tolist()))


def _facts_of_volume(volume: StoredVolume) -> SeriesFacts:
    array = volume.array
    digest = hashlib.sha256(repr(array.shape).encode())
    digest.update(np.ascontiguousarray(array).data)
    some = array[::_EVERY, ::_EVERY]
    low, high = float(array.min()), float(np.percentile(some, 99.5))
    return SeriesFacts(array.shape, tuple(volume.spacing.tolist()), digest.hexdigest(), low, high)
