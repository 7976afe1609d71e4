"""Properties of the images themselves: diversity, intensities, spectra, and small images to find copies with.

Intensities, spectra and small images are short vectors, so they are extracted, cached and compared as features are
(`ImageFeatures`). Multi-scale structural similarity is computed from pairs of volumes, two of which are in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from ccella_fast.errors import DataError
from ccella_fast.evaluation.copying import Memorisation, memorisation_of_distances
from ccella_fast.evaluation.statistics import feature_matrix

if TYPE_CHECKING:
    from ccella_fast.evaluation.volumes import Volume

INTENSITY_BINS = 512  # of equal width, from 0 to 1
FREQUENCY_BINS = 32  # of equal width, from 0 to the Nyquist frequency
PLANES = ("sagittal", "coronal", "axial")  # the axis that runs through the slices is x, y, z
SMALL_SPACING, SMALL_SHAPE = 4.0, (24, 24, 12)  # mm and voxels: the central 96 x 96 x 48 mm
MAX_SHIFT = 2  # voxels of a small image

_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # Wang et al. 2003, of the levels from fine to coarse
_SIGMA, _C1, _C2 = 1.5, 0.01**2, 0.03**2  # width of the window in voxels; stability constants for intensities in [0, 1]
_LOWEST_DB = -120.0  # of a power that is 0
_SLAB = 16  # slices that are processed at a time


class ImageFeatures:
    """An extractor of the vectors of this module, for the feature cache; every sequence is served.

    Attributes:
        spaces: "intensity" is `intensity_histogram`, "spectrum" `power_spectra` and "image-4mm" `small_image`, flattened.
        sequences: None, which means all.
        identity: the settings above.
    """

    spaces = {
        "intensity": INTENSITY_BINS,
        "spectrum": len(PLANES) * FREQUENCY_BINS,
        "image-4mm": int(np.prod(SMALL_SHAPE)),
    }
    sequences: frozenset[str] | None = None
    identity: dict[str, object] = {
        "extractor": "images", "version": 1, "intensity_bins": INTENSITY_BINS, "frequency_bins": FREQUENCY_BINS,
        "small_spacing_mm": SMALL_SPACING, "small_shape": list(SMALL_SHAPE),
    }  # fmt: skip

    def __call__(self, volume: Volume) -> dict[str, np.ndarray]:
        """The vectors of a volume."""
        return {
            "intensity": intensity_histogram(volume.array),
            "spectrum": power_spectra(volume.array).ravel(),
            "image-4mm": small_image(volume.array, volume.spacing).ravel(),
        }


# ---- Diversity


class Diversity(NamedTuple):
    """How similar the volumes of a set are to one another: MS-SSIM of pairs, 1 for identical volumes.

    A low value is not good by itself; compare it with that of real volumes on the same grid.

    Attributes:
        mean: over all pairs.
        ci95: interval of the mean for other volumes of the same kind, from a jackknife that leaves out one volume at a time.
        pairs: their number.
        same_class: mean over the pairs of the same known class; None if there are none.
        same_class_pairs: their number.
        other_class: mean over the pairs of two known classes; None if there are none.
        other_class_pairs: their number.
        levels: of resolution, at most 5; fewer on small grids.
        kernel_size: of the window in voxels, at most 11; less on small grids.
    """

    mean: float
    ci95: tuple[float, float]
    pairs: int
    same_class: float | None
    same_class_pairs: int
    other_class: float | None
    other_class_pairs: int
    levels: int
    kernel_size: int


def ms_ssim_diversity(
    volumes: Sequence[Volume],
    num_pairs: int = 500,
    seed: int = 0,
    *,
    patients: Sequence[str | None] | None = None,
    classes: Sequence[str | None] | None = None,
) -> Diversity:
    """Multi-scale structural similarity of random pairs of volumes of one set.

    Args:
        volumes: a list or a `VolumeSet`, of one grid; two are in memory at a time.
        num_pairs: how many pairs are drawn, without replacement; all pairs if there are not more.
        seed: of the draw.
        patients: of the volumes; two volumes of one patient are not a pair. Default: every volume has a patient of its own.
        classes: of the volumes, None where it is unknown.

    Raises:
        DataError: there are fewer than two patients, or the volumes have different shapes or an axis of fewer than 3 voxels.
    """
    patients = patients if patients is not None else [None] * len(volumes)
    classes = classes if classes is not None else [None] * len(volumes)
    pairs = draw_pairs(patients, num_pairs, seed)
    values, levels, kernel_size = ms_ssim_of_pairs(volumes, pairs)
    return summarize_pairs(values, pairs, classes, levels, kernel_size)


def draw_pairs(patients: Sequence[str | None], num_pairs: int = 500, seed: int = 0) -> np.ndarray:
    """Random pairs of volumes of different patients, without replacement.

    Args:
        patients: of the volumes; None stands for a patient of its own.
        num_pairs: how many; all pairs if there are not more.
        seed: of the draw.

    Returns:
        (pairs, 2) int, sorted, the smaller index first.

    Raises:
        DataError: there are fewer than two patients.
    """
    first, second = np.triu_indices(len(patients), 1)
    candidates = np.stack([first, second], 1)
    allowed = [patients[i] is None or patients[i] != patients[j] for i, j in candidates.tolist()]
    candidates = candidates[np.array(allowed, bool)]
    if not len(candidates):
        why = f"diversity needs volumes of at least two patients, got {len(set(patients)) if patients else 0}"
        raise DataError(why, fix="give more volumes")
    chosen = np.random.default_rng(seed).permutation(len(candidates))[:num_pairs]
    return candidates[np.sort(chosen)]


def ms_ssim_of_pairs(volumes: Sequence[Volume], pairs: np.ndarray) -> tuple[np.ndarray, int, int]:
    """MS-SSIM of pairs of volumes; see `ms_ssim_diversity`. Sorted pairs are fastest: their first volume is read once.

    Args:
        volumes: a list or a `VolumeSet`.
        pairs: (pairs, 2) int, indices.

    Returns:
        The values (pairs,), the number of levels and the size of the window.
    """
    values = np.empty(len(pairs))
    held, a, shape, levels, kernel_size = None, None, None, 0, 0
    for number, (first, second) in enumerate(pairs):
        if held != first:
            held, a = first, None
            a = volumes[int(first)]
        b = volumes[int(second)]
        assert a is not None
        if shape is None:
            shape = a.array.shape
            levels, kernel_size = ms_ssim_scales(shape)
        for volume in (a, b):
            if volume.array.shape != shape:
                why = f"volumes of different shapes in one set: {shape} and {volume.array.shape}"
                raise DataError(why, path=volume.id, fix="bring all volumes of the set to one grid")
        values[number] = ms_ssim(a.array, b.array, levels, kernel_size)
        del b, volume  # before the next one is read
    return values, levels, kernel_size


def summarize_pairs(
    values: np.ndarray, pairs: np.ndarray, classes: Sequence[str | None], levels: int, kernel_size: int
) -> Diversity:
    """The means of `ms_ssim_of_pairs`, with an interval; see `Diversity`.

    The interval is the jackknife of a U-statistic of degree 2 (Arvesen, Annals of Mathematical Statistics 40, 1969): pairs
    share volumes, so they are not independent.
    """
    named = [(classes[i], classes[j]) for i, j in pairs]
    same = np.array([a is not None and a == b for a, b in named], bool)
    other = np.array([None not in (a, b) and a != b for a, b in named], bool)
    mean = float(values.mean())
    without = []
    for volume in np.unique(pairs):
        kept = values[(pairs != volume).all(1)]
        if len(kept):
            without.append(kept.mean())
    n = len(without)
    error = float(np.sqrt((n - 1) / n * np.square(np.array(without) - np.mean(without)).sum())) if n > 2 else np.inf
    return Diversity(
        mean,
        (max(0.0, mean - 1.96 * error), min(1.0, mean + 1.96 * error)),
        len(values),
        float(values[same].mean()) if same.any() else None,
        int(same.sum()),
        float(values[other].mean()) if other.any() else None,
        int(other.sum()),
        levels,
        kernel_size,
    )


def ms_ssim_scales(shape: Sequence[int]) -> tuple[int, int]:
    """The levels, at most 5, and the size of the window, odd and at most 11, that a grid allows: as many levels as possible.

    The window must fit into the smallest axis of the coarsest level; MONAI also divides that axis by (levels - 1)^2.

    Raises:
        DataError: an axis has fewer than 3 voxels.
    """
    for levels in range(len(_WEIGHTS), 0, -1):
        room = min(shape) // max(2 ** (levels - 1), (levels - 1) ** 2)
        if room >= 3:
            return levels, min(11, room - 1 + room % 2)
    raise DataError(f"structural similarity needs at least 3 voxels along each axis, got {tuple(shape)}")


def ms_ssim(a: np.ndarray, b: np.ndarray, levels: int, kernel_size: int) -> float:
    """Multi-scale structural similarity (Wang, Simoncelli and Bovik 2003, equation 7) of two volumes, intensities in [0, 1].

    Equal to MONAI's `compute_ms_ssim` with the first weights of the five, scaled to a sum of 1; its dense three-dimensional
    Gaussian window is applied here along one axis after the other, which is many times faster.

    Args:
        a: (X, Y, Z) float32.
        b: of the same shape.
        levels: number of resolutions; each halves the grid.
        kernel_size: of the Gaussian window of sigma 1.5 voxels, in voxels.
    """
    weights = np.array(_WEIGHTS[:levels]) / sum(_WEIGHTS[:levels])
    offsets = torch.arange(kernel_size, dtype=torch.float32) - (kernel_size - 1) / 2
    window = torch.exp(-0.5 * (offsets / _SIGMA) ** 2)
    window /= window.sum()
    x, y = (torch.from_numpy(np.ascontiguousarray(volume, dtype=np.float32)) for volume in (a, b))
    value = 1.0
    for level, weight in enumerate(weights):
        value *= max(0.0, _mean_contrast(x, y, window, with_luminance=level == levels - 1)) ** weight
        if level < levels - 1:
            x, y = (torch.nn.functional.avg_pool3d(volume[None, None], 2)[0, 0] for volume in (x, y))
    return float(value)


def _mean_contrast(x: torch.Tensor, y: torch.Tensor, window: torch.Tensor, *, with_luminance: bool) -> float:
    """Mean of contrast and structure, and of the luminance if asked for, in slabs that stay in the cache."""
    total, count = 0.0, 0
    for start in range(0, len(x) - len(window) + 1, _SLAB):
        part_x, part_y = (volume[start : start + _SLAB + len(window) - 1] for volume in (x, y))
        mean_x, mean_y = _windowed(part_x, window), _windowed(part_y, window)
        covariance = _windowed(part_x * part_y, window) - mean_x * mean_y
        variances = _windowed(part_x * part_x + part_y * part_y, window) - mean_x**2 - mean_y**2
        values = (2 * covariance + _C2) / (variances + _C2)
        if with_luminance:
            values *= (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
        total, count = total + float(values.sum(dtype=torch.float64)), count + values.numel()
    return total / count


def _windowed(x: torch.Tensor, window: torch.Tensor) -> torch.Tensor:
    """Weighted mean under a separable window at each place where it is inside the volume."""
    for axis in range(3):
        size = x.shape[axis] - len(window) + 1
        total = x.narrow(axis, 0, size) * window[0]
        for offset in range(1, len(window)):
            total.add_(x.narrow(axis, offset, size), alpha=float(window[offset]))
        x = total
    return x


# ---- Intensities


def intensity_histogram(array: np.ndarray) -> np.ndarray:
    """Share of the voxels in each of `INTENSITY_BINS` bins, (bins,) float32; values outside [0, 1] count in the end bins."""
    index = np.clip(array * np.float32(INTENSITY_BINS), 0, INTENSITY_BINS - 1).astype(np.int32)
    return (np.bincount(index.ravel(), minlength=INTENSITY_BINS) / index.size).astype(np.float32)


def intensity_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Wasserstein-1 distance of the mean histograms of two sets, in intensity (the window is 1): the area between their CDFs.

    Args:
        a: (n, bins), see `intensity_histogram`.
        b: (m, bins).
    """
    difference = a.mean(0, dtype=np.float64) - b.mean(0, dtype=np.float64)
    return float(np.abs(np.cumsum(difference)).sum() / len(difference))


# ---- Spectra


def power_spectra(array: np.ndarray) -> np.ndarray:
    """Radial power spectrum in each plane in dB, (3, `FREQUENCY_BINS`) float32, the planes in the order of `PLANES`.

    Each slice, minus its mean and under a Hann window, is Fourier-transformed; the power is averaged over slices and over
    rings of equal frequency. Frequencies are in units of each axis' Nyquist frequency, so spectra are comparable between
    volumes of one voxel size. A bin without any frequency, on small grids, has the value of the bin below it.
    """
    x = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    return np.stack([_radial_db(x.movedim(axis, 0)) for axis in range(3)]).astype(np.float32)


def _radial_db(slices: torch.Tensor) -> np.ndarray:
    rows, columns = slices.shape[1:]
    hann = [torch.hann_window(size + 2, periodic=False)[1:-1] for size in (rows, columns)]
    window = hann[0][:, None] * hann[1]
    power = torch.zeros(rows, columns // 2 + 1, dtype=torch.float64)
    for part in slices.split(_SLAB):
        part = (part - part.mean((1, 2), keepdim=True)) * window
        power += torch.view_as_real(torch.fft.rfft2(part)).square().sum((0, 3), dtype=torch.float64)
    power /= len(slices) * window.square().sum(dtype=torch.float64)
    # Frequency / Nyquist frequency. The half-plane that rfft leaves out mirrors its inner columns.
    v, u = 2 * np.abs(np.fft.fftfreq(rows)), 2 * np.fft.rfftfreq(columns)
    ring = np.floor(np.hypot(v[:, None], u) * FREQUENCY_BINS).astype(int)
    count = np.broadcast_to(np.where((u == 0) | (u == 1), 1, 2), ring.shape)
    inside = (ring < FREQUENCY_BINS) & (np.hypot(v[:, None], u) > 0)
    totals = np.bincount(ring[inside], (power.numpy() * count)[inside], FREQUENCY_BINS)
    counts = np.bincount(ring[inside], count[inside], FREQUENCY_BINS)
    filled = np.maximum.accumulate(np.where(counts > 0, np.arange(FREQUENCY_BINS), -1))
    filled = np.where(filled < 0, np.argmax(counts > 0), filled)
    return 10 * np.log10(np.maximum(totals[filled] / counts[filled], 10 ** (_LOWEST_DB / 10)))


class SpectralDistance(NamedTuple):
    """Difference of two sets' mean spectra in dB.

    Attributes:
        total: root mean square over all bins and planes (log-spectral distance).
        high: mean difference in the upper half of the frequencies, second set minus first: below 0 if the second is blurred.
        planes: `total` of each plane, in the order of `PLANES`.
    """

    total: float
    high: float
    planes: tuple[float, ...]


def spectral_distance(real: np.ndarray, synthetic: np.ndarray) -> SpectralDistance:
    """Compare the mean spectra of two sets.

    Args:
        real: (n, 3 * bins) or (n, 3, bins), see `power_spectra`.
        synthetic: (m, ...) likewise.
    """
    means = [values.reshape(len(values), len(PLANES), -1).mean(0, dtype=np.float64) for values in (real, synthetic)]
    difference = means[1] - means[0]
    squares = np.square(difference)
    high = difference[:, difference.shape[1] // 2 :].mean()
    return SpectralDistance(
        float(np.sqrt(squares.mean())), float(high), tuple(float(root) for root in np.sqrt(squares.mean(1)))
    )


# ---- Small images, for memorization


def small_image(array: np.ndarray, spacing: Sequence[float]) -> np.ndarray:
    """The central 96 x 96 x 48 mm at 4 mm, (24, 24, 12) float32; see `box_means`."""
    return box_means(array, spacing, SMALL_SHAPE, SMALL_SPACING)


def box_means(array: np.ndarray, spacing: Sequence[float], shape: Sequence[int], step: float) -> np.ndarray:
    """Means over cubes of `step` mm around the centre of a volume, `shape` float32. Beyond its edge the last voxel goes on."""
    axes = zip(array.shape, spacing, shape, strict=True)
    x, y, z = (_overlaps(size, length, count, step) for size, length, count in axes)
    return np.einsum("xi,yj,zk,ijk->xyz", x, y, z, array.astype(np.float32, copy=False), optimize=True).astype(
        np.float32
    )


def _overlaps(size: int, length: float, count: int, step: float) -> np.ndarray:
    """Weights (count, size) of an axis' voxels of `length` mm in the means over `count` central intervals of `step` mm."""
    edges = (np.arange(size + 1) - size / 2) * length
    edges[[0, -1]] = -np.inf, np.inf
    targets = (np.arange(count + 1) - count / 2) * step
    upper = np.minimum(edges[None, 1:], targets[1:, None])
    lower = np.maximum(edges[None, :-1], targets[:-1, None])
    return (np.maximum(upper - lower, 0) / step).astype(np.float32)


class NearestImages(NamedTuple):
    """The most similar image of a gallery for each of n images.

    Attributes:
        row: (n,) int, in the gallery.
        correlation: (n,) float64, at most 1.
    """

    row: np.ndarray
    correlation: np.ndarray


def nearest_images(images: np.ndarray, gallery: np.ndarray) -> NearestImages:
    """For each small image the most similar one of a gallery, by `image_correlations`."""
    correlations = image_correlations(images, gallery)
    row = correlations.argmax(1)
    return NearestImages(row, correlations[np.arange(len(images)), row].astype(np.float64))


def image_correlations(images: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Normalized cross-correlation of small images, the best over shifts of -2 to 2 voxels per axis and a left-right flip.

    The inner part of an image is compared with all shifted parts of a gallery image and of its mirror image, each minus
    its mean and divided by its norm. A constant image has correlation 0.

    Args:
        images: (n, 6912) or (n, 24, 24, 12), see `small_image`.
        gallery: (m, ...) likewise.

    Returns:
        (n, m) float32; 1 - this is a distance.
    """
    images, gallery = (np.asarray(given, np.float32).reshape(-1, *SMALL_SHAPE) for given in (images, gallery))
    inner = tuple(slice(MAX_SHIFT, size - MAX_SHIFT) for size in SMALL_SHAPE)
    templates = _unit(images[(slice(None), *inner)].reshape(len(images), -1))
    result = np.empty((len(images), len(gallery)), np.float32)
    for number, image in enumerate(gallery):
        result[:, number] = (templates @ _shifted(image).T).max(1)
    return result


def image_memorisation(train: np.ndarray, held_out: np.ndarray, synthetic: np.ndarray) -> Memorisation:
    """Copies of training images among synthetic ones, also moved by up to 8 mm, mirrored, brighter or of other contrast.

    The distance is the square root of 2 (1 - `image_correlations`): that of the normalized images where they agree best.

    Args:
        train: (n, 6912) small images of the generator's training volumes, n at least 3.
        held_out: (h, 6912) of real volumes that the generator was not trained on, h at least 3.
        synthetic: (m, 6912).

    Raises:
        DataError: a set cannot be used; see `copying.memorisation`.
    """
    train, held_out = feature_matrix(train, "training", 3), feature_matrix(held_out, "held-out", 3)
    others = (held_out, feature_matrix(synthetic, "synthetic", 1))
    correlations = [image_correlations(images, train).astype(np.float64) for images in others]
    return memorisation_of_distances(*(np.sqrt(2 * (1 - values).clip(0)) for values in correlations))


def best_alignment(image: np.ndarray, other: np.ndarray) -> tuple[float, tuple[int, int, int], bool]:
    """Correlation, shift of the other image in voxels, and whether it is mirrored, where two small images agree best.

    `other` (mirrored first if so) moved by the shift is most similar to `image`.
    """
    image, other = (np.asarray(given, np.float32).reshape(SMALL_SHAPE) for given in (image, other))
    inner = tuple(slice(MAX_SHIFT, size - MAX_SHIFT) for size in SMALL_SHAPE)
    scores = _shifted(other) @ _unit(image[inner].reshape(1, -1))[0]
    best = int(scores.argmax())
    flip, *starts = np.unravel_index(best, (2, *(2 * MAX_SHIFT + 1,) * 3))
    x, y, z = (MAX_SHIFT - int(start) for start in starts)
    return float(scores[best]), (x, y, z), bool(flip)


def _shifted(image: np.ndarray) -> np.ndarray:
    """All shifted inner parts of an image and of its mirror image, normalized, (250, voxels)."""
    inner = tuple(size - 2 * MAX_SHIFT for size in SMALL_SHAPE)
    both = [np.lib.stride_tricks.sliding_window_view(side, inner) for side in (image, image[::-1])]
    return _unit(np.stack(both).reshape(-1, int(np.prod(inner))))


def _unit(rows: np.ndarray) -> np.ndarray:
    rows = rows - rows.mean(1, keepdims=True)
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return rows / np.where(norm > 1e-6 * np.sqrt(rows.shape[1]), norm, np.inf)
