"""MedicalNet and RadImageNet: the three forms of weight files, parity with MONAI's ResNet, inputs, independence of batches."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.evaluation.features import radimagenet, taps
from ccella_fast.evaluation.features.medicalnet import MedicalNet
from ccella_fast.evaluation.features.radimagenet import RadImageNet
from ccella_fast.evaluation.folders import evaluate_to_folder
from ccella_fast.models.feature_networks import CONVERTED, MEDICALNET, OFFICIAL, load_resnet50, read_state_dict
from ccella_fast.models.resnet import Bottleneck
from ccella_fast.report.evaluation import write_evaluation_page
from ccella_fast.storage import sha256
from evaluation_fixtures import draw, write_prepared, write_samples
from feature_fixtures import dilated, make_volume

SPACES = ("radimagenet-ccella-axial", "radimagenet-ccella-coronal", "radimagenet-ccella-sagittal")


@pytest.fixture(scope="module")
def medicalnet(weight_files: dict[str, Path]) -> MedicalNet:
    return MedicalNet(weight_files["medicalnet"], allow_unknown_weights=True)


@pytest.fixture(scope="module")
def converted(weight_files: dict[str, Path]) -> RadImageNet:
    return RadImageNet(weight_files["converted"], allow_unknown_weights=True)


@pytest.fixture(scope="module")
def official(weight_files: dict[str, Path]) -> RadImageNet:
    return RadImageNet(weight_files["official"], allow_unknown_weights=True)


def test_each_form_loads_bit_for_bit(medicalnet, converted, official, networks: dict[str, nn.Module]):
    for extractor, name, count in (
        (medicalnet, "medicalnet", 46_155_072),
        (converted, "converted", 23_534_592),
        (official, "official", 23_508_032),
    ):
        state = extractor._network.state_dict()
        expected = networks[name].state_dict()
        assert set(state) == set(expected)
        assert all(torch.equal(state[key], value) for key, value in expected.items() if "num_batches" not in key)
        assert sum(parameter.numel() for parameter in extractor._network.parameters()) == count


def test_medicalnet_equals_monai_with_its_strides_and_dilations(medicalnet: MedicalNet, networks: dict[str, nn.Module]):
    volume = make_volume((40, 36, 24))
    x = torch.from_numpy(volume.array)[None, None]
    found = medicalnet(volume)["medicalnet-ccella"]
    expected = dilated(networks["medicalnet"])(x)[0].numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    plain = networks["medicalnet"](x)[0].numpy()  # negative control: the same weights in MONAI's own network
    assert np.abs(found - plain).max() > 0.05 * np.abs(plain).max()


@pytest.mark.parametrize("name", ["official", "converted"])
def test_radimagenet_equals_monai_in_float64(name: str, request: pytest.FixtureRequest, networks: dict[str, nn.Module]):
    extractor = request.getfixturevalue(name)
    x = torch.rand(2, 3, 45, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = copy.deepcopy(networks[name]).double()(x)
    network = copy.deepcopy(extractor._network).double()
    torch.testing.assert_close(network(x), expected, rtol=1e-10, atol=1e-10)
    for module in network.modules():  # negative controls: the other epsilon, the other stride
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-5 if name == "converted" else 1.001e-5
    assert (network(x) - expected).abs().max() > 1e-9
    strided = network.layer2[0]
    strided.conv1.stride, strided.conv2.stride = strided.conv2.stride, strided.conv1.stride
    assert (network(x) - expected).abs().max() > 1e-3 * expected.abs().max()


def convolve(x: np.ndarray, conv: nn.Conv3d) -> np.ndarray:
    """A convolution in plain loops over its taps and places."""
    weight = conv.weight.double().numpy()
    (padding, *_), (dilation, *_), (stride, *_) = conv.padding, conv.dilation, conv.stride
    x = np.pad(x, [(0, 0)] + [(padding, padding)] * 3)
    size = [(n - dilation * (weight.shape[2] - 1) - 1) // stride + 1 for n in x.shape[1:]]
    result = np.zeros((len(weight), *size))
    for place in np.ndindex(*size):
        for tap in np.ndindex(*weight.shape[2:]):
            source = tuple(stride * p + dilation * t for p, t in zip(place, tap, strict=True))
            result[(slice(None), *place)] += weight[(slice(None), slice(None), *tap)] @ x[(slice(None), *source)]
    return result


def normalise(x: np.ndarray, norm: nn.BatchNorm3d) -> np.ndarray:
    mean, var, weight, bias = (
        value.double().numpy().reshape(-1, 1, 1, 1)
        for value in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data)
    )
    return (x - mean) / np.sqrt(var + norm.eps) * weight + bias


@pytest.mark.parametrize(("stride", "dilation", "first"), [(1, 2, False), (2, 1, False), (2, 1, True)])
def test_block_equals_plain_loops(stride: int, dilation: int, first: bool):
    torch.manual_seed(0)
    block = Bottleneck(3, 5, 2, stride, dilation, False, 1e-5, first).double().eval().requires_grad_(False)
    for module in block.modules():
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.weight.data.normal_()
            module.bias.data.normal_()
    x = torch.randn(1, 5, 6, 5, 7, dtype=torch.float64)
    a = np.maximum(normalise(convolve(x[0].numpy(), block.conv1), block.bn1), 0)
    b = np.maximum(normalise(convolve(a, block.conv2), block.bn2), 0)
    c = normalise(convolve(b, block.conv3), block.bn3)
    shortcut = normalise(convolve(x[0].numpy(), block.downsample[0]), block.downsample[1])
    np.testing.assert_allclose(block(x)[0].numpy(), np.maximum(c + shortcut, 0), atol=1e-12)
    assert (block.conv1.stride if first else block.conv2.stride) == (stride,) * 3


def test_inputs_of_medicalnet(medicalnet: MedicalNet, weight_files: dict[str, Path]):
    volume = make_volume((33, 32, 12))
    standard = MedicalNet(weight_files["medicalnet"], "medicalnet", allow_unknown_weights=True)
    array = volume.array.astype(np.float64)
    values = array[array != 0]
    array[array != 0] = (values - values.mean()) / values.std()
    with torch.no_grad():
        expected = standard._network(torch.from_numpy(array.astype(np.float32))[None, None])[0].numpy()
    found = standard(volume)["medicalnet-medicalnet"]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())
    assert np.abs(found - medicalnet(volume)["medicalnet-ccella"]).max() > 0.01 * np.abs(expected).max()
    assert standard.identity != medicalnet.identity


def rows(network: nn.Module, images: list[np.ndarray]) -> np.ndarray:
    """The features of images of three channels, one at a time."""
    with torch.no_grad():
        return np.stack([network(torch.from_numpy(image.astype(np.float32))[None])[0].numpy() for image in images])


def slices_of(array: np.ndarray, space: str) -> list[np.ndarray]:
    if space.endswith("-sagittal"):
        return [array[x] for x in range(array.shape[0])]
    if space.endswith("-coronal"):
        return [array[:, y] for y in range(array.shape[1])]
    return [array[:, :, z] for z in range(array.shape[2])]


def test_slices_of_three_directions_whatever_the_number_of_a_call(
    converted: RadImageNet, monkeypatch: pytest.MonkeyPatch
):
    volume = make_volume((5, 16, 12))
    expected = {
        space: rows(converted._network, [np.stack([image] * 3) for image in slices_of(volume.array, space)])
        for space in SPACES
    }
    for pixels in (1, 3 * 16 * 12, 2**20):
        monkeypatch.setattr(radimagenet, "_PIXELS", pixels)
        found = converted.slices(volume)
        assert tuple(found) == SPACES == tuple(converted.spaces)
        for space, values in expected.items():
            np.testing.assert_allclose(found[space], values, rtol=1e-3, atol=1e-5 * np.abs(values).max())
    means = converted(volume)
    for space, values in expected.items():
        np.testing.assert_allclose(means[space], values.mean(0), rtol=1e-3, atol=1e-5 * np.abs(values).max())
        assert means[space].dtype == np.float32 and means[space].shape == (2048,)


def test_input_of_the_authors(official: RadImageNet):
    volume = make_volume((3, 5, 2))
    for space, found in official.slices(volume).items():
        images = []
        for image in slices_of(volume.array, space):
            sizes = image.shape
            axes = [(np.arange(224) + 0.5) * n / 224 - 0.5 for n in sizes]  # centres of 224 pixels on the image
            low = [np.clip(np.floor(axis), 0, n - 1).astype(int) for axis, n in zip(axes, sizes, strict=True)]
            high = [np.minimum(place + 1, n - 1) for place, n in zip(low, sizes, strict=True)]
            share = [np.clip(axis, 0, n - 1) - place for axis, place, n in zip(axes, low, sizes, strict=True)]
            part = image[low[0]] * (1 - share[0])[:, None] + image[high[0]] * share[0][:, None]
            part = part[:, low[1]] * (1 - share[1]) + part[:, high[1]] * share[1]
            images.append(np.stack([2 * part - 1] * 3))
        expected = rows(official._network, images)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 2.0), (2.0, 3.0, 2.0)], ids=["padded", "also cropped"])
def test_input_of_maisi(
    spacing, converted: RadImageNet, weight_files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
):
    size = 24  # of the padded cube, 512 in earnest
    monkeypatch.setattr(radimagenet, "_MAISI_SIZE", size)
    extractor = RadImageNet(weight_files["converted"], "maisi", allow_unknown_weights=True)
    volume = make_volume((15, 10, 4), spacing)
    array = radimagenet.resample(volume.array, volume.spacing, (1.0, 1.0, 1.0))
    pads = [((size - n) // 2, size - n - (size - n) // 2) if n < size else (0, 0) for n in array.shape]
    starts = [max(0, (n - size) // 2) for n in array.shape]
    cube = np.pad(array, pads)
    starts = [s if n > size else 0 for s, n in zip(starts, array.shape, strict=True)]
    cube = cube[tuple(slice(s, s + size) for s in starts)]
    assert cube.shape == (size,) * 3
    for space, found in extractor.slices(volume).items():
        images = np.stack(slices_of(cube, space)[int(0.3 * size) : int(0.7 * size)])
        images = (images - images.min()) / (images.max() - images.min())
        blue_green_red = np.array([0.406, 0.456, 0.485]).reshape(3, 1, 1)
        expected = rows(extractor._network, [image - blue_green_red for image in images])
        assert found.shape == expected.shape
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())
    assert np.abs(extractor(volume)["radimagenet-maisi-axial"] - converted(volume)[SPACES[0]]).max() > 0.01


def test_identity_names_weights_input_and_network(converted, official, medicalnet, weight_files: dict[str, Path]):
    assert converted.identity["weights_sha256"] == sha256(weight_files["converted"])
    assert converted.identity["input"] == "ccella" and official.identity["input"] == "official"
    assert len({str(extractor.identity) for extractor in (converted, official, medicalnet)}) == 3


def test_unknown_weights_have_to_be_allowed(weight_files: dict[str, Path]):
    for kind, name in ((MedicalNet, "medicalnet"), (RadImageNet, "converted"), (RadImageNet, "official")):
        with pytest.raises(CheckpointError, match=sha256(weight_files[name])) as caught:
            kind(weight_files[name])
        assert "--allow_unknown_weights" in str(caught.value) and len(str(caught.value).splitlines()) <= 5


@pytest.mark.parametrize(
    ("kind", "name", "words"),
    [
        (MedicalNet, "official", "not a 3D ResNet"),
        (MedicalNet, "converted", "not a 3D ResNet"),
        (RadImageNet, "medicalnet", "not a file of RadImageNet"),
    ],
)
def test_files_of_another_network_are_refused(kind, name: str, words: str, weight_files: dict[str, Path]):
    with pytest.raises(CheckpointError, match=words):
        kind(weight_files[name], allow_unknown_weights=True)


def without(name: str):
    return lambda state: {key: value for key, value in state.items() if key != name}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("layer3.5.bn2.running_var"), "'layer3.5.bn2.running_var' is missing"),
        (without("layer1.0.downsample.0.weight"), "'layer1.0.downsample.0.weight' is missing"),  # shortcut A
        (without("bn1.num_batches_tracked"), "'bn1.num_batches_tracked' is missing"),
        (lambda state: {**state, "fc.weight": torch.ones(2)}, "'fc.weight' is unknown"),
        (lambda state: {**state, "conv1.bias": torch.ones(64)}, "'conv1.bias' is unknown"),
        (lambda state: {**state, "bn1.weight": torch.ones(32)}, r"shape \[32\], \[64\] is expected"),
        (lambda state: {**state, "bn1.weight": torch.ones(64, dtype=torch.float16)}, "float16"),
        (
            lambda state: {**state, "bn1.weight": torch.full((64,), torch.nan)},
            "'bn1.weight' has values that are not finite",
        ),
    ],
)
def test_other_weights_are_refused(change, words: str, networks: dict[str, nn.Module]):
    state = dict(networks["medicalnet"].state_dict())
    load_resnet50(state, "MedicalNet's ResNet-50", "file.pth", field="features", **MEDICALNET)
    with pytest.raises(CheckpointError, match=words):
        load_resnet50(change(state), "MedicalNet's ResNet-50", "file.pth", field="features", **MEDICALNET)


def test_forms_of_radimagenet_are_not_exchangeable(networks: dict[str, nn.Module]):
    with pytest.raises(CheckpointError, match="conv1.bias"):
        load_resnet50(dict(networks["official"].state_dict()), "converted", "file.pth", field="features", **CONVERTED)
    with pytest.raises(CheckpointError, match="unknown"):
        load_resnet50(dict(networks["converted"].state_dict()), "official", "file.pth", field="features", **OFFICIAL)


def test_small_files_of_other_networks_are_refused(tmp_path: Path):
    state = {"conv1.weight": torch.ones(64, 1, 7, 7, 7), "layer1.0.conv1.weight": torch.ones(64, 64, 3, 3, 3)}
    torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, tmp_path / "resnet_18.pth")
    assert set(read_state_dict(tmp_path / "resnet_18.pth")) == set(state)
    with pytest.raises(CheckpointError, match="smaller ResNet"):
        MedicalNet(tmp_path / "resnet_18.pth", allow_unknown_weights=True)
    torch.save({"backbone.0.weight": torch.ones(64, 3, 7, 7), "conv1.weight": torch.ones(1)}, tmp_path / "mixed.pt")
    with pytest.raises(CheckpointError, match="missing"):
        RadImageNet(tmp_path / "mixed.pt", allow_unknown_weights=True)


def test_truncated_and_missing_files_are_refused(weight_files: dict[str, Path], tmp_path: Path):
    content = weight_files["converted"].read_bytes()
    (tmp_path / "cut.pth").write_bytes(content[: len(content) // 2])
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 255
    (tmp_path / "flipped.pth").write_bytes(flipped)
    for name, words in (
        ("cut.pth", "the end of this weight file is missing"),
        ("flipped.pth", "not a readable weight file"),
    ):
        with pytest.raises(CheckpointError, match=words):
            RadImageNet(tmp_path / name, allow_unknown_weights=True)
    with pytest.raises(CheckpointError, match="does not exist"):
        MedicalNet(tmp_path / "absent.pth")


def test_unknown_inputs_are_named(weight_files: dict[str, Path]):
    with pytest.raises(ConfigError, match="no input called 'masi'.*\n.*\n.*did you mean 'maisi'"):
        RadImageNet(weight_files["official"], "masi")
    with pytest.raises(ConfigError, match="ccella, medicalnet"):
        MedicalNet(weight_files["medicalnet"], "1mm")


def test_slices_are_rows_of_the_results_and_of_the_page(converted, weight_files, tmp_path, monkeypatch):
    monkeypatch.setattr(taps, "is_installed", lambda: False)
    arrays = [[draw(k) for k in range(4)], [draw(100 + k, smooth=2) for k in range(3)]]
    write_prepared(tmp_path / "prepared", {f"case{k}": {"t2w": x} for k, x in enumerate(arrays[0])})
    write_samples(tmp_path / "samples", arrays[1])
    evaluate_to_folder(
        tmp_path / "prepared", tmp_path / "samples", tmp_path / "out", draws=2, metrics=["fd"], allow_unknown_weights=True,
        features=[f"radimagenet={weight_files['converted']}"],
    )  # fmt: skip
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())["rows"]
    rows = {row["features"]: row for row in found if row["metric"] == "fd_slices"}
    assert list(rows) == [*SPACES, "radimagenet-ccella"]
    with torch.no_grad():
        images = [torch.from_numpy(np.concatenate([np.moveaxis(x, 2, 0) for x in each])) for each in arrays]
        a, b = (converted._network(x[:, None].expand(-1, 3, -1, -1)).double().numpy() for x in images)
    centred = [(x - x.mean(0)) / np.sqrt(len(x) - 1) for x in (a, b)]
    nuclear = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    expected = np.square(a.mean(0) - b.mean(0)).sum() + sum(np.square(x).sum() for x in centred) - 2 * nuclear
    axial = rows[SPACES[0]]
    assert axial["value"] == pytest.approx(expected, rel=1e-3) and axial["details"]["slices_real"] == len(a) == 32
    assert axial["weights_sha256"] == sha256(weight_files["converted"]) and {"n<d", "dependent"} < set(axial["guards"])
    mean = np.mean([rows[space]["value"] for space in SPACES])
    assert rows["radimagenet-ccella"]["value"] == pytest.approx(mean) and mean != pytest.approx(expected, rel=1e-3)
    page = write_evaluation_page(tmp_path / "out").read_text()
    assert "Fréchet distance of slices (2.5D)" in page and "4, 3 (32, 24 slices)" in page
