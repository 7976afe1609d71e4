"""Prepared studies as training samples (docs/explanation/method.md, section 1.5). The trainer decides which study comes when.

Three things give batches of the studies that they are asked for, through `batches(picks, count)`: `PreparedDataset` from memory
maps, `resident.ResidentLatents` from tensors on the device, `online.OnlineLatents` from images through the autoencoder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ccella_fast.config import Config
from ccella_fast.data.manifest import IMPORTED, NAME, FileEntry, StudyEntry, load_manifest
from ccella_fast.errors import DataError, did_you_mean


class Item(NamedTuple):
    """One study. Latents of several sequences lie one after the other on the channel axis. latent_sigma is 0 where only the
    mean is known. pirads is one-hot x 100, zeros where not known. has_class: there is a class and a report to read it from."""

    id: str
    latent_mean: Tensor  # (C, X, Y, Z) float32
    latent_sigma: Tensor  # (C, X, Y, Z) float32
    text: Tensor | None  # (L, E) float32; None: a variant without text
    pirads: Tensor  # (2,) float32
    spacing: Tensor  # (3,) float32, mm x 100
    text_isnull: bool
    has_class: bool


class Batch(NamedTuple):
    """Items stacked: the same fields, with B in front; `text_isnull` and `has_class` are (B,) bool."""

    ids: list[str]
    latent_mean: Tensor
    latent_sigma: Tensor
    text: Tensor | None
    pirads: Tensor
    spacing: Tensor
    text_isnull: Tensor
    has_class: Tensor


class StudyEpoch(NamedTuple):
    """A study, by its number in the dataset, as it is to be seen in an epoch."""

    study: int
    epoch: int


class LatentSource(Protocol):
    def batches(self, picks: Callable[[int], Sequence[StudyEpoch]], count: int) -> Iterator[Batch]:
        """The batch of `picks(n)` for n = 0 ... count-1."""
        ...


class PreparedDataset:
    """The studies of one split of a prepared folder, for the variant and the grid of `config`.

    Opening compares every file with the manifest's SHA-256 and every shape with the configuration, once; after that files
    are read through memory maps. `ids` and `has_class` are lists over the studies; `copies`: how many augmented latents each
    has beside its own. needs: what will be read, latents or images. Raises DataError, which names the study."""

    def __init__(
        self,
        folder: str | Path,
        config: Config,
        split: Literal["train", "test"] = "train",
        *,
        needs: Literal["latents", "images"] = "latents",
    ):
        self.prepared = load_manifest(folder)
        self.config, self.needs = config, needs
        self._listed = self.prepared.folder / NAME
        self.variant = config.model.traits
        self.cases = self._select(split)
        self.ids = [case.id for case in self.cases]
        self.copies = 0 if needs == "images" else min(len(case.augmented) for case in self.cases)
        self.has_class = [case.pirads is not None and not case.text_isnull for case in self.cases]
        self._check_classes()
        self._check_sides()
        self._check_encoder()
        self._check_spacing()
        rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
        for case in tqdm(self.cases, "checking prepared files", unit="study", mininterval=1, disable=rank != "0"):
            self._check(case)

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> Item:
        return self.item(index)

    def item(self, index: int, copy: int = 0) -> Item:
        """copy: 0, the study as it was prepared; 1 ... `copies`, an augmented one."""
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
        return self.described(index, torch.cat(means), torch.cat(sigmas), spacing)

    def described(self, index: int, mean: Tensor, sigma: Tensor, spacing: Sequence[float]) -> Item:
        """A study's latents, wherever they come from, with what is known of the study."""
        case = self.cases[index]
        return Item(
            case.id,
            mean,
            sigma,
            self._tensor(case, "text", case.files) if self.variant.text else None,
            100 * torch.tensor(case.pirads or [0, 0], dtype=torch.float32),
            100 * torch.tensor(spacing, dtype=torch.float32),
            bool(case.text_isnull),
            self.has_class[index],
        )

    def copy_of(self, pick: StudyEpoch) -> int:
        """Which of a study's latents an epoch sees: each once in `copies` + 1 epochs."""
        return (pick.study + pick.epoch) % (self.copies + 1)

    def batches(self, picks: Callable[[int], Sequence[StudyEpoch]], count: int) -> Iterator[Batch]:
        for n in range(count):
            yield collate([self.item(pick.study, self.copy_of(pick)) for pick in picks(n)])

    def _tensor(self, case: StudyEntry, key: str, files: dict[str, FileEntry]) -> Tensor:
        return torch.from_numpy(np.array(self.prepared.array(case, key, files=files)))

    def _select(self, split: str) -> list[StudyEntry]:
        tag = self.config.data.dataset
        cases = [case for case in self.prepared.cases if case.split == split and tag in (None, case.dataset)]
        if not cases:
            tags = {case.dataset for case in self.prepared.cases if case.dataset}
            why = f"no study in the split '{split}'" + (f" with the dataset '{tag}'" if tag else "")
            fix = did_you_mean(tag, tags) if tag and tags else "prepare studies with this split"
            raise DataError(why, path=self._listed, field="cases", fix=fix)
        return cases

    def _check_classes(self) -> None:
        unknown = [case.id for case in self.cases if case.pirads is None]
        if self.variant.class_input == "given" and unknown:
            shown = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
            why = f"{self.variant.name} is given the class of every study, but it is not known for {shown}"
            raise DataError(
                why, path=self._listed, field=f"{unknown[0]}.pirads", fix="add the class, or leave these studies out"
            )

    def _check_sides(self) -> None:
        """Copies may have been made for a variant without report, which may see mirrored studies."""
        for case in self.cases if self.variant.text else []:
            if any(copy.parameters.get("flip") for copy in case.augmented[: self.copies]):
                why = f"{self.variant.name} reads the report, but augmented latents of '{case.id}' are mirrored"
                fix = "prepare again with --augment and augmentation.flip=0, or with --augment 0"
                raise DataError(why, path=self._listed, field=f"{case.id}.augmented", fix=fix)

    def _check_encoder(self) -> None:
        """New reports are encoded as configured, so the prepared ones must have been too. Imported ones do not say."""
        text = self.prepared.text
        if not self.variant.text or text is None or text.fingerprint == IMPORTED:
            return
        for key in ("encoder", "revision", "max_length", "dtype"):
            found, wanted = getattr(text, key), getattr(self.config.text, key)
            if found != wanted:
                why = f"reports were encoded with {key} {found!r}, configured is {wanted!r}"
                raise DataError(why, path=self._listed, field=f"text.{key}", fix="prepare with this configuration")

    def _check_spacing(self) -> None:
        """Sampling conditions on the configured spacing and writes it, so it must be that of the images."""
        found, wanted = self.prepared.data.spacing, self.config.data.spacing
        if found != wanted:
            why, fix = f"prepared at {found} mm, configured are {wanted}", "prepare with this configuration"
            raise DataError(why, path=self._listed, field="data.spacing", fix=fix)

    def _check(self, case: StudyEntry) -> None:
        latent = (self.config.autoencoder.latent_channels, *self.config.check_grid())
        for sequence in self.config.data.sequences:
            if self.needs == "images":
                self._check_shape(case, f"image/{sequence}", tuple(self.config.data.dim), "data.dim", case.files)
                continue
            for files in (case.files, *(copy.files for copy in case.augmented[: self.copies])):
                for key in (f"latent_mean/{sequence}", f"latent_sigma/{sequence}"):
                    if key in files or key.startswith("latent_mean"):
                        self._check_shape(case, key, latent, "data.dim and the autoencoder", files)
        if self.variant.text:
            length = self.prepared.text.max_length if self.prepared.text else self.config.text.max_length
            width = self.config.model.input_dim
            self._check_shape(case, "text", (length, width), "the encoder and model.input_dim", case.files)

    def _check_shape(
        self, case: StudyEntry, key: str, expected: tuple[int, ...], source: str, files: dict[str, FileEntry]
    ) -> None:
        found = self.prepared.array(case, key, verify=True, files=files).shape
        if found != expected:
            path, field = self.prepared.folder / files[key].path, f"{case.id}.files.{key}"
            why, fix = f"its shape is {found}, {source} give {expected}", "prepare with this configuration"
            raise DataError(why, path=path, field=field, fix=fix)


def collate(items: Sequence[Item]) -> Batch:
    """Stack items into a batch, on the CPU."""
    texts = [item.text for item in items if item.text is not None]
    return Batch(
        ids=[item.id for item in items],
        latent_mean=torch.stack([item.latent_mean for item in items]),
        latent_sigma=torch.stack([item.latent_sigma for item in items]),
        text=torch.stack(texts) if texts else None,
        pirads=torch.stack([item.pirads for item in items]),
        spacing=torch.stack([item.spacing for item in items]),
        text_isnull=torch.tensor([item.text_isnull for item in items]),
        has_class=torch.tensor([item.has_class for item in items]),
    )
