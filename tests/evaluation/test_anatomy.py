"""Measurements of masks against plain loops, rules on planted defects, and when the rules are not applied."""

from __future__ import annotations

import numpy as np
import pytest

from ccella_fast.evaluation.anatomy import (
    RULES,
    GlandFeatures,
    compare_glands,
    glands,
    in_field_of_view,
    is_plausible,
    measure_gland,
)
from ccella_fast.evaluation.volumes import Volume

SPACING = (0.8, 1.0, 3.0)


def ellipsoid(shape=(70, 60, 20), half_mm=(22, 17, 18), centre_mm=(0.0, 0.0, 0.0)) -> np.ndarray:
    axes = ((np.arange(n) - (n - 1) / 2) * s - c for n, s, c in zip(shape, SPACING, centre_mm, strict=True))
    x, y, z = np.meshgrid(*axes, indexing="ij")
    return (x / half_mm[0]) ** 2 + (y / half_mm[1]) ** 2 + (z / half_mm[2]) ** 2 <= 1


def parts_and_holes(mask: np.ndarray) -> tuple[list[int], int]:
    """Sizes of the parts that share faces, and enclosed background voxels, by flooding voxel by voxel."""

    def flooded(values: np.ndarray) -> list[set]:
        left, found = {tuple(v) for v in np.argwhere(values)}, []
        while left:
            part, new = set(), [left.pop()]
            while new:
                voxel = new.pop()
                part.add(voxel)
                for axis in range(3):
                    for step in (-1, 1):
                        other = tuple(v + step * (a == axis) for a, v in enumerate(voxel))
                        if other in left:
                            left.remove(other)
                            new.append(other)
            found.append(part)
        return found

    def at_edge(part: set) -> bool:
        return any(v in (0, n - 1) for voxel in part for v, n in zip(voxel, mask.shape, strict=True))

    return [len(part) for part in flooded(mask)], sum(len(part) for part in flooded(~mask) if not at_edge(part))


@pytest.mark.parametrize("seed", range(4))
def test_measurements_equal_a_flood_fill(seed):
    mask = np.random.default_rng(seed).random((9, 8, 7)) < 0.75
    if seed == 3:
        mask[:, :, 3] = False
        mask[:, :, :2] = False
    gland = measure_gland(mask, SPACING)
    parts, holes = parts_and_holes(mask)
    x, y, z = np.nonzero(mask)
    assert gland.volume_cc == pytest.approx(mask.sum() * 2.4 / 1000)
    expected = [(v.max() - v.min() + 1) * s for v, s in zip((x, y, z), SPACING, strict=True)]
    assert gland[1:4] == pytest.approx(expected)
    assert gland.components == len(parts) and gland.largest_share == pytest.approx(max(parts) / mask.sum())
    assert gland.hole_cc == pytest.approx(holes * 2.4 / 1000) and (seed == 3 or holes > 0)
    edge = sum(bool({i, j, k} & {0}) or i == 8 or j == 7 or k == 6 for i, j, k in zip(x, y, z, strict=True))
    assert gland.border_voxels == edge > 0
    assert gland.slice_gaps == z.max() - z.min() + 1 - len(set(z)) == (seed == 3)


def test_each_planted_defect_breaks_its_rule_and_only_that():
    good = ellipsoid()
    assert is_plausible(measure_gland(good, SPACING))
    assert measure_gland(good, SPACING).volume_cc == pytest.approx(4 / 3 * np.pi * 22 * 17 * 18 / 1000, rel=0.05)
    speck, hole, gap = good.copy(), good.copy(), good.copy()
    speck[2:4, 2:4, 9] = True
    hole[35, 30, 10] = False
    gap[:, :, 12] = False
    defects = {
        "volume": ellipsoid(half_mm=(12, 10, 12)),
        "extents": np.pad(ellipsoid((200, 40, 20), (76.5, 9, 20)), 1),
        "no_border_contact": ellipsoid(centre_mm=(9.0, 0, 0)),
        "no_hole": hole,
        "one_component": speck,
    }
    for rule, mask in defects.items():
        gland = measure_gland(mask, SPACING)
        assert [name for name in RULES if not RULES[name](gland)] == [rule]
    broken = measure_gland(gap, SPACING)  # a missing slice also parts the gland
    assert [name for name in RULES if not RULES[name](broken)] == ["one_component", "no_slice_gap"]
    blank = measure_gland(np.zeros((5, 5, 5), bool), SPACING)
    assert not any(blank) and not any(rule(blank) for rule in RULES.values())


def test_real_and_generated_glands_are_counted():
    good, blank = measure_gland(ellipsoid(), SPACING), measure_gland(np.zeros((5, 5, 5), bool), SPACING)
    small = measure_gland(ellipsoid(half_mm=(12, 10, 12)), SPACING)
    found = compare_glands([good] * 9 + [blank], [good] * 2 + [small] + [blank])
    assert found.applicable and found.segmented[:1] == (0.9,)
    assert found.segmented.ci95 == pytest.approx((0.5958, 0.9821), abs=1e-3)  # Wilson's interval of 9 of 10
    shares = {name: tuple(share.value for share in pair) for name, pair in found.rules.items()}
    assert shares["found"] == (0.9, 0.75) and shares["volume"] == (0.9, 0.5) and shares["plausible"] == (0.9, 0.5)
    assert found.volume_cc[1][0] < found.volume_cc[1][1] == pytest.approx(good.volume_cc)


def test_rules_are_not_applied_where_the_segmenter_fails_on_real_volumes():
    good, blank = measure_gland(ellipsoid(), SPACING), measure_gland(np.zeros((5, 5, 5), bool), SPACING)
    assert not compare_glands([good] * 8 + [blank] * 2, [good]).applicable
    two = ellipsoid()
    two[2:4, 2:4, 9] = True
    assert not compare_glands([measure_gland(two, SPACING)] * 10, [good]).applicable
    nothing = compare_glands([], [])
    assert (
        not nothing.applicable and nothing.rules["found"][0] == (None, (0, 1), 0) and nothing.volume_cc == (None, None)
    )


def test_a_gland_that_the_field_of_view_cuts_off_touches_the_border_although_the_window_is_larger():
    window = ellipsoid(shape=(70, 60, 32))
    for slices, cut in ((20, False), (12, True), (10, True)):
        volume = Volume(np.zeros((112, 60, 3 * slices // 2), np.float32), (0.5, 1.0, 2.0), "a")
        inside = in_field_of_view(window, SPACING, volume)
        assert inside.shape == (70, 60, slices)
        np.testing.assert_array_equal(inside, window[:, :, 16 - slices // 2 : 16 + slices // 2])
        vector = GlandFeatures(lambda volume: (window, SPACING), {})(volume)["gland"]
        assert (vector[7] > 0) == cut and not measure_gland(window, SPACING).border_voxels


def test_a_segmenter_becomes_an_extractor():
    mask = ellipsoid()
    extractor = GlandFeatures(lambda volume: (volume.array > 0.5, volume.spacing), {"segmenter": "threshold"})
    vector = extractor(Volume(mask.astype(np.float32), SPACING, "a"))["gland"]
    assert vector.dtype == np.float32 and vector.shape == (extractor.spaces["gland"],)
    (gland,) = glands(vector[None])
    assert gland == pytest.approx(measure_gland(mask, SPACING), rel=1e-6)
    assert isinstance(gland.components, int) and is_plausible(gland)
