"""The engines that read and augment prepared volumes: their protocol, and the choice between them.

An engine receives the whole order of requests at once and applies the augmentations that they carry; it does not draw random
numbers. The caller therefore decides the order, as a function of (seed, step) that any process can resume at any step. There
are two engines: DALI for a GPU, and torch for a CPU or a GPU. Their volumes are equal up to rounding;
tests/data/test_engines.py states the tolerance per operator.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from ccella_fast.config import AugmentationConfig
from ccella_fast.data.augmentation.requests import VolumeRequest
from ccella_fast.errors import CcellaError, ConfigError, DataError

logger = logging.getLogger("ccella_fast")


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


def check_engine(choice: str) -> None:
    """Check that the configured engine is available, for callers that write files before they create an engine.

    Raises:
        ConfigError: `choice` is "dali" and DALI cannot be used.
    """
    missing = _why_dali_is_unavailable() if choice == "dali" else None
    if missing:
        fix = "pip install 'ccella-fast[gpu]', or set data.engine=auto"
        raise ConfigError(f"DALI cannot be used: {missing}", field="data.engine", fix=fix)


def make_engine(
    choice: Literal["auto", "dali", "torch"], config: AugmentationConfig, device: torch.device, size: Sequence[int]
) -> AugmentationEngine:
    """Create the engine for volumes of `size` voxels on `device` and log the choice with its reason.

    Raises:
        ConfigError: as in `check_engine`.
    """
    check_engine(choice)
    missing = _why_dali_is_unavailable()
    if choice == "auto":
        if device.type != "cuda":
            choice, reason = "torch", "it is faster on a CPU"
        elif missing:
            choice, reason = "torch", f"DALI cannot be used: {missing}"
        else:
            choice, reason = "dali", "a GPU is available"
    else:
        reason = "as configured"
    logger.info("volumes are loaded and augmented by %s (%s)", choice, reason)
    if choice == "dali":
        from ccella_fast.data.augmentation.dali_engine import DaliEngine

        return DaliEngine(config, device, size)
    from ccella_fast.data.augmentation.torch_engine import TorchEngine

    return TorchEngine(config, device, size)


def _why_dali_is_unavailable() -> str | None:
    """The reason why DALI cannot be used, or None. It is imported because an installed DALI may not match Python or CUDA."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "it is not installed"
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"it cannot be imported ({' '.join(str(error).split()):.80})"
    return None


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
