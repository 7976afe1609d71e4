"""Features of focal lesions: where in the region of the prostate, and how strongly, a spot differs from what is around it.

Networks that average over the volume do not keep what a report says about a lesion. These features do, without any
weights: they are read by the probes of `conditions.py`. They are not meant for distances between sets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ccella_fast.evaluation.degradations import blur
from ccella_fast.evaluation.images import box_means

if TYPE_CHECKING:
    from ccella_fast.evaluation.volumes import Volume

_STEP = 2.0  # mm
_REGION = (24, 18, 20)  # voxels of 2 mm around the centre: 48 x 36 x 40 mm
_MARGIN = 10  # voxels around the region
_CELLS = (4, 3, 3)  # of the region
_SIGMAS, _WIDER = (2.5, 4.0), 1.6  # mm; the ratio of the widths at which a difference of Gaussians is like a Laplacian
_DARKEST = 0.05  # of the window, so that the logarithm of 0 exists
_LARGEST, _QUANTILES = 4, (0.9, 0.99, 0.999)
_BRIGHT = ("hbv",)  # sequences on which lesions are bright; they are dark on the others


class FociFeatures:
    """An extractor of one space, "foci", for every sequence.

    On the logarithm of the intensities at 2 mm, a difference of Gaussians of 2.5 and of 4 mm is large in spots of about 9
    and 14 mm. Of each: its maximum in each of 4 x 3 x 3 cells, the four largest of these, three quantiles over the region,
    and the differences between mirrored cells.
    """

    spaces = {"foci": len(_SIGMAS) * (3 * int(np.prod(_CELLS)) // 2 + _LARGEST + len(_QUANTILES))}
    sequences: frozenset[str] | None = None
    identity: dict[str, object] = {
        "extractor": "foci", "version": 1, "step_mm": _STEP, "region": list(_REGION), "cells": list(_CELLS),
        "sigmas_mm": list(_SIGMAS),
    }  # fmt: skip

    def __call__(self, volume: Volume) -> dict[str, np.ndarray]:
        """The vector of a volume, (122,) float32."""
        shape = tuple(size + 2 * _MARGIN for size in _REGION)
        image = np.log(box_means(volume.array, volume.spacing, shape, _STEP).clip(0) + np.float32(_DARKEST))
        inner = tuple(slice(_MARGIN, _MARGIN + size) for size in _REGION)
        sign = -1 if volume.sequence in _BRIGHT else 1
        found = []
        for sigma in _SIGMAS:
            spots = sign * (blur(image, (_STEP,) * 3, _WIDER * sigma) - blur(image, (_STEP,) * 3, sigma))[inner]
            cells = _cell_maxima(spots)
            left_right = np.abs(cells - cells[::-1])[: _CELLS[0] // 2]
            largest = np.sort(cells, axis=None)[-_LARGEST:]
            found += [cells.ravel(), largest, np.quantile(spots, _QUANTILES), left_right.ravel()]
        return {"foci": np.concatenate(found).astype(np.float32)}


def _cell_maxima(values: np.ndarray) -> np.ndarray:
    for axis, count in enumerate(_CELLS):
        starts = [part[0] for part in np.array_split(np.arange(values.shape[axis]), count)]
        values = np.maximum.reduceat(values, starts, axis)
    return values
