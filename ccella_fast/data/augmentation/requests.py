"""Requests for volumes: which window of which prepared file is read, and the augmentation that is applied to it."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ccella_fast.config import Config
from ccella_fast.data.augmentation.parameters import IDENTITY, Augmentation, draw_augmentation
from ccella_fast.data.manifest import open_array
from ccella_fast.errors import DataError

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
