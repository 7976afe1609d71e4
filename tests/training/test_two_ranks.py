"""Two processes: they equal the plain loop, can be resumed, and end together when one receives a signal or fails."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ccella_fast.checkpoint import verify_checkpoint
from ccella_fast.errors import ConfigError
from ccella_fast.folder_lock import lock_folder
from plain_training import UNUSUAL, Step, difference, distance, plain_training, power_average
from training_fixtures import launch_jobs, losses, train_here, weights, write_prepared

SETTINGS = {**UNUSUAL, "batch_size": 1}
# Gathering weights takes longer than a step.
TWICE = {"checkpointing_steps": 2, "power_ema_every": 2, "power_ema_snapshot_steps": 2}
ZERO2_BF16 = {**SETTINGS, "zero_stage": 2, "precision": "bf16"}
LONG = {"max_train_steps": 12, "checkpointing_steps": 12}  # some epochs of the studies with one that is not finite
# Each process writes its share of the files, so the disk can be full for one process alone. "signal" ends after two of four
# steps.
PARTS = {"freeze": ["class_heads"], "lr_scale": {"adapter": 3.0}}
JOBS: dict[str, dict[str, Any]] = {
    "zero0-fp32": {"set": {**SETTINGS, **TWICE}},
    "zero2-fp32": {"set": {**SETTINGS, **TWICE, "zero_stage": 2}},
    "zero3-fp32": {"set": {**SETTINGS, **TWICE, "zero_stage": 3}},
    "zero2-bf16": {"set": {**ZERO2_BF16, **TWICE}},
    "signal": {"set": {**ZERO2_BF16, "checkpointing_steps": 4}, "fault": "signal", "code": 143},
    "resumed": {"set": {**ZERO2_BF16, "checkpointing_steps": 4}, "continues": "signal"},
    "parts0-fp32": {"set": {**SETTINGS, **TWICE, **PARTS}},
    "parts2-fp32": {"set": {**SETTINGS, **TWICE, **PARTS, "zero_stage": 2}},
    "quarantine": {"set": {**LONG, "batch_size": 1}, "nan": True},
    "locked": {"set": {**SETTINGS}, "code": 2},
    "disk": {
        "set": {"batch_size": 1, "max_train_steps": 1, "checkpointing_steps": 1, "zero_stage": 2}, "fault": "disk", "code": 5
    },
}  # fmt: skip
# In bf16, gradients are summed over the processes in bf16. Adam divides by their magnitude, so a gradient that is mostly
# rounding error moves its weight as far as any other, and no bound on the weights holds on every CPU. They must be closer to
# the right loop than to one with other samples; the losses of steps 2 to 4 depend on them too.
TOLERANCE = {
    "fp32": {"loss": 1e-5, "loss_l1": 1e-5, "loss_class": 1e-5, "grad_norm": 1e-5, "lr": 1e-12, "model": 2e-3, "ema": 2e-3},
    "bf16": {"loss": 5e-3, "loss_l1": 5e-3, "loss_class": 2e-2, "grad_norm": 2e-2, "lr": 1e-12},
}  # fmt: skip
SLOW = ["zero0-bf16", "zero1-fp32", "zero1-bf16", "zero3-bf16"]


@pytest.fixture(scope="module")
def launched(tmp_path_factory, data):
    """The folder with the runs of JOBS."""
    folder = tmp_path_factory.mktemp("launched")
    write_prepared(folder / "nan", nan_in="case1")
    with lock_folder(folder / "locked", "another command"):
        launch_jobs(folder, data, JOBS)
    return folder


@pytest.fixture(scope="module")
def plain(data):
    """Per precision, the plain loop with the samples of two processes, and with those of one."""
    return {
        precision: [plain_training(data, **SETTINGS, precision=precision, processes=count) for count in (2, 1)]
        for precision in ("fp32", "bf16")
    }


def check_power_averages(run: Path) -> None:
    """They are float64 sums of the weights of steps 2 and 4, in the checkpoint, and rounded to fp16 in the snapshot."""
    saved = {step: weights(run, step) for step in (2, 4)}
    apart = distance(power_average(saved, 0.1), power_average(saved, 0.05))
    for width in (0.05, 0.1):
        found = weights(run, 4, f"power_ema-{width}")
        error = distance(found, power_average(saved, width))
        assert error < 1e-2 * apart
        snapshot = load_file(run / "snapshots" / "step-00000004" / f"power_ema-{width}.safetensors")
        assert [name for name, tensor in found.items() if not torch.equal(snapshot[name], tensor.half())] == []
    assert len(list((run / "snapshots").iterdir())) == 2


def check_equal_to_the_plain_loop(run: Path, plain: list[list[Step]]) -> None:
    """plain: the plain loop with the samples of two processes, and with those of one."""
    precision, (two, one) = run.name.partition("-")[2], plain
    found = difference(run, two, at=[2, 4])
    other = difference(run, one, at=[2, 4])
    assert all(found[key] <= bound for key, bound in TOLERANCE[precision].items()), found
    assert all(found[key] < other[key] for key in ("model", "ema")), (found, other)
    assert min(other["loss"], other["loss_class"], other["model"]) > 1e-2


@pytest.mark.parametrize("name", ["zero0-fp32", "zero2-fp32", "zero3-fp32", "zero2-bf16"])
def test_two_processes_equal_the_plain_loop(launched, plain, name):
    check_equal_to_the_plain_loop(launched / name, plain[name.partition("-")[2]])
    check_power_averages(launched / name)


@pytest.mark.parametrize("name", ["parts0-fp32", "parts2-fp32"])
def test_two_processes_with_frozen_parts_and_two_rates_equal_the_plain_loop(launched, data, plain, name):
    check_equal_to_the_plain_loop(
        launched / name, [plain_training(data, **SETTINGS, **PARTS, processes=count) for count in (2, 1)]
    )
    assert difference(launched / name, plain["fp32"][0], at=[4])["model"] > 1e-2  # negative control
    check_power_averages(launched / name)


@pytest.mark.slow
def test_two_processes_equal_the_plain_loop_at_other_stages(tmp_path, data, plain):
    settings = {name: (int(name[4]), name[6:]) for name in SLOW}
    jobs = {
        name: {"set": {**SETTINGS, **TWICE, "zero_stage": stage, "precision": precision}}
        for name, (stage, precision) in settings.items()
    }
    launch_jobs(tmp_path, data, jobs)
    for name in jobs:
        check_equal_to_the_plain_loop(tmp_path / name, plain[name.partition("-")[2]])
        check_power_averages(tmp_path / name)


def test_a_locked_folder_stops_both(launched):
    """Rank 0 alone asks for the lock; `launch_jobs` checks that both end with code 2, and would wait for a hanging one."""
    assert not (launched / "locked").exists()  # the fixture's lock has removed the empty folder


def test_a_signal_to_one_process_saves_and_ends_both(launched):
    status = json.loads((launched / "signal" / "run_status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("terminated", 2, 143)
    (saved,) = (launched / "signal" / "checkpoints").iterdir()
    assert saved.name == "step-00000002" and verify_checkpoint(saved)["step"] == 2


def test_two_resumed_processes_equal_an_uninterrupted_run(launched):
    """Bit-equal, with ZeRO 2 in bf16."""
    uninterrupted, resumed = launched / "zero2-bf16", launched / "resumed"
    assert losses(resumed) == losses(uninterrupted) and len(losses(resumed)) == 4
    for name in ("model", "ema"):
        found, expected = weights(resumed, 4, name), weights(uninterrupted, 4, name)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


def test_two_processes_leave_out_the_study_that_one_leaves_out(launched, tmp_path):
    train_here(tmp_path / "one", launched / "nan", **LONG, batch_size=2)
    two, one = launched / "quarantine", tmp_path / "one"
    states = [
        json.loads((run / "checkpoints" / "step-00000012" / "training_state.json").read_text()) for run in (one, two)
    ]
    assert states[0]["quarantine"] == states[1]["quarantine"] and states[0]["quarantine"]["left_out"].keys() == {"1"}
    assert losses(two) == [(step, pytest.approx(loss, rel=1e-4)) for step, loss in losses(one)]
    assert len(losses(one)) == 9


def test_another_global_batch_raises(launched, data, tmp_path):
    folder = Path(shutil.copytree(launched / "signal", tmp_path / "run"))
    with pytest.raises(ConfigError, match=r"is 1 x 2 x 1 = 2; this run was started with 1 x 2 x 2 = 4") as caught:
        train_here(folder, data, resume="latest", **JOBS["signal"]["set"])
    assert (caught.value.field, caught.value.exit_code) == ("training.batch_size", 2)


def test_no_checkpoint_is_published_if_the_disk_of_one_process_is_full(launched):
    status = json.loads((launched / "disk" / "run_status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 0, 5)
    assert "could not be written" in status["why"]
    assert list((launched / "disk" / "checkpoints").iterdir()) == []
