"""Volumes generated during a training: they are those of the checkpoint, and the training stays the same."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch

from ccella_fast import FastSampler
from ccella_fast.config import load_config
from ccella_fast.data.checking.findings import STOPPING
from ccella_fast.evaluation.features.random_networks import RandomNetworks
from ccella_fast.evaluation.mmd import kernel_distance
from ccella_fast.evaluation.volumes import Volume
from ccella_fast.models import build_model
from ccella_fast.report.figures import cut
from ccella_fast.sampling.preview import make_previews
from ccella_fast.storage import read_json, write_json
from ccella_fast.training.run import train
from training_fixtures import (
    CONFIG,
    SMALL_AUTOENCODER,
    launch_jobs,
    losses,
    metrics,
    settings,
    stage_id,
    weights,
    write_visible,
)

SPLITS = ("train", "val", "test", "train", "val", "train", "val", "train")
RUN = {"max_train_steps": 4, "checkpointing_steps": 2, "checkpoints_total_limit": 3}
SEEN: dict[str, Any] = {"monitoring.sample_steps": 2, "monitoring.samples": 4, "monitoring.sample_inference_steps": 3}


@pytest.fixture(scope="module")
def visible(tmp_path_factory) -> Path:
    return write_visible(tmp_path_factory.mktemp("visible") / "prepared", SPLITS)


def run_training(folder: Path, data: Path, seen: list | None = None, **changes: Any) -> Path:
    """Train, and keep the volumes of each preview in `seen`."""
    names = {f"training.{key}": value for key, value in RUN.items()} | {"autoencoder": SMALL_AUTOENCODER} | changes
    folder.parent.mkdir(exist_ok=True)
    write_json(folder.parent / "config.json", CONFIG)

    def make(*arguments: Any) -> Any:
        sample = make_previews(*arguments)

        def recorded(model: Any) -> Any:
            preview = sample(model)
            seen.append(preview)
            return preview

        return sample if seen is None else recorded

    train(load_config(folder.parent / "config.json", names), data=data, run=folder, allow=STOPPING, make_previews=make)
    return folder


@pytest.fixture(scope="module")
def observed(tmp_path_factory, visible) -> tuple[Path, list]:
    seen: list = []
    return run_training(tmp_path_factory.mktemp("observed") / "run", visible, seen, **SEEN), seen


def test_they_are_the_volumes_of_the_checkpoint(observed, visible):
    """Of its averages. Prompts are the reports of the validation studies; the fourth has the first report and another seed."""
    run, seen = observed
    cases = [case for case in read_json(visible / "manifest.json")["cases"] if case["split"] == "val"]
    text = np.stack([np.load(visible / case["files"]["text"]["path"]) for case in [*cases, cases[0]]])
    for step, preview in zip((2, 4), seen, strict=True):
        folder = run / "checkpoints" / f"step-{step:08d}"
        found, raw = (
            FastSampler.from_checkpoint(folder, vae=visible / "vae", dtype="float32", weights=name)(
                text=text, seeds=[0, 0, 0, 1], num_inference_steps=3, solver="dpmpp_2m", progress=False
            ).volumes.numpy()
            for name in ("ema", "raw")
        )
        assert preview.volumes.shape == (4, 1, 32, 32, 16)
        assert np.abs(preview.volumes - found).max() < 1e-5 < np.abs(preview.volumes - raw).max()


def test_they_are_evaluated(observed, visible):
    run, seen = observed
    extract = RandomNetworks()
    cases = [case for case in read_json(visible / "manifest.json")["cases"] if case["split"] == "val"]
    real = [np.load(visible / case["files"]["image/t2w"]["path"]) for case in cases]
    made = list(seen[-1].volumes[:, 0])
    spacing = (0.5, 0.5, 0.5625)
    held_out, generated = (
        np.stack([extract(Volume(array, spacing, "v"))["random"] for array in arrays]) for arrays in (real, made)
    )
    (line,) = [line for line in metrics(run) if line["step"] == 4 and "sample_distance" in line]
    assert line["sample_distance"] == pytest.approx(kernel_distance(held_out, generated), rel=1e-4)
    assert line["sample_copies"] == 0 and line["weights"] == "averaged"
    assert line["sample_distance"] != pytest.approx(kernel_distance(held_out, generated[:3]), rel=1e-2)


def test_a_rectified_flow_has_them_too(tmp_path, visible):
    changes = {"scheduler.schedule": "rectified_flow", "training.report_dropout": 0.5, "sampling.guidance_scale": 2.0}
    seen: list = []
    run = run_training(tmp_path / "run", visible, seen, **SEEN, **changes, **{"monitoring.validation_steps": 2})
    assert len(seen) == 2 and np.isfinite(seen[-1].volumes).all()
    measured = [line for line in metrics(run) if "val_loss" in line]
    assert [line["step"] for line in measured] == [2, 4] and all(line["sample_distance"] for line in measured)


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)], ids=stage_id)
def test_a_run_with_low_rank_adapters_has_them_too(tmp_path, observed, visible, stage):
    changes = {"training.low_rank.rank": 2, "paths.existing_ckpt_filepath": str(observed[0]), "training.lr": 1e-2}
    seen: list = []
    run = run_training(tmp_path / "run", visible, seen, **SEEN, **changes, **{"training.zero_stage": stage})
    prompts = [case for case in read_json(visible / "manifest.json")["cases"] if case["split"] == "val"]
    text = np.stack([np.load(visible / case["files"]["text"]["path"]) for case in [*prompts, prompts[0]]])
    found, before = (
        FastSampler.from_checkpoint(folder, vae=visible / "vae", dtype="float32")(
            text=text, seeds=[0, 0, 0, 1], num_inference_steps=3, solver="dpmpp_2m", progress=False
        ).volumes.numpy()
        for folder in (run, observed[0])
    )
    assert np.abs(seen[-1].volumes - found).max() < 1e-5 < np.abs(seen[-1].volumes - before).max()


def test_a_copy_of_a_training_study_is_found(visible, monkeypatch, caplog):
    config = settings(autoencoder=SMALL_AUTOENCODER, **{name.replace(".", "__"): value for name, value in SEEN.items()})
    sample = make_previews(visible, config, torch.device("cpu"))
    cases = [case for case in read_json(visible / "manifest.json")["cases"] if case["split"] == "train"]
    copy = np.load(visible / cases[0]["files"]["image/t2w"]["path"])
    rows = sample._features([copy, copy], [[0.5, 0.5, 0.5625]] * 2)  # type: ignore[attr-defined]
    assert sample._metrics([rows])["sample_copies"] == 1.0  # type: ignore[attr-defined]


def test_they_are_shown(observed):
    """As a picture in the run folder, and in TensorBoard: the middle slices side by side."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, seen = observed
    assert [path.name for path in sorted((run / "previews").iterdir())] == ["step-00000002.png", "step-00000004.png"]
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    shown = {event.step: event.encoded_image_string for event in events.Images("Preview")}
    assert list(shown) == [2, 4]
    pixels = matplotlib.image.imread(io.BytesIO(shown[4]))
    assert pixels.shape[:2] == (32, 4 * 32)
    expected = cut(seen[-1].volumes[2, 0], (0.5, 0.5, 0.5625), "axial").pixels
    gray = pixels if pixels.ndim == 2 else pixels[..., 0]
    assert np.abs(gray[:, 64:96] - expected).max() < 2 / 255


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)], ids=stage_id)
def test_a_training_with_previews_is_the_same_training(tmp_path, observed, visible, stage):
    """Bit for bit."""
    run = observed[0]
    if stage:
        run = run_training(tmp_path / "with", visible, **SEEN, **{"training.zero_stage": stage})
    without = run_training(tmp_path / "without", visible, **{"training.zero_stage": stage})
    assert losses(run) == losses(without)
    assert not (without / "previews").exists() and (run / "previews").exists()
    for name in ("model", "ema", "exp_avg_sq"):
        found, expected = weights(run, 4, name), weights(without, 4, name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.slow
def test_two_processes_generate_them_from_whole_weights(tmp_path, visible):
    """Process 0 generates while the other one waits; the training of both stays the same."""
    common = {**RUN, "batch_size": 1, "zero_stage": 3}
    common |= {f"autoencoder__{key}": value for key, value in SMALL_AUTOENCODER.items()}
    seen = {key.replace(".", "__"): value for key, value in SEEN.items()}
    launch_jobs(tmp_path, visible, {"with": {"set": {**common, **seen}}, "without": {"set": common}})
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    found, expected = (weights(tmp_path / name, 4) for name in ("with", "without"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert [line["step"] for line in metrics(tmp_path / "with") if "sample_distance" in line] == [2, 4]


def test_a_model_whose_volumes_are_not_finite_goes_on(visible, caplog):
    config = settings(autoencoder=SMALL_AUTOENCODER, **{name.replace(".", "__"): value for name, value in SEEN.items()})
    model = build_model(config)
    torch.nn.init.constant_(next(model.parameters()), torch.nan)
    assert make_previews(visible, config, torch.device("cpu"))(model) is None
    assert "not finite" in caplog.text
