"""The data engines on a GPU give the volumes of a CPU, whatever else is queued there, and training uses them."""

from __future__ import annotations

import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from ccella_fast.config import AugmentationConfig, Config
from ccella_fast.data.augmentation.engine_choice import make_engine
from ccella_fast.data.augmentation.requests import VolumeRequest
from ccella_fast.data.checking.findings import STOPPING
from ccella_fast.errors import DataError
from ccella_fast.models.autoencoder import Autoencoder, save_autoencoder
from ccella_fast.storage import read_json, sha256, write_json
from ccella_fast.training.autoencoder.run import train_vae
from ccella_fast.training.run import train
from engine_fixtures import IMAGE, OPERATORS, SHAPE, SPACING, drawn_request, stream, strengths
from feature_fixtures import make_volume
from study_fixtures import config
from training_fixtures import losses, write_images

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)


@pytest.fixture(scope="module", params=["torch", "dali"])
def engine(request: pytest.FixtureRequest, require) -> str:
    if request.param == "dali":
        require("nvidia.dali")
    return request.param


@pytest.fixture(scope="module")
def volumes(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five different volumes in [0, 1]."""
    folder, paths = tmp_path_factory.mktemp("volumes"), []
    for number in range(5):
        paths.append(folder / f"case{number}" / "t2w.npy")
        paths[-1].parent.mkdir()
        np.save(paths[-1], make_volume(SHAPE, SPACING, seed=number).array)
    return paths


def epochs(volumes: list[Path], settings: AugmentationConfig, count: int) -> list[VolumeRequest]:
    """Every volume once per epoch, in another order and with another augmentation in each."""
    return [
        drawn_request(volumes[(position * 2 + epoch) % len(volumes)], settings, epoch=epoch)
        for epoch in range(count)
        for position in range(len(volumes))
    ]


@pytest.mark.parametrize("operator", OPERATORS)
def test_volumes_are_those_of_torch_on_a_cpu(volumes, operator, engine):
    changes, largest, mean = OPERATORS[operator]
    largest, mean = max(largest, 2e-6), max(mean, 2e-7)  # powers and fused multiply-adds are rounded differently
    settings = strengths(**changes)
    requests = [drawn_request(path, settings) for path in volumes]
    expected, found = stream("torch", settings, requests), stream(engine, settings, requests, device=GPU)
    assert found.device == GPU and found.dtype == torch.float32 and found.shape == (5, 1, *SHAPE)
    difference = (found.cpu() - expected).abs()
    assert difference.max() < largest and difference.mean() < mean, (difference.max(), difference.mean())
    other = [drawn_request(path, settings, seed=3) for path in volumes]
    if operator != "flip":  # a probability of 1, with any seed
        assert (stream(engine, settings, other, device=GPU).cpu() - expected).abs().max() > 10 * largest
    assert (
        torch.stack([torch.from_numpy(np.load(path))[None] for path in volumes]) - expected
    ).abs().mean() > 50 * mean


def test_windows_without_augmentation_are_exact(volumes, engine):
    corners = [(3, 50, 7), (64, 72, 16)]
    requests = [VolumeRequest(volumes[1], SHAPE, corner, (32, 24, 16), SPACING) for corner in corners]
    whole = np.load(volumes[1])
    for (x, y, z), found in zip(corners, stream(engine, strengths(), requests, device=GPU), strict=True):
        np.testing.assert_array_equal(found[0].cpu(), whole[x : x + 32, y : y + 24, z : z + 16])


def test_order_batch_size_and_start_do_not_change_a_volume(volumes, engine):
    """Also several epochs of one stream, a stream that resumes, and two streams at the same time."""
    requests = epochs(volumes, IMAGE, 4)
    whole = stream(engine, IMAGE, requests, device=GPU)
    assert torch.equal(stream(engine, IMAGE, requests[::-1], batch=4, device=GPU).flip(0), whole)
    assert torch.equal(stream(engine, IMAGE, requests[12:], batch=2, device=GPU), whole[12:])
    both = [
        make_engine(engine, IMAGE, GPU, SHAPE).stream(
            [request.path for request in part], lambda n, part=part: part[n : n + 1], len(part)
        )
        for part in (requests, requests[5:])
    ]
    for number, (first, second) in enumerate(zip(*both, strict=False)):
        assert torch.equal(first[0], whole[number]) and torch.equal(second[0], whole[number + 5])
    assert number == 14 and not torch.equal(whole[:5], whole[5:10])


@pytest.mark.parametrize("side_stream", [False, True], ids=["default_stream", "side_stream"])
def test_volumes_stay_until_queued_kernels_have_read_them(volumes, engine, side_stream):
    """As in training: the host is ahead of the GPU, and memory is released while kernels that read it are queued.

    With a stream of its own, another thread asks for the volumes, as for latents that are made during training.
    """
    requests = epochs(volumes, IMAGE, 5)
    expected = stream(engine, IMAGE, requests, device=GPU)
    torch.cuda.synchronize()
    own = torch.cuda.Stream(GPU) if side_stream else None
    batches = make_engine(engine, IMAGE, GPU, SHAPE).stream(
        [request.path for request in requests], lambda n: requests[n : n + 1], len(requests)
    )
    copies = []

    def copy_late() -> None:
        with torch.cuda.device(GPU), torch.cuda.stream(own) if own else nullcontext():
            for batch in batches:
                torch.cuda._sleep(40_000_000)  # cycles, some 20 ms: longer than the engine needs for a volume
                copies.append(batch.clone())
                del batch
            torch.cuda.synchronize()

    with ThreadPoolExecutor(1) as pool:
        pool.submit(copy_late).result()
    assert torch.equal(torch.cat(copies), expected)


def test_missing_file_is_named(volumes, tmp_path, engine):
    lost = VolumeRequest(tmp_path / "lost.npy", SHAPE, (0, 0, 0), SHAPE, SPACING)
    requests = [VolumeRequest(path, SHAPE, (0, 0, 0), SHAPE, SPACING) for path in volumes[:2]] + [lost]
    with pytest.raises(DataError) as caught:
        stream(engine, strengths(), requests, device=GPU)
    assert caught.value.path == str(lost.path)


def test_training_of_the_autoencoder_has_the_losses_of_torch(tmp_path, caplog, require):
    require("nvidia.dali")
    data = write_images(tmp_path / "prepared")
    for choice in ("auto", "torch"):
        settings = config(
            data__dim=[16, 16, 8], data__engine=choice, vae_training__patch=[16, 16, 8], vae_training__batch_size=2,
            vae_training__max_train_steps=12, vae_training__augmentation__preset="image",
        )  # fmt: skip
        with caplog.at_level(logging.INFO, logger="ccella_fast"):
            train_vae(data, tmp_path / choice, settings)
    assert "by dali (a GPU is available)" in caplog.text and "by torch (as configured)" in caplog.text
    (step, found), (_, expected) = losses(tmp_path / "auto")[-1], losses(tmp_path / "torch")[-1]
    assert step == 12 and found == pytest.approx(expected, rel=0.02)  # TF32 in convolutions


def test_training_on_online_latents_has_the_losses_of_torch_and_resumes(tmp_path, caplog, require):
    require("nvidia.dali")
    data = write_images(tmp_path / "prepared", grid=(32, 32, 16))
    for choice in ("auto", "torch"):
        settings = config(
            data__engine=choice, training__latents="online", training__batch_size=2, training__precision="fp32",
            training__max_train_steps=4, training__checkpointing_steps=2, training__ema_decay=0.0,
        )  # fmt: skip
        if choice == "auto":
            add_autoencoder(data, settings)
        with caplog.at_level(logging.INFO, logger="ccella_fast"):
            assert train_here(settings, data, tmp_path / choice) == 0
    assert "by dali (a GPU is available)" in caplog.text and "by torch (as configured)" in caplog.text
    whole = losses(tmp_path / "auto")
    for (step, found), (_, expected) in zip(whole, losses(tmp_path / "torch"), strict=True):
        assert found == pytest.approx(expected, rel=0.02), step
    shutil.rmtree(tmp_path / "auto" / "checkpoints" / "step-00000004")
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"engine": "auto"})})
    assert train_here(settings, data, tmp_path / "auto", resume="latest") == 0
    resumed = losses(tmp_path / "auto")
    assert [step for step, _ in resumed] == [1, 2, 3, 4]
    assert [loss for _, loss in resumed] == pytest.approx([loss for _, loss in whole], rel=0.02)
    assert len({round(loss, 4) for _, loss in whole}) == 4


def add_autoencoder(data: Path, settings: Config) -> None:
    """Make a folder with images one for training on online latents: a random autoencoder, and latents' scale of 1."""
    torch.manual_seed(0)
    save_autoencoder(Autoencoder(settings.autoencoder), data / "vae")
    manifest = read_json(data / "manifest.json")
    weights = next((data / "vae").glob("*.safetensors"))
    write_json(data / "manifest.json", manifest | {"vae": {"sha256": sha256(weights)}, "scale_factor": [1.0]})


def train_here(settings: Config, data: Path, run: Path, **options: str) -> int:
    """Train in this process, and undo what that changes in the environment."""
    before = dict(os.environ)
    try:
        return train(settings, data=data, run=run, allow=STOPPING, **options)
    finally:
        os.environ.clear()
        os.environ.update(before)
