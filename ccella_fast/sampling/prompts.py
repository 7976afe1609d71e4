"""The conditioning inputs of the volumes of a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ccella_fast.models import Conditioning, DiffusionModel
from ccella_fast.pirads import CLASS_NAMES
from ccella_fast.sampling.output import VolumeMetadata
from ccella_fast.sampling.request import VolumeInputs
from ccella_fast.sampling.text_features import PromptFeatures
from ccella_fast.variants import CLASS_SCALE, SPACING_SCALE


class PromptRows(NamedTuple):
    """The conditioning inputs of one network call: U distinct prompts for R rows.

    For a batch of B volumes, R is 1 if all prompts are equal and B otherwise. If guidance is used in any step of the run, R is
    2B: one row per volume, then the same rows with the null report, and with the null class if the training has dropped
    classes. Steps without guidance use the first B rows, or the single one.

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

    Args:
        volumes: the inputs of the volumes.
        reports: the text features.
        has_null_class: whether the training has dropped classes, so that guidance is against the null class too.
    """

    def __init__(self, volumes: VolumeInputs, reports: PromptFeatures, *, has_null_class: bool = False):
        self.seeds, self._has_null_class = volumes.seeds, has_null_class
        self._volumes, self._reports = volumes, reports
        numbers = volumes.reports
        self._rows = [-1] * len(self.seeds) if numbers is None else [reports.rows[number] for number in numbers]
        self._spacings, self._classes = volumes.spacings, volumes.classes

    def __len__(self) -> int:
        return len(self.seeds)

    def metadata_of(self, k: int) -> VolumeMetadata:
        """What the sidecar of volume k says about its inputs."""
        row = self._rows[k]
        identity = self._reports.identities[row] if row >= 0 else None
        return VolumeMetadata(
            max(row, 0), self._volumes.report_ids[k], identity, self.seeds[k], self._volumes.metadata(k)
        )

    def rows(self, volumes: Sequence[int], *, guided: bool, device: torch.device) -> PromptRows:
        """The conditioning inputs of a batch of these volumes; if `guided`, with the null report too."""
        rows: list[tuple] = [(self._rows[k], self._spacings[k], self._classes[k]) for k in volumes]
        if guided:
            rows += [("null", spacing, None if self._has_null_class else name) for _, spacing, name in rows]
        elif len(set(rows)) == 1:
            rows = rows[:1]
        distinct = list(dict.fromkeys(rows))
        texts = [self._reports.features_of(row) for row, _, _ in distinct]
        classes = [[float(name == each) for each in CLASS_NAMES] for _, _, name in distinct]
        return PromptRows(
            text=torch.cat([text.to(device) for text in texts if text is not None]) if self._reports.rows else None,
            spacing=torch.tensor([spacing for _, spacing, _ in distinct], device=device) * SPACING_SCALE,
            pirads=None if self._classes[0] is None else torch.tensor(classes, device=device) * CLASS_SCALE,
            override_class=self._volumes.override_class,
            rows=tuple(distinct.index(row) for row in rows),
        )
