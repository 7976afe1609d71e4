"""Prepared studies as training samples (docs/explanation/method.md, section 1.5).

Three classes implement `LatentSource`, which yields the batches that the trainer requests: `PreparedDataset` reads memory maps,
`ResidentLatents` holds tensors on the device, and `OnlineLatents` encodes images with the autoencoder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ccella_fast.config import Config
from ccella_fast.data.augmentation.parameters import augmented_spacings
from ccella_fast.data.loading.selection import select_studies
from ccella_fast.data.manifest import IMPORTED, NAME, FileEntry, Manifest, Split, StudyEntry, load_manifest
from ccella_fast.errors import DataError, did_you_mean
from ccella_fast.variants import CLASS_SCALE, SPACING_SCALE


class TrainingSample(NamedTuple):
    """The training inputs of one study, or of a batch of B studies, whose tensors have a leading dimension B.

    Latents of several sequences are concatenated along the channels.
    """

    ids: list[str]
    latent_mean: Tensor  # (C, X, Y, Z) float32
    latent_sigma: Tensor  # (C, X, Y, Z) float32; 0 where only the mean was stored
    text: Tensor | None  # (L, E) float32; None: the variant does not use text
    pirads: Tensor  # (2,) float32, one-hot x CLASS_SCALE; zeros if unknown
    spacing: Tensor  # (3,) float32, mm x SPACING_SCALE
    has_class: Tensor  # () bool: the study has a class and a report to predict it from

    def to(self, device: torch.device) -> TrainingSample:
        """A copy with all tensors on `device`."""
        parts = self._asdict().items()
        moved: dict[str, Any] = {name: to_device(part, device) for name, part in parts if isinstance(part, Tensor)}
        return self._replace(**moved)


class StudyEpoch(NamedTuple):
    """A study and the epoch in which it is used, which together select one of its versions."""

    study: int  # index in the dataset
    epoch: int


class LatentSource(Protocol):
    """Where the latents of a batch come from."""

    def batches(self, picks: Callable[[int], Sequence[StudyEpoch]], count: int) -> Iterator[TrainingSample]:
        """Yield the batch of the studies `picks(n)` for n = 0 ... count-1."""
        ...


class PreparedDataset:
    """The studies of one split of a prepared folder, for the variant and the grid of `config`.

    The constructor compares every file with its SHA-256 in the manifest and every shape with the configuration; afterwards,
    files are read through memory maps. Of several processes on a machine, each compares the hashes of a part of the studies.

    Args:
        folder: the prepared folder.
        config: the configuration to train with.
        split: the split of the studies.
        needs: whether latents or images will be read.

    Attributes:
        ids: the id of each study.
        has_class: per study, whether it has a class and a report to predict it from.
        copies: the number of augmented latents per study, in addition to those of the study as it was prepared.

    Raises:
        DataError: a file is missing or damaged, or the data does not fit the configuration. The error names the study.
    """

    def __init__(
        self,
        folder: str | Path,
        config: Config,
        split: Split = "train",
        *,
        needs: Literal["latents", "images"] = "latents",
    ):
        self.prepared = load_manifest(folder)
        self.config, self.needs = config, needs
        self._manifest_path = self.prepared.folder / NAME
        self.variant = config.model.traits
        self.cases = self._select(split)
        self.ids = [case.id for case in self.cases]
        self.copies = 0 if needs == "images" else min(len(case.augmented) for case in self.cases)
        self.has_class = [case.pirads is not None and not case.text_isnull for case in self.cases]
        self._check_classes()
        self._check_flips()
        if self.variant.text:
            check_encoder(self.prepared, config)
        check_spacing(self.prepared, config)
        rank, local_rank, local_size = (
            int(os.environ.get(name, default))
            for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
        )
        bar = tqdm(self.cases, "checking prepared files", unit="study", mininterval=1, disable=rank != 0)
        for number, case in enumerate(bar):
            self._check_study(case, verify=number % local_size == local_rank % local_size)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> TrainingSample:
        return self.item(index)

    def item(self, index: int, copy: int = 0) -> TrainingSample:
        """Read one study. copy: 0 for the study as it was prepared, 1 ... `copies` for an augmented version."""
        case = self.cases[index]
        files = case.augmented[copy - 1].files if copy else case.files
        means, sigmas = [], []
        for sequence in self.config.data.sequences:
            means.append(self._tensor(case, f"latent_mean/{sequence}", files))
            has_sigma = f"latent_sigma/{sequence}" in files
            sigmas.append(
                self._tensor(case, f"latent_sigma/{sequence}", files) if has_sigma else torch.zeros_like(means[-1])
            )
        spacing = case.augmented[copy - 1].spacing if copy else case.spacing
        return self.make_sample(index, torch.cat(means), torch.cat(sigmas), spacing)

    def make_sample(self, index: int, mean: Tensor, sigma: Tensor, spacing: Sequence[float]) -> TrainingSample:
        """Combine latents (C, X, Y, Z) with the text and the class of study `index`.

        spacing: of the images that were encoded, in mm.
        """
        case = self.cases[index]
        return TrainingSample(
            [case.id],
            mean,
            sigma,
            self._tensor(case, "text", case.files) if self.variant.text else None,
            CLASS_SCALE * torch.tensor(case.pirads or [0, 0], dtype=torch.float32),
            SPACING_SCALE * torch.tensor(spacing, dtype=torch.float32),
            torch.tensor(self.has_class[index]),
        )

    def null_report(self) -> Tensor:
        """The features of the null report, (L, E) float32: those that `prepare` has stored, or of a study without a report.

        Raises:
            DataError: the prepared folder contains neither.
        """
        if self.prepared.null_text is not None:
            return torch.from_numpy(
                np.array(self.prepared.open_entry(self.prepared.null_text, "null_text", verify=True))
            )
        for case in self.prepared.cases:
            if case.text_isnull:
                return self._tensor(case, "text", case.files)
        why = "training.report_dropout needs the null report, and this folder does not contain it: every study has a report"
        fix = "run `ccella-fast prepare` again with this configuration, which adds it"
        if self.prepared.text is not None and self.prepared.text.fingerprint == IMPORTED:
            fix = "add a study without a report, with the features of the empty text"
        raise DataError(why, path=self._manifest_path, field="null_text", fix=fix)

    def trained_on(self) -> dict[str, Any]:
        """What a model that is trained on these studies has seen, for training_state.json.

        The number of studies of each class that a class can be learned from, and the smallest and largest voxel size along
        each axis.
        """
        learned = [case.pirads for case, known in zip(self.cases, self.has_class, strict=True) if known]
        spacings = [case.spacing for case in self.cases]
        spacings += [copy.spacing for case in self.cases for copy in case.augmented[: self.copies]]
        low, high = (list(map(choose, zip(*spacings, strict=True))) for choose in (min, max))
        if self.needs == "images":
            low, high = augmented_spacings(self.config.augmentation, low, high)
        return {"classes": [learned.count([1, 0]), learned.count([0, 1])], "spacing": [low, high]}

    def copy_of(self, pick: StudyEpoch) -> int:
        """The number of the version that is used in an epoch; each version is used once in `copies` + 1 epochs."""
        return (pick.study + pick.epoch) % (self.copies + 1)

    def batches(self, picks: Callable[[int], Sequence[StudyEpoch]], count: int) -> Iterator[TrainingSample]:
        """See `LatentSource`. Tensors are on the CPU."""
        for n in range(count):
            yield collate([self.item(pick.study, self.copy_of(pick)) for pick in picks(n)])

    def _tensor(self, case: StudyEntry, key: str, files: dict[str, FileEntry]) -> Tensor:
        return torch.from_numpy(np.array(self.prepared.array(case, key, files=files)))

    def _select(self, split: str) -> list[StudyEntry]:
        cases, tag = select_studies(self.prepared, self.config, split), self.config.data.dataset
        if not cases:
            tags = {case.dataset for case in self.prepared.cases if case.dataset and " " not in case.dataset}
            why = f"there is no study in the split '{split}'" + (f" with the dataset '{tag}'" if tag else "")
            fix = did_you_mean(tag, tags) if tag and tags else "prepare studies with this split"
            raise DataError(why, path=self._manifest_path, field="cases", fix=fix)
        return cases

    def _check_classes(self) -> None:
        unknown = [case.id for case in self.cases if case.pirads is None]
        if self.variant.class_input == "given" and unknown:
            listed = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            why = f"{self.variant.name} is given the class of every study, but it is not known for {listed}"
            fix = "add the class, or leave these studies out"
            raise DataError(why, path=self._manifest_path, field=f"{unknown[0]}.pirads", fix=fix)

    def _check_flips(self) -> None:
        """Raise for mirrored latents, which only a variant without text may use: a report names sides."""
        for case in self.cases if self.variant.text else []:
            if any(copy.parameters.get("flip") for copy in case.augmented[: self.copies]):
                why = f"{self.variant.name} reads the report, but augmented latents of '{case.id}' are mirrored"
                fix = "prepare again with --augment and augmentation.flip=0, or with --augment 0"
                raise DataError(why, path=self._manifest_path, field=f"{case.id}.augmented", fix=fix)

    def _check_study(self, case: StudyEntry, *, verify: bool) -> None:
        latent = (self.config.autoencoder.latent_channels, *self.config.check_grid())
        for sequence in self.config.data.sequences:
            if self.needs == "images":
                self._check_shape(
                    case, f"image/{sequence}", tuple(self.config.data.dim), "data.dim", case.files, verify
                )
                continue
            for files in (case.files, *(copy.files for copy in case.augmented[: self.copies])):
                for key in (f"latent_mean/{sequence}", f"latent_sigma/{sequence}"):
                    if key in files or key.startswith("latent_mean"):
                        self._check_shape(case, key, latent, "data.dim and the autoencoder", files, verify)
        if self.variant.text:
            length = self.prepared.text.max_length if self.prepared.text else self.config.text.max_length
            width = self.config.model.input_dim
            self._check_shape(case, "text", (length, width), "the encoder and model.input_dim", case.files, verify)

    def _check_shape(
        self,
        case: StudyEntry,
        key: str,
        expected: tuple[int, ...],
        source: str,
        files: dict[str, FileEntry],
        verify: bool,
    ) -> None:
        """Raise unless the file `key` is undamaged (if `verify`) and has the shape `expected`, which follows from `source`."""
        found = self.prepared.array(case, key, verify=verify, files=files).shape
        if found != expected:
            path, field = self.prepared.folder / files[key].path, f"{case.id}.files.{key}"
            why = f"its shape is {found}, but {source} require {expected}"
            fix = "prepare the data with this configuration"
            raise DataError(why, path=path, field=field, fix=fix)


def check_encoder(prepared: Manifest, config: Config) -> None:
    """Raise DataError unless reports were encoded as configured, because sampling encodes new ones so.

    Imported features do not record how they were made.
    """
    text = prepared.text
    if text is None or text.fingerprint == IMPORTED:
        return
    for key in ("encoder", "revision", "max_length", "dtype"):
        found, wanted = getattr(text, key), getattr(config.text, key)
        if found != wanted:
            why = f"the reports were encoded with {key} {found!r}, but {wanted!r} is configured"
            fix = "prepare the data with this configuration"
            raise DataError(why, path=prepared.folder / NAME, field=f"text.{key}", fix=fix)


def check_spacing(prepared: Manifest, config: Config) -> None:
    """Raise DataError unless images have the configured spacing, because sampling uses it as condition and writes it."""
    found, wanted = prepared.data.spacing, config.data.spacing
    if found != wanted:
        why = f"the images were prepared at {found} mm, but {wanted} mm is configured"
        fix = "prepare the data with this configuration"
        raise DataError(why, path=prepared.folder / NAME, field="data.spacing", fix=fix)


def collate(samples: Sequence[TrainingSample]) -> TrainingSample:
    """Stack the samples of single studies into a batch."""
    ids, *columns = zip(*samples, strict=True)
    stacked = [None if column[0] is None else torch.stack(column) for column in columns]
    return TrainingSample(list(chain(*ids)), *stacked)  # type: ignore[arg-type]


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`; a copy from the host to a GPU goes through pinned memory and does not wait."""
    if tensor.device.type == device.type:
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
