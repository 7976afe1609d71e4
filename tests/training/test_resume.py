"""A run that was stopped, by whatever, and goes on equals one that was not: every loss, and the weights by their SHA-256."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import time

import pytest

from ccella_fast.errors import CheckpointError, ConfigError
from training_fixtures import losses, start, train_here, write_config, write_prepared

STEPS = {"max_train_steps": 24, "checkpointing_steps": 2, "batch_size": 1}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("unbroken") / "model"
    train_here(folder, data, **STEPS)
    return folder


def fingerprint(folder, step=STEPS["max_train_steps"]):
    """Losses, and hashes of weights and averages."""
    files = [folder / "checkpoints" / f"step-{step:08d}" / f"{name}.safetensors" for name in ("model", "ema")]
    return losses(folder), [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (2, "bf16"), (3, "bf16")])
def test_going_on_from_the_middle_changes_nothing(tmp_path, data, stage, precision):
    training = {"zero_stage": stage, "precision": precision, "checkpointing_steps": 2, "max_train_steps": 4}
    train_here(tmp_path / "run", data, **training)
    expected = fingerprint(tmp_path / "run", 4)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    train_here(tmp_path / "run", data, resume="latest", **training)
    assert fingerprint(tmp_path / "run", 4) == expected
    assert [step for step, _ in expected[0]] == [1, 2, 3, 4]


def test_a_finished_run_ends_at_once_and_is_left_alone(unbroken, data):
    before = fingerprint(unbroken)
    status = (unbroken / "run_status.json").stat().st_mtime_ns
    assert train_here(unbroken, data, resume="latest", **STEPS) == 0
    assert fingerprint(unbroken) == before and (unbroken / "run_status.json").stat().st_mtime_ns == status


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"lr": 1e-4}, "training.lr"),
        ({"max_train_steps": 30}, "training.max_train_steps"),
        ({"zero_stage": 1}, "training.zero_stage"),
        ({"batch_size": 2}, "training.batch_size"),
        ({"seed": 1}, "training.seed"),
        ({"model__num_latents": 8}, "model.num_latents"),
        ({"scheduler__beta_end": 0.02}, "scheduler.beta_end"),
    ],
)
def test_a_changed_setting_is_refused_by_name(unbroken, data, change, field):
    with pytest.raises(ConfigError) as caught:
        train_here(unbroken, data, resume="latest", **{**STEPS, **change})
    assert caught.value.field == field


def test_changed_data_is_refused_and_free_settings_are_not(unbroken, data, tmp_path):
    other = write_prepared(tmp_path / "other", cases=4)
    with pytest.raises(ConfigError, match="data_sha256"):
        train_here(unbroken, other, resume="latest", **STEPS)
    assert train_here(unbroken, data, resume="latest", **STEPS, logging_steps=5, activation_checkpointing=True) == 0


def test_what_is_not_there_is_refused(tmp_path, unbroken, data, caplog):
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        train_here(tmp_path / "run", data, resume=str(tmp_path / "nowhere"), **STEPS)
    with pytest.raises(ConfigError, match="already contains a run"):
        train_here(unbroken, data, **STEPS)
    assert not (tmp_path / "run").exists()


def test_nothing_to_resume_starts_fresh_and_says_so(tmp_path, data, caplog):
    caplog.set_level("INFO", logger="ccella_fast")
    assert train_here(tmp_path / "run", data, resume="latest", max_train_steps=1) == 0
    assert "nothing to resume" in caplog.text


def test_half_a_metrics_line_is_dropped(tmp_path, data, unbroken):
    folder = tmp_path / "model"
    shutil.copytree(unbroken, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000024")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 25, "lo')
    train_here(folder, data, resume="latest", **STEPS)
    assert fingerprint(folder) == fingerprint(unbroken)


def killed_and_resumed(tmp_path, data, kills, seed):
    """SIGKILL at random instants of training and saving, each time at a later step; then to the end."""
    config, folder, source = write_config(tmp_path / "config.json", **STEPS), tmp_path / "model", random.Random(seed)
    arguments = ("--config", config, "--data", data, "--output_dir", folder, "--resume")
    for _ in range(kills):
        process = start(*arguments)
        logged = len(losses(folder)) if (folder / "metrics.jsonl").exists() else 0
        wait = time.monotonic() + 120
        target = min(logged + source.randrange(2, 7), STEPS["max_train_steps"] - 2)
        while time.monotonic() < wait and process.poll() is None:
            lines = (folder / "metrics.jsonl").read_bytes().count(b"\n") if (folder / "metrics.jsonl").exists() else 0
            if lines >= target:
                break
            time.sleep(0.005)
        time.sleep(source.random() * 0.3)
        process.kill()
        process.communicate()
    train_here(folder, data, resume="latest", **STEPS)
    assert not list(folder.rglob(".partial*"))
    return fingerprint(folder)


def test_killed_runs_equal_the_unbroken_one(tmp_path, data, unbroken):
    assert killed_and_resumed(tmp_path, data, kills=2, seed=1) == fingerprint(unbroken)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills_equal_the_unbroken_run(tmp_path, data, unbroken):
    for seed in range(4):
        (tmp_path / str(seed)).mkdir()
        assert killed_and_resumed(tmp_path / str(seed), data, kills=5, seed=seed) == fingerprint(unbroken)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_saves_in_time(tmp_path, data, unbroken, number, code):
    """No checkpoint is due (every 1000 steps): the one that is there was written because of the signal."""
    settings = {**STEPS, "checkpointing_steps": 1000}
    config, folder = write_config(tmp_path / "config.json", **settings), tmp_path / "model"
    process = start("--config", config, "--data", data, "--output_dir", folder, "--resume")
    while not (folder / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(number)
    sent = time.monotonic()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    assert time.monotonic() - sent < 20
    status = json.loads((folder / "run_status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("terminated", code)
    assert (folder / "checkpoints" / f"step-{status['step']:08d}" / "manifest.json").is_file()
    train_here(folder, data, resume="latest", **settings)
    assert fingerprint(folder) == fingerprint(unbroken)


def test_the_comparison_can_fail(unbroken, tmp_path, data):
    """The control: another seed gives other losses and other weights."""
    train_here(tmp_path / "model", data, **{**STEPS, "seed": 1})
    mine, hashes = fingerprint(tmp_path / "model")
    theirs, other_hashes = fingerprint(unbroken)
    assert mine != theirs and not set(hashes) & set(other_hashes)
