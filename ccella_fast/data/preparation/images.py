"""The series of one study to images on its grid: read, check, resample, normalize, write.

This module is imported by the worker processes of `prepare`, so it does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ccella_fast.config import DataConfig
from ccella_fast.data.checking.signature import encode_signature, make_signature
from ccella_fast.data.preparation.plausibility import check_contrast, check_intensities, coverage_note
from ccella_fast.data.preparation.resampling import Grid, check_center, make_grid, normalize, resample
from ccella_fast.data.preparation.stage_cache import write_array
from ccella_fast.data.readers.volume import StoredVolume
from ccella_fast.data.readers.volume_file import check_axial, read_volume


class ImageTask(NamedTuple):
    """What a worker process needs to know of one study.

    Attributes:
        id: The study's id.
        files: Sequence -> image file or folder of DICOM files.
        data: The configuration of the grid.
        out: The prepared folder.
        b_value: Which image to read of a diffusion series that holds several; None reads that of the highest.
    """

    id: str
    files: dict[str, Path]
    data: DataConfig
    out: Path
    b_value: float | None = None


class PreparedImages(NamedTuple):
    """What was written for one study.

    Attributes:
        files: Key -> entry of the manifest's `files`.
        facts: affine, spacing and window, for the manifest; a signature, by which copies of the study are recognized; notes on
            what was there and was not used; the b-value that was asked for.
    """

    files: dict[str, dict[str, Any]]
    facts: dict[str, Any]


def check_images(task: ImageTask) -> None:
    """Read all series; raises DataError if one is invalid or implausible, or not in the same place as the others."""
    series, grid = read_series(task)
    for sequence, volume in series.items():
        check_intensities(volume, sequence, task.files[sequence])
        check_contrast(volume, sequence, grid, task.files[sequence])


def read_images(task: ImageTask) -> dict[str, StoredVolume]:
    """The series of a study as they were measured."""
    return read_series(task)[0]


def make_images(task: ImageTask) -> PreparedImages:
    """Write `images/<id>/<sequence>.npy`, float32 in [0, 1], below `task.out`."""
    series, grid = read_series(task)
    notes = series_notes(series, grid)
    signature = encode_signature(make_signature(series[leading_sequence(task.data)]))
    files, windows = {}, {}
    for sequence in task.data.sequences:
        values = resample(series.pop(sequence), grid)
        image, windows[sequence] = normalize(values, sequence, grid, path=task.files[sequence])
        files[f"image/{sequence}"] = write_array(task.out, f"images/{task.id}/{sequence}.npy", image)
    facts = {
        "affine": grid.affine.tolist(),
        "spacing": list(task.data.spacing),
        "window": windows,
        "signature": signature,
        "notes": notes,
    }
    if task.b_value is not None:
        facts["b_value"] = task.b_value
    return PreparedImages(files, facts)


def read_series(task: ImageTask) -> tuple[dict[str, StoredVolume], Grid]:
    """The series of a study as they were measured, and the study's grid, which follows the T2 series."""
    series: dict[str, StoredVolume] = {}
    for sequence in task.data.sequences:
        series[sequence] = read_sequence(task.files[sequence], sequence, task.b_value)
    leading = leading_sequence(task.data)
    grid = make_grid(series[leading], task.data.spacing, task.data.dim)
    for sequence in task.data.sequences:
        check_center(series[sequence], grid, sequence, leading, path=task.files[sequence])
    return series, grid


def read_sequence(path: Path, sequence: str, b_value: float | None) -> StoredVolume:
    """The series of one sequence, which must be axial. `b_value` is for diffusion series, see `read_volume`."""
    volume = read_volume(path, b_value=b_value if sequence == "hbv" else None)
    check_axial(volume, path)
    return volume


def series_notes(series: dict[str, StoredVolume], grid: Grid) -> dict[str, list[str]]:
    """Sequence -> sentences about what the series holds and was not used, and what it does not cover."""
    notes = {}
    for sequence, volume in series.items():
        coverage = coverage_note(volume, sequence, grid)
        if sentences := [*volume.notes, *([] if coverage is None else [coverage])]:
            notes[sequence] = sentences
    return notes


def leading_sequence(data: DataConfig) -> str:
    """The sequence whose directions and center the grid of a study has."""
    return "t2w" if "t2w" in data.sequences else data.sequences[0]


def bytes_needed(task: ImageTask) -> int:
    """Approximate peak memory of `make_images` in bytes: a few copies of the grid and of a large series."""
    return 4 * (6 * int(np.prod(task.data.dim)) + 6 * 2**24)
