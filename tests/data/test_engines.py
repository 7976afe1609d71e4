"""DALI and torch give the same, correct volumes; errors name the defective file; the choice of the engine is logged."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from ccella_fast.data.augmentation.engine import AugmentationEngine
from ccella_fast.data.augmentation.engine_choice import make_engine
from ccella_fast.data.augmentation.parameters import IDENTITY, Augmentation
from ccella_fast.data.augmentation.requests import VolumeRequest
from ccella_fast.data.augmentation.torch_engine import TorchEngine, blur
from ccella_fast.data.manifest import load_manifest
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.errors import ConfigError, DataError
from engine_fixtures import CPU, GEOMETRY, IMAGE, OPERATORS, SHAPE, SPACING, drawn_request, stream, strengths
from study_fixtures import config, write_nifti


@pytest.fixture(scope="module")
def patients(real_data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The prepared T2 series of the five real patients."""
    out = tmp_path_factory.mktemp("patients")
    prepare(real_data, out, config(data__spacing=list(SPACING), data__dim=list(SHAPE)))
    prepared = load_manifest(out)
    return [out / case.files["image/t2w"].path for case in prepared.cases]


@pytest.fixture(scope="module", params=["torch", "dali"])
def engine(request: pytest.FixtureRequest, require) -> str:
    if request.param == "dali":
        require("nvidia.dali")
    return request.param


@pytest.mark.parametrize("operator", OPERATORS)
def test_engines_agree_within_the_tolerance_of_the_operator(patients: list[Path], operator: str, require):
    require("nvidia.dali")
    changes, largest, mean = OPERATORS[operator]
    settings = strengths(**changes)
    requests = [drawn_request(path, settings) for path in patients]
    ours, theirs = stream("torch", settings, requests), stream("dali", settings, requests)
    difference = (ours - theirs).abs()
    assert ours.shape == (5, 1, *SHAPE) and difference.max() < largest and difference.mean() < mean
    before = torch.stack([torch.from_numpy(np.load(path))[None] for path in patients])
    assert (ours - before).abs().mean() > 50 * mean  # the operator changes the volumes
    unaugmented = [request._replace(augmentation=IDENTITY) for request in requests[1:]]
    assert (
        stream("dali", settings, unaugmented) - ours[1:]
    ).abs().max() > 10 * largest  # negative control: another augmentation


def test_warp_matches_simpleitk(patients: list[Path], engine: str):
    """The same augmentation, given to SimpleITK in mm."""
    view = Augmentation(rotation=(4.0, -3.0, 9.0), shift=(3.0, -5.0, 2.0), scale=(0.9, 0.95, 1.05))
    ours = stream(engine, strengths(**GEOMETRY), [VolumeRequest(patients[0], SHAPE, (0, 0, 0), SHAPE, SPACING, view)])[
        0, 0
    ]
    image = sitk.GetImageFromArray(np.load(patients[0]).transpose(2, 1, 0))
    image.SetSpacing(SPACING)
    image.SetOrigin([-(n - 1) / 2 * step for n, step in zip(SHAPE, SPACING, strict=True)])
    target = sitk.Image(SHAPE, sitk.sitkFloat32)
    target.SetSpacing(view.spacing(SPACING))
    target.SetOrigin([-(n - 1) / 2 * step for n, step in zip(SHAPE, view.spacing(SPACING), strict=True)])
    transform = sitk.Euler3DTransform()
    transform.SetComputeZYX(True)
    transform.SetRotation(*np.deg2rad(view.rotation).tolist())
    transform.SetTranslation(view.shift)
    truth = sitk.GetArrayFromImage(sitk.Resample(image, target, transform, sitk.sitkLinear, 0.0)).transpose(2, 1, 0)
    inner = (
        slice(14, -14),
        slice(14, -14),
        slice(5, -5),
    )  # SimpleITK does not interpolate with the outside at the border
    assert np.abs(ours.numpy() - truth)[inner].max() < 2e-3
    transform.SetTranslation([3.5, -5.0, 2.0])
    other = sitk.GetArrayFromImage(sitk.Resample(image, target, transform, sitk.sitkLinear, 0.0)).transpose(2, 1, 0)
    assert np.abs(ours.numpy() - other)[inner].max() > 0.05  # negative control: a shift of 0.5 mm


def test_blur_matches_a_float64_gaussian():
    values = np.random.default_rng(0).random((40, 30, 20))
    sigmas = (1.5, 0.8, 0.3)
    truth = values
    for axis, sigma in enumerate(sigmas):
        offsets = np.arange(-int(np.ceil(3 * sigma)), int(np.ceil(3 * sigma)) + 1)
        weights = np.exp(-0.5 * (offsets / sigma) ** 2)
        pad = [(0, 0)] * 3
        pad[axis] = (offsets[-1],) * 2
        truth = np.apply_along_axis(np.convolve, axis, np.pad(truth, pad, "reflect"), weights / weights.sum(), "valid")
    ours = blur(torch.from_numpy(values.astype(np.float32)), sigmas)
    np.testing.assert_allclose(ours.numpy(), truth, atol=1e-6)
    assert np.abs(values - truth).max() > 0.1


def test_blur_is_in_mm_of_the_augmented_volume(patients: list[Path], engine: str):
    """Zoom changes the voxel size, so that the same sigma in mm is another one in voxels."""
    plain, blurred = Augmentation(scale=(1.5, 1.0, 0.75)), Augmentation(scale=(1.5, 1.0, 0.75), blur=2.0)
    settings = strengths(zoom=0.5, blur=2.0)
    sharp, soft = (stream(engine, settings, [VolumeRequest(patients[0], SHAPE, (0, 0, 0), SHAPE, SPACING, view)])
                   for view in (plain, blurred))  # fmt: skip
    truth, wrong = (blur(sharp[0, 0], [2.0 / (step * scale) for step, scale in zip(SPACING, scales, strict=True)])
                    for scales in (plain.scale, (1, 1, 1)))  # fmt: skip
    assert (soft[0, 0] - truth).abs().max() < 1e-4 < 0.01 < (soft[0, 0] - wrong).abs().max()


def test_gpu_volumes_are_copied_in_the_stream_that_uses_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, require):
    """DALI reuses its own memory as soon as torch releases it, even if queued kernels still read it."""
    tensors = require("nvidia.dali.tensors")
    from ccella_fast.data.augmentation import dali_engine

    values = np.arange(64, dtype=np.float32).reshape(1, 4, 4, 4)
    streams, copies, contexts = [], [], []

    class Stream(str):
        def query(self) -> None:  # as every call of CUDA, gives the thread a context
            contexts.append(str(self))

    class Pipeline:
        def build(self) -> None: ...

        def run(self, stream: object = None) -> tuple[object]:
            streams.append(stream)
            return (SimpleNamespace(as_tensor=lambda: tensors.TensorCPU(values)),)

    def copy(source, target: torch.Tensor, cuda_stream: object) -> torch.Tensor:
        copies.append(cuda_stream)
        return target.copy_(torch.from_dlpack(source))

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda shape, device: empty(shape))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(f"stream of {device}"))
    monkeypatch.setattr(dali_engine, "feed_ndarray", copy)
    engine = dali_engine.DaliEngine(strengths(), CPU, (4, 4, 4))
    monkeypatch.setattr(engine, "_pipeline", lambda *_, **__: Pipeline())
    for device, own in (("cpu", False), ("cuda:1", True)):
        engine.device = torch.device(device)
        (volumes,) = engine.stream([tmp_path], lambda n: [], 1)
        np.testing.assert_array_equal(volumes.numpy(), values[:, None])
        assert (volumes.data_ptr() != values.ctypes.data) == own
    assert streams == [None, "stream of cuda:1"] and contexts == copies == ["stream of cuda:1"]


def test_window_is_read_at_its_corner(patients: list[Path], engine: str):
    whole = np.load(patients[1])
    requests = [
        VolumeRequest(patients[1], SHAPE, corner, (32, 24, 16), SPACING) for corner in [(3, 50, 7), (64, 72, 16)]
    ]
    for settings, allowed in [(strengths(), 0.0), (strengths(rotation=[1, 1, 1]), 1e-4)]:
        plain = stream(engine, settings, requests)
        for request, patch in zip(requests, plain, strict=True):
            x, y, z = request.corner
            np.testing.assert_allclose(patch[0], whole[x : x + 32, y : y + 24, z : z + 16], atol=allowed)
    assert np.abs(plain[0, 0].numpy() - whole[:32, :24, :16]).max() > 0.1
    rotated = requests[0]._replace(augmentation=Augmentation(rotation=(0, 0, 20)))
    start, size = VolumeRequest(*rotated).box
    assert all(n < full for n, full in zip(size, SHAPE, strict=True)) and start[0] < 3  # only the required part is read


def test_rotated_patch_is_filled_from_outside_its_window(patients: list[Path], engine: str):
    """The corners of a rotated patch come from the surrounding volume; they are not black."""
    request = VolumeRequest(patients[0], SHAPE, (32, 32, 8), (32, 32, 16), SPACING, Augmentation(rotation=(0, 0, 30)))
    patch = stream(engine, strengths(rotation=[0, 0, 30]), [request])[0, 0]
    window = np.ascontiguousarray(np.load(patients[0])[32:64, 32:64, 8:24])
    assert (window > 0.02).mean() > 0.9 and (patch > 0.02).float().mean() > 0.9


def test_order_and_batch_size_do_not_change_a_volume(patients: list[Path], engine: str):
    requests = [drawn_request(path, IMAGE) for path in patients[:4]]
    one, two = stream(engine, IMAGE, requests), stream(engine, IMAGE, requests[::-1], batch=2)
    assert torch.equal(one, two.flip(0)) and not torch.equal(one, two)


def test_missing_or_truncated_file_is_named(tmp_path: Path, engine: str):
    for name in "abcd":
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).random((32, 32, 16), np.float32))
    requests = [
        VolumeRequest(tmp_path / f"{name}.npy", (32, 32, 16), (0, 0, 0), (32, 32, 16), SPACING) for name in "abcd"
    ]
    assert len(stream(engine, strengths(), requests)) == 4
    for spoil in (lambda path: path.write_bytes(path.read_bytes()[:5000]), lambda path: path.unlink()):
        spoil(tmp_path / "c.npy")
        with pytest.raises(DataError) as caught:
            stream(engine, strengths(), requests)
        assert caught.value.path == str(tmp_path / "c.npy") and "prepare" in caught.value.fix, str(caught.value)


def test_a_file_that_dali_reads_again_beyond_the_last_one_is_named(tmp_path: Path, require):
    require("nvidia.dali")
    for name in "abcdef":
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).random((32, 32, 16), np.float32))
    paths = [tmp_path / f"{name}.npy" for name in "abcdef"]
    requests = [VolumeRequest(path, (32, 32, 16), (0, 0, 0), (32, 32, 16), SPACING) for path in paths]
    volumes = make_engine("dali", strengths(), CPU, (32, 32, 16)).stream(paths, lambda n: [requests[n]], 6)
    for _ in "abc":
        next(volumes)
    paths[0].write_bytes(b"no array")
    with pytest.raises(DataError) as caught:
        list(volumes)
    assert caught.value.path == str(paths[0])


# ---- choice of the engine ----


def test_choice_is_logged(caplog: pytest.LogCaptureFixture):
    with caplog.at_level("INFO", logger="ccella_fast"):
        chosen: AugmentationEngine = make_engine("auto", strengths(), CPU, (8, 8, 8))
    assert isinstance(chosen, TorchEngine) and "by torch (it is faster on a CPU)" in caplog.text


def test_missing_dali_falls_back_for_auto_and_raises_for_dali(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if "nvidia" in name else find(name, *rest)
    )
    with pytest.raises(ConfigError, match="DALI cannot be used: it is not installed") as caught:
        make_engine("dali", strengths(), CPU, (8, 8, 8))
    assert caught.value.field == "data.engine" and "auto" in caught.value.fix
    with caplog.at_level("INFO", logger="ccella_fast"):
        engine = make_engine("auto", strengths(), torch.device("cuda"), (8, 8, 8))  # does not use the GPU yet
    assert engine.name == "torch" and "DALI cannot be used: it is not installed" in caplog.text


def test_fixture_volumes_are_not_symmetric(tmp_path: Path):
    """Negative control: the fixtures would reveal a wrong order of the axes."""
    from ccella_fast.data.readers.volume_file import read_volume

    values = read_volume(write_nifti(tmp_path / "a.nii.gz")).array
    assert np.abs(values[::-1] - values).max() > 50 and len(set(values.shape)) == 3
