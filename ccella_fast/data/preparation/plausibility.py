"""Checks that the intensities of a series are what its sequence should have, and how much of the grid it covers.

They find what no header states: an ADC map in other units, a padding value or a hot voxel that would take all contrast.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ccella_fast.data.preparation.resampling import ADC_WINDOW, PERCENTILES, Grid
from ccella_fast.data.readers.volume import Volume
from ccella_fast.errors import DataError

#: Of the median of the positive voxels of an ADC map, in 1e-6 mm2/s. Free water at body temperature has 3000, restricted
#: diffusion in cancer 500 to 900, normal prostate 1300 to 2000; fat and bone around it have a few hundred.
ADC_MEDIAN = (100.0, 3000.0)
_TYPICAL_ADC = 1200.0
_ADC_UNITS = {1e3: "1e-3 mm2/s", 1e6: "mm2/s", 1e-1: "1e-7 mm2/s", 1e-3: "1e-9 mm2/s"}
_LEAST_SPREAD = (
    0.1  # of the window of T2 or high b, between the 5th and the 95th percentile; real series have 0.5 to 0.8
)
_HOT = 1000  # times the top of the window; beyond it a cubic B-spline spreads a voxel over the volume. Real series have 2 to 5
_SAMPLE = 200_000  # voxels, for percentiles
_LEAST_COVER = 0.75  # of the voxels of the grid that the leading series covers


def check_intensities(volume: Volume, sequence: str, path: Path) -> None:
    """Raise DataError unless the intensities are plausible for `sequence`, "t2w", "hbv" or "adc"."""
    if sequence == "adc":
        _check_adc_unit(volume.array, path)
        _check_hot_voxels(np.abs(volume.array), ADC_WINDOW[1], "the top of the window", path)
    else:
        _check_window(volume.array, sequence, path)


def coverage_note(volume: Volume, sequence: str, grid: Grid) -> str | None:
    """A sentence if a series covers less than three quarters of the part of the grid that the leading series covers."""
    steps = [np.linspace(part.start, part.stop - 1, 12) for part in grid.inner]
    points = np.stack([*np.meshgrid(*steps, indexing="ij"), np.ones((12, 12, 12))], -1)
    index = points @ (np.linalg.inv(volume.affine) @ grid.affine).T
    inside = (index[..., :3] >= -0.5) & (index[..., :3] <= np.array(volume.array.shape) - 0.5)
    share = float(inside.all(-1).mean())
    if share >= _LEAST_COVER:
        return None
    return f"{sequence} covers {share:.0%} of the grid, the rest is filled with its minimum"


def _check_adc_unit(array: np.ndarray, path: Path) -> None:
    positive = array[array > 0]
    if positive.size == 0:
        why = f"no voxel of this ADC map is positive (its range is {array.min():g} to {array.max():g})"
        raise DataError(why, path=path, field="voxels", fix="export the ADC map again, in 1e-6 mm2/s")
    median, (low, high) = float(np.median(positive)), ADC_MEDIAN
    if low <= median <= high:
        return
    factor = 10.0 ** round(math.log10(_TYPICAL_ADC / median))
    unit = next((f" (it looks like {unit})" for each, unit in _ADC_UNITS.items() if math.isclose(each, factor)), "")
    why = (
        f"the median of the positive voxels of this ADC map is {median:.3g}, but {low:g} to {high:g} is expected{unit}"
    )
    raise DataError(why, path=path, field="voxels", fix=f"give ADC in 1e-6 mm2/s: multiply by {factor:g}")


def _check_window(array: np.ndarray, sequence: str, path: Path) -> None:
    low, top = float(array.min()), float(array.max())
    # The background has the lowest value, and padding may have the highest.
    tissue = array[(array > low) & (array < top)]
    tissue = tissue if tissue.size else array[array > low]
    high = float(np.percentile(_sample(array[array > low]), PERCENTILES[1]))
    first, last = (float(value) for value in np.percentile(_sample(tissue), [5, 95]))
    _check_hot_voxels(array, high, "the 99.5th percentile", path)
    if last - first >= _LEAST_SPREAD * (high - low):
        return
    value = low if first - low > high - last else top
    why = (
        f"{np.count_nonzero(array == value)} voxels are {value:g}, which leaves the tissue ({first:.4g} to {last:.4g}) "
        f"{(last - first) / (high - low):.1%} of the window of {sequence}"
    )
    raise DataError(why, path=path, field="voxels", fix="replace this padding value by 0, or export the series again")


def _check_hot_voxels(array: np.ndarray, high: float, what: str, path: Path) -> None:
    hot = array > _HOT * max(high, 1e-30)
    if hot.any():
        why = f"{np.count_nonzero(hot)} voxels are up to {array.max():.3g}, more than {_HOT} times {what} ({high:.4g})"
        raise DataError(why, path=path, field="voxels", fix="replace these voxels by plausible values, or export again")


def _sample(values: np.ndarray) -> np.ndarray:
    return values[:: max(1, values.size // _SAMPLE)]
