"""Degradations against closed forms and SimpleITK; the gate on extractors of known sensitivity."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import SimpleITK as sitk

from ccella_fast.errors import DataError
from ccella_fast.evaluation import degradations
from ccella_fast.evaluation.degradations import CENTRAL, DEGRADATIONS, Region
from ccella_fast.evaluation.paired import sign_flip_p
from ccella_fast.evaluation.sensitivity import GATING, gate_table, sensitivity_gate
from ccella_fast.evaluation.volumes import Volume

SHAPE, SPACING = (44, 40, 16), (2.0, 2.0, 4.0)


def grid(shape=SHAPE, spacing=SPACING) -> list[np.ndarray]:
    axes = ((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True))
    return np.meshgrid(*axes, indexing="ij")


def phantom(number: int, lesion: bool = False) -> tuple[Volume, np.ndarray]:
    """A bright ellipsoid in a textured background, and the mask of its dark focus, which may be drawn."""
    rng = np.random.default_rng(number)
    x, y, z = grid()
    noise = sitk.GetImageFromArray(rng.standard_normal(SHAPE).astype(np.float32))
    texture = sitk.GetArrayFromImage(sitk.DiscreteGaussian(noise, 1.0))
    half = rng.uniform((20, 16, 17), (26, 20, 22))
    inside = (x / half[0]) ** 2 + (y / half[1]) ** 2 + (z / half[2]) ** 2 < 1
    focus = (x - 9) ** 2 + (y - 5) ** 2 + z**2 < 49
    array = 0.35 + 0.1 * texture + 0.3 * inside - (0.2 * focus if lesion else 0) + 0.01 * rng.standard_normal(SHAPE)
    return Volume(array.astype(np.float32), SPACING, f"case-{number}", "t2w", None, "pos" if lesion else "neg"), focus


class Moments:
    """Intensities and gradients of the volume and of its center: sees every degradation."""

    spaces = {"moments": 12}
    sequences = None
    identity: dict[str, object] = {}

    def __call__(self, volume):
        inner = volume.array[10:-10, 10:-10, 3:-3].astype(np.float64)
        gradients = [np.abs(np.diff(inner, axis=axis)).mean() for axis in range(3)]
        seconds = [np.abs(np.diff(inner, 2, axis)).mean() for axis in range(3)]
        levels = [(inner > level).mean() for level in (0.4, 0.5, 0.6)]
        vector = [inner.mean(), inner.std(), (inner**3).mean(), *gradients, *seconds, *levels]
        return {"moments": np.array(vector, np.float32)}


class Focus(Moments):
    """Sees the dark focus, and the contrast of the gland."""

    spaces = {"focus": 2}

    def __call__(self, volume):
        center = volume.array[22:32, 20:25, 6:10]
        return {"focus": np.array([center.mean(), volume.array.std()], np.float32)}


class Deaf(Moments):
    """Knows the volume by its name alone, so that no degradation changes anything."""

    def __call__(self, volume):
        return {"moments": np.random.default_rng(int(volume.id.removeprefix("case-"))).random(12).astype(np.float32)}


class Blind(Moments):
    """As above, and a space of random numbers that have nothing to do with how much worse a volume is."""

    spaces = {"moments": 12, "random": 5}

    def __call__(self, volume):
        seed = abs(hash(volume.array.tobytes())) % 2**32
        return {**super().__call__(volume), "random": np.random.default_rng(seed).random(5).astype(np.float32)}


def test_blur_of_a_point_is_the_integrated_gaussian_and_keeps_a_constant():
    from math import erf, sqrt

    point = np.zeros((31, 31, 21), np.float32)
    point[15, 15, 10] = 1
    blurred = degradations.blur(point, (0.8, 0.8, 3.0), 2.0)

    def cell(offset, step):
        return 0.5 * (erf((offset + 0.5) * step / 2 / sqrt(2)) - erf((offset - 0.5) * step / 2 / sqrt(2)))

    for i, j, k in ((0, 0, 0), (3, 1, 0), (0, -4, 1), (2, 2, -2)):
        expected = cell(i, 0.8) * cell(j, 0.8) * cell(k, 3.0)
        assert blurred[15 + i, 15 + j, 10 + k] == pytest.approx(expected, rel=1e-3)
    np.testing.assert_allclose(degradations.blur(np.full((9, 9, 5), 0.3, np.float32), (1, 1, 3), 2.0), 0.3, atol=1e-6)
    # A large blur agrees with another library's.
    x = np.random.default_rng(0).random((40, 40, 40)).astype(np.float32)
    other = sitk.GetArrayFromImage(sitk.DiscreteGaussian(sitk.GetImageFromArray(x), 9.0, 30, 1e-5))
    inner = (slice(13, -13),) * 3
    np.testing.assert_allclose(degradations.blur(x, (1, 1, 1), 3.0)[inner], other[inner], atol=1e-3)


def test_noise_is_repeatable_and_of_its_size():
    x = np.zeros((40, 40, 20), np.float32)
    noise = degradations.add_noise(x, 0.05, "a")
    assert noise.std() == pytest.approx(0.05, rel=0.02) and noise.dtype == np.float32
    assert (noise == degradations.add_noise(x, 0.05, "a")).all()
    assert abs(np.corrcoef(noise.ravel(), degradations.add_noise(x, 0.05, "b").ravel())[0, 1]) < 0.03


def test_shift_moves_by_the_nearest_whole_number_of_voxels():
    x = np.random.default_rng(0).random((12, 5, 4))
    for spacing, voxels in ((0.8, 3), (0.5, 5), (2.25, 1), (6.0, 1)):
        moved = degradations.shift(x, (spacing, 1, 1), 2.4)
        assert (moved[voxels:] == x[:-voxels]).all() and (moved[:voxels] == x[0]).all()


def test_a_scaled_gland_has_its_new_size_and_far_from_it_nothing_changes():
    x, y, z = grid()
    region = Region((4.0, -2.0, 0.0), (16.0, 12.0, 12.0))
    radius = np.sqrt(
        sum(((a - c) / h) ** 2 for a, c, h in zip((x, y, z), region.centre, region.half_axes, strict=True))
    )
    smooth = np.exp(-(radius**2)).astype(np.float32)
    for factor in (1.05, 1.15):
        scaled = degradations.scale_gland(smooth, SPACING, factor, region)
        inside = radius < 0.9
        expected = np.exp(-((radius / factor) ** 2))
        assert np.abs(scaled - expected)[inside].max() < 0.01 < np.abs(smooth - expected)[inside].max()
        assert (scaled == smooth)[radius >= 1.6].all()
    # Cubic interpolation does not change a volume by itself.
    noise = np.random.default_rng(0).random(SHAPE).astype(np.float32)
    np.testing.assert_allclose(degradations.scale_gland(noise, SPACING, 1.0, region), noise, atol=1e-5)
    sharp = phantom(0)[0].array > 0.5
    grown = degradations.scale_gland(sharp.astype(np.float32), SPACING, 1.15, CENTRAL) > 0.5
    assert 1.3 < grown.sum() / sharp.sum() < 1.65  # 1.15^3 = 1.52


def test_the_region_of_a_mask_is_where_the_mask_is():
    x, y, z = grid()
    mask = ((x - 7) / 15) ** 2 + ((y + 4) / 12) ** 2 + (z / 18) ** 2 < 1
    region = degradations.region_of(mask, SPACING)
    assert region.centre == pytest.approx((7, -4, 0), abs=2) and region.half_axes == pytest.approx(
        (15, 12, 18), abs=2.1
    )
    assert degradations.region_of(np.zeros(SHAPE, bool), SPACING) == CENTRAL


def test_a_removed_lesion_is_as_bright_as_its_surroundings_and_keeps_its_texture():
    with_lesion, focus = phantom(3, lesion=True)
    without = phantom(3)[0].array
    removed = degradations.remove_lesion(with_lesion.array, SPACING, focus)
    assert removed[focus].mean() == pytest.approx(without[focus].mean(), abs=0.04)
    assert with_lesion.array[focus].mean() < without[focus].mean() - 0.15
    x, y, z = grid()
    inner = (x - 9) ** 2 + (y - 5) ** 2 + z**2 < 20
    assert np.corrcoef(removed[inner], without[inner])[0, 1] > 0.95
    assert (removed == with_lesion.array)[(x - 9) ** 2 + (y - 5) ** 2 + z**2 > 400].all()
    assert (degradations.remove_lesion(without, SPACING, np.zeros(SHAPE, bool)) == without).all()


def test_a_sensitive_space_passes_and_a_blind_one_fails():
    volumes = [phantom(number)[0] for number in range(6)]
    gates = {gate.space: gate for gate in sensitivity_gate(iter(volumes), Blind())}
    good, bad = gates["moments"], gates["random"]
    assert good.passed and set(good.in_order.values()) == {1.0} and set(good.in_order) == set(GATING)
    assert not bad.passed
    assert [row[:4] for row in good.rows] == [(*each[:3], 6) for each in DEGRADATIONS]
    blur = [row for row in good.rows if row.family == "blur"]
    assert blur[0].paired < blur[1].paired < blur[2].paired
    assert blur[2].detected == 1 and blur[2].frechet_ratio > 2 * blur[0].frechet_ratio
    assert good.lesion_p is None and good.class_ratio is None and good.guards == ["few"]
    table = gate_table(list(gates.values())).splitlines()
    assert table[0].split("  ")[0] == "space" and "blur 0.5 mm" in table[0] and "gland 15 %" in table[0]
    column = table[0].index("noise 0.01")
    assert all(line[column - 2 : column] == "  " and line[column] in "n0123456789" for line in table)
    assert table[1].startswith("moments") and table[1].endswith("yes") and table[2].endswith("no")


def test_a_space_in_which_nothing_changes_fails():
    (gate,) = sensitivity_gate([phantom(number)[0] for number in range(6)], Deaf())
    assert not gate.passed and set(gate.in_order.values()) == {0.0}
    for row in gate.rows:
        assert row.paired == 0 and row.frechet_ratio == pytest.approx(1) and row.detected <= 0.1


def test_paired_distances_equal_a_loop():
    volumes = [phantom(number)[0] for number in range(4)]
    volumes[1] = volumes[1]._replace(patient="a")
    volumes[2] = volumes[2]._replace(patient="a")
    (gate,) = sensitivity_gate(volumes, Moments())
    features = np.stack([Moments()(volume)["moments"] for volume in volumes]).astype(np.float64)
    deviation = features.std(0, ddof=1)
    between = [
        np.linalg.norm((features[i] - features[j]) / deviation)
        for i, j in itertools.combinations(range(4), 2)
        if (i, j) != (1, 2)
    ]
    for degradation, row in zip(DEGRADATIONS, gate.rows, strict=True):
        worse = [Moments()(v._replace(array=degradation.apply(v, CENTRAL)))["moments"] for v in volumes]
        distances = np.linalg.norm((np.stack(worse) - features) / deviation, axis=1)
        assert row.paired == pytest.approx(distances.mean() / np.mean(between), rel=1e-6)


def test_lesions_and_class_ratio_are_reported():
    pairs = [phantom(number, lesion=number % 2 == 0) for number in range(28)]
    known = {volume.id: focus for volume, focus in pairs if volume.pirads == "pos"}
    volumes = [volume for volume, _ in pairs]
    (gate,) = sensitivity_gate(volumes, Focus(), lesions=lambda volume: known.get(volume.id), draws=20)
    assert gate.lesion_p is not None and gate.lesion_p < 0.05
    assert gate.rows[-1].family == "lesion" and gate.rows[-1].n == 14
    assert gate.class_ratio is not None and gate.class_ratio.m == 10 and gate.class_ratio.detected >= 0.8
    assert gate.class_ratio.frechet_ratio > 1.5 and gate.guards == []
    (gate,) = sensitivity_gate(volumes[:24], Focus(), draws=2)
    assert gate.class_ratio is None and gate.lesion_p is None


def test_sign_flips_are_exact_and_uniform_under_the_null():
    rng = np.random.default_rng(0)
    differences = rng.standard_normal((7, 3))
    norms = [np.linalg.norm(np.array(signs) @ differences) for signs in itertools.product((1, -1), repeat=7)]
    assert sign_flip_p(differences) == pytest.approx(np.mean(np.array(norms) >= norms[0] - 1e-9))
    p = np.sort([sign_flip_p(rng.standard_normal((10, 3))) for _ in range(200)])
    assert np.abs(p - (np.arange(200) + 0.5) / 200).max() < 1.36 / np.sqrt(200)  # Kolmogorov and Smirnov, 5 %
    assert sign_flip_p(rng.standard_normal((20, 3)) + 1) < 0.01


def test_too_few_volumes_are_named():
    with pytest.raises(DataError, match="at least 3 real volumes of two patients, got 2"):
        sensitivity_gate([phantom(0)[0], phantom(1)[0]], Moments())
    same = [phantom(number)[0]._replace(patient="a") for number in range(3)]
    with pytest.raises(DataError, match="two patients"):
        sensitivity_gate(same, Moments())
