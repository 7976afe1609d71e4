"""Latents made while training: load, augment, encode with the frozen autoencoder. A few hundred studies become endless.

What a study looks like in an epoch is drawn from (seed, case id, epoch), so a run that is taken up again, on another number of
processes too, sees the same volumes as an unbroken one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ccella_fast.config import Config
from ccella_fast.data.augment import IDENTITY, Augmentation, draw
from ccella_fast.data.dataset import Batch, Pick, PreparedDataset, collate
from ccella_fast.data.latents import LatentEncoder
from ccella_fast.data.manifest import Case
from ccella_fast.data.volumes import Job, make_engine


class Volumes:
    """Jobs for a prepared folder's studies, augmented as configured."""

    def __init__(self, folder: Path, config: Config, seed: int):
        self.folder, self.config, self.seed = folder, config, seed

    def augmentation(self, case: Case, epoch: int) -> Augmentation:
        if not self.config.augmentation.active:
            return IDENTITY
        grid = self.config.data
        return draw(
            self.config.augmentation, seed=self.seed, case_id=case.id, epoch=epoch, shape=grid.dim, spacing=grid.spacing
        )

    def jobs(self, case: Case, epoch: int) -> list[Job]:
        """One a sequence: the same view of each."""
        x, y, z = self.config.data.dim
        r, a, s = self.config.data.spacing
        drawn = self.augmentation(case, epoch)
        return [
            Job(self.path(case, sequence), (x, y, z), (0, 0, 0), (x, y, z), (r, a, s), drawn.for_sequence(sequence))
            for sequence in self.config.data.sequences
        ]

    def path(self, case: Case, sequence: str) -> Path:
        return self.folder / case.files[f"image/{sequence}"].path


class OnlineLatents:
    """See dataset.Source. dataset: opened for images. vae: the frozen autoencoder's folder."""

    def __init__(self, dataset: PreparedDataset, vae: Path, device: torch.device, seed: int):
        self.dataset = dataset
        self.config = dataset.config
        self.volumes = Volumes(dataset.prepared.folder, self.config, seed)
        self.encoder = LatentEncoder(vae, self.config.autoencoder)
        self.engine = make_engine(self.config.data.engine, self.config.augmentation, device, self.config.data.dim)

    def batches(self, picks: Callable[[int], Sequence[Pick]], count: int) -> Iterator[Batch]:
        cases, sequences = self.dataset.cases, self.config.data.sequences
        paths = [self.volumes.path(cases[p.study], name) for n in range(count) for p in picks(n) for name in sequences]

        def jobs(n: int) -> list[Job]:
            return [job for pick in picks(n) for job in self.volumes.jobs(cases[pick.study], pick.epoch)]

        for n, volumes in enumerate(self.engine.stream(paths, jobs, count)):
            # One at a time: an encoder holds gigabytes a volume.
            parts = [self.encoder.posterior(volume[None]) for volume in volumes]
            mean, sigma = (torch.cat(part) for part in zip(*parts, strict=True))
            items = []
            for number, pick in enumerate(picks(n)):
                rows = slice(number * len(sequences), (number + 1) * len(sequences))
                spacing = self.volumes.augmentation(cases[pick.study], pick.epoch).spacing(self.config.data.spacing)
                items.append(
                    self.dataset.described(pick.study, mean[rows].flatten(0, 1), sigma[rows].flatten(0, 1), spacing)
                )
            yield collate(items)
