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
    """One volume that an engine is to produce: a window of a prepared `.npy` file (X, Y, Z), augmented about its center.

    Voxels of the window that are outside the file are 0.

    Attributes:
        path: the file.
        shape: shape of the file in voxels.
        corner: index of the window's first voxel in the file.
        size: shape of the window in voxels.
        spacing: voxel size of the file in mm.
        augmentation: what is applied to the window.
    """

    @cached_property
    def matrix(self) -> np.ndarray:
        """(3, 4) float64, maps the index of an output voxel to an index into the file."""
        matrix = self.augmentation.matrix(self.size, self.spacing)
        matrix[:, 3] += self.corner
        return matrix

    @cached_property
    def box(self) -> tuple[Shape, Shape]:
        """Start and shape of the part of the file that the window needs, at least one voxel per axis."""
        last = np.array(self.size) - 1
        corners = np.array([[x, y, z] for x in (0, last[0]) for y in (0, last[1]) for z in (0, last[2])])
        reached = corners @ self.matrix[:, :3].T + self.matrix[:, 3]
        limit = np.array(self.shape)
        start = np.clip(np.floor(reached.min(0) + 1e-6).astype(int), 0, limit - 1)
        stop = np.clip(np.ceil(reached.max(0) - 1e-6).astype(int) + 1, start + 1, limit)
        return tuple(map(int, start)), tuple(map(int, stop - start))  # type: ignore[return-value]

    @property
    def local_matrix(self) -> np.ndarray:
        """`matrix` relative to the start of `box`."""
        matrix = self.matrix.copy()
        matrix[:, 3] -= self.box[0]
        return matrix

    @property
    def sigmas(self) -> list[float]:
        """Standard deviation of the blur along each axis, in voxels of the output."""
        return [self.augmentation.blur / step for step in self.augmentation.spacing(self.spacing)]

    def read(self) -> np.ndarray:
        """Read the box into memory.

        Returns:
            A float32 copy of the part `box` of the file.

        Raises:
            DataError: the file is missing, cannot be read or does not have the expected shape.
        """
        try:
            if not self.path.is_file():
                raise DataError("this prepared file is missing", path=self.path)
            values = open_array(self.path)
            if values.shape != tuple(self.shape):
                raise DataError(f"the shape must be {tuple(self.shape)}, got {values.shape}", path=self.path)
            (x, y, z), (i, j, k) = self.box
            return np.array(values[x : x + i, y : y + j, z : z + k])
        except DataError as error:
            error.fix = "run `ccella-fast prepare` again"
            raise


def augmentation_of(config: Config, case_id: str, *, seed: int, epoch: int) -> Augmentation:
    """The augmentation of a whole study in an epoch; `IDENTITY` if the configuration does not enable any operator."""
    strengths, grid = config.augmentation, config.data
    if not strengths.active:
        return IDENTITY
    return draw_augmentation(strengths, seed=seed, case_id=case_id, epoch=epoch, shape=grid.dim, spacing=grid.spacing)


def study_requests(
    config: Config, images: dict[str, Path], case_id: str, *, seed: int, epoch: int
) -> list[VolumeRequest]:
    """One request per sequence of a study, all with the same geometry.

    Args:
        config: gives the sequences, the grid and the augmentation.
        images: prepared file of each sequence.
        case_id: the study.
        seed: seed of the run.
        epoch: epoch for which the augmentation is drawn.
    """
    x, y, z = config.data.dim
    r, a, s = config.data.spacing
    drawn = augmentation_of(config, case_id, seed=seed, epoch=epoch)
    return [
        VolumeRequest(images[sequence], (x, y, z), (0, 0, 0), (x, y, z), (r, a, s), drawn.for_sequence(sequence))
        for sequence in config.data.sequences
    ]
