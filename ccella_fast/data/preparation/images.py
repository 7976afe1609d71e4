"""One study's series to images on its grid: read, check, resample, normalise, write.

Runs in `prepare`'s worker processes too, so nothing here imports torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ccella_fast.config import DataConfig
from ccella_fast.data.preparation.resampling import Grid, covers_centre, make_grid, normalise, resample
from ccella_fast.data.preparation.stage_cache import write_array
from ccella_fast.data.readers.volume_file import Volume, check_axial, read_volume
from ccella_fast.errors import DataError


class ImageTask(NamedTuple):
    """files: sequence -> file or DICOM folder. out: the prepared folder."""

    id: str
    files: dict[str, Path]
    data: DataConfig
    out: Path


class PreparedImages(NamedTuple):
    """files: the manifest's entries of what was written. facts: affine, spacing, window."""

    files: dict[str, dict[str, Any]]
    facts: dict[str, Any]


def check_images(task: ImageTask) -> None:
    """Read everything; DataError where a series is unsound or does not lie with the others."""
    read_series(task)


def make_images(task: ImageTask) -> PreparedImages:
    """Write `images/<id>/<sequence>.npy` below `task.out`."""
    series, grid = read_series(task)
    files, windows = {}, {}
    for sequence in task.data.sequences:
        values = resample(series.pop(sequence), grid)
        image, windows[sequence] = normalise(values, sequence, grid, path=task.files[sequence])
        files[f"image/{sequence}"] = write_array(task.out, f"images/{task.id}/{sequence}.npy", image)
    facts = {"affine": grid.affine.tolist(), "spacing": list(task.data.spacing), "window": windows}
    return PreparedImages(files, facts)


def read_series(task: ImageTask) -> tuple[dict[str, Volume], Grid]:
    """The study's series as they were measured, and its grid, which is laid over the T2 series."""
    series: dict[str, Volume] = {}
    for sequence in task.data.sequences:
        series[sequence] = read_volume(task.files[sequence])
        check_axial(series[sequence], task.files[sequence])
    leading = "t2w" if "t2w" in task.data.sequences else task.data.sequences[0]
    grid = make_grid(series[leading], task.data.spacing, task.data.dim)
    for sequence in task.data.sequences:
        if not covers_centre(series[sequence], grid):
            why, fix = f"does not lie where the {leading} series lies", "give series of one examination"
            raise DataError(why, path=task.files[sequence], field="origin", fix=fix)
    return series, grid


def bytes_needed(task: ImageTask) -> int:
    """About what `make_images` holds at its peak: a few copies of the grid, and of a large series."""
    return 4 * (6 * int(np.prod(task.data.dim)) + 6 * 2**24)
