"""The parameters of augmentations: drawn by a pure function, true to the anatomy, never contradicting the report."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from ccella_fast.config import AugmentationConfig, Config, make_config
from ccella_fast.data.augmentation.parameters import (
    Augmentation,
    check_conditioning,
    draw_augmentation,
    keeps_gland_in_view,
    minimal_config,
    standard_normals,
    strongest_augmentations,
)
from ccella_fast.data.augmentation.requests import VolumeRequest
from ccella_fast.data.augmentation.torch_engine import TorchEngine
from ccella_fast.errors import ConfigError

SHAPE, SPACING = (64, 56, 24), (1.5, 1.5, 3.0)
IMAGE = AugmentationConfig.model_validate({"preset": "image"})
CPU = torch.device("cpu")


def drawn(config=IMAGE, *, seed=1, case_id="a", epoch=0, **options) -> Augmentation:
    return draw_augmentation(config, seed=seed, case_id=case_id, epoch=epoch, shape=SHAPE, spacing=SPACING, **options)


def make(path, values: np.ndarray, config: AugmentationConfig, augmentation: Augmentation) -> np.ndarray:
    np.save(path, values.astype(np.float32))
    request = VolumeRequest(path, values.shape, (0, 0, 0), values.shape, SPACING, augmentation)
    return TorchEngine(config, CPU, values.shape).make(request)[0].numpy()


def test_a_draw_is_a_function_of_seed_case_and_epoch():
    assert drawn() == drawn()
    others = [drawn(seed=2), drawn(case_id="b"), drawn(epoch=1)]
    assert len({json.dumps(each.dump()) for each in [drawn(), *others]}) == 4
    assert Augmentation(**json.loads(json.dumps(drawn().dump()))).dump() == drawn().dump()
    # Fixed values that detect a change of the random stream, which would change the data of a resumed run.
    assert drawn().gamma == pytest.approx(1.26170, abs=1e-5) and drawn().noise_start == 407785


def test_draws_stay_within_the_strengths_and_use_them():
    many = [drawn(epoch=epoch) for epoch in range(300)]
    for axis, limit in enumerate(IMAGE.rotation):
        assert 0.7 * limit < max(abs(each.rotation[axis]) for each in many) <= limit
    assert max(each.blur for each in many) <= IMAGE.blur and max(each.noise for each in many) <= IMAGE.noise
    assert math.exp(-IMAGE.gamma) <= min(each.gamma for each in many) < 0.85
    assert 0.4 < np.mean([each.flip for each in many]) < 0.6
    assert max(np.abs(np.log(each.field() / each.gain)).max() for each in many) <= IMAGE.bias
    none = AugmentationConfig.model_validate({"preset": "none"})
    assert drawn(none) == Augmentation(noise_start=drawn(none).noise_start) and not none.active


def blobs(*places: tuple[float, float, float]) -> np.ndarray:
    """A volume with Gaussian blobs (sigma 4 mm) at these positions in mm from the center."""
    index = np.stack(np.indices(SHAPE), -1)
    mm = (index - (np.array(SHAPE) - 1) / 2) * SPACING
    return sum(np.exp(-0.5 * ((mm - place) ** 2).sum(-1) / 16) for place in places)


def center_of_mass(volume: np.ndarray, spacing) -> np.ndarray:
    """Center of mass of a single blob, in mm from the center of the volume."""
    index = np.stack(np.indices(SHAPE), -1)
    center = (index * volume[..., None]).sum((0, 1, 2)) / volume.sum()
    return (center - (np.array(SHAPE) - 1) / 2) * spacing


def test_distances_in_mm_are_preserved_under_the_augmented_spacing(tmp_path):
    geometry = AugmentationConfig.model_validate(
        {"preset": "none", "rotation": IMAGE.rotation, "zoom": 0.2, "crop": [0.1] * 3}
    )
    places = [(12.0, -9.0, 6.0), (-8.0, 10.0, -9.0)]
    truth = np.linalg.norm(np.subtract(*places))
    errors_with_old_spacing = []
    for epoch in range(4):
        view = drawn(geometry, epoch=epoch)
        images = [make(tmp_path / "v.npy", blobs(place), geometry, view) for place in places]
        distance = np.linalg.norm(np.subtract(*[center_of_mass(image, view.spacing(SPACING)) for image in images]))
        assert distance == pytest.approx(truth, abs=0.1)
        unscaled = np.linalg.norm(np.subtract(*[center_of_mass(image, SPACING) for image in images]))
        errors_with_old_spacing.append(abs(unscaled - truth))
    assert max(errors_with_old_spacing) > 1  # negative control


def test_rotation_has_the_stated_axis_angle_and_sign(tmp_path):
    """A rotation by 10 degrees about S moves a point on the right towards the front; in the output it appears inverted."""
    only = AugmentationConfig.model_validate({"preset": "none", "rotation": [0, 0, 10]})
    place = np.array([20.0, 0.0, 0.0])
    moved = center_of_mass(
        make(tmp_path / "v.npy", blobs(tuple(place)), only, Augmentation(rotation=(0, 0, 10))), SPACING
    )
    angle = np.deg2rad(10)
    np.testing.assert_allclose(moved, [20 * math.cos(angle), -20 * math.sin(angle), 0], atol=0.05)


def test_prostate_stays_in_view():
    views = [drawn(epoch=epoch) for epoch in range(100)]
    assert all(keeps_gland_in_view(view, IMAGE.gland, SHAPE, SPACING) for view in views)
    unconstrained = [drawn(epoch=epoch, keep_gland=False) for epoch in range(100)]
    assert not all(keeps_gland_in_view(view, IMAGE.gland, SHAPE, SPACING) for view in unconstrained)
    assert len({view.rotation for view in views}) > 90  # the geometry still varies
    shown = [
        (title, view)
        for title, view in strongest_augmentations(IMAGE, SHAPE, SPACING)
        if title in ("crop", "translation", "zoom in")
    ]
    assert len(shown) == 3 and all(keeps_gland_in_view(view, IMAGE.gland, SHAPE, SPACING) for _, view in shown)


def test_minimal_config_gives_the_same_volume(tmp_path):
    x = np.random.default_rng(0).random(SHAPE)
    for title, view in strongest_augmentations(IMAGE, SHAPE, SPACING):
        full, minimal = (make(tmp_path / "v.npy", x, config, view) for config in (IMAGE, minimal_config(view)))
        np.testing.assert_allclose(full, minimal, atol=2e-4, err_msg=title)
        assert np.abs(minimal - x).max() > 0.01, title


def reads_report(**changes) -> Config:
    return make_config({"model.variant": "CCELLA", **{key.replace("__", "."): value for key, value in changes.items()}})


def test_mirroring_a_study_whose_report_is_read_raises():
    with pytest.raises(ConfigError, match="CCELLA reads the report.*'left' is on the right") as caught:
        check_conditioning(reads_report(augmentation__preset="image"))
    assert caught.value.field == "augmentation.flip"
    check_conditioning(reads_report(augmentation__preset="image", augmentation__flip=0))
    check_conditioning(reads_report())
    check_conditioning(make_config({"model.variant": "MAISI", "augmentation.preset": "image"}))


def test_keys_override_the_preset_and_unknown_keys_raise():
    given = make_config({"augmentation.preset": "image", "augmentation.noise": 0.5}).augmentation
    assert given.noise == 0.5 and given.flip == 0.5 and make_config().augmentation.flip == 0
    assert Config.model_validate(make_config({"augmentation.preset": "image"}).dump()).augmentation == IMAGE
    with pytest.raises(ConfigError):
        make_config({"augmentation.preset": "strong"})
    with pytest.raises(ConfigError, match="did you mean 'rotation'"):
        make_config({"augmentation.rotate": [1, 1, 1]})


def test_series_of_a_study_share_the_geometry_and_adc_keeps_its_values():
    view = drawn()
    adc, high_b = view.for_sequence("adc"), view.for_sequence("hbv")
    assert (adc.rotation, adc.shift, adc.scale, adc.blur) == (view.rotation, view.shift, view.scale, view.blur)
    assert (adc.gain, adc.gamma, adc.contrast, adc.bias) == (1, 1, 0, ()) and high_b.gamma == view.gamma != 1
    assert len({view.for_sequence(name).noise_start for name in ("t2w", "hbv", "adc")}) == 3


def test_intensity_operators_match_float64(tmp_path):
    """The formulas of the module's docstring, evaluated in float64."""
    x = np.random.default_rng(0).random((32, 24, 16))
    tone = {"brightness": 0.2, "gamma": 0.3, "contrast": 0.2, "noise": 0.05}
    config = AugmentationConfig.model_validate({"preset": "none", **tone})
    applied = Augmentation(gain=0.9, gamma=1.3, contrast=0.15, noise=0.04, noise_start=77)
    ours = make(tmp_path / "v.npy", x, config, applied)
    truth = (0.9 * x.astype(np.float32).astype(np.float64)) ** 1.3
    truth = truth + 2 * 0.15 * truth * (1 - truth) * (2 * truth - 1)
    noise = standard_normals(x.size)[77 : 77 + x.size].reshape(x.shape).astype(np.float64)
    truth = np.clip(truth + 0.04 * noise * np.clip(truth / 0.02, 0, 1), 0, 1)
    np.testing.assert_allclose(ours, truth, atol=1e-5)
    assert np.abs(ours - x).max() > 0.1
    empty = make(tmp_path / "v.npy", np.zeros_like(x), config, applied)
    assert not empty.any()  # padding stays empty


def test_bias_field_multiplies_the_image_and_matches_its_formula(tmp_path):
    config = AugmentationConfig.model_validate({"preset": "none", "bias": 0.3})
    applied = Augmentation(bias=(0.2, -0.1, 0.05, 0.0, 0.1, 0.0, 0.0, 0.05, 0.0))
    ours = make(tmp_path / "v.npy", np.full(SHAPE, 0.5), config, applied)
    u, v, w = np.meshgrid(*[(np.arange(n) + 0.5) / n * 2 - 1 for n in SHAPE], indexing="ij")
    truth = 0.5 * np.exp(0.2 * u - 0.1 * v + 0.05 * w + 0.1 * v * v + 0.05 * u * w)
    inner = tuple(slice(n // 16, n - n // 16) for n in SHAPE)  # the field is constant beyond its outermost points
    np.testing.assert_allclose(ours[inner], truth[inner], atol=2e-3)
    assert np.ptp(ours) > 0.1
