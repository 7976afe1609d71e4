"""Voxel sizes, fields of view and intensities that differ from the configured grid or from the other studies."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ccella_fast.config import Config
from ccella_fast.data.checking.findings import Finding
from ccella_fast.data.checking.study_facts import SeriesFacts, StudyFacts
from ccella_fast.data.preparation.images import leading_sequence

_OTHER_SPACING = 1.6  # ratio to the median of the studies
_FILLED, _COVERED = 0.6, 0.4  # shares of an axis: of the grid by the image, of the image by the grid
_THICK = 5.0  # mm; PI-RADS asks for 3 mm
_OTHER_INTENSITY = 20.0  # ratio to the median of the studies
_ENOUGH = 5  # studies for a median
_AXES = ("R", "A", "S")


def check_geometry(facts: Sequence[StudyFacts], config: Config) -> list[Finding]:
    """Findings about the series as they were measured; none for a prepared folder, whose images are on one grid."""
    found = []
    for sequence in config.data.sequences:
        series = [(study.id, study.series[sequence]) for study in facts if sequence in study.series]
        if series:
            found += _spacing(series, sequence) + _intensities(series, sequence)
    leading = leading_sequence(config.data)
    return found + _field([(study.id, study.series[leading]) for study in facts if leading in study.series], config)


def _spacing(series: list[tuple[str, SeriesFacts]], sequence: str) -> list[Finding]:
    found = []
    median = [statistics.median(each.spacing[axis] for _, each in series) for axis in range(3)]
    size = " x ".join(f"{value:.3g}" for value in median)
    if len(series) >= _ENOUGH:
        other = tuple(
            study
            for study, each in series
            if any(max(a / b, b / a) > _OTHER_SPACING for a, b in zip(each.spacing, median, strict=True))
        )
        if other:
            why = f"{sequence} series with a voxel size far from the median, {size} mm: {len(other)} of {len(series)}"
            found.append(
                Finding("other_spacing", "warning", why, "check that these are the same kind of series", other)
            )
    thick = tuple(study for study, each in series if each.spacing[2] > _THICK)
    if thick:
        why = f"{sequence} series with slices of more than {_THICK:g} mm: {len(thick)} of {len(series)}"
        found.append(Finding("thick_slices", "warning", why, "give the series with thinner slices", thick))
    return found


def _field(series: list[tuple[str, SeriesFacts]], config: Config) -> list[Finding]:
    """The images against the configured grid."""
    if not series:
        return []
    found = []
    grid = [size * step for size, step in zip(config.data.dim, config.data.spacing, strict=True)]
    for axis, name in enumerate(_AXES):
        shares = [(study, each.shape[axis] * each.spacing[axis] / grid[axis]) for study, each in series]
        padded = tuple(study for study, share in shares if share < _FILLED)
        cropped = tuple(study for study, share in shares if share > 1 / _COVERED)
        if padded:
            why = f"images that fill less than {_FILLED:.0%} of the grid of {grid[axis]:.0f} mm along {name}: {len(padded)}"
            found.append(Finding("small_field", "warning", why, "choose a smaller data.dim or data.spacing", padded))
        if cropped:
            size = f"{grid[axis]:.0f} mm"
            why = f"images of which the grid of {size} covers less than {_COVERED:.0%} along {name}: {len(cropped)}"
            found.append(Finding("large_field", "warning", why, "choose a larger data.dim or data.spacing", cropped))
    target = config.data.spacing[2]
    thicker = sum(each.spacing[2] > 1.5 * target for _, each in series)
    if thicker:
        typical = statistics.median(each.spacing[2] for _, each in series)
        why = f"images with slices (median {typical:.3g} mm) thicker than the grid's {target:g} mm: {thicker}"
        found.append(Finding("interpolated_slices", "info", f"{why}; slices in between are interpolated"))
    return found


def _intensities(series: list[tuple[str, SeriesFacts]], sequence: str) -> list[Finding]:
    found = []
    known = [(study, each.low, each.high) for study, each in series if each.low is not None and each.high is not None]
    if sequence != "adc":  # magnitudes; a calculated ADC may be slightly negative
        negative = tuple(study for study, low, high in known if low < -0.1 * abs(high))
        if negative:
            why = f"{sequence} series with negative intensities, which a magnitude image does not have: {len(negative)}"
            fix = "check the number type (16-bit values that wrapped?) and the rescale slope"
            found.append(Finding("negative_intensities", "warning", why, fix, negative))
    positive = [high for _, _, high in known if high > 0]
    if len(positive) >= _ENOUGH:
        median = statistics.median(positive)
        other = tuple(
            study for study, _, high in known if high <= 0 or max(high / median, median / high) > _OTHER_INTENSITY
        )
        if other:
            why = (
                f"{sequence} series with intensities far from the median of {median:.3g}: {len(other)} of {len(known)}"
            )
            found.append(Finding("other_intensities", "warning", why, "check their units and rescale slopes", other))
    return found
