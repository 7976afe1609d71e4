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

from ccella_fast.data.loading.dataset import LatentSource, PreparedDataset, StudyEpoch, TrainingSample
from ccella_fast.environment import free_memory

logger = logging.getLogger("ccella_fast")
_SHARE = 0.25  # of free memory; the rest is for activations


class ResidentLatents:
    """See dataset.Source. Every study and every augmented copy of it, stacked."""

    def __init__(self, dataset: PreparedDataset, device: torch.device, text_dtype: torch.dtype):
        self.dataset, self.device = dataset, device
        versions = [(index, copy) for copy in range(dataset.copies + 1) for index in range(len(dataset))]
        text_rows: dict[str, int] = {}
        texts: list[Tensor] = []
        self._stacked: dict[str, Tensor] = {}  # every tensor of a sample but the text, one row per version
        for row, (index, copy) in enumerate(
            tqdm(versions, "loading latents", unit="study", mininterval=1, disable=None)
        ):
            sample = dataset.item(index, copy)
            parts = {name: part for name, part in sample._asdict().items() if name not in ("ids", "text")}
            if not self._stacked:
                self._stacked = {
                    name: torch.empty(len(versions), *part.shape, dtype=part.dtype, device=device)
                    for name, part in parts.items()
                }
            for name, part in parts.items():
                self._stacked[name][row] = part
            if sample.text is not None and _report(dataset, index) not in text_rows:
                text_rows[_report(dataset, index)] = len(texts)
                texts.append(sample.text.to(device, text_dtype))
        self._text = torch.stack(texts) if texts else None
        self._text_row = [text_rows.get(_report(dataset, index), 0) for index in range(len(dataset))]

    def batches(self, picks: Callable[[int], Sequence[StudyEpoch]], count: int) -> Iterator[TrainingSample]:
        for n in range(count):
            wanted = picks(n)
            row = self._on_device([self.dataset.copy_of(p) * len(self.dataset) + p.study for p in wanted])
            text_row = self._on_device([self._text_row[pick.study] for pick in wanted])
            yield TrainingSample(
                ids=[self.dataset.ids[pick.study] for pick in wanted],
                text=None if self._text is None else self._text[text_row],
                **{name: stacked[row] for name, stacked in self._stacked.items()},
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
