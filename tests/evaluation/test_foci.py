"""Focal features against a loop over cells, and what probes read from them on volumes with planted foci."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from ccella_fast.evaluation.conditions import condition_agreement
from ccella_fast.evaluation.foci import FociFeatures, _cell_maxima
from ccella_fast.evaluation.volumes import Volume

SHAPE, SPACING = (56, 48, 20), (1.6, 1.6, 3.0)


def scan(number: int, center=None, diameter: float = 12, sequence: str = "t2w", depth: float = 0.35) -> Volume:
    """A textured gland with a dark focus at `center` (mm from the middle), bright on high-b images."""
    rng = np.random.default_rng(number)
    x, y, z = np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * s for n, s in zip(SHAPE, SPACING, strict=True)), indexing="ij"
    )
    texture = sitk.GetArrayFromImage(sitk.DiscreteGaussian(sitk.GetImageFromArray(rng.standard_normal(SHAPE)), 1.0))
    array = 0.4 + 0.15 * ((x / 26) ** 2 + (y / 18) ** 2 + (z / 22) ** 2 < 1) + 0.12 * texture
    if center is not None:
        inside = sum((axis - c) ** 2 for axis, c in zip((x, y, z), center, strict=True)) < (diameter / 2) ** 2
        array = array * (1 - depth * inside) if sequence != "hbv" else array * (1 + depth * inside)
    return Volume(array.clip(0).astype(np.float32), SPACING, str(number), sequence)


def foci(volume: Volume) -> np.ndarray:
    return FociFeatures()(volume)["foci"]


def test_the_maximum_is_in_the_cell_of_the_focus_and_moves_with_a_mirror_image():
    with_focus, without = foci(scan(0, (18.0, 11.0, 0.0), depth=0.7)), foci(scan(0))
    assert with_focus.shape == (FociFeatures.spaces["foci"],) and with_focus.dtype == np.float32
    gained = (with_focus - without)[:36].reshape(4, 3, 3)
    assert np.unravel_index(gained.argmax(), (4, 3, 3)) == (3, 2, 1)
    volume = scan(0, (18.0, 11.0, 0.0), depth=0.7)
    mirrored = foci(volume._replace(array=volume.array[::-1]))
    np.testing.assert_allclose(mirrored[:36].reshape(4, 3, 3), with_focus[:36].reshape(4, 3, 3)[::-1], atol=1e-5)
    np.testing.assert_allclose(mirrored[43:61], with_focus[43:61], atol=1e-5)  # differences of the sides have no sign


def test_a_focus_is_dark_on_t2_and_bright_on_high_b_images():
    place = (-14.0, 6.0, 4.0)
    for sequence in ("t2w", "hbv", "adc"):
        found = foci(scan(1, place, sequence=sequence, depth=0.7)) - foci(scan(1, sequence=sequence))
        assert found[36:40].max() > 0.1
    volume = scan(1, place, depth=0.7)
    assert (foci(volume._replace(sequence="hbv")) - foci(scan(1)._replace(sequence="hbv")))[36:40].max() < 0.1


def test_cell_maxima_equal_a_loop():
    values = np.random.default_rng(0).random((24, 18, 20))
    got = _cell_maxima(values)
    assert got.shape == (4, 3, 3)
    for i, xs in enumerate(np.array_split(np.arange(24), 4)):
        for j, ys in enumerate(np.array_split(np.arange(18), 3)):
            for k, zs in enumerate(np.array_split(np.arange(20), 3)):
                assert got[i, j, k] == values[np.ix_(xs, ys, zs)].max()


def test_probes_read_class_side_and_size_from_planted_foci():
    rng = np.random.default_rng(0)
    volumes, classes, sides, sizes = [], [], [], []
    for number in range(60):
        side, diameter = rng.choice([-1, 1]), rng.uniform(9, 18)
        place = (side * rng.uniform(8, 16), rng.uniform(2, 9), rng.uniform(-9, 9))
        positive = number % 2 == 1
        volumes.append(foci(scan(number, place if positive else None, diameter)))
        classes.append("pos" if positive else "neg")
        sides.append(("left" if side < 0 else "right") if positive else None)
        sizes.append(diameter if positive else None)
    features = np.stack(volumes)
    rows = list(range(60))
    for labels, least in ((classes, 0.9), (sides, 0.9), (sizes, 0.5)):
        found = condition_agreement("", features, labels, features, labels, prompted_by=rows, permutations=100)
        assert found.ceiling > least and found.normalized == pytest.approx(1)
    plain = np.stack([foci(scan(100 + number)) for number in range(60)])  # negative control: nothing planted
    nothing = condition_agreement("class", plain, classes, plain, classes, prompted_by=rows, permutations=100)
    assert nothing.ceiling < 0.75
