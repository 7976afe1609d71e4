"""The stages of preparation: images, text, latents; and the import of text and latents that the reference's scripts made.

A stage says what its result for a study depends on (`inputs`), reads it once before anything is written (`check`), and does
what is missing (`run`), one study or one batch at a time; images, which take the time, in several processes.
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
from ccella_fast.data.preparation.images import ImageTask, bytes_needed, check_images, make_images
from ccella_fast.data.preparation.latent_encoder import LatentEncoder, import_latent, moments
from ccella_fast.data.preparation.stage_cache import StageCache, fingerprint_of
from ccella_fast.data.preparation.worker_pool import TaskResult, WorkerPool
from ccella_fast.data.readers.study import Study
from ccella_fast.data.text_encoder import TextEncoder
from ccella_fast.environment import warn_of_emulated_bf16
from ccella_fast.errors import DataError

# Part of every digest; raise it when the same inputs give other results.
RECIPE, IMAGE_RECIPE, AUGMENTED_RECIPE = 1, 2, 2


class Stage:
    """`name` is the key of the records; see the module for the methods."""

    name: ClassVar[str]

    def __init__(self, records: StageCache, studies: list[Study], config: Config):
        self.records, self.studies, self.config = records, studies, config
        self.sequences = config.data.sequences

    @property
    def checks(self) -> bool:
        """Has it inputs that can be unsound?"""
        return type(self).check is not Stage.check

    def inputs(self, study: Study) -> str:
        raise NotImplementedError

    def check(self, todo: list[Study]) -> list[DataError]:
        """Read everything that these studies need; what is wrong with it."""
        return []

    def run(self, todo: list[Study]) -> dict[str, float]:
        """Do these studies; returns seconds a study, where studies are done one by one."""
        raise NotImplementedError

    def stale(self) -> list[Study]:
        """The studies for which this stage is not done, or was done with other inputs."""
        return [study for study in self.studies if not self.records.is_done(study.id, self.name, self.inputs(study))]

    def kept(self) -> bool:
        """Is what the stage leaves beside its studies' files still there?"""
        return True


class ImageStage(Stage):
    """Series to one grid and [0, 1], in the processes of `pool`."""

    name = "image"

    def __init__(self, records: StageCache, studies: list[Study], config: Config, pool: WorkerPool):
        super().__init__(records, studies, config)
        self.pool = pool

    def inputs(self, study: Study) -> str:
        series = {sequence: self.records.fingerprint(study.files[sequence]) for sequence in self.sequences}
        return fingerprint_of(
            [IMAGE_RECIPE, series, self.config.data.model_dump(include={"sequences", "spacing", "dim"})]
        )

    def check(self, todo: list[Study]) -> list[DataError]:
        found = [(done.task, done.result) for done in self._all(check_images, todo, "checking images") if done.result]
        return [defect for _, defect in sorted(found, key=lambda pair: pair[0])]

    def run(self, todo: list[Study]) -> dict[str, float]:
        seconds = {}
        for done in self._all(make_images, todo, "images"):
            if isinstance(done.result, DataError):
                raise done.result
            study = todo[done.task]
            files, facts = done.result
            self.records.trust(files.values())
            self.records.put(study.id, self.name, self.inputs(study), files, facts)
            seconds[study.id] = done.seconds
        return seconds

    def _all(self, function: Callable[[ImageTask], Any], todo: list[Study], what: str) -> Iterator[TaskResult]:
        tasks = [ImageTask(study.id, self._files(study), self.config.data, self.records.out) for study in todo]
        names, each = [study.id for study in todo], bytes_needed(tasks[0]) if tasks else 0
        with progress_bar(todo, what) as progress:
            for done in self.pool.run(function, tasks, names, bytes_each=each):
                progress.update()
                yield done

    def _files(self, study: Study) -> dict[str, Path]:
        return {sequence: study.files[sequence] for sequence in self.sequences}


class TextStage(Stage):
    """Reports to features. Each different report is encoded once, and always in the same batch, so that an interruption
    changes no bit."""

    name = "text"

    def __init__(self, records: StageCache, studies: list[Study], config: Config, encoder: TextEncoder):
        super().__init__(records, studies, config)
        self.encoder = encoder

    def inputs(self, study: Study) -> str:
        return fingerprint_of([RECIPE, self.encoder.identity, study.report or ""])

    def run(self, todo: list[Study]) -> dict[str, float]:
        wanted: dict[str, list[str]] = {}
        for study in todo:
            wanted.setdefault(self.inputs(study), []).append(study.id)
        reports = sorted({self.inputs(study): study.report or "" for study in self.studies}.items())
        size = self.config.text.batch_size
        batches = [reports[start : start + size] for start in range(0, len(reports), size)]
        batches = [batch for batch in batches if wanted.keys() & dict(batch).keys()]
        if batches and self.config.text.dtype == "bfloat16" and self.encoder.device.type == "cpu":
            warn_of_emulated_bf16("set text.dtype to float32, for training and sampling alike (the features differ)")
        for batch in progress_bar(batches, "reports", unit="batch"):
            encoded = self.encoder.encode([report for _, report in batch])
            for (key, _), features, truncated in zip(batch, encoded.features, encoded.truncated, strict=True):
                if key in wanted:
                    entry = self.records.write_array(f"text/{key}.npy", features)
                    for case in wanted[key]:
                        self.records.put(case, self.name, key, {"text": entry}, {"truncated": truncated})
        return {}


class ImportedTextStage(Stage):
    """The reference's `text.npy`, (text.max_length, model.input_dim) float32."""

    name = "text"

    def inputs(self, study: Study) -> str:
        assert study.text_file is not None
        return fingerprint_of([RECIPE, "imported", self.records.fingerprint(study.text_file)])

    def check(self, todo: list[Study]) -> list[DataError]:
        return _defects(self._read, progress_bar(todo, "checking texts"))

    def run(self, todo: list[Study]) -> dict[str, float]:
        for study in progress_bar(todo, "reports"):
            entry = self.records.write_array(f"text/{self.inputs(study)}.npy", self._read(study))
            self.records.put(study.id, self.name, self.inputs(study), {"text": entry}, {"truncated": False})
        return {}

    def _read(self, study: Study) -> np.ndarray:
        assert study.text_file is not None
        features, path = open_array(study.text_file, field=f"{study.field}.text"), study.text_file
        expected = (self.config.text.max_length, self.config.model.input_dim)
        if features.shape != expected:
            why = f"text features are {features.shape}; (text.max_length, model.input_dim) is {expected}"
            raise DataError(why, path=path, field=f"{study.field}.text", fix="set both to what the features are")
        if not np.isfinite(features).all():
            why, fix = "text features are not finite", "encode the report again"
            raise DataError(why, path=path, field=f"{study.field}.text", fix=fix)
        return features


class LatentStage(Stage):
    """Images through the autoencoder's encoder: the posterior's mean and sigma."""

    name = "latent"

    def __init__(self, records: StageCache, studies: list[Study], config: Config, vae: LatentEncoder):
        super().__init__(records, studies, config)
        self.vae = vae

    def inputs(self, study: Study) -> str:
        return latent_digest(self.records, study, self.vae.sha256)

    def kept(self) -> bool:
        return (self.records.out / "vae" / "manifest.json").is_file()

    def run(self, todo: list[Study]) -> dict[str, float]:
        seconds = {}
        for study in progress_bar(todo, "latents"):
            begun = time.perf_counter()
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
            seconds[study.id] = time.perf_counter() - begun
        self.vae.save(self.records.out / "vae")
        return seconds


class ImportedLatentStage(Stage):
    """The reference's `_emb.nii.gz`: one drawn sample, taken as the mean."""

    name = "latent"

    def inputs(self, study: Study) -> str:
        sources = {sequence: self.records.fingerprint(study.latent_files[sequence]) for sequence in self.sequences}
        return fingerprint_of([RECIPE, "imported", sources])

    def check(self, todo: list[Study]) -> list[DataError]:
        def read(study: Study) -> None:
            for sequence in self.sequences:
                import_latent(study.latent_files[sequence], self.config)

        return _defects(read, progress_bar(todo, "checking latents"))

    def run(self, todo: list[Study]) -> dict[str, float]:
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
    """What latents made by the autoencoder with this SHA-256 depend on: it, and the prepared images."""
    images = records.get(study.id, "image").get("files", {})
    return fingerprint_of([RECIPE, vae, {key: entry["sha256"] for key, entry in sorted(images.items())}])


def _defects(read: Callable[[Study], Any], studies: Iterable[Study]) -> list[DataError]:
    found = []
    for study in studies:
        try:
            read(study)
        except DataError as defect:
            found.append(defect)
    return found


def progress_bar(items: list[Any], what: str, unit: str = "study") -> Any:
    """A progress bar over `items`; none where there is nothing to do."""
    return tqdm(items, desc=what, unit=unit, mininterval=1, disable=not items)
