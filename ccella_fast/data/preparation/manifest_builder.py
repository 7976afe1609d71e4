"""Assembles `manifest.json`, the table of contents of a prepared folder, from the records of its studies."""

from __future__ import annotations

import json
import logging
import statistics
from pathlib import Path
from typing import Any

from ccella_fast.config import Config
from ccella_fast.data.manifest import FORMAT, IMPORTED, NAME, Manifest, load_manifest
from ccella_fast.data.preparation.augmented_latents import AugmentedLatentStage, augmented_digest, listed
from ccella_fast.data.preparation.latent_encoder import combine_moments
from ccella_fast.data.preparation.resampling import ADC_WINDOW
from ccella_fast.data.preparation.stage_cache import StageCache, file_entry
from ccella_fast.data.preparation.stages import (
    ImageStage,
    ImportedLatentStage,
    LatentStage,
    Stage,
    TextStage,
    latent_digest,
)
from ccella_fast.data.readers.study import Study
from ccella_fast.errors import DataError
from ccella_fast.quantities import counted
from ccella_fast.storage import read_json, write_json

logger = logging.getLogger("ccella_fast")
_LOGGED_NOTES = 20


class ManifestBuilder:
    """Builds the manifest of a prepared folder, and compares it with the one that the folder holds.

    Args:
        records: The records of the prepared folder.
        studies: The studies to list.
        config: The configuration that they are prepared with.
        stages: The stages of this run; latents and augmented latents of earlier runs are listed as long as they are valid.
        augment: Number of augmented latents per training study; 0 lists none, None those of earlier runs.
    """

    def __init__(
        self, records: StageCache, studies: list[Study], config: Config, stages: list[Stage], augment: int | None
    ):
        self.records, self.studies, self.config = records, studies, config
        self.stages = {stage.name: stage for stage in stages}
        self.augment = augment
        self.patients = list(dict.fromkeys(study.patient for study in studies if study.patient is not None))
        self.path = records.out / NAME

    def is_current(self) -> bool:
        """Whether the manifest on disk lists exactly what the records hold."""
        return self.path.is_file() and read_json(self.path) == json.loads(json.dumps(self._build()))

    def changed_settings(self) -> dict[str, tuple[Any, Any]]:
        """Setting -> (before, now), where this run would replace results that the complete folder holds for other settings."""
        try:
            before = load_manifest(self.path.parent)
        except DataError:  # not complete, so there is nothing finished to lose
            return {}
        grids = before.data.model_dump(mode="json"), self.config.data.model_dump(mode="json", exclude={"engine"})
        pairs = {f"data.{key}": (grids[0].get(key), value) for key, value in grids[1].items()}
        text = self._text()
        if before.text is not None and text is not None:
            pairs |= {f"text.{key}": (value, text[key]) for key, value in before.text.model_dump().items()}
        if isinstance(image := self.stages.get("image"), ImageStage):
            held = [self.records.get(study.id, "image").get("facts", {}).get("b_value") for study in self.studies]
            other = [value for value in held if value != image.b_value]
            pairs["--b_value"] = (other[0] if other else image.b_value, image.b_value)
        latent = self.stages.get("latent")
        if latent is not None and before.scale_factor is not None:
            vae = latent.vae.sha256 if isinstance(latent, LatentStage) else None
            pairs["the autoencoder"] = (before.vae.sha256 if before.vae else None, vae)
        return {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}

    def write(self) -> None:
        """Write the manifest and log a summary of it."""
        manifest = self._build()
        Manifest.model_validate(manifest)
        write_json(self.path, manifest, sealed=True)
        self._log_summary(manifest)

    def _build(self) -> dict[str, Any]:
        vae, has_latents = self._latents()
        augmented = self._augmented(vae)
        train = [study for study in self.studies if study.split == "train"] or self.studies
        scale_factor = None
        if has_latents:
            moments = [self._facts(study, "latent")["moments"] for study in train]
            scale_factor = [
                1 / combine_moments(each[name] for each in moments) ** 0.5 for name in self.config.data.sequences
            ]
        truncated = [
            study.id for study in self.studies if "text" in self.stages and self._facts(study, "text")["truncated"]
        ]
        return {
            "format": FORMAT,
            "version": 1,
            "data": self.config.data.model_dump(mode="json", exclude={"engine"}),
            "text": self._text(),
            **self._null_text(),
            "vae": None if vae is None else {"sha256": vae},
            "scale_factor": scale_factor,
            "intensity_scale": {name: self._intensity_scale(name, train) for name in self.config.data.sequences},
            "truncated_reports": truncated,
            "cases": [self._case(study, has_latents) | augmented.get(study.id, {}) for study in self.studies],
        }

    def _latents(self) -> tuple[str | None, bool]:
        """(SHA-256 of the autoencoder or None, whether every study has latents).

        Latents that an earlier run encoded from the same images are kept.
        """
        if isinstance(self.stages.get("latent"), ImportedLatentStage):
            return None, True
        records = [self.records.get(study.id, "latent") for study in self.studies]
        vae = records[0]["facts"]["vae"] if records[0] else None
        complete = vae is not None and all(
            self.records.is_done(study.id, "latent", latent_digest(self.records, study, vae)) for study in self.studies
        )
        return (vae, True) if complete else (None, False)

    def _augmented(self, vae: str | None) -> dict[str, dict[str, Any]]:
        """Id -> {"augmented": ...} of the training studies; empty unless all of them have the same number of valid copies."""
        train = [study for study in self.studies if study.split == "train"]
        records = [self.records.get(study.id, AugmentedLatentStage.name) for study in train]
        if vae is None or self.augment == 0 or not all(records) or not train:
            return {}
        copies = self.augment or len(records[0]["facts"]["copies"])
        complete = all(
            self.records.is_done(
                study.id, AugmentedLatentStage.name, augmented_digest(self.records, study, self.config, vae, copies)
            )
            for study in train
        )
        return {study.id: {"augmented": listed(self.records, study)} for study in train} if complete else {}

    def _case(self, study: Study, has_latents: bool) -> dict[str, Any]:
        listed_stages = [name for name in ("image", "text") if name in self.stages] + ["latent"] * has_latents
        geometry = self._facts(study, "image" if "image" in self.stages else "latent")
        return {
            "id": study.id,
            "split": study.split,
            "synthetic": study.synthetic,
            **({} if study.source_case is None else {"source_case": study.source_case}),
            **({} if study.class_predicted is None else {"class_predicted": study.class_predicted}),
            "dataset": study.dataset,
            **({} if study.patient is None else {"patient": self.patients.index(study.patient)}),
            "spacing": geometry["spacing"],
            "pirads": study.pirads,
            "text_isnull": study.text_isnull if study.text_file is not None else int(study.report is None),
            "affine": geometry["affine"],
            "window": geometry["window"],
            "files": {
                key: entry
                for stage in listed_stages
                for key, entry in self.records.get(study.id, stage)["files"].items()
            },
        }

    def _text(self) -> dict[str, Any] | None:
        """Identity of the text encoder; of imported features, the settings that they were checked against."""
        stage = self.stages.get("text")
        if stage is None or isinstance(stage, TextStage):
            return stage.encoder.identity if stage else None
        settings = self.config.text.model_dump(include={"encoder", "revision", "max_length", "dtype"})
        return {**settings, "width": self.config.model.input_dim, "fingerprint": IMPORTED}

    def _null_text(self) -> dict[str, Any]:
        """The file of the null report, if this run or an earlier one has encoded it with the present encoder."""
        stage = self.stages.get("text")
        if not isinstance(stage, TextStage) or not (self.records.out / stage.null_file).is_file():
            return {}
        return {"null_text": file_entry(self.records.out, stage.null_file)}

    def _intensity_scale(self, sequence: str, train: list[Study]) -> float:
        """The factor from a generated volume in [0, 1] to scanner intensities; 1 if they are unknown (imported latents)."""
        if sequence == "adc":
            return ADC_WINDOW[1]
        if "image" not in self.stages:
            return 1.0
        return statistics.median(self._facts(study, "image")["window"][sequence][1] for study in train)

    def _facts(self, study: Study, stage: str) -> dict[str, Any]:
        return self.records.get(study.id, stage)["facts"]

    def _log_summary(self, manifest: dict[str, Any]) -> None:
        cases, truncated = manifest["cases"], manifest["truncated_reports"]
        reports = sum(not case["text_isnull"] for case in cases)
        classes = sum(case["pirads"] is not None for case in cases)
        prepared = counted(len(cases), "study", "studies")
        logger.info("%s prepared, %d with a report, %d with a class", prepared, reports, classes)
        if truncated:
            message = "reports of more than %d tokens, which lose their beginning: %d, %s"
            logger.warning(message, self.config.text.max_length, len(truncated), join_ids(truncated))
        if "image" in self.stages:
            self._log_notes()
        if manifest["scale_factor"] is None:
            logger.info("no latents yet: run `ccella-fast train-vae`, then `prepare` again with --vae")

    def _log_notes(self) -> None:
        """Warn of what was there and was not used: an equal sentence once, with the first series, and a limited number."""
        series: dict[str, list[Path]] = {}
        for study in self.studies:
            for sequence, sentences in self._facts(study, "image").get("notes", {}).items():
                for sentence in sentences:
                    series.setdefault(sentence, []).append(study.files[sequence])
        for sentence, paths in list(series.items())[:_LOGGED_NOTES]:
            more = f" (and {len(paths) - 1} more series)" if len(paths) > 1 else ""
            logger.warning("%s: %s%s", paths[0], sentence, more)
        if len(series) > _LOGGED_NOTES:
            logger.warning("notes that are not shown: %d, see cases/<id>.json", len(series) - _LOGGED_NOTES)


def join_ids(ids: list[str]) -> str:
    """The first 50 ids in one line, and how many more there are."""
    return ", ".join(ids[:50]) + (f" and {len(ids) - 50} more" if len(ids) > 50 else "")
