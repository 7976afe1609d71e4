"""The whole training set as tensors on the device, and the plan that says whether it fits.

Latents stay float32, so that a batch is bit for bit the memory-mapped one; text features are kept in the dtype that the model
reads them in, and reports that are the same once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ccella_fast.data.loading.dataset import Batch, LatentSource, PreparedDataset, StudyEpoch
from ccella_fast.hardware import free_memory

logger = logging.getLogger("ccella_fast")
_SHARE = 0.25  # of free memory; the rest is for activations


class ResidentLatents:
    """See dataset.Source. Every study and every augmented copy of it, stacked."""

    def __init__(self, dataset: PreparedDataset, device: torch.device, text_dtype: torch.dtype):
        self.dataset, self.device = dataset, device
        versions = [(index, copy) for copy in range(dataset.copies + 1) for index in range(len(dataset))]
        texts: dict[str, int] = {}
        rows: list[Tensor] = []
        mean = sigma = spacing = None
        for row, (index, copy) in enumerate(
            tqdm(versions, "loading latents", unit="study", mininterval=1, disable=None)
        ):
            item = dataset.item(index, copy)
            if mean is None or sigma is None or spacing is None:
                mean, sigma, spacing = (
                    torch.empty(len(versions), *part.shape, device=device)
                    for part in (item.latent_mean, item.latent_sigma, item.spacing)
                )
            mean[row], sigma[row], spacing[row] = item.latent_mean, item.latent_sigma, item.spacing
            if item.text is not None and _report(dataset, index) not in texts:
                texts[_report(dataset, index)] = len(rows)
                rows.append(item.text.to(device, text_dtype))
        assert mean is not None and sigma is not None and spacing is not None
        self._mean, self._sigma, self._spacing = mean, sigma, spacing
        self._text = torch.stack(rows) if rows else None
        self._text_row = [texts.get(_report(dataset, index), 0) for index in range(len(dataset))]
        cases = dataset.cases
        self._pirads = 100 * torch.tensor([case.pirads or [0, 0] for case in cases], dtype=torch.float32, device=device)
        self._isnull = torch.tensor([bool(case.text_isnull) for case in cases], device=device)
        self._has_class = torch.tensor(dataset.has_class, device=device)

    def batches(self, picks: Callable[[int], Sequence[StudyEpoch]], count: int) -> Iterator[Batch]:
        for n in range(count):
            wanted = picks(n)
            index = [pick.study for pick in wanted]
            row = self._on_device([self.dataset.copy_of(p) * len(self.dataset) + p.study for p in wanted])
            text_row, study = self._on_device([self._text_row[i] for i in index]), self._on_device(index)
            yield Batch(
                ids=[self.dataset.ids[i] for i in index],
                latent_mean=self._mean[row],
                latent_sigma=self._sigma[row],
                text=None if self._text is None else self._text[text_row],
                pirads=self._pirads[study],
                spacing=self._spacing[row],
                text_isnull=self._isnull[study],
                has_class=self._has_class[study],
            )

    def _on_device(self, numbers: list[int]) -> Tensor:
        index = torch.tensor(numbers)
        return index.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else index


def choose_latent_source(dataset: PreparedDataset, device: torch.device, text_dtype: torch.dtype) -> LatentSource:
    """The latents on `device` if they take at most a quarter of its free memory, else memory-mapped, where the processes of a
    node share one copy in the page cache. Says which, and why, in the log."""
    needed = bytes_needed(dataset, text_dtype)
    room = int(_SHARE * _free(device))
    studies = len(dataset) * (dataset.copies + 1)
    told = f"memory plan: latents and text of {studies} volumes take {needed / 1e6:.0f} MB, there is room for {room / 1e6:.0f}"
    if needed <= room:
        logger.info("%s: resident on %s", told, device)
        return ResidentLatents(dataset, device, text_dtype)
    logger.info("%s: memory-mapped%s", told, ", read ahead into pinned memory" if device.type == "cuda" else "")
    return dataset


def bytes_needed(dataset: PreparedDataset, text_dtype: torch.dtype) -> int:
    """Of `ResidentLatents`, without its small parts."""
    latents = 0
    for case in dataset.cases:
        for files in (case.files, *(copy.files for copy in case.augmented[: dataset.copies])):
            latents += 2 * sum(files[f"latent_mean/{name}"].bytes for name in dataset.config.data.sequences)
    texts = {case.files["text"].path: case.files["text"].bytes for case in dataset.cases if dataset.variant.text}
    return latents + sum(texts.values()) * text_dtype.itemsize // torch.float32.itemsize


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return free_memory(device)
    return free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _report(dataset: PreparedDataset, index: int) -> str:
    """The file that holds a study's text features: equal reports share it."""
    return dataset.cases[index].files["text"].path if dataset.variant.text else ""
