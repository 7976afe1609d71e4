"""The validation loss: it equals one that is written out with plain torch, and a training with it is the same training."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ccella_fast.config import make_config
from ccella_fast.data.loading.selection import select_studies
from ccella_fast.data.manifest import load_manifest
from ccella_fast.diffusion.noise import generator
from ccella_fast.errors import ConfigError
from ccella_fast.models import build_model
from ccella_fast.storage import read_json, write_json
from training_fixtures import (
    CONFIG,
    launch_jobs,
    losses,
    metrics,
    settings,
    stage_id,
    train_here,
    validations,
    weights,
    write_prepared,
)


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


SPLITS = ("train", "train", "val", "train", "val", "test", "val", "train", "train")
RUN: dict[str, Any] = {"max_train_steps": 4, "checkpointing_steps": 2, "checkpoints_total_limit": 3}
VALIDATED: dict[str, Any] = {**RUN, "monitoring__validation_steps": 2}
JOBS: dict[str, dict[str, Any]] = {
    f"zero{stage}": {"set": {**VALIDATED, "batch_size": 1, "zero_stage": stage}} for stage in (0, 3)
}


@pytest.fixture(scope="module")
def divided(tmp_path_factory) -> Path:
    """A prepared folder with studies of every split."""
    return write_prepared(tmp_path_factory.mktemp("divided") / "prepared", cases=len(SPLITS), splits=SPLITS)


@pytest.fixture(scope="module")
def launched(tmp_path_factory, divided) -> Path:
    """The folder with the runs of JOBS, on two processes."""
    folder = tmp_path_factory.mktemp("launched")
    launch_jobs(folder, divided, JOBS)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory, divided) -> Path:
    """A run on one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train_here(folder, divided, **VALIDATED)
    return folder


def plain_validation(data: Path, run: Path, step: int, split: str = "val", name: str = "ema") -> dict[str, Any]:
    """The loss of a checkpoint on a split, one study and one timestep at a time, summed in float64."""
    cases = [case for case in read_json(data / "manifest.json")["cases"] if case["split"] == split]
    model = build_model(make_config({key: value for key, value in CONFIG.items() if key != "name"}))
    model.load_state_dict(weights(run, step, name))
    signal = np.cumprod(1 - np.linspace(math.sqrt(0.0015), math.sqrt(0.0195), 1000) ** 2)
    bands, focal, known = [], 0.0, 0
    for band in range(4):
        order = torch.randperm(
            len(cases), generator=generator(0, "validation timesteps", 250 * band, 250 * (band + 1))
        ).tolist()
        total = 0.0
        for number, case in enumerate(cases):
            arrays = {key: torch.from_numpy(np.load(data / entry["path"])) for key, entry in case["files"].items()}
            source = generator(0, "validation", case["id"], band)
            shape = arrays["latent_mean/t2w"].shape
            posterior, noise = torch.randn(shape, generator=source), torch.randn(shape, generator=source)
            latent = (arrays["latent_mean/t2w"] + arrays["latent_sigma/t2w"] * posterior) * 0.97
            t = 250 * band + int((order[number] + 0.5) * 250 / len(cases))
            noisy = (math.sqrt(signal[t]) * latent.double() + math.sqrt(1 - signal[t]) * noise.double()).float()
            spacing = 100 * torch.tensor(case["spacing"])
            with torch.no_grad():
                predicted, logits = model(
                    noisy[None], torch.tensor([t]), spacing=spacing[None], text=arrays["text"][None]
                )
            total += float((predicted[0].double() - noise.double()).abs().mean())
            if case["pirads"] and not case["text_isnull"]:
                p = logits[0].double().softmax(0)
                alpha = torch.tensor([0.25, 0.75], dtype=torch.float64)
                focal -= float((100 * torch.tensor(case["pirads"]) * alpha * (1 - p) ** 2 * p.log()).sum())
                known += 1
        bands.append(total / len(cases))
    l1, classes = sum(bands) / 4, focal / known
    by_band = {f"val_loss_l1_{250 * band}_{250 * band + 249}": value for band, value in enumerate(bands)}
    return {"val_loss": l1 + 1e-4 * classes, "val_loss_l1": l1, "val_loss_class": classes, **by_band}


def check_equal_to_the_plain_one(run: Path, data: Path) -> None:
    assert [line["step"] for line in validations(run)] == [2, 4]
    for line in validations(run):
        expected, raw = (plain_validation(data, run, line["step"], name=name) for name in ("ema", "model"))
        assert line["weights"] == "averaged"
        assert {key: line[key] for key in expected} == pytest.approx(expected, rel=2e-5)
        assert abs(line["val_loss"] - raw["val_loss"]) > 1e-4  # the control: other weights


@pytest.mark.parametrize("stage", [0, 3], ids=stage_id)
def test_it_equals_a_plain_loop_on_two_processes(launched, divided, stage):
    check_equal_to_the_plain_one(launched / f"zero{stage}", divided)


def test_it_equals_a_plain_loop_on_one_process(run, divided):
    check_equal_to_the_plain_one(run, divided)
    others = plain_validation(divided, run, 4, split="test")
    assert abs(others["val_loss"] - validations(run)[-1]["val_loss"]) > 1e-3


@pytest.mark.parametrize("own_section", [False, True], ids=["switch", "section of the DeepSpeed file"])
def test_it_is_measured_with_activation_checkpointing(tmp_path, run, divided, own_section):
    file, settings = None, {"activation_checkpointing": True}
    if own_section:
        file, settings = tmp_path / "deepspeed.json", {}
        write_json(file, {"activation_checkpointing": {"profile": True}})
    train_here(tmp_path / "run", divided, deepspeed_file=file, **VALIDATED, **settings)
    check_equal_to_the_plain_one(tmp_path / "run", divided)
    assert [line["val_loss"] for line in validations(tmp_path / "run")] == pytest.approx(
        [line["val_loss"] for line in validations(run)], rel=1e-5
    )


def test_without_an_average_the_weights_of_the_training_are_measured(tmp_path, divided):
    train_here(tmp_path / "run", divided, **VALIDATED, ema_decay=0)
    line = validations(tmp_path / "run")[-1]
    expected = plain_validation(divided, tmp_path / "run", 4, name="model")
    assert line["weights"] == "raw"
    assert {key: line[key] for key in expected} == pytest.approx(expected, rel=2e-5)


def test_the_loss_of_training_studies_is_measured_in_the_same_way(tmp_path, run, divided):
    """Of three of the five: as many as there are validation studies, spread over the list."""
    manifest = read_json(divided / "manifest.json")
    train = [case["id"] for case in manifest["cases"] if case["split"] == "train"]
    chosen = [train[0], train[1], train[3]]
    for case in manifest["cases"]:
        case["split"] = "chosen" if case["id"] in chosen else "other"
    shutil.copytree(divided, tmp_path / "relabelled")
    write_json(tmp_path / "relabelled" / "manifest.json", manifest)
    expected = plain_validation(tmp_path / "relabelled", run, 4, split="chosen")
    assert validations(run)[-1]["train_eval_loss"] == pytest.approx(expected["val_loss"], rel=2e-5)


@pytest.mark.parametrize(
    ("stage", "precision"), [(0, "bf16"), slow(0, "fp32"), slow(2, "bf16"), slow(3, "fp32")], ids=stage_id
)
def test_a_training_with_validation_is_the_same_training(tmp_path, divided, stage, precision):
    """Bit for bit, also after a resumption; the validations of the resumed run are those of the uninterrupted one."""
    settings = {"zero_stage": stage, "precision": precision}
    train_here(tmp_path / "without", divided, **RUN, **settings)
    train_here(tmp_path / "with", divided, **VALIDATED, **settings)
    shutil.copytree(tmp_path / "with", tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-00000004")
    train_here(tmp_path / "resumed", divided, resume="latest", **VALIDATED, **settings)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert validations(tmp_path / "resumed") == validations(tmp_path / "with")
    for run in ("with", "resumed"):
        for name in ("model", "ema", "exp_avg_sq"):
            found, expected = weights(tmp_path / run, 4, name), weights(tmp_path / "without", 4, name)
            assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_study_of_the_test_split_never_enters(tmp_path, caplog):
    """One with NaN changes nothing; as a validation study it makes the validation not finite, and is named."""
    data = write_prepared(tmp_path / "prepared", cases=len(SPLITS), splits=SPLITS, nan_in="case5")
    train_here(tmp_path / "run", data, **VALIDATED)
    assert all(math.isfinite(line[name]) for line in validations(tmp_path / "run") for name in line if "loss" in name)
    manifest = read_json(data / "manifest.json")
    manifest["cases"][5]["split"] = "val"
    write_json(data / "manifest.json", manifest)
    train_here(tmp_path / "other", data, **VALIDATED)
    assert [line["val_loss"] for line in validations(tmp_path / "other")] == [None, None]
    assert losses(tmp_path / "other") == losses(tmp_path / "run")
    assert "the validation is not finite; cases: case5" in caplog.text


PATIENTS = (1, 1, 2, 2, 3, 3, 4, 4, 5, 5)


def divide(data: Path, fraction: float) -> tuple[list[str], list[str]]:
    config = settings(monitoring__validation_fraction=fraction)
    return tuple([case.id for case in select_studies(load_manifest(data), config, name)] for name in ("train", "val"))  # type: ignore[return-value]


def test_patients_are_set_aside_whole(tmp_path):
    splits = ["train"] * 8 + ["test"] * 2
    data = write_prepared(tmp_path / "ten", cases=10, patients=PATIENTS, splits=splits)
    patient = {f"case{number}": PATIENTS[number] for number in range(10)}
    train, val = divide(data, 0.5)
    assert len(train) == len(val) == 4 and sorted([*train, *val]) == [f"case{number}" for number in range(8)]
    assert not {patient[case] for case in train} & {patient[case] for case in val}
    few = divide(data, 0.01)[1]
    assert len(few) == 2 and set(few) <= set(val)
    assert len(divide(data, 0.99)[0]) == 2  # something is left to train on
    assert divide(data, 0.0) == ([f"case{number}" for number in range(8)], [])
    more = write_prepared(tmp_path / "twelve", cases=12, patients=(*PATIENTS, 6, 6), splits=[*splits, "train", "train"])
    assert len({*divide(more, 0.5)[1]} & {*val}) >= 2  # most keep their side when patients are added


def test_studies_without_a_named_patient_are_patients_of_their_own(tmp_path):
    data = write_prepared(tmp_path / "prepared", cases=6)
    train, val = divide(data, 0.5)
    assert (len(train), len(val)) == (3, 3)


def test_a_fraction_trains_as_if_the_studies_were_of_the_split_val(tmp_path):
    data = write_prepared(tmp_path / "prepared", cases=10, patients=PATIENTS)
    _, val = divide(data, 0.4)
    shutil.copytree(data, tmp_path / "marked")
    manifest = read_json(data / "manifest.json")
    for case in manifest["cases"]:
        case["split"] = "val" if case["id"] in val else "train"
    write_json(tmp_path / "marked" / "manifest.json", manifest)
    epochs = {"max_train_steps": None, "n_epochs": 2, "monitoring__validation_steps": 2}
    train_here(tmp_path / "fraction", data, **epochs, monitoring__validation_fraction=0.4)
    train_here(tmp_path / "split", tmp_path / "marked", **epochs)
    assert len(losses(tmp_path / "split")) == 6  # two epochs of six studies, two at a time
    assert losses(tmp_path / "fraction") == losses(tmp_path / "split")
    assert validations(tmp_path / "fraction") == validations(tmp_path / "split")


@pytest.mark.parametrize(
    ("splits", "changes", "field", "why"),
    [
        (SPLITS, {"validation_fraction": 0.1}, "monitoring.validation_fraction", "the split val has 3 studies already"),
        (["train"] + ["test"] * 8, {"validation_fraction": 0.1}, "monitoring.validation_fraction", "at least two patients"),
        (["train"] * 9, {"validation_steps": 1}, "monitoring.validation_steps", "set, but there is no study of the split val"),
    ],
    ids=["both", "one-patient", "none"],
)  # fmt: skip
def test_a_validation_that_is_not_possible_is_refused(tmp_path, splits, changes, field, why):
    data = write_prepared(tmp_path / "prepared", cases=len(splits), splits=splits)
    with pytest.raises(ConfigError, match=why) as caught:
        train_here(tmp_path / "run", data, **RUN, **{f"monitoring__{key}": value for key, value in changes.items()})
    assert caught.value.field == field and not (tmp_path / "run" / "config.json").exists()


def test_tensorboard_has_steps_as_its_axis(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    scalars = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert scalars["Train/loss"] == [(step, pytest.approx(loss)) for step, loss in losses(run)]
    for name in ("val_loss", "val_loss_l1_750_999", "train_eval_loss"):
        expected = [(line["step"], pytest.approx(line[name])) for line in validations(run)]
        assert scalars[f"Measured/{name}"] == expected


def test_no_id_of_a_study_is_written(run):
    text = json.dumps(metrics(run))
    assert "val_loss" in text and "case" not in text
