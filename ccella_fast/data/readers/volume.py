"""A volume as the readers return it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class StoredVolume(NamedTuple):
    """A 3D image and its place in the patient. Oblique direction cosines are kept: nothing is rotated.

    Attributes:
        array: (X, Y, Z) float32. A reader of one format keeps the stored order of the axes; `read_volume` returns those
            nearest to Right, Anterior, Superior.
        affine: (4, 4) float64, voxel index -> RAS mm.
        notes: Sentences about what was there and was not used, or was chosen: other b-values, files that are not slices.
            They name files and numbers, never the content of a header.
    """

    array: np.ndarray
    affine: np.ndarray
    notes: tuple[str, ...] = ()

    @property
    def spacing(self) -> np.ndarray:
        """Voxel size in mm along the axes of the array."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)
