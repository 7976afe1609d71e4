"""The packaged prostate network: its file, its place in MONAI's network, its features and the gland on real images."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.evaluation.features import taps
from ccella_fast.evaluation.features.onnx_tensors import _fields, read_onnx_tensors
from ccella_fast.evaluation.volumes import Volume
from feature_fixtures import make_volume


@pytest.fixture(scope="module")
def data(taps_package: None) -> bytes:
    return taps._find_file().read_bytes()


def test_file_holds_81_tensors(data: bytes):
    tensors = read_onnx_tensors(data)
    shapes = [array.shape for array in tensors.values()]
    assert len(tensors) == 81
    assert sum(len(shape) == 5 for shape in shapes) == 32 and sum(len(shape) == 4 for shape in shapes) == 48
    assert sum(array.size for array in tensors.values()) == 19_914_113
    assert sum(array.size for name, array in tensors.items() if name.startswith("encoder.")) < 17_590_752
    assert tensors["encoder.conv_init.weight"].shape == (32, 1, 3, 3, 3)
    assert tensors["up_layers.2.head.bias"].shape == (1,)
    assert all(np.isfinite(array).all() for array in tensors.values())


def test_every_norm_is_where_the_graph_has_it(data: bytes):
    """The nodes of the file's graph in order: the scale and shift before a convolution belong to the norm before it."""
    graph = next(value for number, value in _fields(memoryview(data)) if number == 7)
    nodes = [
        [bytes(value).decode() for key, value in _fields(node) if key == 1]
        for number, node in _fields(graph)
        if number == 1
    ]
    tensors = read_onnx_tensors(data)
    network = taps.load_network()
    state = network.state_dict()
    pending: list[str] = []
    checked = 0
    for inputs in nodes:
        pending += [name for name in inputs if name.startswith("onnx::")]
        for convolution in (name for name in inputs if re.search(r"\.conv[12]\.weight$", name)):
            torch.testing.assert_close(
                state[convolution], torch.from_numpy(tensors[convolution].copy()), rtol=0, atol=0
            )
            norm = re.sub(r"conv([12])\.weight$", r"norm\1.", convolution)
            assert len(pending) == 2
            for kind, name in zip(("weight", "bias"), pending, strict=True):
                np.testing.assert_array_equal(state[norm + kind].numpy(), tensors[name].ravel())
            pending, checked = [], checked + 1
    assert checked == 24 and not pending
    encoder = network.get_submodule("encoder")
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 17_590_752


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data + b"\0",
        lambda data: data[:40_000_000] + bytes([data[40_000_000] ^ 1]) + data[40_000_001:],
        lambda data: b"",
        lambda data: b"version https://git-lfs.github.com/spec/v1\n",
    ],
    ids=["last byte", "half", "one more", "one bit", "empty", "pointer"],
)
def test_other_files_are_refused(damage, data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model_v1.onnx").write_bytes(damage(data))
    monkeypatch.setattr(taps, "_find_file", lambda: tmp_path / "model_v1.onnx")
    with pytest.raises(CheckpointError, match="not the network of lavlab-taps 1.1.2") as caught:
        taps.load_network.__wrapped__()
    assert taps.SHA256 in str(caught.value) and "pip install --no-deps lavlab-taps==1.1.2" in str(caught.value)


class Distribution:
    version = "9.9"

    def __init__(self, folder: Path):
        self.folder = folder

    def locate_file(self, name: str) -> Path:
        return self.folder / name


def test_absent_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def absent(name: str):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert not taps.is_installed()
    with pytest.raises(ConfigError, match="lavlab-taps, which is not installed") as caught:
        taps.load_network.__wrapped__()
    assert caught.value.fix == "pip install --no-deps lavlab-taps==1.1.2"
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution(tmp_path))
    with pytest.raises(CheckpointError, match="lavlab-taps 9.9 does not have this file"):
        taps.load_network.__wrapped__()


def test_features_are_moments_of_the_encoder_levels(taps_package: None):
    extractor = taps.Taps()
    volume = make_volume((48, 44, 14), (2.25, 2.25, 3.0))
    found = extractor(volume)
    assert {name: array.shape for name, array in found.items()} == {name: (n,) for name, n in extractor.spaces.items()}
    window = torch.from_numpy(taps._FEATURE_WINDOW(volume))[None, None]
    with torch.no_grad():
        levels = taps.load_network().encoder(window)
    for space, channels, scale in (("taps-l3", 128, 4), ("taps-l4", 256, 8)):
        level = levels[taps._LEVELS[space]][0].double().numpy()
        assert level.shape == (channels, 96 // scale, 96 // scale, 16 // scale)
        expected = [*(level[c].mean() for c in range(channels)), *(level[c].std(ddof=1) for c in range(channels))]
        np.testing.assert_allclose(found[space], expected, rtol=1e-4, atol=1e-5)
    assert extractor.sequences == {"t2w"}
    assert extractor.identity["weights_sha256"] == taps.SHA256
    # A scanner's gain and offset do not matter, the image does.
    scaled = extractor(volume._replace(array=volume.array * 1.7))
    np.testing.assert_allclose(scaled["taps-l3"], found["taps-l3"], rtol=1e-3, atol=1e-4)
    other = extractor(make_volume((48, 44, 14), (2.25, 2.25, 3.0), seed=1))
    assert np.abs(other["taps-l3"] - found["taps-l3"]).max() > 0.01


# Volumes in cc that the network gave when it was first examined, with the resampling of SimpleITK.
@pytest.mark.parametrize(
    ("file", "volume_cc"), [("prostate3t-03-0002/t2w.nii.gz", 46.2), ("prostatex-0000/t2w.mha", 39.8)]
)
def test_gland_of_real_patients_is_plausible(taps_package: None, real_data: Path, file: str, volume_cc: float):
    image = sitk.DICOMOrient(sitk.ReadImage(str(real_data / "mri" / file)), "RAS")
    array = sitk.GetArrayFromImage(image).T.astype(np.float32)
    array = (array / np.percentile(array, 99.5)).clip(0, 1)
    volume = Volume(np.ascontiguousarray(array), image.GetSpacing(), file)
    segmenter = taps.GlandSegmenter()
    mask, spacing = segmenter.segment(volume)
    assert mask.shape == (128, 128, 32) and mask.dtype == bool and spacing == (0.8, 0.8, 3.0)
    assert mask.sum() * np.prod(spacing) / 1000 == pytest.approx(volume_cc, abs=1.5)
    components = sitk.GetArrayFromImage(sitk.ConnectedComponent(sitk.GetImageFromArray(mask.astype(np.uint8))))
    assert components.max() == 1
    middle = np.argwhere(mask).mean(0) - (np.array(mask.shape) - 1) / 2
    assert np.linalg.norm(middle * spacing) < 20  # mm from the centre of the image
    extent = (np.ptp(np.argwhere(mask), axis=0) + 1) * spacing
    assert (extent > 25).all() and (extent < 70).all()


def test_an_image_without_a_gland_gives_none(taps_package: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(taps, "_SEGMENTER_WINDOW", taps._SEGMENTER_WINDOW._replace(shape=(64, 64, 16)))  # an eighth
    mask, _ = taps.GlandSegmenter().segment(make_volume((48, 44, 14), (2.25, 2.25, 3.0)))
    assert not mask.any()


def test_mask_is_the_threshold_of_the_blurred_probability(taps_package: None, monkeypatch: pytest.MonkeyPatch):
    segmenter = taps.GlandSegmenter()
    logits = np.full((128, 128, 32), -4.0, np.float32)
    logits[40:80, 50:90, 8:24] = 4.0
    monkeypatch.setattr(segmenter, "logits", lambda volume: logits)
    mask, _ = segmenter.segment(make_volume())
    blurred = sitk.GetArrayFromImage(
        sitk.DiscreteGaussian(
            sitk.GetImageFromArray(logits.T), variance=[2.5**2] * 3, maximumError=1e-4, maximumKernelWidth=64
        )
    ).T
    expected = 1 / (1 + np.exp(-blurred)) > 0.55
    assert (mask != expected).mean() < 1e-3 and mask.any()
    assert (mask != (logits > 0)).mean() > 2e-3  # negative control: the blur rounds the corners
