"""The images on which the autoencoder is trained and tested, and the random patches of each step.

The patches of step k depend only on (seed, k), so that a resumed run uses the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ccella_fast.config import Config, VaeTrainingConfig
from ccella_fast.data.augmentation.engine_choice import make_engine
from ccella_fast.data.augmentation.parameters import IDENTITY, draw_augmentation
from ccella_fast.data.augmentation.requests import VolumeRequest
from ccella_fast.data.manifest import load_manifest
from ccella_fast.diffusion.noise import generator
from ccella_fast.progress import refresh_interval
from ccella_fast.training.batches import epoch_order


class Image(NamedTuple):
    """One prepared volume."""

    case: str
    sequence: str
    sha256: str  # of the file
    values: np.ndarray  # (X, Y, Z) float32 in [0, 1], a read-only memory map of the file
    path: Path
    spacing: tuple[float, float, float]  # mm


def read_images(data: str | Path) -> tuple[list[Image], list[Image]]:
    """All sequences of the studies of the splits (train, test); those of val are left out.

    Raises:
        DataError: a file is missing or has changed.
    """
    prepared = load_manifest(data)
    splits: dict[str, list[Image]] = {"train": [], "test": []}
    cases = [case for case in prepared.cases if case.split in splits]
    for case in tqdm(cases, desc="checking images", unit="study", mininterval=refresh_interval()):
        for sequence in prepared.data.sequences:
            key = f"image/{sequence}"
            values = prepared.array(case, key, verify=True)
            path, (r, a, s) = prepared.folder / case.files[key].path, case.spacing
            splits[case.split].append(Image(case.id, sequence, case.files[key].sha256, values, path, (r, a, s)))
    return splits["train"], splits["test"]


def patch_requests(images: Sequence[Image], settings: VaeTrainingConfig, step: int) -> list[VolumeRequest]:
    """The patches of `step`, at random positions. Each image is used once before any is used again."""
    source, (i, j, k) = generator(settings.seed, "place", step), settings.patch
    requests = []
    for number in range(step * settings.batch_size, (step + 1) * settings.batch_size):
        image, epoch = _image_at(images, settings, number)
        x, y, z = (
            int(torch.randint(size - width + 1, (1,), generator=source))
            for size, width in zip(image.values.shape, settings.patch, strict=True)
        )
        drawn, strengths = IDENTITY, settings.augmentation
        if strengths.active:
            drawn = draw_augmentation(
                strengths, seed=settings.seed, case_id=f"{image.case} {x} {y} {z}", epoch=epoch, shape=settings.patch,
                spacing=image.spacing, keep_gland=False,
            ).for_sequence(image.sequence)  # fmt: skip
        requests.append(VolumeRequest(image.path, image.values.shape, (x, y, z), (i, j, k), image.spacing, drawn))
    return requests


def patch_batches(images: list[Image], config: Config, device: torch.device, start: int) -> Iterator[Tensor]:
    """Yield the patches (B, 1, *patch), float32, of each step from `start` to the last."""
    settings = config.vae_training
    first, last = (step * settings.batch_size for step in (start, settings.max_train_steps))
    engine = make_engine(config.data.engine, settings.augmentation, device, settings.patch)
    paths = [_image_at(images, settings, number)[0].path for number in range(first, last)]
    return engine.stream(paths, lambda n: patch_requests(images, settings, start + n), settings.max_train_steps - start)


def _image_at(images: Sequence[Image], settings: VaeTrainingConfig, number: int) -> tuple[Image, int]:
    """The image and the epoch of patch `number` of the run."""
    epoch, position = divmod(number, len(images))
    return images[epoch_order(settings.seed, epoch, len(images))[position]], epoch
