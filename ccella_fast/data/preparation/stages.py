"""The stages of preparation: images, text and latents, and the import of text features and latents of the reference's scripts.

A stage states what its result for a study depends on (`inputs`), reads these inputs before anything is written (`check`) and
makes the results that are missing (`run`), per study or per batch. Images, which take most of the time, are made in several
processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from ccella_fast.config import Config
from ccella_fast.data.manifest import open_array
from ccella_fast.data.preparation.images import ImageTask, bytes_needed, check_images, make_images, read_images
from ccella_fast.data.preparation.latent_encoder import LatentEncoder, import_latent, moments
from ccella_fast.data.preparation.stage_cache import StageCache, fingerprint_of
from ccella_fast.data.preparation.worker_pool import TaskResult, WorkerPool
from ccella_fast.data.readers.study import Study
from ccella_fast.data.readers.volume import StoredVolume
from ccella_fast.data.text_encoder import TextEncoder
from ccella_fast.errors import DataError
from ccella_fast.hardware import warn_of_emulated_bf16

# Part of every digest; to be increased when the same inputs give other results.
RECIPE, IMAGE_RECIPE, AUGMENTED_RECIPE = 1, 2, 2


class Stage:
    """One kind of result per study.

    Args:
        records: The records of the prepared folder.
        studies: The studies to prepare.
        config: The configuration.
    """

    name: ClassVar[str]  #: key of the stage in the records

    def __init__(self, records: StageCache, studies: list[Study], config: Config):
        self.records, self.studies, self.config = records, studies, config
        self.sequences = config.data.sequences

    @property
    def checks_inputs(self) -> bool:
        """Whether the stage reads inputs that may be invalid."""
        return type(self).check is not Stage.check

    def inputs(self, study: Study) -> str:
        """Digest of everything that the result for a study depends on."""
        raise NotImplementedError

    def check(self, todo: list[Study]) -> list[DataError]:
        """Read everything that these studies need; returns the defects found."""
        return []

    def run(self, todo: list[Study]) -> dict[str, float]:
        """Make the results of these studies; returns the seconds per study where studies are processed one by one."""
        raise NotImplementedError

    def stale(self) -> list[Study]:
        """The studies whose result does not exist or was made from other inputs."""
        return [study for study in self.studies if not self.records.is_done(study.id, self.name, self.inputs(study))]

    def has_shared_files(self) -> bool:
        """Whether the files that the stage writes once, next to those of the studies, exist."""
        return True


class ImageStage(Stage):
    """Series to images on one grid in [0, 1], in the processes of `pool`."""

    name = "image"

    def __init__(
        self,
        records: StageCache,
        studies: list[Study],
        config: Config,
        pool: WorkerPool,
        b_value: float | None = None,
    ):
        super().__init__(records, studies, config)
        self.pool, self.b_value = pool, b_value

    def inputs(self, study: Study) -> str:
        """Digest of the series and the grid."""
        series = {sequence: self.records.fingerprint(study.files[sequence]) for sequence in self.sequences}
        grid = self.config.data.model_dump(include={"sequences", "spacing", "dim"})
        return fingerprint_of([IMAGE_RECIPE, series, grid, *([] if self.b_value is None else [self.b_value])])

    def check(self, todo: list[Study]) -> list[DataError]:
        """Read every series."""
        results = {done.task: done.result for done in self._run_in_pool(check_images, todo, "checking images")}
        return [results[task] for task in sorted(results) if results[task]]

    def run(self, todo: list[Study]) -> dict[str, float]:
        """Write the images, in several processes."""
        seconds = {}
        for done in self._run_in_pool(make_images, todo, "images"):
            if isinstance(done.result, DataError):
                raise done.result
            study = todo[done.task]
            files, facts = done.result
            self.records.trust(files.values())
            self.records.put(study.id, self.name, self.inputs(study), files, facts)
            seconds[study.id] = done.seconds
        return seconds

    def read(self, todo: list[Study], title: str) -> Iterator[tuple[Study, dict[str, StoredVolume]]]:
        """The series of these studies as they were measured."""
        for done in self._run_in_pool(read_images, todo, title):
            if isinstance(done.result, DataError):
                raise done.result
            yield todo[done.task], done.result

    def _run_in_pool(self, function: Callable[[ImageTask], Any], todo: list[Study], title: str) -> Iterator[TaskResult]:
        tasks = [
            ImageTask(study.id, self._files(study), self.config.data, self.records.out, self.b_value) for study in todo
        ]
        ids, bytes_per_task = [study.id for study in todo], bytes_needed(tasks[0]) if tasks else 0
        with progress_bar(todo, title) as progress:
            for done in self.pool.run(function, tasks, ids, bytes_each=bytes_per_task):
                progress.update()
                yield done

    def _files(self, study: Study) -> dict[str, Path]:
        return {sequence: study.files[sequence] for sequence in self.sequences}


class TextStage(Stage):
    """Reports to features.

    Each distinct report is encoded once and always in the same batch, so that the result does not depend on interruptions.
    """

    name = "text"

    def __init__(self, records: StageCache, studies: list[Study], config: Config, encoder: TextEncoder):
        super().__init__(records, studies, config)
        self.encoder = encoder

    def inputs(self, study: Study) -> str:
        """Digest of the report and the encoder."""
        return fingerprint_of([RECIPE, self.encoder.identity, study.report or ""])

    @property
    def null_file(self) -> str:
        """The file with the features of the null report, which only training with report dropout needs."""
        return f"text/null-{fingerprint_of([RECIPE, self.encoder.identity])}.npy"

    def has_shared_files(self) -> bool:
        """Whether the null report is stored, if it is needed."""
        return not self.config.training.report_dropout or (self.records.out / self.null_file).is_file()

    def run(self, todo: list[Study]) -> dict[str, float]:
        """Encode the reports in batches."""
        ids_of: dict[str, list[str]] = {}
        for study in todo:
            ids_of.setdefault(self.inputs(study), []).append(study.id)
        reports = sorted({self.inputs(study): study.report or "" for study in self.studies}.items())
        size = self.config.text.batch_size
        batches = [reports[start : start + size] for start in range(0, len(reports), size)]
        batches = [batch for batch in batches if ids_of.keys() & dict(batch).keys()]
        if batches and self.config.text.dtype == "bfloat16" and self.encoder.device.type == "cpu":
            warn_of_emulated_bf16("set text.dtype to float32, for training and sampling alike (the features differ)")
        for batch in progress_bar(batches, "reports", unit="batch"):
            encoded = self.encoder.encode([report for _, report in batch])
            for (key, report), features, truncated in zip(batch, encoded.features, encoded.truncated, strict=True):
                if key in ids_of:
                    entry = self.records.write_array(f"text/{key}.npy", features)
                    facts = {"truncated": truncated, "words": len(report.split())}
                    for case in ids_of[key]:
                        self.records.put(case, self.name, key, {"text": entry}, facts)
        if not self.has_shared_files():
            # Alone, as in sampling: the bits of a report's features depend on the others of its batch.
            self.records.write_array(self.null_file, self.encoder.encode([""]).features[0])
        return {}


class ImportedTextStage(Stage):
    """Import of the reference's `text.npy`, (text.max_length, model.input_dim) float32."""

    name = "text"

    def inputs(self, study: Study) -> str:
        """Digest of the file of features."""
        assert study.text_file is not None
        return fingerprint_of([RECIPE, "imported", self.records.fingerprint(study.text_file)])

    def check(self, todo: list[Study]) -> list[DataError]:
        """Read every file of features."""
        return _find_defects(self._read, progress_bar(todo, "checking texts"))

    def run(self, todo: list[Study]) -> dict[str, float]:
        """Copy the features."""
        for study in progress_bar(todo, "reports"):
            entry = self.records.write_array(f"text/{self.inputs(study)}.npy", self._read(study))
            self.records.put(study.id, self.name, self.inputs(study), {"text": entry}, {"truncated": False})
        return {}

    def _read(self, study: Study) -> np.ndarray:
        assert study.text_file is not None
        path, field = study.text_file, f"{study.field}.text"
        features = open_array(path, field=field)
        expected = (self.config.text.max_length, self.config.model.input_dim)
        if features.shape != expected:
            why = f"the text features have the shape {features.shape}, but (text.max_length, model.input_dim) is {expected}"
            raise DataError(why, path=path, field=field, fix="set both keys to the size of the features")
        if not np.isfinite(features).all():
            why = "the text features are not finite (NaN or infinity)"
            raise DataError(why, path=path, field=field, fix="encode the report again")
        return features


class LatentStage(Stage):
    """Images to the mean and sigma of the autoencoder's posterior."""

    name = "latent"

    def __init__(self, records: StageCache, studies: list[Study], config: Config, vae: LatentEncoder):
        super().__init__(records, studies, config)
        self.vae = vae

    def inputs(self, study: Study) -> str:
        """Digest of the images and the autoencoder."""
        return latent_digest(self.records, study, self.vae.sha256)

    def has_shared_files(self) -> bool:
        """Whether the autoencoder is stored with its latents."""
        return (self.records.out / "vae" / "manifest.json").is_file()

    def run(self, todo: list[Study]) -> dict[str, float]:
        """Encode the images, and store the autoencoder."""
        seconds = {}
        for study in progress_bar(todo, "latents"):
            start = time.perf_counter()
            files, parts = {}, {}
            for sequence in self.sequences:
                entry = self.records.get(study.id, "image")["files"][f"image/{sequence}"]
                mean, sigma = self.vae.encode(open_array(self.records.out / entry["path"]))
                parts[sequence] = moments(mean, sigma)
                for name, array in (("mean", mean), ("sigma", sigma)):
                    target = f"latents/{study.id}/{sequence}_{name}.npy"
                    files[f"latent_{name}/{sequence}"] = self.records.write_array(target, array)
            facts = {"vae": self.vae.sha256, "moments": parts}
            self.records.put(study.id, self.name, self.inputs(study), files, facts)
            seconds[study.id] = time.perf_counter() - start
        self.vae.save(self.records.out / "vae")
        return seconds


class ImportedLatentStage(Stage):
    """Import of the reference's `_emb.nii.gz`, one sample of the posterior, which is taken as its mean."""

    name = "latent"

    def inputs(self, study: Study) -> str:
        """Digest of the latent files."""
        files = {sequence: self.records.fingerprint(study.latent_files[sequence]) for sequence in self.sequences}
        return fingerprint_of([RECIPE, "imported", files])

    def check(self, todo: list[Study]) -> list[DataError]:
        """Read every latent."""

        def read(study: Study) -> None:
            for sequence in self.sequences:
                import_latent(study.latent_files[sequence], self.config)

        return _find_defects(read, progress_bar(todo, "checking latents"))

    def run(self, todo: list[Study]) -> dict[str, float]:
        """Copy the latents."""
        for study in progress_bar(todo, "latents"):
            files, parts = {}, {}
            for sequence in self.sequences:
                mean, affine = import_latent(study.latent_files[sequence], self.config)
                target = f"latents/{study.id}/{sequence}_mean.npy"
                files[f"latent_mean/{sequence}"] = self.records.write_array(target, mean)
                parts[sequence] = moments(mean, None)
            spacing = study.spacing or np.linalg.norm(affine[:3, :3], axis=0).tolist()
            facts = {"vae": None, "moments": parts, "affine": affine.tolist(), "spacing": spacing, "window": {}}
            self.records.put(study.id, self.name, self.inputs(study), files, facts)
        return {}


def latent_digest(records: StageCache, study: Study, vae: str) -> str:
    """Digest of what the latents of a study depend on: the prepared images and the autoencoder with this SHA-256."""
    images = records.get(study.id, "image").get("files", {})
    return fingerprint_of([RECIPE, vae, {key: entry["sha256"] for key, entry in sorted(images.items())}])


def _find_defects(read: Callable[[Study], Any], studies: Iterable[Study]) -> list[DataError]:
    defects = []
    for study in studies:
        try:
            read(study)
        except DataError as defect:
            defects.append(defect)
    return defects


def progress_bar(items: list[Any], title: str, unit: str = "study") -> Any:
    """A progress bar over `items`, which is not shown if there are none."""
    return tqdm(items, desc=title, unit=unit, mininterval=1, disable=not items)
