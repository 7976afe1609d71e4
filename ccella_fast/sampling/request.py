"""The arguments of a sampling call, checked before any work."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ccella_fast.config import Config
from ccella_fast.deprecation import DeprecatedAttribute, deprecated_arguments
from ccella_fast.errors import ConfigError
from ccella_fast.pirads import CLASS_NAMES, CLASSES
from ccella_fast.sampling.guidance import Guidance, Reuse
from ccella_fast.variants import Variant

PiRads = int | str  # a score from 1 to 5, or the name of a class


class VolumeInputs(NamedTuple):
    """The inputs of the volumes of a request, one entry per volume.

    Attributes:
        seeds: of the noise.
        reports: the position of the report in the request; None without reports.
        report_ids: the name of the report; None if it has none.
        spacings: in mm.
        classes: "neg", "pos", or None if none is given.
        override_class: whether the classes replace those that the variant predicts.
    """

    seeds: list[int]
    reports: list[int] | None
    report_ids: list[str | None]
    spacings: list[tuple[float, ...]]
    classes: list[str | None]
    override_class: bool

    def metadata(self, k: int) -> dict[str, Any]:
        """The sidecar entries about the spacing and the class of volume k."""
        return {
            "spacing": list(self.spacings[k]),
            "class_given": None if self.override_class else self.classes[k],
            "class_override": self.classes[k] if self.override_class else None,
        }


@deprecated_arguments(num_steps="num_inference_steps")
@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of a call of the sampler. None means the value of the sampler's configuration, unless stated otherwise.

    One volume is generated per seed. A single report, text, spacing or class is used for all seeds, a single seed for all
    reports.

    Attributes:
        reports: texts, encoded by the configured encoder.
        report_ids: a name of each report, written to the sidecars of its volumes; default: none.
        text: text features (n, L, E) of the configured encoder, in place of `reports`.
        seeds: integers; default 0, 1, ..., one per report. The noise of a volume depends on its seed alone.
        spacing: voxel size in mm, (3,) or (n, 3).
        pirads: a PI-RADS score from 1 to 5, or "neg" (1 and 2) or "pos" (3 to 5), or one per volume, for variants whose class
            is an input.
        class_override: the same, in place of the class that a variant predicts from the report.
        latent_shape: (C, X, Y, Z); default: that of the training grid.
        num_inference_steps: denoising steps.
        solver: as for `ccella_fast.sample`.
        prediction: what the network predicts; only to check that it is what the checkpoint says.
        timestep_spacing: the timesteps that a run with fewer steps visits.
        guidance_scale: scale of classifier-free guidance; 1 disables it, at no cost.
        guidance_interval: fractions of the schedule between which guidance is applied.
        null_text: features of the null report (1, L, E); default: the encoded empty report.
        reuse: feature reuse between steps, an approximation; default: off.
        batch_size: volumes denoised at a time.
        batch_invariant: process each volume alone, in calls of fixed shape, so that on a CPU its bits do not depend on the
            other volumes of the request.
        decode: False for latents only.
        progress: show a progress bar on stderr.
    """

    reports: Sequence[str] | None = field(default=None, repr=False)  # a report is confidential
    report_ids: Sequence[str] | None = None
    text: Tensor | np.ndarray | None = field(default=None, repr=False)
    seeds: Sequence[int] | None = None
    spacing: Sequence[float] | Sequence[Sequence[float]] | None = None
    pirads: PiRads | Sequence[PiRads] | None = None
    class_override: PiRads | Sequence[PiRads] | None = None
    latent_shape: Sequence[int] | None = None
    num_inference_steps: int | None = None
    solver: Any = None
    prediction: str | None = None
    timestep_spacing: str | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    null_text: Tensor | np.ndarray | None = field(default=None, repr=False)
    reuse: Reuse | None = None
    batch_size: int | None = None
    batch_invariant: bool = False
    decode: bool = True
    progress: bool = True

    num_steps = DeprecatedAttribute("num_inference_steps")
    guidance = DeprecatedAttribute("resolve_guidance")
    shape = DeprecatedAttribute("resolve_latent_shape")
    batch = DeprecatedAttribute("resolve_batch_size")

    def resolve_guidance(self, config: Config) -> Guidance:
        """The guidance settings, with the defaults of `config`."""
        settings = config.sampling
        scale = settings.guidance_scale if self.guidance_scale is None else self.guidance_scale
        interval = settings.guidance_interval if self.guidance_interval is None else self.guidance_interval
        low, high = _parse_numbers(interval, 2, "guidance_interval", "two fractions of the schedule, such as 0.1 0.7")
        (scale,) = _parse_numbers([scale], 1, "guidance_scale", "a number, such as 2")
        return Guidance(scale, (low, high))

    def resolve_latent_shape(self, config: Config) -> list[int]:
        """The latent shape [C, X, Y, Z], with the default of `config`.

        Raises:
            ConfigError: the model does not support this shape.
        """
        channels, divisor = sum(config.model.latent_channels), config.model.divisor
        if self.latent_shape is None:
            return [channels, *config.check_grid()]
        shape = parse_integers(self.latent_shape, "latent_shape")
        if len(shape) != 4 or shape[0] != channels or min(shape) < 1:
            why = f"a latent shape must be ({channels}, X, Y, Z) with sizes of at least 1, got {shape}"
            fix = f"give ({channels}, X, Y, Z): the latents of this model have {channels} channels"
            raise ConfigError(why, field="latent_shape", fix=fix)
        if any(size % divisor for size in shape[1:]):
            near = [max(1, round(size / divisor)) * divisor for size in shape[1:]]
            why = f"the sizes of the latent grid must be divisible by {divisor}, got {shape[1:]}"
            fix = f"use {near}: the U-Net halves the grid {divisor.bit_length() - 1} times"
            raise ConfigError(why, field="latent_shape", fix=fix)
        return shape

    def resolve_batch_size(self, config: Config) -> int:
        """The number of volumes denoised at a time, with the default of `config`; 1 if `batch_invariant`."""
        size = config.sampling.batch_size if self.batch_size is None else self.batch_size
        if not isinstance(size, Integral) or size < 1:
            raise ConfigError(
                f"batch_size must be at least 1, got {size!r:.40}", field="batch_size", fix="use 1 or more"
            )
        return 1 if self.batch_invariant else int(size)

    def resolve_volumes(self, config: Config) -> VolumeInputs:
        """Seed, report, spacing and class of every volume, with the defaults of `config`.

        Raises:
            ConfigError: the numbers of seeds, reports, spacings and classes do not match, or a value is invalid.
        """
        seeds = None if self.seeds is None else parse_integers(self.seeds, "seeds")
        reports = self._number_reports()
        spacing = config.data.spacing if self.spacing is None else self.spacing
        rows = list(spacing) if np.asarray(spacing, dtype=object).ndim > 1 else [spacing]
        spacings = [_parse_spacing(row) for row in rows]
        override = self.class_override is not None
        names = self.class_override if override else self.pirads
        given: Any = [names] if names is None or isinstance(names, (str, int)) else names
        classes = [_parse_class(name, "class_override" if override else "pirads") for name in given]
        lengths = {len(values) for values in (seeds, reports, spacings, classes) if values is not None} - {1}
        if len(lengths) > 1:
            counts = " and ".join(map(str, sorted(lengths)))
            why = f"the numbers of seeds, reports, spacings and classes must be equal or 1, got {counts}"
            raise ConfigError(why, field="seeds", fix="give one of each per volume, or a single one for all volumes")
        count = lengths.pop() if lengths else 1
        if count < 1:
            why = "the number of volumes must be at least 1, got 0"
            raise ConfigError(why, field="seeds", fix="give at least one seed or report")
        numbers = None if reports is None else _broadcast(reports, count)
        ids: list[str | None] = [None] * count
        if self.report_ids is not None and numbers is not None:
            ids = [self.report_ids[number] for number in numbers]
        return VolumeInputs(
            list(range(count)) if seeds is None else _broadcast(seeds, count),
            numbers,
            ids,
            _broadcast(spacings, count),
            _broadcast(classes, count),
            override,
        )

    def _number_reports(self) -> list[int] | None:
        """The positions of the reports, given as texts or features; None without reports."""
        if self.text is not None:
            if self.reports is not None:
                raise ConfigError("both reports and text are given", field="text", fix="give one of them")
            try:
                several = np.ndim(self.text) > 2
            except (TypeError, ValueError, RuntimeError):  # a list that is not an array; `TextFeatureCache` reports it
                several = True
            return list(range(len(self.text) if several else 1))
        reports = self.reports
        if reports is None:
            return None
        if isinstance(reports, str) or len(reports) == 0 or not all(isinstance(report, str) for report in reports):
            raise ConfigError("reports must be a non-empty list of texts", field="reports", fix='write reports=["..."]')
        if self.report_ids is not None and len(self.report_ids) != len(reports):
            why = f"the numbers of reports and report_ids must be equal, got {len(reports)} and {len(self.report_ids)}"
            raise ConfigError(why, field="report_ids", fix="give one id per report")
        return list(range(len(reports)))


def _broadcast(values: Sequence, count: int) -> list:
    return list(values) * count if len(values) == 1 else list(values)


def _parse_class(value: object, field: str) -> str | None:
    """The class of a PI-RADS score or of the name of a class; None stays None."""
    if value is None:
        return None
    one_hot = CLASSES.get(str(value))
    if one_hot is None:
        why = f"a class must be a PI-RADS score from 1 to 5, neg or pos, got '{value!s:.20}'"
        raise ConfigError(why, field=f"--{field}", fix="use 1 to 5, neg (PI-RADS 1-2) or pos (PI-RADS 3-5)")
    return CLASS_NAMES[one_hot.index(1)]


def _parse_numbers(values: Any, count: int, field: str, fix: str) -> list[float]:
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        numbers = []
    if len(numbers) != count:
        got = values[0] if count == 1 else values
        raise ConfigError(f"{field} must be {fix}, got {got!r:.60}", field=field, fix=f"give {fix}")
    return numbers


def _parse_spacing(row: Any) -> tuple[float, ...]:
    try:
        spacing = tuple(map(float, np.atleast_1d(row)))
    except (TypeError, ValueError):
        spacing = ()
    if len(spacing) != 3 or not all(0 < length < 100 for length in spacing):
        got = list(spacing) if spacing else f"{row!r:.60}"
        why = f"a spacing must be three lengths between 0 and 100 mm, got {got}"
        raise ConfigError(why, field="--spacing", fix="give three lengths in mm")
    return spacing


def check_inputs(row: Variant, *, has_text: bool, pirads: object = None, class_override: object = None) -> None:
    """Check that the inputs are those of the variant.

    Raises:
        ConfigError: a report or a class is missing, or the variant does not use it.
    """
    variant = row.name
    if has_text and not row.text:
        raise ConfigError(f"{variant} does not take a report", field="--report", fix="omit the report")
    if row.text and not has_text:
        raise ConfigError(f"{variant} needs a report", field="reports", fix="give reports=[...], or text features")
    if row.class_input == "given" and pirads is None:
        raise ConfigError(
            f"{variant} needs a class", field="--pirads", fix="add --pirads with a score from 1 to 5, neg or pos"
        )
    if row.class_input != "given" and pirads is not None:
        predicted = row.class_input == "predicted"
        why = "predicts the class from the report" if predicted else "does not take a class"
        fix = "omit --pirads" + (", or replace the predicted class with --class_override" if predicted else "")
        raise ConfigError(f"{variant} {why}", field="--pirads", fix=fix)
    if row.class_input != "predicted" and class_override is not None:
        fix = "use --pirads" if row.class_input == "given" else "omit --class_override"
        raise ConfigError(f"{variant} does not predict a class", field="--class_override", fix=fix)


def parse_integers(values: Any, field: str) -> list[int]:
    """The values as Python integers; a ConfigError that names `field` if they are not integers."""
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        why = f"{field} must be a list of integers, got {values!r:.60}"
        raise ConfigError(why, field=field, fix=f"write {field}=[...]") from None
