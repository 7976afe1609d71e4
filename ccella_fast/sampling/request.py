"""What a caller asks for, and its checks: everything is refused here, before any work."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccella_fast.config import Config
from ccella_fast.errors import ConfigError
from ccella_fast.models.ldm import CLASS_SCALE
from ccella_fast.sampling.conditioning import PromptRows
from ccella_fast.sampling.guidance import Guidance, Reuse
from ccella_fast.sampling.text_features import PromptFeatures
from ccella_fast.variants import Variant

CLASSES = ["neg", "pos"]  # PI-RADS 1-2, 3-5
SPACING_SCALE = 100.0  # the reference feeds spacings times 100


@dataclass(frozen=True, kw_only=True)
class Request:
    """The arguments of a call of the sampler. Where one is None, the sampler's configuration decides.

    One volume is generated per seed. A single report, text, spacing or class serves all seeds, a single seed all reports.

    Attributes:
        reports: texts, encoded by the configuration's encoder.
        text: instead of reports: features (n, L, E), as that encoder makes them.
        seeds: integers; default 0, 1, ..., one per report. They alone decide the noise.
        spacing: voxel size in mm, (3,) or (n, 3).
        pirads: "neg", "pos", or one per volume, for variants whose class is given.
        class_override: the same, in place of the class that a variant predicts from the report.
        latent_shape: (C, X, Y, Z); default: the training grid's.
        num_steps: denoising steps.
        solver: as in `ccella_fast.sample`, as are the next two.
        prediction: what the network predicts.
        timestep_spacing: which timesteps a shorter run visits.
        guidance_scale: strength of classifier-free guidance; 1 is off and costs nothing.
        guidance_interval: fractions of the schedule between which guidance acts.
        null_text: features of the null report (1, L, E); default: the empty report through the encoder.
        reuse: feature reuse between steps, an approximation; default off.
        batch_size: volumes denoised at a time.
        batch_invariant: process each volume alone, in calls of fixed shape: on a CPU its bits then do not depend on the other
            volumes of the request.
        decode: False gives latents only.
        progress: show a bar on stderr.
    """

    reports: Sequence[str] | None = None
    text: Tensor | np.ndarray | None = None
    seeds: Sequence[int] | None = None
    spacing: Sequence[float] | Sequence[Sequence[float]] | None = None
    pirads: str | Sequence[str] | None = None
    class_override: str | Sequence[str] | None = None
    latent_shape: Sequence[int] | None = None
    num_steps: int | None = None
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

    def guidance(self, config: Config) -> Guidance:
        settings = config.sampling
        scale = settings.guidance_scale if self.guidance_scale is None else self.guidance_scale
        interval = self.guidance_interval or settings.guidance_interval
        return Guidance(float(scale), (float(interval[0]), float(interval[1])))

    def shape(self, config: Config) -> list[int]:
        """[C, X, Y, Z] of a latent. ConfigError unless the model can take it."""
        channels, divisor = sum(config.model.latent_channels), config.model.divisor
        if self.latent_shape is None:
            return [channels, *config.check_grid()]
        shape = _integers(self.latent_shape, "latent_shape")
        if len(shape) != 4 or shape[0] != channels or min(shape) < 1:
            fix = f"give ({channels}, X, Y, Z): this model's latents have {channels} channels"
            raise ConfigError(f"{shape} is not the shape of a latent", field="latent_shape", fix=fix)
        if any(size % divisor for size in shape[1:]):
            near = [max(1, round(size / divisor)) * divisor for size in shape[1:]]
            why = f"the latent grid {shape[1:]} is not divisible by {divisor}"
            raise ConfigError(
                why, field="latent_shape", fix=f"use {near}: the U-Net halves it {divisor.bit_length() - 1} times"
            )
        return shape

    def batch(self, config: Config) -> int:
        size = config.sampling.batch_size if self.batch_size is None else operator.index(self.batch_size)
        if size < 1:
            raise ConfigError(f"a batch of {size}", field="batch_size", fix="use 1 or more")
        return 1 if self.batch_invariant else size


class Prompts:
    """The conditioning of every volume of a request."""

    def __init__(self, request: Request, config: Config, reports: PromptFeatures):
        given_seeds = None if request.seeds is None else _integers(request.seeds, "seeds")
        given = [given_seeds, reports.rows or None, _several(request.spacing), request.pirads, request.class_override]
        lengths = {len(values) for values in given if values is not None and not isinstance(values, str)} - {1}
        if len(lengths) > 1:
            why = f"{' and '.join(map(str, sorted(lengths)))} seeds, reports, spacings or classes do not go together"
            raise ConfigError(why, field="seeds", fix="give one of each a volume, or a single one for all")
        count = lengths.pop() if lengths else 1
        if count < 1:
            raise ConfigError("no volume is asked for", field="seeds", fix="give at least one seed or report")
        self.seeds = list(range(count)) if given_seeds is None else _spread(given_seeds, count)
        self._rows = _spread(reports.rows or [-1], count)
        spacing = config.data.spacing if request.spacing is None else request.spacing
        self._spacings = [_spacing(row) for row in _spread(_several(spacing) or [spacing], count)]
        self._override = request.class_override is not None
        named = request.class_override if self._override else request.pirads
        self._classes: list[str | None] = _spread([named] if named is None or isinstance(named, str) else named, count)
        for name in self._classes:
            if name not in (*CLASSES, None):
                fix = "give neg (PI-RADS 1-2) or pos (3-5)"
                raise ConfigError(f"there is no class '{name}'", field="--pirads", fix=fix)
        self._reports = reports

    def __len__(self) -> int:
        return len(self.seeds)

    def described(self, k: int) -> tuple[int, str | None, int, dict[str, Any]]:
        """Of volume k: the number of its report, its report's identity, its seed, and what else is its own."""
        row = self._rows[k]
        given, override = (None, self._classes[k]) if self._override else (self._classes[k], None)
        own = {"spacing": list(self._spacings[k]), "class_given": given, "class_override": override}
        return max(row, 0), self._reports.identities[row] if row >= 0 else None, self.seeds[k], own

    def rows(self, volumes: Sequence[int], *, guided: bool, device: torch.device) -> PromptRows:
        """The conditioning of these volumes."""
        wanted: list[tuple] = [(self._rows[k], self._spacings[k], self._classes[k]) for k in volumes]
        if guided:
            wanted += [("null", spacing, given) for _, spacing, given in wanted]
        elif len(set(wanted)) == 1:
            wanted = wanted[:1]
        different = list(dict.fromkeys(wanted))
        texts = [self._reports.features_of(row) for row, _, _ in different]
        classes = [[float(name == each) for each in CLASSES] for _, _, name in different]
        return PromptRows(
            text=torch.cat([text for text in texts if text is not None]).to(device) if self._reports.rows else None,
            spacing=torch.tensor([spacing for _, spacing, _ in different], device=device) * SPACING_SCALE,
            pirads=None if self._classes[0] is None else torch.tensor(classes, device=device) * CLASS_SCALE,
            override_class=self._override,
            rows=tuple(different.index(row) for row in wanted),
        )


def check_inputs(row: Variant, *, has_text: bool, pirads: object = None, class_override: object = None) -> None:
    """ConfigError when a report or a class is missing or not wanted."""
    variant = row.name
    if has_text and not row.text:
        raise ConfigError(f"{variant} takes no report", field="--report", fix="leave the report out")
    if row.text and not has_text:
        raise ConfigError(f"{variant} needs a report", field="reports", fix="give reports=[...], or text features")
    if row.class_input == "given" and pirads is None:
        raise ConfigError(f"{variant} needs the class", field="--pirads", fix="add --pirads neg or --pirads pos")
    if row.class_input != "given" and pirads is not None:
        predicted = row.class_input == "predicted"
        why = "predicts the class from the report" if predicted else "knows no class"
        fix = "leave --pirads out" + (", or insist with --class_override" if predicted else "")
        raise ConfigError(f"{variant} {why}", field="--pirads", fix=fix)
    if row.class_input != "predicted" and class_override is not None:
        fix = "use --pirads" if row.class_input == "given" else "leave it out"
        raise ConfigError(f"{variant} predicts no class", field="--class_override", fix=fix)


def _integers(values: Any, field: str) -> list[int]:
    try:
        return [operator.index(value) for value in values]
    except TypeError:
        why = f"{values!r:.60} is not a list of integers"
        raise ConfigError(why, field=field, fix=f"write {field}=[...]") from None


def _several(spacing: Any) -> list | None:
    """The rows of a spacing that is given for each volume; None for a single one."""
    rows = None if spacing is None else np.asarray(spacing, dtype=object)
    return None if rows is None or rows.ndim < 2 else list(spacing)


def _spread(values: Sequence, count: int) -> list:
    return list(values) * count if len(values) == 1 else list(values)


def _spacing(row: Sequence[float]) -> tuple[float, ...]:
    steps = tuple(map(float, np.atleast_1d(row)))
    if len(steps) != 3 or not all(0 < step < 100 for step in steps):
        raise ConfigError(f"a spacing of {list(steps)} mm", field="--spacing", fix="give three lengths in mm")
    return steps
