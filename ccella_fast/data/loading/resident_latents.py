"""The whole training set as tensors on the device, if it fits.

Latents stay float32, so that a batch is bit-equal to the memory-mapped one. Text features have the dtype of the model's inputs,
and equal reports are stored once.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from tqdm import tqdm

from ccella_fast.data.loading.dataset import LatentSource, PreparedDataset, StudyEpoch, TrainingSample, to_device
from ccella_fast.hardware import free_memory
from ccella_fast.quantities import counted, format_bytes

logger = logging.getLogger("ccella_fast")
_MEMORY_SHARE = 0.25  # of free memory; the rest is for activations


class ResidentLatents:
    """A `LatentSource` that holds all studies and all of their augmented copies on `device`."""

    def __init__(self, dataset: PreparedDataset, device: torch.device, text_dtype: torch.dtype):
        self.dataset, self.device = dataset, device
        versions = [(index, copy) for copy in range(dataset.copies + 1) for index in range(len(dataset))]
        text_rows: dict[str, int] = {}
        texts: list[Tensor] = []
        self._stacked: dict[str, Tensor] = {}  # all tensors of a sample except text, with a row per version
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
            if sample.text is not None and _text_path(dataset, index) not in text_rows:
                text_rows[_text_path(dataset, index)] = len(texts)
                texts.append(sample.text.to(device, text_dtype))
        self._text = torch.stack(texts) if texts else None
        self._text_row = [text_rows.get(_text_path(dataset, index), 0) for index in range(len(dataset))]

    def batches(self, picks: Callable[[int], Sequence[StudyEpoch]], count: int) -> Iterator[TrainingSample]:
        """See `LatentSource`. Tensors are on the device."""
        for n in range(count):
            studies = picks(n)
            row = self._index([self.dataset.copy_of(pick) * len(self.dataset) + pick.study for pick in studies])
            text_row = self._index([self._text_row[pick.study] for pick in studies])
            yield TrainingSample(
                ids=[self.dataset.ids[pick.study] for pick in studies],
                text=None if self._text is None else self._text[text_row],
                **{name: stacked[row] for name, stacked in self._stacked.items()},
            )

    def _index(self, rows: list[int]) -> Tensor:
        return to_device(torch.tensor(rows), self.device)


def choose_latent_source(dataset: PreparedDataset, device: torch.device, text_dtype: torch.dtype) -> LatentSource:
    """Keep latents on `device` if they take at most a quarter of its free memory, else read them through memory maps.

    The processes of a node share one copy of memory-mapped files in the page cache. The choice is logged with its reason.
    """
    needed = bytes_needed(dataset, text_dtype)
    available = int(_MEMORY_SHARE * _free_memory_per_process(device))
    studies = len(dataset) * (dataset.copies + 1)
    volumes, of = counted(studies, "volume"), f"{format_bytes(needed)} of {format_bytes(available)}"
    sizes = f"latents and text of {volumes} take {of} available"
    if needed <= available:
        logger.info("%s: resident on %s", sizes, device)
        return ResidentLatents(dataset, device, text_dtype)
    logger.info("%s: memory-mapped%s", sizes, ", prefetched into pinned memory" if device.type == "cuda" else "")
    return dataset


def bytes_needed(dataset: PreparedDataset, text_dtype: torch.dtype) -> int:
    """The size of latents and text in `ResidentLatents`; the other tensors are small."""
    latents = 0
    for case in dataset.cases:
        for files in (case.files, *(copy.files for copy in case.augmented[: dataset.copies])):
            latents += 2 * sum(files[f"latent_mean/{name}"].bytes for name in dataset.config.data.sequences)
    texts = {case.files["text"].path: case.files["text"].bytes for case in dataset.cases if dataset.variant.text}
    return latents + sum(texts.values()) * text_dtype.itemsize // torch.float32.itemsize


def _free_memory_per_process(device: torch.device) -> int:
    if device.type == "cuda":
        return free_memory(device)
    return free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _text_path(dataset: PreparedDataset, index: int) -> str:
    """The path of the file with a study's text features, which equal reports share."""
    return dataset.cases[index].files["text"].path if dataset.variant.text else ""
