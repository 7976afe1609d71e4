"""Prepared volumes, or windows of them, read and augmented in a given order: what is to be made, and who makes it.

An engine is given the whole order at once and applies what `augment` has drawn; it draws nothing itself. So the order is the
caller's: a function of (seed, step), which any process can take up at any step. There are two engines, equal within
rounding (tests/data/test_engines.py states it per operator): DALI, for a GPU, and torch, for either.
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
    """`stream(paths, jobs, count)`: for n = 0 ... count-1 a tensor (B, 1, *size) float32 of the jobs `jobs(n)`, on the engine's
    device. paths: of all these jobs, in order."""

    name: str

    def stream(
        self, paths: Sequence[Path], jobs: Callable[[int], list[VolumeRequest]], count: int
    ) -> Iterator[Tensor]: ...


def check_engine(choice: str) -> None:
    """ConfigError where DALI is asked for by name and cannot be had: for callers that write before they make an engine."""
    missing = _why_no_dali() if choice == "dali" else None
    if missing:
        fix = "pip install 'ccella-fast[gpu]', or set data.engine=auto"
        raise ConfigError(f"DALI cannot be used: {missing}", field="data.engine", fix=fix)


def make_engine(
    choice: Literal["auto", "dali", "torch"], config: AugmentationConfig, device: torch.device, size: Sequence[int]
) -> AugmentationEngine:
    """The engine for volumes of `size` voxels on `device`, and a line in the log that says which and why.

    Raises ConfigError as `check_engine` does."""
    check_engine(choice)
    missing = _why_no_dali()
    if choice == "auto":
        if device.type != "cuda":
            choice, why = "torch", "on a CPU it is the faster one"
        elif missing:
            choice, why = "torch", f"DALI cannot be used: {missing}"
        else:
            choice, why = "dali", "a GPU is there"
    else:
        why = "as configured"
    logger.info("volumes are loaded and augmented by %s (%s)", choice, why)
    if choice == "dali":
        from ccella_fast.data.augmentation.dali_engine import DaliEngine

        return DaliEngine(config, device, size)
    from ccella_fast.data.augmentation.torch_engine import TorchEngine

    return TorchEngine(config, device, size)


def _why_no_dali() -> str | None:
    """None: it is there. Importing it is the test: an installed DALI may be of another Python or another CUDA."""
    if importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None:
        return "it is not installed"
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError, RuntimeError) as bad:
        return f"it does not load ({' '.join(str(bad).split()):.80})"
    return None


def threads_per_process() -> int:
    """For work beside the training: the cores of this process's share of the node."""
    return max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def diagnose_engine_error(jobs: Sequence[VolumeRequest], error: Exception) -> CcellaError:
    """What an engine's failure means to the user: the file of these jobs that is at fault, or else the engine itself."""
    for job in jobs:
        try:
            job.read()
        except DataError as defect:
            return defect
    why = f"the data engine failed: {' '.join(str(error).split())[-120:]}"
    return DataError(why, path=jobs[0].path if jobs else None, fix="set data.engine=torch, and report this")
