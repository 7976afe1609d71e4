"""Studies and reports to a prepared folder, in stages: images, text features and, with an autoencoder, latents.

Every file appears under its final name only when it is complete, and `cases/<id>.json` records it; `manifest.json` is written
last. A second run continues where the first one stopped, repeats what depends on a changed study or setting and keeps the
rest. Results depend on inputs and settings only, never on where a run was interrupted.
"""

from __future__ import annotations

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
from ccella_fast.data.augmentation.engine_choice import check_engine
from ccella_fast.data.augmentation.parameters import check_conditioning
from ccella_fast.data.checking.findings import log_findings
from ccella_fast.data.checking.overview import check_facts
from ccella_fast.data.checking.study_facts import facts_of_studies
from ccella_fast.data.checking.tables import check_table
from ccella_fast.data.manifest import NAME
from ccella_fast.data.preparation.augmented_latents import AugmentedLatentStage
from ccella_fast.data.preparation.latent_encoder import LatentEncoder
from ccella_fast.data.preparation.manifest_builder import ManifestBuilder, join_ids
from ccella_fast.data.preparation.preview import PreviewStage
from ccella_fast.data.preparation.stage_cache import StageCache
from ccella_fast.data.preparation.stages import (
    ImageStage,
    ImportedLatentStage,
    ImportedTextStage,
    LatentStage,
    Stage,
    TextStage,
)
from ccella_fast.data.preparation.worker_pool import WorkerPool
from ccella_fast.data.readers.discovery import find_studies
from ccella_fast.data.readers.study import Defects, Study
from ccella_fast.data.text_encoder import TextEncoder
from ccella_fast.errors import ConfigError, DataError, DiskError
from ccella_fast.folder_kinds import check_output
from ccella_fast.folder_lock import lock_folder
from ccella_fast.hardware import peak_memory
from ccella_fast.models.autoencoder import check_autoencoder
from ccella_fast.quantities import counted, format_bytes
from ccella_fast.run_record import write_run_record
from ccella_fast.storage import check_writable, existing_parent, read_json, remove_partial_files

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
    follow_links: bool = False,
    b_value: float | None = None,
    augment: int | None = None,
    preview: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
) -> None:
    """Prepare studies for training. All studies are read and checked before the first file is written.

    Args:
        data: Folder of studies, or a manifest in the form of the reference implementation.
        out: The prepared folder. It may hold results of earlier runs.
        config: The configuration.
        vae: Autoencoder. With it, latents (mean and sigma of the posterior) and their scale factor are added.
        csv: Splits, classes and reports of the studies of a folder.
        test_data: Manifest of the test split.
        data_base_dir: Folder that the image paths of a manifest are relative to.
        embedding_base_dir: Folder of the latents and text features that the reference implementation prepared.
        follow_links: Whether series may be links to files or folders outside the data folder.
        b_value: Which image to read of a diffusion series that holds several, in s/mm2; None reads that of the highest.
        augment: Number of augmented latents per training study; 0 removes them from the manifest, None keeps existing ones.
        preview: Whether to draw a picture of every study.
        overwrite: Whether to replace what a complete `out` holds for other settings or another autoencoder.
        workers: Number of processes that make images; None chooses it. The result does not depend on it.

    Raises:
        DataError: If a study, report or manifest is invalid; the message counts all defects.
        ConfigError: If the settings do not fit together or do not fit the studies, if `out` is in `data` or holds results of
            another kind, if another command writes to it, or if it is complete with other settings and `overwrite` is not
            given.
        CheckpointError: If the autoencoder cannot be used.
        DiskError: If `out` cannot be written or the disk is too small.
    """
    out = Path(out)
    config.check_grid()
    check_writable(out, "--out")
    if out.resolve().is_relative_to(Path(data).resolve()):  # the next run would read what this one has written
        why = "the prepared folder would be in the folder of studies"
        raise ConfigError(why, path=out, field="--out", fix="choose a folder next to --data")
    check_output(out, "prepared data", field="--out")
    if vae is not None:
        check_autoencoder(Path(vae))
    with lock_folder(out, "ccella-fast prepare"), WorkerPool(workers) as pool:
        studies = find_studies(
            data,
            csv_file=csv,
            test_data=test_data,
            data_base_dir=data_base_dir,
            embedding_base_dir=embedding_base_dir,
            follow_links=follow_links,
        )
        log_findings([
            *check_table(studies, Path(data), None if csv is None else Path(csv)),
            *check_facts(facts_of_studies(studies), config),
        ])  # fmt: skip
        records = StageCache(out)
        stages = _make_stages(records, studies, config, vae, pool, b_value)
        stages += _make_optional_stages(records, studies, config, stages, augment, preview)
        manifest = ManifestBuilder(records, studies, config, stages, augment)
        if not overwrite:
            _check_settings(records, stages, manifest)
        _run_stages(out, config, records, stages, manifest)


def _check_settings(records: StageCache, stages: list[Stage], manifest: ManifestBuilder) -> None:
    """Raise ConfigError if results that took long would be replaced because a setting or the autoencoder has changed."""
    changed = manifest.changed_settings()
    if not changed:
        return
    held = {stage.name: [study for study in stage.stale() if records.get(study.id, stage.name)] for stage in stages}
    if held.get("image"):  # latents of images that are replaced are worth nothing, also without --vae
        held["latent"] = [study for study in manifest.studies if records.get(study.id, "latent")]
    redone = [f"{name} of {counted(len(studies), 'study', 'studies')}" for name, studies in held.items() if studies]
    if not redone:
        return
    why = "this folder was prepared with other settings: " + "; ".join(
        f"{name} was {_shown(before)}, now {_shown(now)}" for name, (before, now) in changed.items()
    )
    why += f". Results to be replaced: {', '.join(redone)}"
    fix = "restore the settings, choose another --out, or replace the results with --overwrite"
    raise ConfigError(why, path=records.out, field=next(iter(changed)), fix=fix)


def _shown(value: Any) -> str:
    """A setting for a message; a long hash is cut."""
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else f"{value}"[:80]


def _run_stages(out: Path, config: Config, records: StageCache, stages: list[Stage], manifest: ManifestBuilder) -> None:
    """Run every stage for the studies that need it, then write the manifest."""
    stale = {stage.name: stage.stale() for stage in stages}
    if not any(stale.values()) and all(stage.has_shared_files() for stage in stages) and manifest.is_current():
        logger.info("%s is complete, nothing to do", out)
        return
    times = _read_earlier_times(out)
    with write_run_record(out, "prepare", studies=len(manifest.studies), stages=times):
        with _timed(times, "check", sum(len(stale[stage.name]) for stage in stages if stage.checks_inputs)):
            _check_inputs(stages, stale)
        _check_free_space(out, config, len(stale.get("image", [])))
        remove_partial_files(out)
        for stage in stages:
            todo = stage.stale()  # once more, because latents depend on the images just made
            _invalidate_manifest(records, stage, todo)
            with _timed(times, stage.name, len(todo)) as seconds:
                seconds |= stage.run(todo)
        remove_partial_files(out)  # of workers that were killed, whose studies others have read again
        manifest.write()


def _read_earlier_times(out: Path) -> dict[str, Any]:
    """The times of stages in earlier runs: a run that only adds latents keeps the time that images took."""
    path = out / "run_record.json"
    return read_json(path).get("stages", {}) if path.is_file() else {}


@contextmanager
def _timed(times: dict[str, Any], stage: str, studies: int) -> Iterator[dict[str, float]]:
    """Record and log the duration of a stage. Yields a dictionary that the stage fills with the seconds per study."""
    start, per_study = time.perf_counter(), dict[str, float]()
    yield per_study
    if not studies:
        return
    seconds = time.perf_counter() - start
    times[stage] = {"studies": studies, "seconds": round(seconds, 2), **peak_memory()}
    summary = f"{stage}: {counted(studies, 'study', 'studies')} in {seconds:.1f} s"
    if per_study:
        times[stage]["seconds_per_study"] = {name: round(per_study[name], 3) for name in sorted(per_study)}
        slowest = max(per_study, key=lambda name: per_study[name])
        median = statistics.median(per_study.values())
        summary += f"; median {median:.2f} s, longest {per_study[slowest]:.2f} s ({slowest})"
    logger.info("%s", summary)


def _make_stages(
    records: StageCache,
    studies: list[Study],
    config: Config,
    vae: str | Path | None,
    pool: WorkerPool,
    b_value: float | None,
) -> list[Stage]:
    """The stages that these studies need. Neither imported and encoded text nor latents of two autoencoders are mixed."""
    sequences = config.data.sequences
    with_latents = [study for study in studies if all(name in study.latent_files for name in sequences)]
    with_features = [study for study in studies if study.text_file is not None]
    check_one_form(studies, with_latents, with_features, vae)
    stages: list[Stage] = []
    if not with_latents:
        missing_series(studies, sequences).raise_first()
        stages.append(ImageStage(records, studies, config, pool, b_value))
    if with_features:
        stages.append(ImportedTextStage(records, studies, config))
    elif config.model.traits.text:
        stages.append(TextStage(records, studies, config, _make_text_encoder(config)))
    if with_latents:
        stages.append(ImportedLatentStage(records, studies, config))
    elif vae is not None:
        stages.append(LatentStage(records, studies, config, LatentEncoder(vae, config.autoencoder)))
    return stages


def check_one_form(
    studies: list[Study], with_latents: list[Study], with_features: list[Study], vae: str | Path | None
) -> None:
    """Raise DataError if studies come partly as latents, or reports partly as features."""
    if with_latents and (vae is not None or len(with_latents) < len(studies)):
        conflict = "but --vae is given" if vae is not None else f"{len(studies) - len(with_latents)} as images"
        come = counted(len(with_latents), "study comes", "studies come")
        why = f"{come} as latents (_emb.nii.gz), {conflict}: two autoencoders do not mix"
        fix = "give latents of all studies and no --vae, or of none"
        raise DataError(why, path=with_latents[0].listed_in, field=with_latents[0].field, fix=fix)
    if with_features and len(with_features) < len(studies):
        why = f"some reports come as features (.npy, {len(with_features)} of {len(studies)}), the others as text"
        first = with_features[0]
        raise DataError(why, path=first.listed_in, field=f"{first.field}.text", fix="give all reports in one form")


def _make_optional_stages(
    records: StageCache, studies: list[Study], config: Config, stages: list[Stage], augment: int | None, preview: bool
) -> list[Stage]:
    """The stages of --augment and --preview."""
    optional: list[Stage] = []
    latents = next((stage for stage in stages if isinstance(stage, LatentStage)), None)
    if augment:
        check_conditioning(config)
        if latents is None:
            raise ConfigError("augmented latents need an autoencoder", field="--augment", fix="give --vae too")
        if not config.augmentation.active:
            why = "--augment is given, but no operator of the section augmentation is enabled"
            raise ConfigError(why, field="augmentation.preset", fix="choose the preset text or image")
        check_engine(config.data.engine)
        optional.append(AugmentedLatentStage(records, studies, config, latents.vae, augment))
    if preview:
        image = next((stage for stage in stages if isinstance(stage, ImageStage)), None)
        if image is None:
            why = "these studies come without images, which previews need"
            raise ConfigError(why, field="--preview", fix="leave --preview out")
        optional.append(PreviewStage(records, studies, config, image))
    return optional


def missing_series(studies: list[Study], sequences: list[Any]) -> Defects:
    """What is wrong where a study does not have a file of every sequence."""
    defects = Defects()
    for study in studies:
        for sequence in sequences:
            path = study.files.get(sequence)
            if path is None:
                why, place = f"the study '{study.id}' has no {sequence}", study.listed_in
                fix = "add the series, or remove it from data.sequences"
            elif not path.exists():
                why, place, fix = "this file does not exist", path, "check the path"
            else:
                continue
            defects.add(DataError(why, path=place, field=study.field or sequence, fix=fix))
    return defects


def _make_text_encoder(config: Config) -> TextEncoder:
    encoder = TextEncoder(config.text)
    if encoder.width != config.model.input_dim:
        why = f"the features of the text encoder are {encoder.width} wide, but model.input_dim is {config.model.input_dim}"
        fix = f"set model.input_dim={encoder.width}, or choose another encoder"
        raise ConfigError(why, field="model.input_dim", fix=fix)
    return encoder


def _check_inputs(stages: list[Stage], stale: dict[str, list[Study]]) -> None:
    """Read all inputs that will be used; raises the first defect, whose message counts the others."""
    defects = Defects()
    for stage in stages:
        defects.found += stage.check(stale[stage.name])
    defects.raise_first()


def _invalidate_manifest(records: StageCache, stage: Stage, todo: list[Study]) -> None:
    """Delete the manifest before files that it lists are replaced; it is written again when all files are complete."""
    changed = [study.id for study in todo if records.get(study.id, stage.name)]
    if changed:
        logger.warning("%s: inputs or settings changed, done again for %s", stage.name, join_ids(changed))
        (records.out / NAME).unlink(missing_ok=True)


def bytes_to_prepare(config: Config, studies: int) -> int:
    """Disk space of the images and text features of so many studies, in fp32."""
    voxels = int(np.prod(config.data.dim)) * len(config.data.sequences)
    return 4 * studies * (voxels + config.text.max_length * config.model.input_dim)


def _check_free_space(out: Path, config: Config, images: int) -> None:
    """Raise DiskError unless the images and text features of so many studies fit on the disk."""
    needed, free = bytes_to_prepare(config, images), shutil.disk_usage(existing_parent(out)).free
    if needed > free:
        why = f"about {format_bytes(needed)} are needed, but only {format_bytes(free)} are free"
        raise DiskError(why, path=out, field="--out", fix="free space or choose another folder")
