"""Resampling, windows and standardisation, against SimpleITK, MONAI and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

from ccella_fast.errors import DataError
from ccella_fast.evaluation.features.preprocessing import (
    Window,
    along_axes,
    check_volume,
    crop_or_pad,
    filter_matrix,
    gaussian,
    resample,
    standardise,
)
from feature_fixtures import make_volume


@pytest.mark.parametrize("target", [(0.8, 0.8, 3.0), (2.0, 2.0, 2.0), (0.5, 1.1, 4.5), (9.0, 50.0, 3.0)])
def test_resampling_equals_simpleitk(target: tuple[float, float, float]):
    volume = make_volume((21, 18, 9), (0.9, 1.3, 3.1))
    image = sitk.GetImageFromArray(np.ascontiguousarray(volume.array.T))
    image.SetSpacing(volume.spacing)
    size = [
        max(1, round(n * old / new)) for n, old, new in zip(volume.array.shape, volume.spacing, target, strict=True)
    ]
    centre = [(n - 1) / 2 * spacing for n, spacing in zip(volume.array.shape, volume.spacing, strict=True)]
    origin = [c - (n - 1) / 2 * spacing for c, n, spacing in zip(centre, size, target, strict=True)]
    # Edges as repeated voxels: SimpleITK returns a default value beyond the outermost half voxel, which is never reached here.
    expected = sitk.Resample(image, size, sitk.Transform(), sitk.sitkLinear, origin, target, np.eye(3).ravel().tolist())
    found = resample(volume.array, volume.spacing, target)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, sitk.GetArrayFromImage(expected).T, atol=2e-5)
    other = resample(volume.array, (0.9, 1.3, 2.6), target)  # negative control: another spacing
    assert other.shape != found.shape or np.abs(other - found).max() > 1e-3


def test_resampling_to_the_same_grid_changes_nothing():
    volume = make_volume()
    np.testing.assert_array_equal(resample(volume.array, volume.spacing, volume.spacing), volume.array)
    assert resample(volume.array[:, :, :1], volume.spacing, (1.0, 1.0, 1.0)).shape == (48, 44, 3)


def test_filters_equal_a_plain_loop_with_repeated_edges():
    array = np.random.default_rng(0).random((7, 5, 9))
    kernels = [gaussian(0.8), gaussian(1.3), gaussian(1.0, derivative=2)]
    expected = array
    for axis, kernel in enumerate(kernels):
        radius = len(kernel) // 2
        padded = np.pad(expected, [(radius, radius) if a == axis else (0, 0) for a in range(3)], mode="edge")
        result = np.zeros_like(array)
        for place in range(array.shape[axis]):
            for tap, weight in enumerate(kernel):
                result.swapaxes(0, axis)[place] += weight * padded.swapaxes(0, axis)[place + tap]
        expected = result
    found = along_axes(array, [filter_matrix(n, kernel) for n, kernel in zip(array.shape, kernels, strict=True)])
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("sigma", [0.6, 1.0, 2.5])
def test_gaussian_has_the_moments_of_its_formula(sigma: float):
    kernel = gaussian(sigma)
    x = np.arange(len(kernel)) - len(kernel) // 2
    assert len(kernel) == 2 * int(4 * sigma + 0.5) + 1
    assert kernel.sum() == pytest.approx(1) and (kernel * x**2).sum() == pytest.approx(sigma**2, rel=0.03)
    second = gaussian(sigma, derivative=2)
    assert [(second * x**power).sum() for power in (0, 1, 2)] == pytest.approx([0, 0, 2], abs=1e-12)
    assert second[len(x) // 2] < 0 < second[-1] + 1e-3


def test_standardisation_equals_monai():
    from monai.transforms import NormalizeIntensity

    array = make_volume().array
    assert (array == 0).any()
    expected = np.asarray(NormalizeIntensity(nonzero=True)(array))
    np.testing.assert_allclose(standardise(array, "case"), expected, atol=1e-5)
    everywhere = np.asarray(NormalizeIntensity(nonzero=False)(array))
    assert np.abs(everywhere - expected).max() > 0.01  # negative control


def test_crop_and_padding_are_central():
    array = np.arange(1, 4 * 6 * 5 + 1).reshape(4, 6, 5)
    result = crop_or_pad(array, (8, 2, 5))
    np.testing.assert_array_equal(result[2:6], array[:, 2:4])
    assert result[:2].sum() == result[6:].sum() == 0
    np.testing.assert_array_equal(crop_or_pad(array, (3, 6, 7))[:, :, 1:6], array[:3])


def test_window_holds_the_centre_of_the_volume_wherever_the_grid_ends():
    volume = make_volume((40, 40, 20), (1.0, 1.0, 2.0))
    window = Window((1.0, 1.0, 2.0), (16, 16, 8))(volume)
    np.testing.assert_allclose(window, standardise(volume.array, "case")[12:28, 12:28, 6:14], atol=1e-5)
    small = Window((1.0, 1.0, 2.0), (48, 40, 20))(volume)
    assert np.abs(small[:4]).max() == np.abs(small[44:]).max() == 0 < np.abs(small[4]).max()


def nan_inside(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[5, 5, 5] = np.nan
    return array


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (nan_inside, "'case' has voxels that are not finite"),
        (lambda array: np.where(array > 0.99, np.inf, array), "not finite"),
        (lambda array: np.full_like(array, 0.25), "all voxels of the volume 'case' have the value 0.25"),
        (np.zeros_like, "the value 0"),
        (lambda array: array[0], r"shape \[22, 10\], three axes"),
        (lambda array: array[:0], "shape"),
    ],
    ids=["nan", "inf", "constant", "zeros", "two axes", "empty"],
)
def test_volumes_without_features_are_named(change, words: str):
    volume = make_volume()
    check_volume(volume)
    with pytest.raises(DataError, match=words):
        check_volume(volume._replace(array=change(volume.array)))


def test_masks_are_no_images():
    volume = make_volume()
    mask = volume._replace(array=(volume.array > 0.5).astype(np.float32))
    with pytest.raises(DataError, match="that are not zero have the same value"):
        standardise(mask.array, mask.id)
