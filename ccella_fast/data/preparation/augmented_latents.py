"""`prepare --augment K`: K augmented latents per training study in addition to its own, with the parameters of each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ccella_fast.config import Config
from ccella_fast.data.augmentation.engine_choice import make_engine
from ccella_fast.data.augmentation.requests import VolumeRequest, augmentation_of, study_requests
from ccella_fast.data.preparation.latent_encoder import LatentEncoder
from ccella_fast.data.preparation.stage_cache import StageCache, fingerprint_of
from ccella_fast.data.preparation.stages import AUGMENTED_RECIPE, Stage, latent_digest, progress_bar
from ccella_fast.data.readers.study import Study


class AugmentedLatentStage(Stage):
    """Encodes augmented copies of the training studies; copy k of a study equals what online training uses in epoch k."""

    name = "augmented"

    def __init__(self, records: StageCache, studies: list[Study], config: Config, vae: LatentEncoder, copies: int):
        super().__init__(records, [study for study in studies if study.split == "train"], config)
        self.vae, self.copies = vae, copies

    def inputs(self, study: Study) -> str:
        """Digest of everything that the study's augmented latents depend on."""
        return augmented_digest(self.records, study, self.config, self.vae.sha256, self.copies)

    def run(self, todo: list[Study]) -> dict[str, float]:
        """Augment and encode all copies of the studies."""
        if not todo:
            return {}
        pairs = [(study, copy) for study in todo for copy in range(1, self.copies + 1)]
        paths = [path for study, _ in pairs for path in self._images(study).values()]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        engine = make_engine(self.config.data.engine, self.config.augmentation, device, self.config.data.dim)
        volumes = engine.stream(paths, lambda n: self._requests(*pairs[n]), len(pairs))
        files: dict[str, Any] = {}
        facts: dict[str, Any] = {"vae": self.vae.sha256, "copies": []}
        for (study, copy), images in zip(progress_bar(pairs, "augmented latents", "volume"), volumes, strict=True):
            if copy == 1:
                files, facts["copies"] = {}, []
            for sequence, image in zip(self.sequences, images, strict=True):
                for name, part in zip(("mean", "sigma"), self.vae.posterior(image[None]), strict=True):
                    target = f"latents/{study.id}/augmented{copy}_{sequence}_{name}.npy"
                    files[f"{copy}/latent_{name}/{sequence}"] = self.records.write_array(target, part[0].cpu().numpy())
            drawn = augmentation_of(self.config, study.id, seed=self.config.training.seed, epoch=copy)
            spacing = drawn.spacing(self.config.data.spacing)
            facts["copies"].append({"parameters": drawn.dump(), "spacing": spacing})
            if copy == self.copies:
                self.records.put(study.id, self.name, self.inputs(study), files, facts)
        return {}

    def _requests(self, study: Study, copy: int) -> list[VolumeRequest]:
        seed = self.config.training.seed
        return study_requests(self.config, self._images(study), study.id, seed=seed, epoch=copy)

    def _images(self, study: Study) -> dict[str, Path]:
        files = self.records.get(study.id, "image")["files"]
        return {name: self.records.out / files[f"image/{name}"]["path"] for name in self.sequences}


def augmented_digest(records: StageCache, study: Study, config: Config, vae: str, copies: int) -> str:
    """Digest of everything that a study's augmented latents depend on.

    Args:
        records: the stages of `prepare` that are complete.
        study: the study.
        config: gives the augmentation and the seed.
        vae: SHA-256 of the autoencoder's weights.
        copies: number of augmented copies.
    """
    strengths = config.augmentation.model_dump(exclude={"preset"})
    return fingerprint_of(
        [AUGMENTED_RECIPE, latent_digest(records, study, vae), strengths, config.training.seed, copies]
    )


def listed(records: StageCache, study: Study) -> list[dict[str, Any]]:
    """The manifest entries `augmented` of a study for which this stage is complete."""
    record = records.get(study.id, AugmentedLatentStage.name)
    copies = []
    for number, facts in enumerate(record["facts"]["copies"], start=1):
        files = {key: entry for key, entry in record["files"].items() if key.startswith(f"{number}/")}
        copies.append({**facts, "files": {key.split("/", 1)[1]: entry for key, entry in files.items()}})
    return copies
