"""First-order and texture features as in radiomics, computed without weights, for every sequence.

The set follows the Frechet radiomics distance (arXiv 2412.01496); formulas and names are those of the Image Biomarker
Standardisation Initiative (IBSI, arXiv 1612.07003, sections 3.3, 3.4 and 3.6), with co-occurrence in 3D merged over the 13
directions. The features explain what differs between two sets. They are no ranking: a few of them grow without limit under
noise or blur.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np

from ccella_fast.evaluation.features.preprocessing import (
    along_axes,
    check_volume,
    crop_or_pad,
    filter_matrix,
    gaussian,
    resample,
    standardise,
)

if TYPE_CHECKING:
    from ccella_fast.evaluation.volumes import Volume

_SPACING = (2.0, 2.0, 2.0)  # mm
_BOX = (40, 40, 24)  # voxels around the centre, 80 x 80 x 48 mm, or the field of view where that is smaller
_SIGMAS = (2.0, 3.0, 4.0)  # mm
_LEVELS = 32
_RANGE = 3.0  # z-scores from -3 to 3 are divided into the levels; what is beyond belongs to the outermost
_LOG_RANGE = 1.5

FIRST_ORDER = (
    "mean", "median", "minimum", "maximum", "range", "10th percentile", "90th percentile", "interquartile range",
    "standard deviation", "mean absolute deviation", "robust mean absolute deviation", "root mean square", "skewness",
    "excess kurtosis", "entropy", "uniformity",
)  # fmt: skip
TEXTURE = (
    "joint maximum", "joint average", "joint variance", "joint entropy", "angular second moment", "autocorrelation",
    "contrast", "dissimilarity", "difference variance", "difference entropy", "sum variance", "sum entropy",
    "inverse difference", "normalised inverse difference", "inverse difference moment",
    "normalised inverse difference moment", "inverse variance", "correlation", "cluster shade", "cluster prominence",
    "first information correlation", "second information correlation",
)  # fmt: skip

# One of each pair of opposite neighbours.
_DIRECTIONS = [offset for offset in itertools.product((-1, 0, 1), repeat=3) if offset > (0, 0, 0)]


class Radiomics:
    """One space, `radiomics`: 16 first-order and 22 texture features of the image and of three Laplacian-of-Gaussian images.

    Attributes:
        names: of the 152 features, in order, such as `LoG 2 mm: contrast`.
    """

    def __init__(self) -> None:
        self.spaces = {"radiomics": len(_image_names()) * len(FIRST_ORDER + TEXTURE)}
        self.sequences: frozenset[str] | None = None
        self.names = {"radiomics": [f"{image}: {name}" for image in _image_names() for name in FIRST_ORDER + TEXTURE]}
        self.identity: dict[str, object] = {
            "extractor": "radiomics",
            "version": 1,
            "preprocessing": {
                "axes": "RAS",
                "spacing_mm": list(_SPACING),
                "interpolation": "linear, same centre",
                "intensities": "z-score over non-zero voxels of the resampled volume",
                "box": list(_BOX),
                "log_sigma_mm": list(_SIGMAS),
                "levels": _LEVELS,
                "range": [_RANGE, _LOG_RANGE],
            },
            "features": f"IBSI: {len(FIRST_ORDER)} first-order, {len(TEXTURE)} co-occurrence in 3D, merged directions",
        }

    def __call__(self, volume: Volume) -> dict[str, np.ndarray]:
        """The features of one volume."""
        check_volume(volume)
        array = resample(volume.array.astype(np.float64), volume.spacing, _SPACING)
        array = standardise(array, volume.id)
        box = [min(size, limit) for size, limit in zip(array.shape, _BOX, strict=True)]
        features = []
        for image, limit in [(array, _RANGE), *((log_image(array, sigma), _LOG_RANGE) for sigma in _SIGMAS)]:
            voxels = crop_or_pad(image, box)
            levels = discretise(voxels, limit)
            features += [first_order(voxels, levels), texture(cooccurrence(levels))]
        return {"radiomics": np.concatenate(features).astype(np.float32)}


def _image_names() -> list[str]:
    return ["image", *(f"LoG {sigma:g} mm" for sigma in _SIGMAS)]


def log_image(array: np.ndarray, sigma: float) -> np.ndarray:
    """Laplacian of a Gaussian of `sigma` mm, times sigma squared in voxels, so that its size does not depend on sigma."""
    total = np.zeros_like(array)
    widths = [sigma / spacing for spacing in _SPACING]
    smooth = [filter_matrix(size, gaussian(width)) for size, width in zip(array.shape, widths, strict=True)]
    for axis, width in enumerate(widths):
        matrices = list(smooth)
        matrices[axis] = filter_matrix(array.shape[axis], gaussian(width, derivative=2)) * width**2
        total += along_axes(array, matrices)
    return total


def discretise(voxels: np.ndarray, limit: float) -> np.ndarray:
    """Levels 0 to 31 of equal width between -limit and limit. Fixed edges: a level means the same in every volume."""
    scaled = np.floor((voxels + limit) * (_LEVELS / (2 * limit)))
    return scaled.clip(0, _LEVELS - 1).astype(np.int64)


def first_order(voxels: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The features named in `FIRST_ORDER`; entropy and uniformity are those of the histogram of `levels`."""
    x = voxels.ravel()
    mean, deviation = x.mean(), x.std()
    p10, p25, p50, p75, p90 = np.percentile(x, (10, 25, 50, 75, 90))
    robust = x[(x >= p10) & (x <= p90)]
    z = (x - mean) / deviation if deviation > 1e-12 else np.zeros_like(x)
    share = np.bincount(levels.ravel()) / levels.size
    return np.array(
        [
            mean, p50, x.min(), x.max(), x.max() - x.min(), p10, p90, p75 - p25,
            deviation, np.abs(x - mean).mean(), np.abs(robust - robust.mean()).mean(), np.sqrt((x**2).mean()), (z**3).mean(),
            (z**4).mean() - 3, _entropy(share), (share**2).sum(),
        ]
    )  # fmt: skip


def cooccurrence(levels: np.ndarray) -> np.ndarray:
    """The (32, 32) symmetric matrix of probabilities of two levels in neighbouring voxels, all 13 directions in one.

    IBSI section 3.6: 3D, merged; distance 1 in the Chebyshev norm.
    """
    counts = np.zeros(_LEVELS * _LEVELS, np.int64)
    for offset in _DIRECTIONS:
        first = levels[
            tuple(slice(max(0, -step), size + min(0, -step)) for step, size in zip(offset, levels.shape, strict=True))
        ]
        second = levels[
            tuple(slice(max(0, step), size + min(0, step)) for step, size in zip(offset, levels.shape, strict=True))
        ]
        counts += np.bincount((first * _LEVELS + second).ravel(), minlength=_LEVELS * _LEVELS)
    matrix = counts.reshape(_LEVELS, _LEVELS)
    return (matrix + matrix.T) / (2 * max(1, matrix.sum()))


def texture(p: np.ndarray) -> np.ndarray:
    """The features named in `TEXTURE` of a symmetric co-occurrence matrix, whose levels count from 1 as in IBSI."""
    level = np.arange(1, _LEVELS + 1)
    i, j = level[:, None], level[None, :]
    single = p.sum(1)  # of the rows, and of the columns: p is symmetric
    difference = np.bincount(np.abs(i - j).ravel(), p.ravel(), minlength=_LEVELS)
    total = np.bincount((i + j).ravel(), p.ravel(), minlength=2 * _LEVELS + 1)
    gap = np.arange(_LEVELS)
    mean = (level * single).sum()
    variance = ((level - mean) ** 2 * single).sum()
    entropy, single_entropy = _entropy(p), _entropy(single)
    independent = 2 * single_entropy  # of a matrix with the same rows whose levels are independent
    cluster = i + j - 2 * mean
    mean_difference = (gap * difference).sum()
    return np.array(
        [
            p.max(), mean, variance, entropy, (p**2).sum(), (i * j * p).sum(),
            (gap**2 * difference).sum(), mean_difference, ((gap - mean_difference) ** 2 * difference).sum(),
            _entropy(difference),
            (cluster**2 * p).sum(), _entropy(total),
            (difference / (1 + gap)).sum(), (difference / (1 + gap / _LEVELS)).sum(), (difference / (1 + gap**2)).sum(),
            (difference / (1 + (gap / _LEVELS) ** 2)).sum(), (difference[1:] / gap[1:] ** 2).sum(),
            ((i - mean) * (j - mean) * p).sum() / variance if variance > 1e-12 else 1.0,
            (cluster**3 * p).sum(), (cluster**4 * p).sum(),
            (entropy - independent) / single_entropy if single_entropy > 1e-12 else 0.0,
            np.sqrt(max(0.0, 1 - np.exp(-2 * (independent - entropy)))),
        ]
    )  # fmt: skip


def _entropy(share: np.ndarray) -> float:
    """In bits."""
    positive = share[share > 0]
    return float(-(positive * np.log2(positive)).sum())
