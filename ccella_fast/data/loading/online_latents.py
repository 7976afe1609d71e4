"""Latents made during training: images are loaded, augmented and encoded with the frozen autoencoder.

The augmentation of a study in an epoch depends only on (seed, study id, epoch), so that a resumed run uses the same volumes as
an uninterrupted one, and so do runs with the same global batch on any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from ccella_fast.data.augmentation.engine_choice import make_engine
from ccella_fast.data.augmentation.requests import VolumeRequest, augmentation_of, study_requests
from ccella_fast.data.loading.dataset import PreparedDataset, StudyEpoch, TrainingSample, collate
from ccella_fast.data.preparation.latent_encoder import LatentEncoder


class OnlineLatents:
    """A `LatentSource` that encodes augmented images.

    Args:
        dataset: the studies, opened with `needs="images"`.
        vae: folder of the frozen autoencoder.
        device: where images are augmented and encoded.
        seed: of the augmentation.
    """

    def __init__(self, dataset: PreparedDataset, vae: Path, device: torch.device, seed: int):
        self.dataset = dataset
        self.config, self.seed = dataset.config, seed
        self.encoder = LatentEncoder(vae, self.config.autoencoder, device)
        self.engine = make_engine(self.config.data.engine, self.config.augmentation, device, self.config.data.dim)

    def batches(self, picks: Callable[[int], Sequence[StudyEpoch]], count: int) -> Iterator[TrainingSample]:
        """See `LatentSource`. Latents are on the device, the other tensors on the CPU."""
        cases, sequences = self.dataset.cases, self.config.data.sequences
        paths = [self._images(p)[name] for n in range(count) for p in picks(n) for name in sequences]

        def requests(n: int) -> list[VolumeRequest]:
            return [request for pick in picks(n) for request in self._requests(pick)]

        for n, volumes in enumerate(self.engine.stream(paths, requests, count)):
            # One volume at a time, because the encoder's activations take gigabytes per volume.
            parts = [self.encoder.posterior(volume[None]) for volume in volumes]
            mean, sigma = (torch.cat(part) for part in zip(*parts, strict=True))
            samples = []
            for number, pick in enumerate(picks(n)):
                rows = slice(number * len(sequences), (number + 1) * len(sequences))
                drawn = augmentation_of(self.config, cases[pick.study].id, seed=self.seed, epoch=pick.epoch)
                spacing = drawn.spacing(self.config.data.spacing)
                samples.append(
                    self.dataset.make_sample(pick.study, mean[rows].flatten(0, 1), sigma[rows].flatten(0, 1), spacing)
                )
            yield collate(samples)

    def _requests(self, pick: StudyEpoch) -> list[VolumeRequest]:
        case = self.dataset.cases[pick.study]
        return study_requests(self.config, self._images(pick), case.id, seed=self.seed, epoch=pick.epoch)

    def _images(self, pick: StudyEpoch) -> dict[str, Path]:
        folder, files = self.dataset.prepared.folder, self.dataset.cases[pick.study].files
        return {name: folder / files[f"image/{name}"].path for name in self.config.data.sequences}
