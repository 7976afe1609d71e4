"""The protocol of the engines that read and augment prepared volumes, and what both share.

An engine receives the whole order of requests at once and applies the augmentations that they carry; it does not draw random
numbers. The caller therefore decides the order, as a function of (seed, step) that any process can resume at any step. There
are two engines: DALI for a GPU, and torch for a CPU or a GPU. Their volumes are equal up to rounding;
tests/data/test_engines.py states the tolerance per operator.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from torch import Tensor

from ccella_fast.data.augmentation.requests import VolumeRequest
from ccella_fast.errors import CcellaError, DataError


class AugmentationEngine(Protocol):
    """Reads and augments batches of volumes."""

    name: str

    def stream(
        self, paths: Sequence[Path], requests: Callable[[int], list[VolumeRequest]], count: int
    ) -> Iterator[Tensor]:
        """Yield `count` batches.

        Args:
            paths: files of all requests, in order.
            requests: maps the number of a batch, from 0 to count - 1, to its requests.
            count: number of batches.

        Yields:
            (B, 1, *size) float32 tensors on the engine's device.
        """
        ...


def threads_per_process() -> int:
    """Number of threads for work next to the training: this process's share of the node's cores, at least 1."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def diagnose_engine_error(requests: Sequence[VolumeRequest], error: Exception) -> CcellaError:
    """Translate an engine's failure into an error that names the defective file among `requests`, or else the engine."""
    for request in requests:
        try:
            request.read()
        except DataError as defect:
            return defect
    why = f"the data engine failed: {' '.join(str(error).split())[-120:]}"
    path = requests[0].path if requests else None
    return DataError(why, path=path, fix="set data.engine=torch, and report this error")
