"""Radiomics against the definitions of IBSI in plain loops over voxels and pairs of levels."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ccella_fast.evaluation.features import radiomics
from ccella_fast.evaluation.features.radiomics import FIRST_ORDER, TEXTURE, Radiomics
from feature_fixtures import make_volume

LEVELS = 32


def plain_cooccurrence(levels: np.ndarray) -> np.ndarray:
    """Both orders of every pair of neighbours, voxel by voxel."""
    counts = np.zeros((LEVELS, LEVELS))
    for place in np.ndindex(*levels.shape):
        for step in np.ndindex(3, 3, 3):
            other = tuple(p + s - 1 for p, s in zip(place, step, strict=True))
            inside = all(0 <= o < n for o, n in zip(other, levels.shape, strict=True))
            if inside and other != place:
                counts[levels[place], levels[other]] += 1
    return counts / counts.sum()


def plain_texture(p: np.ndarray) -> dict[str, float]:
    """Section 3.6 of IBSI, sums over levels from 1, written as they are printed."""
    n = LEVELS
    pairs = [(i, j, p[i - 1, j - 1]) for i in range(1, n + 1) for j in range(1, n + 1)]
    rows = [sum(p[i]) for i in range(n)]
    columns = [sum(p[:, j]) for j in range(n)]
    minus = [sum(v for i, j, v in pairs if abs(i - j) == k) for k in range(n)]
    plus = {k: sum(v for i, j, v in pairs if i + j == k) for k in range(2, 2 * n + 1)}
    log2 = lambda v: math.log2(v) if v > 0 else 0.0  # noqa: E731
    mean = sum(i * v for i, j, v in pairs)
    variance = sum((i - mean) ** 2 * v for i, j, v in pairs)
    difference_mean = sum(k * v for k, v in enumerate(minus))
    sum_mean = sum(k * v for k, v in plus.items())
    entropy = -sum(v * log2(v) for i, j, v in pairs)
    hx = -sum(v * log2(v) for v in rows)
    hxy1 = -sum(v * log2(rows[i - 1] * columns[j - 1]) for i, j, v in pairs)
    hxy2 = -sum(rows[i - 1] * columns[j - 1] * log2(rows[i - 1] * columns[j - 1]) for i, j, v in pairs)
    return {
        "joint maximum": max(v for i, j, v in pairs),
        "joint average": mean,
        "joint variance": variance,
        "joint entropy": entropy,
        "angular second moment": sum(v**2 for i, j, v in pairs),
        "autocorrelation": sum(i * j * v for i, j, v in pairs),
        "contrast": sum((i - j) ** 2 * v for i, j, v in pairs),
        "dissimilarity": sum(abs(i - j) * v for i, j, v in pairs),
        "difference variance": sum((k - difference_mean) ** 2 * v for k, v in enumerate(minus)),
        "difference entropy": -sum(v * log2(v) for v in minus),
        "sum variance": sum((k - sum_mean) ** 2 * v for k, v in plus.items()),
        "sum entropy": -sum(v * log2(v) for v in plus.values()),
        "inverse difference": sum(v / (1 + abs(i - j)) for i, j, v in pairs),
        "normalised inverse difference": sum(v / (1 + abs(i - j) / n) for i, j, v in pairs),
        "inverse difference moment": sum(v / (1 + (i - j) ** 2) for i, j, v in pairs),
        "normalised inverse difference moment": sum(v / (1 + (i - j) ** 2 / n**2) for i, j, v in pairs),
        "inverse variance": sum(v / (i - j) ** 2 for i, j, v in pairs if i != j),
        "correlation": sum((i - mean) * (j - mean) * v for i, j, v in pairs) / variance,
        "cluster shade": sum((i + j - 2 * mean) ** 3 * v for i, j, v in pairs),
        "cluster prominence": sum((i + j - 2 * mean) ** 4 * v for i, j, v in pairs),
        "first information correlation": (entropy - hxy1) / hx,
        "second information correlation": math.sqrt(1 - math.exp(-2 * (hxy2 - entropy))),
    }


def plain_first_order(voxels: np.ndarray, levels: np.ndarray) -> dict[str, float]:
    """Sections 3.3 and 3.4 of IBSI."""
    x = sorted(float(v) for v in voxels.ravel())
    n = len(x)

    def percentile(share: float) -> float:
        place = share * (n - 1)
        low = min(int(place), n - 2)
        return x[low] + (place - low) * (x[low + 1] - x[low])

    mean = sum(x) / n
    moment = [sum((v - mean) ** k for v in x) / n for k in range(5)]
    p10, p90 = percentile(0.1), percentile(0.9)
    robust = [v for v in x if p10 <= v <= p90]
    robust_mean = sum(robust) / len(robust)
    share = [float((levels == level).mean()) for level in range(LEVELS)]
    return {
        "mean": mean,
        "median": percentile(0.5),
        "minimum": x[0],
        "maximum": x[-1],
        "range": x[-1] - x[0],
        "10th percentile": p10,
        "90th percentile": p90,
        "interquartile range": percentile(0.75) - percentile(0.25),
        "standard deviation": math.sqrt(moment[2]),
        "mean absolute deviation": sum(abs(v - mean) for v in x) / n,
        "robust mean absolute deviation": sum(abs(v - robust_mean) for v in robust) / len(robust),
        "root mean square": math.sqrt(sum(v**2 for v in x) / n),
        "skewness": moment[3] / moment[2] ** 1.5,
        "excess kurtosis": moment[4] / moment[2] ** 2 - 3,
        "entropy": -sum(s * math.log2(s) for s in share if s > 0),
        "uniformity": sum(s**2 for s in share),
    }


@pytest.fixture
def voxels() -> np.ndarray:
    """Smooth z-scores of another size along each axis, with values beyond the range on both sides."""
    array = make_volume((6, 5, 4)).array.astype(np.float64)
    voxels = (array - array.mean()) / array.std()
    voxels[0, 0, 0], voxels[5, 4, 3] = 9.0, -9.0
    return voxels


def test_levels_have_fixed_edges():
    values = np.array([-9, -3, -3 + 6 / 32 - 1e-9, -3 + 6 / 32, 0, 3 - 1e-9, 3, 9])
    assert radiomics.discretise(values, 3.0).tolist() == [0, 0, 0, 1, 16, 31, 31, 31]


def test_cooccurrence_equals_plain_loops(voxels: np.ndarray):
    levels = radiomics.discretise(voxels, 3.0)
    found = radiomics.cooccurrence(levels)
    np.testing.assert_allclose(found, plain_cooccurrence(levels), atol=1e-15)
    assert found.sum() == pytest.approx(1) and (found > 0).sum() > 50


def test_texture_equals_plain_loops(voxels: np.ndarray):
    p = plain_cooccurrence(radiomics.discretise(voxels, 3.0))
    assert dict(zip(TEXTURE, radiomics.texture(p), strict=True)) == pytest.approx(plain_texture(p), rel=1e-9)


def test_first_order_equals_plain_loops(voxels: np.ndarray):
    levels = radiomics.discretise(voxels, 3.0)
    found = radiomics.first_order(voxels, levels)
    assert dict(zip(FIRST_ORDER, found, strict=True)) == pytest.approx(plain_first_order(voxels, levels), rel=1e-9)


def test_texture_of_a_checkerboard_is_known():
    """Two levels, 10 and 14; of the 26 neighbours of a voxel those at an even number of steps have its level."""
    levels = np.where(np.indices((8, 8, 8)).sum(0) % 2, 10, 14)
    texture = dict(zip(TEXTURE, radiomics.texture(radiomics.cooccurrence(levels)), strict=True))
    pairs = {1: 3 * 8 * 8 * 7, 2: 6 * 8 * 7 * 7, 3: 4 * 7 * 7 * 7}  # neighbours across a face, an edge, a corner
    different = (pairs[1] + pairs[3]) / sum(pairs.values())
    assert texture["contrast"] == pytest.approx(16 * different) and texture["dissimilarity"] == pytest.approx(
        4 * different
    )
    assert texture["joint average"] == pytest.approx(13) and texture["joint variance"] == pytest.approx(4)
    assert texture["correlation"] == pytest.approx(1 - 2 * different)


def test_constant_boxes_have_finite_features():
    levels = np.full((4, 4, 4), 7)
    for p in (radiomics.cooccurrence(levels), radiomics.cooccurrence(levels[:1, :1, :1])):
        assert np.isfinite(radiomics.texture(p)).all()
    assert np.isfinite(radiomics.first_order(np.zeros((4, 4, 4)), levels)).all()


def test_laplacian_of_gaussian_equals_its_formula():
    """A Gaussian blob of width s filtered with width t is known in closed form; the filter sees it inside a zero margin."""
    spacing, blob, sigma = 2.0, 7.0, 3.0
    x = (np.arange(41) - 20) * spacing
    radius2 = sum(axis**2 for axis in np.meshgrid(x, x, x, indexing="ij"))
    width2 = blob**2 + sigma**2
    smooth = (blob**2 / width2) ** 1.5 * np.exp(-radius2 / (2 * width2))
    expected = sigma**2 * smooth * (radius2 / width2**2 - 3 / width2)
    found = radiomics.log_image(np.exp(-radius2 / (2 * blob**2)), sigma)
    np.testing.assert_allclose(found, expected, atol=0.01 * np.abs(expected).max())
    assert np.abs(radiomics.log_image(np.exp(-radius2 / (2 * blob**2)), 4.0) - expected).max() > 0.05


def test_laplacian_is_exact_for_a_parabola_and_blind_to_a_slope():
    x, y, z = np.indices((31, 31, 31)).astype(float) * 2.0
    slope = radiomics.log_image(3 * x - y + 5, 2.0)[15, 15, 15]
    parabola = radiomics.log_image(x**2 + 2 * y**2 - z**2, 2.0)[15, 15, 15]
    assert slope == pytest.approx(0, abs=1e-9) and parabola == pytest.approx(2.0**2 * (2 + 4 - 2), rel=1e-9)


def test_extractor_takes_the_central_box_of_the_standardised_volume():
    volume = make_volume((60, 50, 20), (1.5, 1.5, 3.0))
    extractor = Radiomics()
    found = dict(zip(extractor.names["radiomics"], extractor(volume)["radiomics"], strict=True))
    assert len(found) == 152 == extractor.spaces["radiomics"] and extractor.sequences is None
    array = radiomics.standardise(
        radiomics.resample(volume.array.astype(np.float64), volume.spacing, (2, 2, 2)), "case"
    )
    assert array.shape == (45, 38, 30)
    parts = {"image": (array, 3.0), "LoG 4 mm": (radiomics.log_image(array, 4.0), 1.5)}
    for name, (image, limit) in parts.items():
        box = image[2:42, :, 3:27]  # 40 x 38 x 24: the field of view is narrower than 40 along the second axis
        levels = radiomics.discretise(box, limit)
        texture = dict(zip(TEXTURE, radiomics.texture(radiomics.cooccurrence(levels)), strict=True))
        expected = {**plain_first_order(box, levels), **texture}
        assert {key: found[f"{name}: {key}"] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_gain_and_offset_of_the_scanner_do_not_matter():
    volume = make_volume((40, 40, 16))
    inside = volume._replace(array=np.where(volume.array > 0, volume.array + 0.5, 0))
    found = [Radiomics()(v)["radiomics"] for v in (inside, inside._replace(array=inside.array * 3))]
    np.testing.assert_allclose(found[0], found[1], rtol=1e-3, atol=1e-3)
    blurred = Radiomics()(make_volume((40, 40, 16), seed=1))["radiomics"]
    assert np.abs(blurred - found[0]).max() > 0.1
