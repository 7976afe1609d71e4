"""Latents made while training: load, augment, encode with the frozen autoencoder. A few hundred studies become endless.

What a study looks like in an epoch is drawn from (seed, case id, epoch) alone: a resumed run sees the same volumes as an
unbroken one, and runs of one global batch see the same whatever their number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ccella_fast.data.augmentation.engine import make_engine
from ccella_fast.data.augmentation.requests import VolumeRequest, augmentation_of, study_requests
from ccella_fast.data.loading.dataset import Batch, PreparedDataset, StudyEpoch, collate
from ccella_fast.data.preparation.latent_encoder import LatentEncoder


class OnlineLatents:
    """See dataset.Source. dataset: opened for images. vae: the frozen autoencoder's folder."""

    def __init__(self, dataset: PreparedDataset, vae: Path, device: torch.device, seed: int):
        self.dataset = dataset
        self.config, self.seed = dataset.config, seed
        self.encoder = LatentEncoder(vae, self.config.autoencoder, device)
        self.engine = make_engine(self.config.data.engine, self.config.augmentation, device, self.config.data.dim)

    def batches(self, picks: Callable[[int], Sequence[StudyEpoch]], count: int) -> Iterator[Batch]:
        cases, sequences = self.dataset.cases, self.config.data.sequences
        paths = [self._images(p)[name] for n in range(count) for p in picks(n) for name in sequences]

        def jobs(n: int) -> list[VolumeRequest]:
            return [job for pick in picks(n) for job in self._jobs(pick)]

        for n, volumes in enumerate(self.engine.stream(paths, jobs, count)):
            # One at a time: an encoder holds gigabytes a volume.
            parts = [self.encoder.posterior(volume[None]) for volume in volumes]
            mean, sigma = (torch.cat(part) for part in zip(*parts, strict=True))
            items = []
            for number, pick in enumerate(picks(n)):
                rows = slice(number * len(sequences), (number + 1) * len(sequences))
                drawn = augmentation_of(self.config, cases[pick.study].id, seed=self.seed, epoch=pick.epoch)
                spacing = drawn.spacing(self.config.data.spacing)
                items.append(
                    self.dataset.described(pick.study, mean[rows].flatten(0, 1), sigma[rows].flatten(0, 1), spacing)
                )
            yield collate(items)

    def _jobs(self, pick: StudyEpoch) -> list[VolumeRequest]:
        case = self.dataset.cases[pick.study]
        return study_requests(self.config, self._images(pick), case.id, seed=self.seed, epoch=pick.epoch)

    def _images(self, pick: StudyEpoch) -> dict[str, Path]:
        folder, files = self.dataset.prepared.folder, self.dataset.cases[pick.study].files
        return {name: folder / files[f"image/{name}"].path for name in self.config.data.sequences}
