"""The distribution of 300 drawn augmentations, and the geometry against SimpleITK on a synthetic volume.

Each strength is drawn over its whole range, never beyond it or beyond the volume, and changes no other parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from ccella_fast.config import AugmentationConfig
from ccella_fast.data.augmentation.parameters import (
    IDENTITY,
    Augmentation,
    draw_augmentation,
    keeps_gland_in_view,
    strongest_augmentations,
)
from ccella_fast.data.augmentation.requests import VolumeRequest
from ccella_fast.data.augmentation.torch_engine import TorchEngine

SHAPE, SPACING = (40, 32, 20), (1.5, 2.0, 3.0)
CASES = 300


def strengths(**changes: Any) -> AugmentationConfig:
    return AugmentationConfig.model_validate({"preset": "none", **changes})


def draws(**changes: Any) -> list[Augmentation]:
    config = strengths(**changes)
    options = {"seed": 3, "epoch": 1, "shape": SHAPE, "spacing": SPACING, "keep_gland": False}
    return [draw_augmentation(config, case_id=f"case{n}", **options) for n in range(CASES)]


def corners(view: Augmentation) -> np.ndarray:
    """(8, 3): the outer corners of the view as indices into the volume, whose own corners are at -0.5 and n - 0.5."""
    ends = [(-0.5, size - 0.5) for size in SHAPE]
    points = np.array([[x, y, z, 1] for x in ends[0] for y in ends[1] for z in ends[2]])
    return points @ view.matrix(SHAPE, SPACING).T


def test_crop_stays_inside_the_volume_and_reaches_its_edges():
    share, size = np.array([0.3, 0.2, 0.1]), np.array(SHAPE)
    views = draws(crop=share.tolist())
    reached = np.stack([corners(view) for view in views])
    low, high = reached.min(1) + 0.5, size - 0.5 - reached.max(1)  # margin at both ends, in voxels
    assert low.min() > -1e-9 and high.min() > -1e-9
    assert (low.min(0) < 0.05 * size * share).all() and (
        high.min(0) < 0.05 * size * share
    ).all()  # the edges are reached
    kept = 1 - (low + high) / size
    np.testing.assert_allclose(kept, [view.scale for view in views], atol=1e-9)
    assert (kept > 1 - share - 1e-9).all() and (kept.min(0) < 1 - 0.9 * share).all() and kept.max() > 0.99
    assert (np.abs(low.mean(0) - high.mean(0)) < 0.1 * size * share).all()  # neither end is preferred


def test_translation_adds_to_the_margin_of_a_crop():
    limits = np.array([4.0, 2.0, 1.0])
    shifts = np.array([view.shift for view in draws(translation=limits.tolist())])
    assert (
        (np.abs(shifts) <= limits).all()
        and (shifts.max(0) > 0.9 * limits).all()
        and (shifts.min(0) < -0.9 * limits).all()
    )
    views = draws(translation=limits.tolist(), crop=[0.2] * 3)
    beyond = np.array([np.maximum(-0.5 - corners(v).min(0), corners(v).max(0) - np.array(SHAPE) + 0.5) for v in views])
    assert (beyond * SPACING <= limits + 1e-9).all() and (beyond * SPACING).max() > 0


def test_zoom_is_isotropic_and_symmetric_in_log_scale():
    scales = np.array([view.scale for view in draws(zoom=0.2)])
    assert np.ptp(scales, axis=1).max() == 0
    logs = np.log(scales[:, 0]) / np.log(1.2)
    assert -1 <= logs.min() < -0.95 and 0.95 < logs.max() <= 1 and abs(logs.mean()) < 4 * 3**-0.5 / CASES**0.5
    assert all(view.spacing(SPACING) == pytest.approx(np.array(SPACING) * scale) for view, scale in
               zip(draws(zoom=0.2), scales, strict=True))  # fmt: skip


# Name of the strength: its value, the parameter that is drawn, and the smallest and largest value of the parameter.
SCALARS: dict[str, tuple[float, Callable[[Augmentation], float], float, float]] = {
    "gamma": (0.3, lambda view: math.log(view.gamma), -0.3, 0.3),
    "contrast": (0.2, lambda view: view.contrast, -0.2, 0.2),
    "brightness": (0.25, lambda view: view.gain - 1, -0.25, 0.25),
    "blur": (1.5, lambda view: view.blur, 0.0, 1.5),
    "noise": (0.1, lambda view: view.noise, 0.0, 0.1),
}


@pytest.mark.parametrize("name", SCALARS)
def test_strength_is_drawn_uniformly_up_to_its_limit_and_changes_one_parameter(name: str):
    strength, read, low, high = SCALARS[name]
    views = draws(**{name: strength})
    values = np.array([read(view) for view in views])
    width = high - low
    assert low - 1e-12 <= values.min() < low + 0.05 * width and high - 0.05 * width < values.max() <= high + 1e-12
    assert abs(values.mean() - (low + high) / 2) < 4 * width / 12**0.5 / CASES**0.5
    assert abs(values.std() - width / 12**0.5) < 0.1 * width
    for view in views:
        changed = {key for key, value in view.dump().items() if value != IDENTITY.dump()[key]} - {"noise_start"}
        assert changed <= {{"brightness": "gain"}.get(name, name)}


def test_bias_field_stays_within_its_strength():
    views = draws(bias=0.3)
    terms = np.array([view.bias for view in views])
    assert terms.shape == (CASES, 9)
    sums = np.abs(terms).sum(1)
    assert sums.max() <= 0.3 + 1e-9 and sums.max() > 0.29 and sums.min() < 0.03
    assert (terms.max(0) > 0).all() and (terms.min(0) < 0).all()  # every term, of either sign
    points = (np.arange(16) + 0.5) / 16 * 2 - 1
    u, v, w = np.meshgrid(points, points, points, indexing="ij")
    for view in views[:20]:
        parts = (u, v, w, u * u, v * v, w * w, u * v, u * w, v * w)
        truth = np.exp(sum(part * term for part, term in zip(parts, view.bias, strict=True)))
        np.testing.assert_allclose(view.field(), truth, rtol=1e-5)


def test_rotations_reach_their_limits_and_flips_have_the_configured_probability():
    limits = np.array([3.0, 6.0, 12.0])
    angles = np.array([view.rotation for view in draws(rotation=limits.tolist())])
    assert (np.abs(angles) <= limits).all() and (np.abs(angles).max(0) > 0.95 * limits).all()
    assert np.abs(np.corrcoef(angles.T) - np.eye(3)).max() < 4 / CASES**0.5  # three independent draws
    assert abs(np.mean([view.flip for view in draws(flip=0.25)]) - 0.25) < 4 * (0.25 * 0.75 / CASES) ** 0.5
    assert not any(view.flip for view in draws(flip=0.0)) and all(view.flip for view in draws(flip=1.0))
    starts = np.array([view.noise_start for view in draws(noise=0.1)])
    assert len(set(starts)) == CASES and starts.min() < 2**20 / 20 and 2**20 * 19 / 20 < starts.max() < 2**20


@pytest.mark.parametrize("gland", [[40.0] * 3, [500.0] * 3], ids=["40mm", "larger-than-the-grid"])
def test_kept_box_is_central_and_at_most_four_fifths_of_the_grid(gland: list[float]):
    """Computed by hand without rotation: the view [c - s n / 2, c + s n / 2] about the shifted center contains the box."""
    half = np.minimum(np.array(gland), 0.8 * np.array(SHAPE) * SPACING) / 2
    agreed = []
    for view in draws(translation=[12.0, 12.0, 12.0], zoom=0.3):
        extent = np.array(SHAPE) * SPACING * np.array(view.scale) / 2
        inside = bool((np.abs(view.shift) + half < extent).all())
        assert keeps_gland_in_view(view, gland, SHAPE, SPACING) == inside
        agreed.append(inside)
    assert any(agreed) and not all(agreed)


def test_strongest_augmentations_are_each_strength_at_its_limit():
    config = strengths(rotation=[3, 0, 7], translation=[1, 2, 3], zoom=0.25, crop=[0.2, 0.1, 0.0], flip=0.5, gamma=0.2,
                       contrast=0.1, brightness=0.15, bias=0.2, blur=1.0, noise=0.05, gland=[5.0, 5.0, 5.0])  # fmt: skip
    shown = dict(strongest_augmentations(config, SHAPE, SPACING))
    assert list(shown) == [
        "rotation R 3°", "rotation S 7°", "translation", "zoom in", "zoom out", "crop", "mirrored", "blur", "brighter",
        "bias field", "gamma down", "gamma up", "contrast", "noise",
    ]  # fmt: skip
    assert shown["rotation R 3°"].rotation == (3, 0, 0) and shown["rotation S 7°"].rotation == (0, 0, 7)
    assert shown["translation"].shift == (1, 2, 3) and shown["zoom in"].scale == (0.8,) * 3
    assert shown["zoom out"].scale == (1.25,) * 3 and shown["crop"].scale == (0.8, 0.9, 1.0)
    assert corners(shown["crop"]).max(0) == pytest.approx(np.array(SHAPE) - 0.5)  # exactly at the edge
    assert shown["brighter"].gain == 1.15 and shown["noise"].noise == 0.05 and shown["blur"].blur == 1.0
    assert shown["gamma down"].gamma == pytest.approx(math.exp(-0.2)) and shown["contrast"].contrast == 0.1
    assert [title for title, view in shown.items() if view.flip] == ["mirrored"]
    assert not list(strongest_augmentations(strengths(), SHAPE, SPACING))


VIEWS = {
    "rotation-R": Augmentation(rotation=(8.0, 0.0, 0.0)), "rotation-A": Augmentation(rotation=(0.0, 8.0, 0.0)),
    "rotation-RAS": Augmentation(rotation=(4.0, -7.0, 9.0)), "flip": Augmentation(flip=True),
    "shift": Augmentation(shift=(4.0, -3.0, 5.0)), "scale": Augmentation(scale=(0.9, 1.1, 0.8)),
    "all": Augmentation(rotation=(4.0, -7.0, 9.0), shift=(4.0, -3.0, 5.0), scale=(0.9, 1.1, 0.8), flip=True),
}  # fmt: skip


def smooth() -> np.ndarray:
    x, y, z = np.meshgrid(*[np.linspace(0, 6, n) for n in SHAPE], indexing="ij")
    return (0.5 + 0.25 * np.sin(x + 0.3 * y) + 0.25 * np.cos(1.3 * y - 0.7 * z + 0.2 * x)).astype(np.float32)


def deep_within(mask: np.ndarray) -> np.ndarray:
    """The voxels whose neighborhood of two voxels along each axis is inside the mask."""
    shifts = [np.roll(mask, step, axis) for axis in range(3) for step in (-2, -1, 1, 2)]
    rim = np.ones(SHAPE, bool)
    rim[2:-2, 2:-2, 2:-2] = False
    return np.logical_and.reduce([mask, ~rim, *shifts])


def make(tmp_path: Path, values: np.ndarray, config: AugmentationConfig, view: Augmentation) -> np.ndarray:
    np.save(tmp_path / "v.npy", values)
    return (
        TorchEngine(config, torch.device("cpu"), SHAPE)
        .make(VolumeRequest(tmp_path / "v.npy", SHAPE, (0, 0, 0), SHAPE, SPACING, view))[0]
        .numpy()
    )


def warp_with_simpleitk(values: np.ndarray, view: Augmentation) -> np.ndarray:
    """SimpleITK's result: a point is mirrored along R, rotated about R, then A, then S, and shifted, in mm from the center."""
    image, spacing = sitk.GetImageFromArray(values.transpose(2, 1, 0)), [float(s) for s in view.spacing(SPACING)]
    image.SetSpacing(SPACING)
    image.SetOrigin([-(n - 1) / 2 * step for n, step in zip(SHAPE, SPACING, strict=True)])
    target = sitk.Image(SHAPE, sitk.sitkFloat32)
    target.SetSpacing(spacing)
    target.SetOrigin([-(n - 1) / 2 * step for n, step in zip(SHAPE, spacing, strict=True)])
    chain = sitk.CompositeTransform(3)  # the transform that is added last is applied first
    chain.AddTransform(sitk.TranslationTransform(3, view.shift))
    for axis in (2, 1, 0):
        rotation = sitk.VersorTransform([float(axis == i) for i in range(3)], math.radians(view.rotation[axis]))
        chain.AddTransform(rotation)
    chain.AddTransform(sitk.ScaleTransform(3, (-1.0 if view.flip else 1.0, 1.0, 1.0)))
    return sitk.GetArrayFromImage(sitk.Resample(image, target, chain, sitk.sitkLinear, -1.0)).transpose(2, 1, 0)


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_geometry_matches_simpleitk(view: Augmentation, tmp_path: Path):
    values = smooth()
    ours = make(tmp_path, values, strengths(rotation=[1, 1, 1]), view)
    truth = warp_with_simpleitk(values, view)
    inside = deep_within(truth >= 0)  # SimpleITK does not interpolate with the outside at the border
    assert inside.mean() > 0.2 and np.abs(ours - truth)[inside].max() < 1e-4
    assert np.abs(ours - values)[inside].max() > 0.05
    outside = deep_within(truth < 0)
    assert not ours[outside].any()
