"""Images as the classifier sees them, against MONAI's transforms, which the reference implementation uses."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ccella_fast.data.augmentation.parameters import Augmentation
from ccella_fast.data.augmentation.torch_engine import warp
from ccella_fast.downstream.data import LabelledCase
from ccella_fast.downstream.inputs import (
    Inputs,
    as_the_reference,
    crop_or_pad,
    crop_to_positive,
    on_prepared_grid,
)


def volume(shape, *, margin: int = 0, seed: int = 0) -> np.ndarray:
    """Random values above 0 within a margin of zeros."""
    array = np.zeros(shape, np.float32)
    inside = tuple(slice(margin, size - margin) for size in shape)
    array[inside] = np.random.default_rng(seed).random(array[inside].shape, dtype=np.float32) + 0.01
    return array


def test_the_input_of_the_reference_is_that_of_monais_transforms(require):
    transforms = require("monai.transforms")
    pipeline = transforms.Compose([
        transforms.CropForeground(),
        transforms.ScaleIntensityRangePercentiles(lower=0, upper=98.0, b_min=0.0, b_max=1.0, clip=True),
        transforms.SpatialPad(spatial_size=(256, 256, 32), mode="constant", constant_values=[0]),
        transforms.CenterSpatialCrop(roi_size=(256, 256, 32)),
    ])  # fmt: skip
    array = volume((281, 190, 21), margin=3)
    array[100:, 100, 10] *= 5  # above the 98th percentile
    expected = np.asarray(pipeline(array[None]))[0]
    found = as_the_reference(array, (0.5, 0.5, 3.0))
    assert found.voxels.shape == (256, 256, 32) and found.spacing == (0.5, 0.5, 3.0)
    np.testing.assert_allclose(found.voxels.numpy(), expected, atol=2e-6)
    assert float(found.voxels.max()) == 1 and 0.6 < float((found.voxels == 0).float().mean()) < 0.7
    for given, wanted in (((5, 6, 7), (6, 5, 4)), ((8, 3, 4), (5, 6, 7)), ((7, 7, 8), (4, 9, 5))):
        small = volume(given, seed=1)
        pads = transforms.Compose([transforms.SpatialPad(wanted), transforms.CenterSpatialCrop(wanted)])
        np.testing.assert_array_equal(crop_or_pad(small, wanted), np.asarray(pads(small[None]))[0])


def test_other_grids_are_resampled_first(require):
    require("SimpleITK")
    z = np.arange(24, dtype=np.float32)
    ramp = np.broadcast_to((z + 1) / 25, (8, 8, 24)).copy()
    found = as_the_reference(ramp, (1.0, 1.0, 1.5)).voxels.numpy()
    occupied = np.flatnonzero(found.any((0, 1)))
    assert len(occupied) == 12 or len(occupied) == 11  # half as many slices; the lowest value is 0
    assert np.flatnonzero(found[..., occupied[-1]].any(1)).size == 16  # twice as many voxels in the plane
    assert (np.diff(found[128, 128, occupied]) > 0).all()


def test_augmentations_are_monais(require):
    """Each alone, in the middle of a smooth volume; directions may be opposite, as they are drawn symmetrically."""
    transforms = require("monai.transforms")
    grids = np.meshgrid(*[np.linspace(-1, 1, n) for n in (40, 40, 20)], indexing="ij")
    image = np.exp(-((grids[0] - 0.2) ** 2 + 2 * (grids[1] + 0.3) ** 2 + (grids[2] - 0.1) ** 2)).astype(np.float32)
    spacing, middle = (0.5, 0.5, 3.0), (slice(8, 32), slice(8, 32), slice(5, 15))

    def ours(augmentation: Augmentation) -> np.ndarray:
        matrix = augmentation.matrix(image.shape, spacing)
        return warp(torch.from_numpy(image), matrix, image.shape, 0, 40).numpy()[middle]

    def monais(transform) -> np.ndarray:
        return np.asarray(transform(image[None]))[0][middle]

    def agree(found: list[Augmentation], transform, tolerance: float) -> None:
        errors = [np.abs(ours(each) - monais(transform)).max() for each in found]
        assert min(errors) < tolerance < 0.02 < np.abs(image[middle] - monais(transform)).max(), errors

    agree([Augmentation(flip=True)], transforms.Flip(spatial_axis=0), 1e-5)
    moved = transforms.Affine(translate_params=(3, -2, 1), padding_mode="zeros", mode="bilinear", image_only=True)
    agree([Augmentation(shift=(s * 1.5, -s * 1.0, s * 3.0)) for s in (1, -1)], moved, 1e-4)
    turned = transforms.Rotate(angle=(0, 0, np.deg2rad(15)), mode="bilinear", padding_mode="zeros")
    agree([Augmentation(rotation=(0, 0, s * 15.0)) for s in (1, -1)], turned, 1e-3)
    zoomed = transforms.Zoom(zoom=1.1, mode="trilinear", align_corners=False, padding_mode="constant")
    agree([Augmentation(scale=(1 / 1.1,) * 3)], zoomed, 5e-3)


def test_a_volume_on_its_own_grid_is_scaled_by_its_own_percentiles():
    array = volume((12, 10, 8), seed=2)
    found = on_prepared_grid(array, (1.0, 1.0, 3.0))
    low, high = np.percentile(array, [1, 99])
    np.testing.assert_allclose(found.voxels.numpy(), np.clip((array - low) / (high - low), 0, 1), atol=1e-6)
    # The scale of the intensities, by which sources may differ, is not seen.
    np.testing.assert_allclose(on_prepared_grid(0.3 * array + 0.2, (1.0, 1.0, 3.0)).voxels, found.voxels, atol=1e-5)
    assert float(on_prepared_grid(np.ones((4, 4, 4), np.float32), (1, 1, 1)).voxels.abs().max()) == 0


def test_boxes_of_positive_voxels():
    array = np.zeros((6, 5, 4))
    array[1:3, 2, 1:] = 1
    assert crop_to_positive(array).shape == (2, 1, 3) and crop_to_positive(array).all()
    assert crop_to_positive(np.zeros((2, 2, 2))).shape == (2, 2, 2)


@pytest.mark.parametrize(("free", "reads"), [(10**9, 2), (0, 4), (2 * 4 * 24, 3)])
def test_images_are_read_once_if_memory_suffices(monkeypatch, free: int, reads: int):
    """A third of the last amount is that of one image, and half of what is free is used."""
    monkeypatch.setattr("ccella_fast.downstream.inputs.free_memory", lambda: free)
    counts = []
    array = volume((4, 3, 2))
    two = [LabelledCase(name, 0, name, name, lambda: counts.append(1) or (array, (1, 1, 1))) for name in "ab"]  # type: ignore[func-returns-value,arg-type,return-value]
    inputs = Inputs(on_prepared_grid)
    batches = [inputs.batch(two, torch.device("cpu")) for _ in range(2)]
    assert torch.equal(*batches) and batches[0].shape == (2, 1, 4, 3, 2) and len(counts) == reads
