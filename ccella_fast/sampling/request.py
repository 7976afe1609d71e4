"""The arguments of a sampling call, checked before any work."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ccella_fast.config import Config
from ccella_fast.deprecation import DeprecatedAttribute, deprecated_arguments
from ccella_fast.errors import ConfigError
from ccella_fast.sampling.guidance import Guidance, Reuse
from ccella_fast.variants import Variant

CLASSES = ["neg", "pos"]  # PI-RADS 1-2, 3-5


@deprecated_arguments(num_steps="num_inference_steps")
@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of a call of the sampler. None means the value of the sampler's configuration, unless stated otherwise.

    One volume is generated per seed. A single report, text, spacing or class is used for all seeds, a single seed for all
    reports.

    Attributes:
        reports: texts, encoded by the configured encoder.
        text: text features (n, L, E) of the configured encoder, in place of `reports`.
        seeds: integers; default 0, 1, ..., one per report. The noise of a volume depends on its seed alone.
        spacing: voxel size in mm, (3,) or (n, 3).
        pirads: "neg" or "pos", or one per volume, for variants whose class is an input.
        class_override: the same, in place of the class that a variant predicts from the report.
        latent_shape: (C, X, Y, Z); default: that of the training grid.
        num_inference_steps: denoising steps.
        solver: as for `ccella_fast.sample`, like the next two.
        prediction: what the network predicts.
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

    reports: Sequence[str] | None = None
    text: Tensor | np.ndarray | None = None
    seeds: Sequence[int] | None = None
    spacing: Sequence[float] | Sequence[Sequence[float]] | None = None
    pirads: str | Sequence[str] | None = None
    class_override: str | Sequence[str] | None = None
    latent_shape: Sequence[int] | None = None
    num_inference_steps: int | None = None
    solver: Any = None
    prediction: str | None = None
    timestep_spacing: str | None = None
    guidance_scale: float | None = None
    guidance_interval: tuple[float, float] | None = None
    null_text: Tensor | np.ndarray | None = None
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
        interval = self.guidance_interval or settings.guidance_interval
        return Guidance(float(scale), (float(interval[0]), float(interval[1])))

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
        size = config.sampling.batch_size if self.batch_size is None else operator.index(self.batch_size)
        if size < 1:
            raise ConfigError(f"batch_size must be at least 1, got {size}", field="batch_size", fix="use 1 or more")
        return 1 if self.batch_invariant else size


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
        raise ConfigError(f"{variant} needs a class", field="--pirads", fix="add --pirads neg or --pirads pos")
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
