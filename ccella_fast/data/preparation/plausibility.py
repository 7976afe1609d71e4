"""Checks that the intensities of a series are what its sequence should have, and how much of the grid it covers.

They find what no header states: an ADC map in other units, a padding value or a hot voxel that would take all contrast.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from ccella_fast.data.preparation.resampling import ADC_WINDOW, PERCENTILES, Grid, normalize, resample
from ccella_fast.data.readers.volume import StoredVolume
from ccella_fast.errors import DataError
from ccella_fast.quantities import counted

#: Of the median of the positive voxels in the middle of an ADC map, in 1e-6 mm2/s. Muscle and normal prostate, most of what is
#: there, have 1000 to 1800; free water at body temperature (bladder, cysts) has 3000, cancer 500 to 900, marrow and fat a few
#: hundred; real maps and parts of them have a median of 1020 to 2890. A tenth of any map, even of water, is below the bounds,
#: and ten times a map with a median of at least 400 is above them.
ADC_MEDIAN = (300.0, 4000.0)
_TYPICAL_ADC = 1200.0
_LEAST_POSITIVE = 0.001  # of the voxels in the middle; the gland alone takes more
_ADC_UNITS = {
    6: "mm2/s",
    8: "cm2/s",
    12: "m2/s",
}  # by the power of 10 that converts them; others are powers of 10 of mm2/s
#: Largest magnitude of an ADC value, ten times free water. Noise reaches log(4095) / 300 s/mm2 = 28,000, with signals of 12
#: bits and b-values 300 apart. Few voxels may be beyond it; a padding value is in many, and a cubic B-spline spreads it.
ADC_LIMIT = 30_000.0
_MOST_NOISE = 0.001  # of the voxels of an ADC map
#: Of the window of T2 or high b, between the 5th and the 95th percentile; real series have 0.5 to 0.8.
_LEAST_SPREAD = 0.1
_GAP = 0.3  # of the window, without any voxel: beyond it are other things than tissue; real series have less than 0.05
_HOT = 1000  # times the top of the window; beyond it a cubic B-spline spreads a voxel over the volume. Real series have 2 to 5
_SAMPLE = 200_000  # voxels, for percentiles
_LEAST_COVER = 0.75  # of the voxels of the grid that the leading series covers


def check_intensities(volume: StoredVolume, sequence: str, path: Path) -> None:
    """Raise DataError unless the intensities are plausible for `sequence`, "t2w", "hbv" or "adc"."""
    if sequence == "adc":
        _check_adc(volume.array, path)
    else:
        _check_window(volume.array, sequence, path)


def check_contrast(volume: StoredVolume, sequence: str, grid: Grid, path: Path) -> None:
    """Raise DataError if `normalize` would, for a series of which the part inside the grid has no contrast."""
    if sequence == "adc":  # its window is fixed
        return
    index, inside = _nearest_voxels(volume, grid, 48)
    values = volume.array[tuple(index[inside].T)]
    is_certain = inside.mean() >= _LEAST_COVER and np.percentile(values, PERCENTILES[1]) > max(values.min(), 0)
    if not is_certain:
        normalize(resample(volume, grid), sequence, grid, path=path)


def coverage_note(volume: StoredVolume, sequence: str, grid: Grid) -> str | None:
    """A sentence if a series covers less than three quarters of the part of the grid that the leading series covers."""
    _, inside = _nearest_voxels(volume, grid, 12)
    share = float(inside.mean())
    if share >= _LEAST_COVER:
        return None
    return f"{sequence} covers {share:.0%} of the grid, the rest is filled with its minimum"


def _nearest_voxels(volume: StoredVolume, grid: Grid, count: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3) index of the voxels nearest to count**3 points of the inner part of the grid, and which of them exist."""
    steps = [np.linspace(part.start, part.stop - 1, count) for part in grid.inner]
    points = np.stack([*np.meshgrid(*steps, indexing="ij"), np.ones([count] * 3)], -1).reshape(-1, 4)
    index = np.rint(points @ (np.linalg.inv(volume.affine) @ grid.affine)[:3].T).astype(int)
    return index, ((index >= 0) & (index < np.array(volume.array.shape))).all(-1)


def _check_adc(array: np.ndarray, path: Path) -> None:
    x, y = (slice(size // 4, -(size // 4) or None) for size in array.shape[:2])
    middle = array[x, y]  # around it is noise or fat, whose share depends on the field of view
    positive = middle[middle > 0]
    if positive.size <= _LEAST_POSITIVE * middle.size:
        count = f"{positive.size} of {middle.size}" if positive.size else "none"
        extent = f"its range is {array.min():g} to {array.max():g}"
        why = f"positive voxels in the middle of this ADC map: {count} ({extent})"
        raise DataError(why, path=path, field="voxels", fix="export the ADC map again, in 1e-6 mm2/s")
    median, (low, high) = float(np.median(positive)), ADC_MEDIAN
    if not low <= median <= high:
        power = round(math.log10(_TYPICAL_ADC / median))
        unit = _ADC_UNITS.get(power, f"1e{power - 6} mm2/s")
        why = (
            f"the median of the positive voxels in the middle of this ADC map is {median:.3g}, "
            f"but {low:g} to {high:g} is expected (it looks like {unit})"
        )
        fix = f"give ADC in 1e-6 mm2/s: multiply by {10.0**power:g}"
        raise DataError(why, path=path, field="voxels", fix=fix)
    _check_hot_voxels(array, ADC_WINDOW[1], "the top of the window", path)
    outside = array[np.abs(array) > ADC_LIMIT]
    if outside.size > _MOST_NOISE * array.size:
        why = f"{_voxels_between(outside)}, but an ADC map has values between {-ADC_LIMIT:g} and {ADC_LIMIT:g}"
        raise DataError(why, path=path, field="voxels", fix="replace this padding value by 0, or export the map again")


def _check_window(array: np.ndarray, sequence: str, path: Path) -> None:
    low = float(array.min())
    rest = array[array > low]  # without the background, if it has one value
    sample = rest[:: max(1, rest.size // _SAMPLE)]
    high = float(np.percentile(sample, PERCENTILES[1]))
    _check_hot_voxels(array[array > 0], high, "the 99.5th percentile", path)
    values = np.unique(np.append(sample[sample <= high], np.float32(low)))
    start, stop = _largest_cluster(values, _GAP * (high - low))
    if start == stop:  # no gap is smaller, so there are at most four
        shown = ", ".join(f"{value:.4g}" for value in values)
        why = f"nearly all voxels of this {sequence} series have one of {len(values)} values ({shown}), as those of a mask have"
        raise DataError(why, path=path, field="voxels", fix="give the image, exported with all its values")
    first, last = (float(each) for each in np.percentile(sample[(sample >= start) & (sample <= stop)], [5, 95]))
    if last - first < _LEAST_SPREAD * (high - low):
        start, stop = start if start > low else first, stop if stop < high else last
        other = array[array < start] if start - low > high - stop else array[array > stop]
        why = (
            f"{_voxels_between(other)}, which leaves the tissue ({first:.4g} to {last:.4g}) "
            f"{(last - first) / (high - low):.1%} of the window of {sequence}"
        )
        raise DataError(
            why, path=path, field="voxels", fix="replace this padding value by 0, or export the series again"
        )


def _check_hot_voxels(array: np.ndarray, high: float, what: str, path: Path) -> None:
    hot = array[np.abs(array) > _HOT * max(high, 1e-30)]
    if hot.size:
        why = f"{_voxels_between(hot)}, more than {_HOT} times {what} ({high:.4g})"
        raise DataError(why, path=path, field="voxels", fix="replace these voxels by plausible values, or export again")


def _largest_cluster(values: np.ndarray, gap: float) -> tuple[float, float]:
    """The ends of the part of `values`, which are sorted and different, with the most values and without a gap."""
    clusters = np.split(values, np.flatnonzero(np.diff(values) > gap) + 1)
    largest = max(reversed(clusters), key=len)
    return float(largest[0]), float(largest[-1])


def _voxels_between(outside: np.ndarray) -> str:
    """How many voxels there are in `outside`, and their values."""
    low, high = outside.min(), outside.max()
    values = f"{low:.6g}" if low == high else f"{low:.6g} to {high:.6g}"
    return f"{counted(outside.size, 'voxel is', 'voxels are')} {values}"
