"""From studies and reports to a prepared folder, one study at a time: images, text and, once there is a VAE, latents.

Every file appears under its final name whole, and `cases/<id>.json` records it; `manifest.json` is written last. Run again, it
goes on where it stopped, does again what depends on a changed study or setting, and keeps the rest. Results depend on
inputs and settings only, never on where a run was interrupted.
"""

from __future__ import annotations

import json
import logging
import shutil
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ccella_fast.config import Config
from ccella_fast.data.augmentation.engine import check_engine
from ccella_fast.data.augmentation.parameters import check_conditioning
from ccella_fast.data.manifest import FORMAT, IMPORTED, NAME, Manifest
from ccella_fast.data.preparation.augmented_latents import AugmentedLatentStage, augmented_digest, listed
from ccella_fast.data.preparation.latent_encoder import LatentEncoder, combine_moments
from ccella_fast.data.preparation.preview import PreviewStage
from ccella_fast.data.preparation.resampling import ADC_WINDOW
from ccella_fast.data.preparation.stage_cache import StageCache
from ccella_fast.data.preparation.stages import (
    ImageStage,
    ImportedLatentStage,
    ImportedTextStage,
    LatentStage,
    Stage,
    TextStage,
    latent_digest,
)
from ccella_fast.data.preparation.worker_pool import WorkerPool
from ccella_fast.data.readers.discovery import Defects, Study, find_studies
from ccella_fast.data.text_encoder import TextEncoder
from ccella_fast.environment import peak_memory, write_run_record
from ccella_fast.errors import ConfigError, DataError, DiskError
from ccella_fast.storage import check_writable, existing_parent, read_json, remove_partial_files, write_json

logger = logging.getLogger("ccella_fast")


def prepare(
    data: str | Path,
    out: str | Path,
    config: Config,
    *,
    vae: str | Path | None = None,
    csv: str | Path | None = None,
    test_data: str | Path | None = None,
    data_base_dir: str | Path | None = None,
    embedding_base_dir: str | Path | None = None,
    augment: int | None = None,
    preview: bool = False,
    workers: int | None = None,
) -> None:
    """Prepare the studies of `data` (a folder, or a manifest in the reference's form) into the folder `out`.

    csv: classes, splits and reports of a folder's studies. test_data: manifest of the test split. data_base_dir,
    embedding_base_dir: where a manifest's images and the reference's own prepared files lie. vae: adds latents (posterior mean
    and sigma) and the scale factor. augment: adds so many augmented latents of every training study (0: none; None: those
    that are there stay). preview: adds a picture of every study. workers: processes that make images (None: as many as are
    worth it); they change no bit of the result. Every study is read and checked before the first is written. Raises DataError,
    ConfigError, CheckpointError, DiskError."""
    out = Path(out)
    config.check_grid()
    check_writable(out, "--out")
    studies = find_studies(
        data, csv_file=csv, test_data=test_data, data_base_dir=data_base_dir, embedding_base_dir=embedding_base_dir
    )
    records = StageCache(out)
    with WorkerPool(workers) as pool:
        stages = _plan(records, studies, config, vae, pool)
        stages += _extra_stages(records, studies, config, stages, augment, preview)
        _run(out, config, records, stages, _ManifestBuilder(records, studies, config, stages, augment))


def _run(out: Path, config: Config, records: StageCache, stages: list[Stage], manifest: _ManifestBuilder) -> None:
    """Do what is missing, the manifest last."""
    stale = {stage.name: stage.stale() for stage in stages}
    if not any(stale.values()) and all(stage.kept() for stage in stages) and manifest.is_current():
        logger.info("%s is complete, nothing to do", out)
        return
    times = _earlier_times(out)
    with write_run_record(out, "prepare", studies=len(manifest.studies), stages=times):
        with _timed(times, "check", sum(len(stale[stage.name]) for stage in stages if stage.checks)):
            _check_all(stages, stale)
        _check_room(out, config, len(stale.get("image", [])))
        remove_partial_files(out)
        for stage in stages:
            todo = stage.stale()  # again: latents depend on the images just made
            _announce(records, stage, todo)
            with _timed(times, stage.name, len(todo)) as seconds:
                seconds |= stage.run(todo)
        manifest.write()


def _earlier_times(out: Path) -> dict[str, Any]:
    """What earlier runs recorded of each stage: a run that only adds latents keeps the time that the images took."""
    path = out / "run_record.json"
    return read_json(path).get("stages", {}) if path.is_file() else {}


@contextmanager
def _timed(times: dict[str, Any], stage: str, studies: int) -> Iterator[dict[str, float]]:
    """Record and tell how long a stage took. Yields a dictionary for the seconds of single studies."""
    begun, each = time.perf_counter(), dict[str, float]()
    yield each
    if not studies:
        return
    seconds = time.perf_counter() - begun
    times[stage] = {"studies": studies, "seconds": round(seconds, 2), **peak_memory()}
    told = f"{stage}: {studies} {'study' if studies == 1 else 'studies'} in {seconds:.1f} s"
    if each:
        times[stage]["seconds_per_study"] = {name: round(each[name], 3) for name in sorted(each)}
        slowest = max(each, key=lambda name: each[name])
        told += f"; median {statistics.median(each.values()):.2f} s, longest {each[slowest]:.2f} s ({slowest})"
    logger.info("%s", told)


def _plan(
    records: StageCache, studies: list[Study], config: Config, vae: str | Path | None, pool: WorkerPool
) -> list[Stage]:
    """The stages that these studies need. Imported and made text do not mix, nor do latents of two autoencoders."""
    sequences = config.data.sequences
    as_latents = [study for study in studies if all(name in study.latent_files for name in sequences)]
    as_features = [study for study in studies if study.text_file is not None]
    if as_latents and (vae is not None or len(as_latents) < len(studies)):
        other = "--vae is given" if vae is not None else "others as images"
        why = f"{len(as_latents)} studies come as latents (_emb.nii.gz), {other}: two autoencoders do not mix"
        fix = "give latents of all studies and no --vae, or of none"
        raise DataError(why, path=as_latents[0].listed_in, field=as_latents[0].field, fix=fix)
    if as_features and len(as_features) < len(studies):
        why, fix = "some reports come as features (.npy), others as text", "give all in one form"
        raise DataError(why, path=as_features[0].listed_in, field=f"{as_features[0].field}.text", fix=fix)
    stages: list[Stage] = []
    if not as_latents:
        _check_series(studies, sequences)
        stages.append(ImageStage(records, studies, config, pool))
    if as_features:
        stages.append(ImportedTextStage(records, studies, config))
    elif config.model.traits.text:
        stages.append(TextStage(records, studies, config, _text_encoder(config)))
    if as_latents:
        stages.append(ImportedLatentStage(records, studies, config))
    elif vae is not None:
        stages.append(LatentStage(records, studies, config, LatentEncoder(vae, config.autoencoder)))
    return stages


def _extra_stages(
    records: StageCache, studies: list[Study], config: Config, stages: list[Stage], augment: int | None, preview: bool
) -> list[Stage]:
    """What may be added to prepared studies: augmented latents, previews."""
    extra: list[Stage] = []
    latents = next((stage for stage in stages if isinstance(stage, LatentStage)), None)
    if augment:
        check_conditioning(config)
        if latents is None:
            raise ConfigError("augmented latents need an autoencoder", field="--augment", fix="give --vae too")
        if not config.augmentation.active:
            raise ConfigError("nothing is augmented", field="augmentation.preset", fix="take preset text or image")
        check_engine(config.data.engine)
        extra.append(AugmentedLatentStage(records, studies, config, latents.vae, augment))
    if preview:
        if not any(isinstance(stage, ImageStage) for stage in stages):
            raise ConfigError("these studies come without images", field="--preview", fix="leave --preview out")
        extra.append(PreviewStage(records, studies, config))
    return extra


def _check_series(studies: list[Study], sequences: list[Any]) -> None:
    defects = Defects()
    for study in studies:
        for sequence in sequences:
            path = study.files.get(sequence)
            if path is None or not path.exists():
                why = f"the study '{study.id}' has no {sequence}" if path is None else "this file does not exist"
                where = study.listed_in if path is None else path
                fix = "add the series, or leave it out of data.sequences" if path is None else "check the path"
                defects.add(DataError(why, path=where, field=study.field or sequence, fix=fix))
    defects.raise_first()


def _text_encoder(config: Config) -> TextEncoder:
    encoder = TextEncoder(config.text)
    if encoder.width != config.model.input_dim:
        why = f"the encoder's features are {encoder.width} wide, model.input_dim is {config.model.input_dim}"
        fix = f"set model.input_dim={encoder.width}, or choose another encoder"
        raise ConfigError(why, field="model.input_dim", fix=fix)
    return encoder


def _check_all(stages: list[Stage], stale: dict[str, list[Study]]) -> None:
    """Read everything that will be used; DataError tells the first defect and how many more there are."""
    defects = Defects()
    for stage in stages:
        defects.found += stage.check(stale[stage.name])
    defects.raise_first()


def _announce(records: StageCache, stage: Stage, todo: list[Study]) -> None:
    """Before files that the manifest lists are replaced, the manifest goes: it comes back when all is whole."""
    changed = [study.id for study in todo if records.get(study.id, stage.name)]
    if changed:
        logger.warning("%s: inputs or settings changed, done again for %s", stage.name, _names(changed))
        (records.out / NAME).unlink(missing_ok=True)


class _ManifestBuilder:
    """manifest.json, assembled from the records."""

    def __init__(
        self, records: StageCache, studies: list[Study], config: Config, stages: list[Stage], augment: int | None
    ):
        self.augment = augment
        self.records, self.studies, self.config = records, studies, config
        self.path = records.out / NAME
        self.stages = {stage.name: stage for stage in stages}

    def is_current(self) -> bool:
        return self.path.is_file() and read_json(self.path) == json.loads(json.dumps(self._build()))

    def write(self) -> None:
        manifest = self._build()
        Manifest.model_validate(manifest)
        write_json(self.path, manifest)
        self._tell(manifest)

    def _build(self) -> dict[str, Any]:
        vae, with_latents = self._latents()
        augmented = self._augmented(vae)
        train = [study for study in self.studies if study.split == "train"] or self.studies
        scale = None
        if with_latents:
            parts = [self._facts(study, "latent")["moments"] for study in train]
            scale = [1 / combine_moments(part[name] for part in parts) ** 0.5 for name in self.config.data.sequences]
        truncated = [
            study.id for study in self.studies if "text" in self.stages and self._facts(study, "text")["truncated"]
        ]
        return {
            "format": FORMAT,
            "version": 1,
            "data": self.config.data.model_dump(mode="json", exclude={"engine"}),
            "text": self._text(),
            "vae": None if vae is None else {"sha256": vae},
            "scale_factor": scale,
            "intensity_scale": {name: self._intensity_scale(name, train) for name in self.config.data.sequences},
            "truncated_reports": truncated,
            "cases": [self._case(study, with_latents) | augmented.get(study.id, {}) for study in self.studies],
        }

    def _latents(self) -> tuple[str | None, bool]:
        """(SHA-256 of the VAE, are all latents there). Latents that an earlier run made of the same images stay."""
        if isinstance(self.stages.get("latent"), ImportedLatentStage):
            return None, True
        found = [self.records.get(study.id, "latent") for study in self.studies]
        vae = found[0]["facts"]["vae"] if found[0] else None
        whole = vae is not None and all(
            self.records.is_done(study.id, "latent", latent_digest(self.records, study, vae)) for study in self.studies
        )
        return (vae, True) if whole else (None, False)

    def _augmented(self, vae: str | None) -> dict[str, dict[str, Any]]:
        """Id -> {"augmented": ...} of the training studies, when they all have as many as are asked for, or had."""
        train = [study for study in self.studies if study.split == "train"]
        found = [self.records.get(study.id, AugmentedLatentStage.name) for study in train]
        if vae is None or self.augment == 0 or not all(found) or not train:
            return {}
        copies = self.augment or len(found[0]["facts"]["copies"])
        done = all(
            self.records.is_done(
                s.id, AugmentedLatentStage.name, augmented_digest(self.records, s, self.config, vae, copies)
            )
            for s in train
        )
        return {study.id: {"augmented": listed(self.records, study)} for study in train} if done else {}

    def _case(self, study: Study, with_latents: bool) -> dict[str, Any]:
        kept = [*(name for name in ("image", "text") if name in self.stages), *(["latent"] if with_latents else [])]
        place = self._facts(study, "image" if "image" in self.stages else "latent")
        isnull = study.text_isnull if study.text_file is not None else int(study.report is None)
        return {
            "id": study.id,
            "split": study.split,
            "synthetic": study.synthetic,
            "dataset": study.dataset,
            "spacing": place["spacing"],
            "pirads": study.pirads,
            "text_isnull": isnull,
            "affine": place["affine"],
            "window": place["window"],
            "files": {key: entry for name in kept for key, entry in self.records.get(study.id, name)["files"].items()},
        }

    def _text(self) -> dict[str, Any] | None:
        stage = self.stages.get("text")
        if stage is None or isinstance(stage, TextStage):
            return stage.encoder.identity if stage else None
        text = self.config.text.model_dump(include={"encoder", "revision", "max_length", "dtype"})
        return {**text, "width": self.config.model.input_dim, "fingerprint": IMPORTED}

    def _intensity_scale(self, sequence: str, train: list[Study]) -> float:
        """What a generated volume in [0, 1] is multiplied by; 1 where the intensities are not known (imported latents)."""
        if sequence == "adc":
            return ADC_WINDOW[1]
        if "image" not in self.stages:
            return 1.0
        return statistics.median(self._facts(study, "image")["window"][sequence][1] for study in train)

    def _facts(self, study: Study, stage: str) -> dict[str, Any]:
        return self.records.get(study.id, stage)["facts"]

    def _tell(self, manifest: dict[str, Any]) -> None:
        cases, truncated = manifest["cases"], manifest["truncated_reports"]
        reports = sum(not case["text_isnull"] for case in cases)
        classes = sum(case["pirads"] is not None for case in cases)
        logger.info("%d studies prepared, %d with a report, %d with a class", len(cases), reports, classes)
        if truncated:
            why = "%d reports are longer than %d tokens and lose their beginning: %s"
            logger.warning(why, len(truncated), self.config.text.max_length, _names(truncated))
        if manifest["scale_factor"] is None:
            logger.info("no latents yet: run `ccella-fast train-vae`, then `prepare` again with --vae")


def _check_room(out: Path, config: Config, images: int) -> None:
    values = (
        int(np.prod(config.data.dim)) * len(config.data.sequences) + config.text.max_length * config.model.input_dim
    )
    needed, free = 4 * images * values, shutil.disk_usage(existing_parent(out)).free
    if needed > free:
        why = f"about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        raise DiskError(why, path=out, field="--out", fix="free space or choose another folder")


def _names(cases: list[str]) -> str:
    return ", ".join(cases[:50]) + (f" and {len(cases) - 50} more" if len(cases) > 50 else "")
