"""`prepare --preview`: one picture per study of the images as read, as prepared, and with each augmentation at its strongest.

It is meant for visual inspection before training: the prostate, its orientation and its proportions should be right.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ccella_fast.config import Config
from ccella_fast.data.augmentation.parameters import Augmentation, minimal_config, strongest_augmentations
from ccella_fast.data.augmentation.requests import VolumeRequest
from ccella_fast.data.augmentation.torch_engine import TorchEngine
from ccella_fast.data.manifest import open_array
from ccella_fast.data.preparation.stage_cache import StageCache, file_entry, fingerprint_of
from ccella_fast.data.preparation.stages import RECIPE, ImageStage, Stage
from ccella_fast.data.readers.study import Study
from ccella_fast.data.readers.volume import StoredVolume
from ccella_fast.report.figures import Panel, montage
from ccella_fast.storage import atomic_path

FOLDER = "preview"
_CAPTION = (
    "As read, as prepared, and augmentations at their strongest. R, L: the patient's right and left. Not for diagnosis."
)


class PreviewStage(Stage):
    """Draws `preview/<id>.png`. The picture itself does not contain the study's id."""

    name = "preview"

    def __init__(self, records: StageCache, studies: list[Study], config: Config, images: ImageStage):
        super().__init__(records, studies, config)
        self.images = images

    def inputs(self, study: Study) -> str:
        """Digest of the prepared images and of the augmentation."""
        images = self.records.get(study.id, "image").get("files", {})
        sha256s = {key: entry["sha256"] for key, entry in sorted(images.items())}
        return fingerprint_of([RECIPE, sha256s, self.config.augmentation.model_dump(exclude={"preset"})])

    def run(self, todo: list[Study]) -> dict[str, float]:
        """Draw the pictures of the studies."""
        for study, series in self.images.read(todo, "previews"):
            path = self.records.out / FOLDER / f"{study.id}.png"
            with atomic_path(path) as temporary:
                temporary.write_bytes(montage(list(self._panels(study, series)), window=(0, 1), caption=_CAPTION))
            entry = file_entry(self.records.out, f"{FOLDER}/{study.id}.png")
            self.records.put(study.id, self.name, self.inputs(study), {"preview": entry}, {})
        return {}

    def _panels(self, study: Study, series: dict[str, StoredVolume]) -> Iterator[Panel]:
        record, spacing = self.records.get(study.id, "image"), self.config.data.spacing
        for name in self.sequences:
            low, high = record["facts"]["window"][name]
            volume = series[name]
            yield Panel((volume.array - low) / (high - low), volume.spacing.tolist(), f"{name} as read")
            yield Panel(self._image(record, name), spacing, f"{name} prepared")
        for title, augmentation in strongest_augmentations(self.config.augmentation, self.config.data.dim, spacing):
            image = self._augmented(record, augmentation)
            yield Panel(image, augmentation.spacing(spacing), title)

    def _image(self, record: dict[str, Any], sequence: str) -> np.ndarray:
        return open_array(self.records.out / record["files"][f"image/{sequence}"]["path"])

    def _augmented(self, record: dict[str, Any], augmentation: Augmentation) -> np.ndarray:
        """The first sequence of the study, augmented by the engine."""
        x, y, z = self.config.data.dim
        r, a, s = self.config.data.spacing
        path = self.records.out / record["files"][f"image/{self.sequences[0]}"]["path"]
        engine = TorchEngine(minimal_config(augmentation), torch.device("cpu"), (x, y, z))
        return engine.make(VolumeRequest(path, (x, y, z), (0, 0, 0), (x, y, z), (r, a, s), augmentation))[0].numpy()
