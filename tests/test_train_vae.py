"""Training the autoencoder: it learns, goes on after a stop as if nothing had happened, and loses nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ccella_fast.config import VaeTrainingConfig, make_config
from ccella_fast.errors import CheckpointError, ConfigError, DataError, NonFiniteError
from ccella_fast.models.vae import Autoencoder, load_autoencoder
from ccella_fast.storage import sha256, write_json
from ccella_fast.training import vae as module
from ccella_fast.training.vae import evaluate, kl_divergence, learning_rate, patch_jobs, read_images, train_vae

GRID = (16, 16, 8)
SETTINGS: dict[str, Any] = {
    "autoencoder.num_channels": [8, 8],
    "autoencoder.num_res_blocks": [1, 1],
    "autoencoder.norm_num_groups": 4,
    "data.dim": list(GRID),
    "vae_training.patch": list(GRID),
    "vae_training.batch_size": 2,
    "vae_training.max_train_steps": 80,
    "vae_training.lr": 5e-3,
}


def write_images(folder: Path, *, shift: float = 0.0, test: int = 1, train: int = 3) -> Path:
    """A prepared folder with images only: a bright ellipsoid at a place of its own in each, on a dim slope."""
    cases = []
    axes = np.meshgrid(*[np.arange(size) / size for size in GRID], indexing="ij")
    for number in range(train + test):
        distance = sum((axis - (0.35 + 0.1 * number + shift)) ** 2 for axis in axes)
        image = (0.2 + 0.3 * axes[0] + 0.5 * (distance < 0.06)).clip(0, 1).astype(np.float32)
        file = folder / "images" / f"case{number}" / "t2w.npy"
        file.parent.mkdir(parents=True)
        np.save(file, image)
        entry = {"path": file.relative_to(folder).as_posix(), "sha256": sha256(file), "bytes": file.stat().st_size}
        cases.append({
            "id": f"case{number}", "split": "train" if number < train else "test", "dataset": None, "spacing": [1.5, 1.5, 3.0],
            "pirads": None, "text_isnull": 1, "affine": np.eye(4).tolist(), "window": {"t2w": [0.0, 1.0]},
            "files": {"image/t2w": entry},
        })  # fmt: skip
    write_json(folder / "manifest.json", {
        "format": "ccella_fast.prepared", "version": 1,
        "data": {"sequences": ["t2w"], "spacing": [1.5, 1.5, 3.0], "dim": list(GRID), "dataset": None},
        "text": None, "vae": None, "scale_factor": None, "intensity_scale": {"t2w": 700.0}, "truncated_reports": [],
        "cases": cases,
    })  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("run") / "vae"
    train_vae(data, out, make_config(SETTINGS))
    return out


def metrics(out: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds_per_step"} for line in lines]


def test_it_learns_what_it_was_shown(data, trained):
    record = json.loads((trained / "run_record.json").read_text())
    _, test = read_images(data)
    untrained = evaluate(Autoencoder(make_config(SETTINGS).autoencoder), test, trained.parent, torch.device("cpu"))
    constant = np.abs(test[0].values - np.median(test[0].values)).mean()
    assert record["test"]["volumes"] == 1
    assert record["test"]["l1"] < 0.6 * min(constant, untrained["l1"])
    assert metrics(trained)[-1]["step"] == 80
    assert metrics(trained)[-1]["loss_l1"] < 0.5 * metrics(trained)[0]["loss_l1"]
    assert sorted(path.name for path in trained.iterdir()) == [
        "config.json", "manifest.json", "metrics.jsonl", "model.safetensors", "reconstructions", "run_record.json",
        "training.json",
    ]  # fmt: skip


def test_recorded_quality_is_that_of_the_written_weights(data, trained):
    """The numbers, again, from the files alone and in float64."""
    record = json.loads((trained / "run_record.json").read_text())["test"]
    image = np.load(data / "images" / "case3" / "t2w.npy").astype(np.float64)
    vae = load_autoencoder(trained).double()
    with torch.no_grad():
        decoded = vae.decode(vae.encode(torch.from_numpy(image)[None, None])[0])[0, 0].clamp(0, 1).numpy()
    assert record["l1"] == pytest.approx(np.abs(decoded - image).mean(), abs=2e-5)
    assert record["psnr"] == pytest.approx(10 * math.log10(1 / ((decoded - image) ** 2).mean()), abs=0.01)
    np.testing.assert_allclose(np.load(trained / "reconstructions" / "case3" / "t2w.npy"), decoded, atol=1e-5)


def test_a_stopped_run_goes_on_to_the_same_weights(data, trained, tmp_path, monkeypatch):
    calls = []
    whole = module._step

    def dies(*arguments):
        calls.append(1)
        if len(calls) == 37:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(module, "_SAVE_SECONDS", 0.0)
    monkeypatch.setattr(module, "_step", dies)
    with pytest.raises(KeyboardInterrupt):
        train_vae(data, tmp_path / "vae", make_config(SETTINGS))
    assert not (tmp_path / "vae" / "manifest.json").exists()
    with (tmp_path / "vae" / "metrics.jsonl").open("a") as log:
        log.write('{"step": 4')  # a kill in mid-line
    train_vae(data, tmp_path / "vae", make_config(SETTINGS))
    assert len(calls) == 37 + 50  # from step 30, the last saved one
    assert metrics(tmp_path / "vae") == metrics(trained)
    expected, got = load_autoencoder(trained).state_dict(), load_autoencoder(tmp_path / "vae").state_dict()
    assert all(torch.equal(expected[name], got[name]) for name in expected)


def test_the_seed_decides_the_weights(data, tmp_path):
    few = SETTINGS | {"vae_training.max_train_steps": 2}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_vae(data, tmp_path / name, make_config(few | {"vae_training.seed": seed}))
    a, b, c = (sha256(tmp_path / name / "model.safetensors") for name in "abc")
    assert a == b
    assert a != c


def test_a_finished_run_is_kept_and_others_are_not_overwritten(data, trained, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "_train", never)
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()}
    train_vae(data, trained, make_config(SETTINGS))
    other_images = write_images(tmp_path, shift=0.1)
    for folder, settings in ((data, {"vae_training.lr": 1e-3}), (other_images, {})):
        with pytest.raises(CheckpointError, match="other settings or other images"):
            train_vae(folder, trained, make_config(SETTINGS | settings))
    assert {path: path.stat().st_mtime_ns for path in trained.rglob("*") if path.is_file()} == before


def test_a_damaged_state_is_named(data, tmp_path):
    settings = make_config(SETTINGS)
    write_json(tmp_path / "training.json", {"identity": module._identity(settings, read_images(data)[0])})
    (tmp_path / "state.pt").write_bytes(b"PK not really")
    with pytest.raises(CheckpointError) as caught:
        train_vae(data, tmp_path, settings)
    assert caught.value.path == str(tmp_path / "state.pt") and len(str(caught.value).splitlines()) <= 5


def test_a_diverged_last_step_is_not_saved(data, tmp_path, monkeypatch):
    whole = module._step

    def last(vae, *rest):
        loss = whole(vae, *rest)
        with torch.no_grad():
            next(vae.parameters()).fill_(math.inf)  # as an update does whose gradients overflow
        return loss

    monkeypatch.setattr(module, "_step", last)
    with pytest.raises(NonFiniteError, match="last step"):
        train_vae(data, tmp_path / "vae", make_config(SETTINGS | {"vae_training.max_train_steps": 1}))
    assert not (tmp_path / "vae" / "manifest.json").exists()


def test_a_diverged_loss_stops(data, tmp_path):
    with pytest.raises(NonFiniteError, match="lower vae_training.lr") as stopped:
        train_vae(data, tmp_path / "vae", make_config(SETTINGS | {"vae_training.lr": 1e30}))
    assert stopped.value.exit_code == 6
    assert not (tmp_path / "vae" / "manifest.json").exists()


@pytest.mark.parametrize("patch", [[8, 8, 6], [32, 16, 8], [8, 8, 9]])
def test_patches_that_do_not_fit_are_refused(data, tmp_path, patch):
    factor_4 = {"autoencoder.num_channels": [8, 8, 8], "autoencoder.num_res_blocks": [1, 1, 1]}
    with pytest.raises(ConfigError, match="multiple of 4") as refused:
        train_vae(data, tmp_path / "vae", make_config(SETTINGS | factor_4 | {"vae_training.patch": patch}))
    assert refused.value.field == "vae_training.patch"
    assert not (tmp_path / "vae").exists()


def test_damaged_images_and_an_empty_split_are_refused(tmp_path):
    folder = write_images(tmp_path / "damaged")
    file = folder / "images" / "case1" / "t2w.npy"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.raises(DataError, match="SHA-256") as refused:
        train_vae(folder, tmp_path / "vae", make_config(SETTINGS))
    assert refused.value.path == str(file)
    with pytest.raises(DataError, match="train split is empty"):
        train_vae(write_images(tmp_path / "empty", train=0), tmp_path / "vae", make_config(SETTINGS))


def test_without_a_test_split_there_is_no_quality(tmp_path):
    few = make_config(SETTINGS | {"vae_training.max_train_steps": 3})
    train_vae(write_images(tmp_path / "prepared", test=0), tmp_path / "vae", few)
    assert json.loads((tmp_path / "vae" / "run_record.json").read_text())["test"] is None


def test_patches_cover_every_image_equally(data):
    train, _ = read_images(data)
    settings = VaeTrainingConfig(patch=[8, 8, 8], batch_size=2)
    drawn = torch.cat(
        [torch.from_numpy(job.read())[None] for step in range(30) for job in patch_jobs(train, settings, step)]
    )
    assert torch.equal(
        drawn[14:16], torch.stack([torch.from_numpy(job.read()) for job in patch_jobs(train, settings, 7)])
    )
    windows = [np.lib.stride_tricks.sliding_window_view(image.values, (8, 8, 8)).reshape(-1, 512) for image in train]
    sources = [
        next(k for k, every in enumerate(windows) if (every == patch.numpy().ravel()).all(1).any()) for patch in drawn
    ]
    assert [sorted(sources[i : i + 3]) for i in range(0, 60, 3)] == [[0, 1, 2]] * 20
    assert len({patch.numpy().tobytes() for patch in drawn}) > 30


def test_augmented_patches_are_drawn_once_for_good_and_train(data, tmp_path):
    train, _ = read_images(data)
    changes = {"vae_training.augmentation.preset": "image", "vae_training.max_train_steps": 3}
    augmented = make_config(SETTINGS | changes)
    jobs = [patch_jobs(train, augmented.vae_training, step) for step in (0, 1, 0)]
    assert jobs[0] == jobs[2] != jobs[1] and jobs[0][0].augmentation.rotation != (0.0, 0.0, 0.0)
    plain = patch_jobs(train, make_config(SETTINGS).vae_training, 0)
    assert [job.corner for job in plain] == [job.corner for job in jobs[0]] and plain[0].augmentation.rotation == (
        0,
        0,
        0,
    )
    train_vae(data, tmp_path / "vae", augmented)
    assert json.loads((tmp_path / "vae" / "run_record.json").read_text())["images"] == 3


def test_kl_equals_torch_distributions():
    mean, sigma = torch.randn(3, 4, 2, 2, 2), torch.rand(3, 4, 2, 2, 2) + 0.1
    normal = torch.distributions.Normal
    truth = torch.distributions.kl_divergence(normal(mean.double(), sigma.double()), normal(0.0, 1.0)).sum() / 3
    assert kl_divergence(mean, sigma).item() == pytest.approx(truth.item(), rel=1e-5)
    assert kl_divergence(mean, 2 * sigma).item() != pytest.approx(truth.item(), rel=1e-5)


def test_learning_rate_equals_torch_schedulers():
    settings = VaeTrainingConfig(max_train_steps=400, lr=2e-3)  # 20 steps of warm-up
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2e-3)
    warm = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / 20, 1.0, total_iters=19)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=380, eta_min=2e-5)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, cosine], milestones=[20])
    truth = []
    for _ in range(400):
        truth.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    np.testing.assert_allclose([learning_rate(settings, step) for step in range(400)], truth, rtol=1e-6)
