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
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from ccella_fast.config import AugmentationConfig, Config
from ccella_fast.data.augmentation.parameters import IDENTITY, Augmentation, draw_augmentation
from ccella_fast.data.manifest import open_array
from ccella_fast.errors import CcellaError, ConfigError, DataError

logger = logging.getLogger("ccella_fast")
Shape = tuple[int, int, int]


class _Window(NamedTuple):
    path: Path
    shape: Shape
    corner: Shape
    size: Shape
    spacing: tuple[float, float, float]
    augmentation: Augmentation = IDENTITY


class VolumeRequest(_Window):
    """One volume to make: the window of `size` voxels at `corner` of the `.npy` file (X, Y, Z) at `path`, augmented about the
    window's centre. shape: of the file. spacing: mm. What lies outside the file is 0."""

    @cached_property
    def matrix(self) -> np.ndarray:
        """(3, 4): index of an output voxel -> index into the file."""
        matrix = self.augmentation.matrix(self.size, self.spacing)
        matrix[:, 3] += self.corner
        return matrix

    @cached_property
    def box(self) -> tuple[Shape, Shape]:
        """(start, shape) of the part of the file that the window needs; at least one voxel an axis."""
        last = np.array(self.size) - 1
        corners = np.array([[x, y, z] for x in (0, last[0]) for y in (0, last[1]) for z in (0, last[2])])
        reached = corners @ self.matrix[:, :3].T + self.matrix[:, 3]
        limit = np.array(self.shape)
        start = np.clip(np.floor(reached.min(0) + 1e-6).astype(int), 0, limit - 1)
        stop = np.clip(np.ceil(reached.max(0) - 1e-6).astype(int) + 1, start + 1, limit)
        return tuple(map(int, start)), tuple(map(int, stop - start))  # type: ignore[return-value]

    @property
    def local_matrix(self) -> np.ndarray:
        """`matrix` into the box."""
        matrix = self.matrix.copy()
        matrix[:, 3] -= self.box[0]
        return matrix

    @property
    def sigmas(self) -> list[float]:
        """Of the blur, in the result's voxels."""
        return [self.augmentation.blur / step for step in self.augmentation.spacing(self.spacing)]

    def read(self) -> np.ndarray:
        """The box, a copy. DataError, naming the file, where it is missing or not what it was."""
        try:
            if not self.path.is_file():
                raise DataError("this prepared file is missing", path=self.path)
            values = open_array(self.path)
            if values.shape != tuple(self.shape):
                raise DataError(f"its shape is {values.shape}, it was {self.shape}", path=self.path)
            (x, y, z), (i, j, k) = self.box
            return np.array(values[x : x + i, y : y + j, z : z + k])
        except DataError as defect:
            defect.fix = "run `ccella-fast prepare` again"
            raise


def augmentation_of(config: Config, case_id: str, *, seed: int, epoch: int) -> Augmentation:
    """How a whole study looks in an epoch."""
    strengths, grid = config.augmentation, config.data
    if not strengths.active:
        return IDENTITY
    return draw_augmentation(strengths, seed=seed, case_id=case_id, epoch=epoch, shape=grid.dim, spacing=grid.spacing)


def study_requests(
    config: Config, images: dict[str, Path], case_id: str, *, seed: int, epoch: int
) -> list[VolumeRequest]:
    """One job a sequence: the same view of each. images: sequence -> prepared file."""
    x, y, z = config.data.dim
    r, a, s = config.data.spacing
    drawn = augmentation_of(config, case_id, seed=seed, epoch=epoch)
    return [
        VolumeRequest(images[sequence], (x, y, z), (0, 0, 0), (x, y, z), (r, a, s), drawn.for_sequence(sequence))
        for sequence in config.data.sequences
    ]


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
