"""The conditioning inputs of the volumes of a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ccella_fast.config import Config
from ccella_fast.errors import ConfigError
from ccella_fast.models import Conditioning, DiffusionModel
from ccella_fast.sampling.request import CLASSES, Request, parse_integers
from ccella_fast.sampling.text_features import PromptFeatures
from ccella_fast.variants import CLASS_SCALE, SPACING_SCALE


class PromptRows(NamedTuple):
    """The conditioning inputs of one network call: U distinct prompts for R rows.

    For a batch of B volumes, R is 1 if all prompts are equal and B otherwise. If guidance is used in any step of the run, R is
    2B: one row per volume, then the same rows with the null report. Steps without guidance use the first B rows, or the single
    one.

    Attributes:
        text: (U, L, E), or None for variants without a report.
        spacing: (U, 3) in mm x 100.
        pirads: (U, classes), one-hot x 100, or None.
        override_class: whether `pirads` replaces the class that the variant predicts.
        rows: R indices of distinct prompts.
    """

    text: Tensor | None
    spacing: Tensor
    pirads: Tensor | None
    override_class: bool
    rows: tuple[int, ...]

    @property
    def shape_signature(self) -> tuple:
        """All that must be equal between batches that share a captured step; only the values of the tensors may differ."""
        shapes = tuple(None if tensor is None else tuple(tensor.shape) for tensor in self[:3])
        return shapes, self.override_class, self.rows

    def condition(self, model: DiffusionModel, timesteps: Tensor) -> Conditioning:
        """The conditioning of n x U rows for timesteps (n,), in order of the timesteps."""
        count, prompts = len(timesteps), len(self.spacing)
        return model.condition(
            timesteps.repeat_interleave(prompts),
            spacing=self.spacing.repeat(count, 1),
            text=self.text,
            pirads=None if self.pirads is None else self.pirads.repeat(count, 1),
            override_class=self.override_class,
        )


class Prompts:
    """The seed, spacing, class and report of every volume of a request.

    Raises:
        ConfigError: the numbers of seeds, reports, spacings and classes do not match, or a value is invalid.
    """

    def __init__(self, request: Request, config: Config, reports: PromptFeatures):
        seeds = None if request.seeds is None else parse_integers(request.seeds, "seeds")
        given = [seeds, reports.rows or None, _per_volume(request.spacing), request.pirads, request.class_override]
        lengths = {len(values) for values in given if values is not None and not isinstance(values, str)} - {1}
        if len(lengths) > 1:
            counts = " and ".join(map(str, sorted(lengths)))
            why = f"the numbers of seeds, reports, spacings and classes must be equal or 1, got {counts}"
            raise ConfigError(why, field="seeds", fix="give one of each per volume, or a single one for all volumes")
        count = lengths.pop() if lengths else 1
        if count < 1:
            why = "the number of volumes must be at least 1, got 0"
            raise ConfigError(why, field="seeds", fix="give at least one seed or report")
        self.seeds = list(range(count)) if seeds is None else _broadcast(seeds, count)
        self._rows = _broadcast(reports.rows or [-1], count)
        spacing = config.data.spacing if request.spacing is None else request.spacing
        self._spacings = [_check_spacing(row) for row in _broadcast(_per_volume(spacing) or [spacing], count)]
        self._override = request.class_override is not None
        names = request.class_override if self._override else request.pirads
        self._classes: list[str | None] = _broadcast(
            [names] if names is None or isinstance(names, str) else names, count
        )
        for name in self._classes:
            if name not in (*CLASSES, None):
                fix = "use neg (PI-RADS 1-2) or pos (PI-RADS 3-5)"
                raise ConfigError(f"there is no class '{name}'", field="--pirads", fix=fix)
        self._reports = reports

    def __len__(self) -> int:
        return len(self.seeds)

    def metadata_of(self, k: int) -> tuple[int, str | None, int, dict[str, Any]]:
        """The report's number, the report's identity, the seed, and the spacing and class of volume k."""
        row = self._rows[k]
        given, override = (None, self._classes[k]) if self._override else (self._classes[k], None)
        sample_metadata = {"spacing": list(self._spacings[k]), "class_given": given, "class_override": override}
        identity = self._reports.identities[row] if row >= 0 else None
        return max(row, 0), identity, self.seeds[k], sample_metadata

    def rows(self, volumes: Sequence[int], *, guided: bool, device: torch.device) -> PromptRows:
        """The conditioning inputs of a batch of these volumes; if `guided`, with the null report too."""
        rows: list[tuple] = [(self._rows[k], self._spacings[k], self._classes[k]) for k in volumes]
        if guided:
            rows += [("null", spacing, name) for _, spacing, name in rows]
        elif len(set(rows)) == 1:
            rows = rows[:1]
        distinct = list(dict.fromkeys(rows))
        texts = [self._reports.features_of(row) for row, _, _ in distinct]
        classes = [[float(name == each) for each in CLASSES] for _, _, name in distinct]
        return PromptRows(
            text=torch.cat([text for text in texts if text is not None]).to(device) if self._reports.rows else None,
            spacing=torch.tensor([spacing for _, spacing, _ in distinct], device=device) * SPACING_SCALE,
            pirads=None if self._classes[0] is None else torch.tensor(classes, device=device) * CLASS_SCALE,
            override_class=self._override,
            rows=tuple(distinct.index(row) for row in rows),
        )


def _per_volume(spacing: Any) -> list | None:
    """The rows of a spacing that is given per volume; None for a single spacing."""
    rows = None if spacing is None else np.asarray(spacing, dtype=object)
    return None if rows is None or rows.ndim < 2 else list(spacing)


def _broadcast(values: Sequence, count: int) -> list:
    return list(values) * count if len(values) == 1 else list(values)


def _check_spacing(row: Sequence[float]) -> tuple[float, ...]:
    spacing = tuple(map(float, np.atleast_1d(row)))
    if len(spacing) != 3 or not all(0 < length < 100 for length in spacing):
        why = f"a spacing must be three lengths between 0 and 100 mm, got {list(spacing)}"
        raise ConfigError(why, field="--spacing", fix="give three lengths in mm")
    return spacing
