"""From studies and reports to a prepared folder, one study at a time: images, text and, once there is a VAE, latents.

Every file appears under its final name whole, and `cases/<id>.json` records it; `manifest.json` is written last. Run again, it
goes on where it stopped, does again what depends on a changed study or setting, and keeps the rest. Results depend on
inputs and settings only, never on where a run was interrupted.
"""

from __future__ import annotations

import logging
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ccella_fast.config import Config
from ccella_fast.data.grid import ADC_WINDOW, covers_centre, make_grid, normalise, resample
from ccella_fast.data.latents import LatentEncoder, combine_moments, import_latent, moments
from ccella_fast.data.manifest import FORMAT, NAME, Prepared, open_array
from ccella_fast.data.records import Records, digest, fingerprint
from ccella_fast.data.sources import Defects, Study, find_studies
from ccella_fast.data.text import TextEncoder
from ccella_fast.data.volume import Volume, check_axial, read_volume
from ccella_fast.environment import recorded
from ccella_fast.errors import ConfigError, DataError, DiskError
from ccella_fast.storage import sweep, write_json
from ccella_fast.variants import get_variant

logger = logging.getLogger("ccella_fast")

_RECIPE = 1  # part of every digest; raise it when the same inputs give other results


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
) -> None:
    """Prepare the studies of `data` (a folder, or a manifest in the reference's form) into the folder `out`.

    csv: classes, splits and reports of a folder's studies. test_data: manifest of the test split. data_base_dir,
    embedding_base_dir: where a manifest's images and the reference's own prepared files lie. vae: adds latents (posterior mean
    and sigma) and the scale factor. Every study is read and checked before the first is written. Raises DataError, ConfigError,
    CheckpointError, DiskError."""
    out = Path(out)
    config.check_grid()
    _check_writable(out)
    studies = find_studies(
        data, csv_file=csv, test_data=test_data, data_base_dir=data_base_dir, embedding_base_dir=embedding_base_dir
    )
    encoder = _text_encoder(config, studies)
    latent_encoder = LatentEncoder(vae, config.autoencoder) if vae is not None else None
    job = _Preparation(out, config, studies)
    job.check_imports(latent_encoder)
    images = job.check_images()
    _check_room(out, config, len(images))
    sweep(out)
    with recorded(out, "prepare", studies=len(studies)) as facts:
        job.write_images(images)
        job.write_text(encoder)
        job.import_latents()
        if latent_encoder is not None:
            job.write_latents(latent_encoder)
            facts["peak_gpu_memory_mib"] = latent_encoder.peak_memory_mib
        job.write_manifest(encoder)


class _Preparation:
    """The stages, in the order in which `prepare` calls them."""

    def __init__(self, out: Path, config: Config, studies: list[Study]):
        self.out, self.config, self.studies = out, config, studies
        self.records = Records(out)
        self.sequences = config.data.sequences
        self.image_inputs: dict[str, str] = {}

    # ---- images ----

    def check_images(self) -> list[Study]:
        """Read every study that is not prepared yet; DataError tells the first defect and how many more there are."""
        todo, defects = [], Defects()
        for study in _bar(self.studies, "checking studies"):
            if self._is_imported(study):
                continue
            try:
                inputs = self._image_digest(study)
                if not self.records.is_done(study.id, "image", inputs):
                    self._read_series(study)
                    todo.append(study)
            except DataError as defect:
                defects.add(defect)
        defects.raise_first()
        return todo

    def write_images(self, todo: list[Study]) -> None:
        self._start(todo, "image")
        for study in _bar(todo, "images"):
            series = self._read_series(study)
            grid = make_grid(series[self._leading], self.config.data.spacing, self.config.data.dim)
            files, windows = {}, {}
            for sequence in self.sequences:
                try:
                    image, windows[sequence] = normalise(resample(series[sequence], grid), sequence, grid)
                except DataError as defect:
                    defect.path = str(study.files[sequence])
                    raise
                files[f"image/{sequence}"] = self.records.write_array(f"images/{study.id}/{sequence}.npy", image)
            facts = {"affine": grid.affine.tolist(), "spacing": list(self.config.data.spacing), "window": windows}
            self.records.put(study.id, "image", self.image_inputs[study.id], files, facts)

    @property
    def _leading(self) -> str:
        """The sequence that the grid is laid over."""
        return "t2w" if "t2w" in self.sequences else self.sequences[0]

    def _image_digest(self, study: Study) -> str:
        for sequence in self.sequences:
            path = study.files.get(sequence)
            if path is None or not path.exists():
                why = f"the study '{study.id}' has no {sequence}" if path is None else "this file does not exist"
                where = study.listed_in if path is None else path
                field = f"{study.field or study.id}.{sequence}"
                raise DataError(why, path=where, field=field, fix="add the series, or leave it out of data.sequences")
        series = {sequence: fingerprint(study.files[sequence]) for sequence in self.sequences}
        settings = self.config.data.model_dump(include={"sequences", "spacing", "dim"})
        self.image_inputs[study.id] = digest([_RECIPE, series, settings])
        return self.image_inputs[study.id]

    def _read_series(self, study: Study) -> dict[str, Volume]:
        series: dict[str, Volume] = {}
        for sequence in self.sequences:
            series[sequence] = read_volume(study.files[sequence])
            check_axial(series[sequence], study.files[sequence])
        grid = make_grid(series[self._leading], self.config.data.spacing, self.config.data.dim)
        for sequence in self.sequences:
            if not covers_centre(series[sequence], grid):
                why, fix = f"does not lie where the {self._leading} series lies", "give series of one examination"
                raise DataError(why, path=study.files[sequence], field="origin", fix=fix)
        return series

    # ---- text ----

    def write_text(self, encoder: TextEncoder | None) -> None:
        """Each different report is encoded once, always in the same batches, so that an interruption changes no bit."""
        for study in self.studies:
            if study.text_file is not None:
                self._import_text(study)
        if encoder is None:
            return
        keys = {study.id: digest([_RECIPE, encoder.identity, study.report or ""]) for study in self.studies}
        stale = [study for study in self.studies if not self.records.is_done(study.id, "text", keys[study.id])]
        self._start(stale, "text")
        reports = sorted({keys[study.id]: study.report or "" for study in self.studies}.items())
        wanted = {keys[study.id]: [other.id for other in stale if keys[other.id] == keys[study.id]] for study in stale}
        size = encoder.config.batch_size
        batches = [reports[start : start + size] for start in range(0, len(reports), size)]
        batches = [batch for batch in batches if wanted.keys() & dict(batch).keys()]
        for batch in _bar(batches, "reports", unit="batch"):
            encoded = encoder.encode([report for _, report in batch])
            for (key, _), features, truncated in zip(batch, encoded.features, encoded.truncated, strict=True):
                if key in wanted:
                    entry = self.records.write_array(f"text/{key}.npy", features)
                    for case in wanted[key]:
                        self.records.put(case, "text", key, {"text": entry}, {"truncated": truncated})

    def _import_text(self, study: Study) -> None:
        assert study.text_file is not None
        inputs = digest([_RECIPE, "imported", fingerprint(study.text_file)])
        if not self.records.is_done(study.id, "text", inputs):
            self._start([study], "text")
            features = self._text_features(study)
            entry = self.records.write_array(f"text/{inputs}.npy", features)
            self.records.put(study.id, "text", inputs, {"text": entry}, {"truncated": False})

    def _text_features(self, study: Study) -> np.ndarray:
        assert study.text_file is not None
        features = open_array(study.text_file, field=study.field)
        expected = (self.config.text.max_length, self.config.model.input_dim)
        if features.shape != expected:
            why = f"text features are {features.shape}, (text.max_length, model.input_dim) is {expected}"
            raise DataError(why, path=study.text_file, field="shape", fix="set both to what the features are")
        if not np.isfinite(features).all():
            raise DataError(
                "text features are not finite", path=study.text_file, field="values", fix="encode the report again"
            )
        return features

    # ---- latents ----

    def check_imports(self, vae: LatentEncoder | None) -> None:
        """Read the reference's own prepared files once, before anything is written."""
        imported = [study for study in self.studies if self._is_imported(study)]
        if imported and (vae is not None or len(imported) < len(self.studies)):
            other = "--vae is given" if vae is not None else "others as images"
            why = f"{len(imported)} studies come as latents, {other}: latents of two autoencoders do not mix"
            fix = "give latents (_emb.nii.gz) of all studies and no --vae, or of none"
            raise DataError(why, path=imported[0].listed_in, field=imported[0].field, fix=fix)
        defects = Defects()
        for study in _bar([study for study in self.studies if study.text_file is not None], "checking imports"):
            try:
                self._text_features(study)
                if self._is_imported(study):
                    for sequence in self.sequences:
                        import_latent(study.latent_files[sequence], self.config)
            except DataError as defect:
                defects.add(defect)
        defects.raise_first()

    def _is_imported(self, study: Study) -> bool:
        return all(sequence in study.latent_files for sequence in self.sequences)

    def import_latents(self) -> None:
        for study in _bar([study for study in self.studies if self._is_imported(study)], "latents"):
            inputs = self._latent_digest(study, None)
            if self.records.is_done(study.id, "latent", inputs):
                continue
            self._start([study], "latent")
            files, parts = {}, {}
            for sequence in self.sequences:
                mean, affine = import_latent(study.latent_files[sequence], self.config)
                target = f"latents/{study.id}/{sequence}_mean.npy"
                files[f"latent_mean/{sequence}"] = self.records.write_array(target, mean)
                parts[sequence] = moments(mean, None)
            spacing = study.spacing or np.linalg.norm(affine[:3, :3], axis=0).tolist()
            facts = {"vae": None, "moments": parts, "affine": affine.tolist(), "spacing": spacing, "window": {}}
            self.records.put(study.id, "latent", inputs, files, facts)

    def write_latents(self, vae: LatentEncoder) -> None:
        inputs = {study.id: self._latent_digest(study, vae.sha256) for study in self.studies}
        stale = [study for study in self.studies if not self.records.is_done(study.id, "latent", inputs[study.id])]
        self._start(stale, "latent")
        for study in _bar(stale, "latents"):
            files, parts = {}, {}
            for sequence in self.sequences:
                entry = self.records.get(study.id, "image")["files"][f"image/{sequence}"]
                mean, sigma = vae.encode(open_array(self.out / entry["path"]))
                parts[sequence] = moments(mean, sigma)
                for name, array in (("mean", mean), ("sigma", sigma)):
                    target = f"latents/{study.id}/{sequence}_{name}.npy"
                    files[f"latent_{name}/{sequence}"] = self.records.write_array(target, array)
            facts = {"vae": vae.sha256, "moments": parts}
            self.records.put(study.id, "latent", inputs[study.id], files, facts)

    def _latent_digest(self, study: Study, vae: str | None) -> str:
        if vae is None:
            sources = {
                name: fingerprint(study.latent_files[name]) for name in self.sequences if name in study.latent_files
            }
            return digest([_RECIPE, "imported", sources])
        images = self.records.get(study.id, "image").get("files", {})
        return digest([_RECIPE, vae, {key: entry["sha256"] for key, entry in sorted(images.items())}])

    # ---- manifest ----

    def write_manifest(self, encoder: TextEncoder | None) -> None:
        vae, with_latents = self._latents_state()
        text = self._text_info(encoder)
        cases = [self._case(study, with_latents, with_text=text is not None) for study in self.studies]
        train = [study.id for study in self.studies if study.split == "train"] or [study.id for study in self.studies]
        scale = None
        if with_latents:
            parts = [self.records.get(case, "latent")["facts"]["moments"] for case in train]
            scale = [1 / combine_moments([part[name] for part in parts]) ** 0.5 for name in self.sequences]
        truncated = [s.id for s in self.studies if self.records.get(s.id, "text").get("facts", {}).get("truncated")]
        manifest = {
            "format": FORMAT,
            "version": 1,
            "data": self.config.data.model_dump(mode="json"),
            "text": text,
            "vae": None if vae is None else {"sha256": vae},
            "scale_factor": scale,
            "intensity_scale": {name: self._intensity_scale(name, train) for name in self.sequences},
            "truncated_reports": truncated,
            "cases": cases,
        }
        Prepared.model_validate(manifest)
        write_json(self.out / NAME, manifest)
        self._tell(truncated, with_latents)

    def _latents_state(self) -> tuple[str | None, bool]:
        """(SHA-256 of the VAE, are all latents there). Latents that an earlier run made of the same images stay."""
        found = [self.records.get(study.id, "latent") for study in self.studies]
        vae = found[0]["facts"]["vae"] if found[0] else None
        whole = all(
            record.get("inputs") == self._latent_digest(study, vae) and (vae is not None or self._is_imported(study))
            for study, record in zip(self.studies, found, strict=True)
        )
        return (vae, True) if whole else (None, False)

    def _case(self, study: Study, with_latents: bool, with_text: bool) -> dict[str, Any]:
        wanted = {"image": not self._is_imported(study), "latent": with_latents, "text": with_text}
        records = {stage: self.records.get(study.id, stage) for stage in wanted if wanted[stage]}
        place = records["image" if wanted["image"] else "latent"]["facts"]
        isnull = study.text_isnull if study.text_file is not None else int(study.report is None)
        return {
            "id": study.id,
            "split": study.split,
            "dataset": study.dataset,
            "spacing": place["spacing"],
            "pirads": study.pirads,
            "text_isnull": isnull,
            "affine": place["affine"],
            "window": place["window"],
            "files": {key: entry for record in records.values() for key, entry in record["files"].items()},
        }

    def _text_info(self, encoder: TextEncoder | None) -> dict[str, Any] | None:
        if encoder is not None:
            return encoder.identity
        if all(study.text_file is None for study in self.studies):
            return None
        text = self.config.text
        shared = {
            "encoder": text.encoder,
            "revision": text.revision,
            "max_length": text.max_length,
            "dtype": text.dtype,
        }
        return {**shared, "width": self.config.model.input_dim, "fingerprint": "imported"}

    def _intensity_scale(self, sequence: str, train: list[str]) -> float:
        """What a generated volume in [0, 1] is multiplied by; 1 where the intensities are not known (imported latents)."""
        if sequence == "adc":
            return ADC_WINDOW[1]
        windows = [self.records.get(case, "image").get("facts", {}).get("window", {}).get(sequence) for case in train]
        highs = [window[1] for window in windows if window]
        return statistics.median(highs) if highs else 1.0

    # ---- messages ----

    def _start(self, todo: list[Study], stage: str) -> None:
        """Before files that the manifest lists are replaced, the manifest goes: it comes back when all is whole."""
        changed = [study.id for study in todo if self.records.get(study.id, stage)]
        if changed:
            logger.warning("%s: inputs or settings changed, done again for %s", stage, _names(changed))
            (self.out / NAME).unlink(missing_ok=True)

    def _tell(self, truncated: list[str], with_latents: bool) -> None:
        count = len(self.studies)
        reports = sum(study.report is not None or study.text_isnull == 0 for study in self.studies)
        classes = sum(study.pirads is not None for study in self.studies)
        logger.info("%d studies prepared, %d with a report, %d with a class", count, reports, classes)
        if truncated:
            length = self.config.text.max_length
            why = "%d reports are longer than %d tokens and lost their beginning: %s"
            logger.warning(why, len(truncated), length, _names(truncated))
        if not with_latents:
            logger.info("no latents yet: run `ccella-fast train-vae`, then `prepare` again with --vae")


def _text_encoder(config: Config, studies: list[Study]) -> TextEncoder | None:
    """None for a variant without text, and when all features are imported."""
    if not get_variant(config.model.variant).text or all(study.text_file is not None for study in studies):
        return None
    if any(study.text_file is not None for study in studies):
        fix = "give features (.npy) of all reports, or of none"
        raise DataError(
            "some reports come as features, others as text", field="text", path=studies[0].listed_in, fix=fix
        )
    encoder = TextEncoder(config.text)
    if encoder.width != config.model.input_dim:
        why = f"the encoder's features are {encoder.width} wide, model.input_dim is {config.model.input_dim}"
        raise ConfigError(
            why, field="model.input_dim", fix=f"set model.input_dim={encoder.width}, or choose another encoder"
        )
    return encoder


def _check_writable(out: Path) -> None:
    existing = _existing(out)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        why = "cannot write here" if existing.is_dir() else f"{existing.name} is a file, not a folder"
        raise DiskError(why, path=out, field="--out", fix="choose a folder you can write to")


def _check_room(out: Path, config: Config, images: int) -> None:
    values = (
        int(np.prod(config.data.dim)) * len(config.data.sequences) + config.text.max_length * config.model.input_dim
    )
    needed, free = 4 * images * values, shutil.disk_usage(_existing(out)).free
    if needed > free:
        why = f"about {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free"
        raise DiskError(why, path=out, field="--out", fix="free space or choose another folder")


def _existing(out: Path) -> Path:
    return next(folder for folder in [out.absolute(), *out.absolute().parents] if folder.exists())


def _bar(items: list[Any], what: str, unit: str = "study") -> Any:
    return tqdm(items, desc=what, unit=unit, mininterval=1, disable=not items)


def _names(cases: list[str]) -> str:
    return ", ".join(cases[:50]) + (f" and {len(cases) - 50} more" if len(cases) > 50 else "")
