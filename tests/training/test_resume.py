"""A run that was interrupted and resumed equals an uninterrupted one: every loss, and the SHA-256 of the weights."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import time

import pytest

import ccella_fast
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.storage import write_json
from training_fixtures import losses, stage_id, start, train_here, write_config, write_prepared

OFFLOADED = {
    "offload-2": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "offload-3": {
        "stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"},
        "stage3_param_persistence_threshold": 0,
    },
}  # fmt: skip
STEPS = {"max_train_steps": 24, "checkpointing_steps": 2, "batch_size": 1}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("uninterrupted") / "model"
    train_here(folder, data, **STEPS)
    return folder


def fingerprint(folder, step=STEPS["max_train_steps"]):
    """The losses, and the hashes of weights, averages and moments."""
    files = sorted((folder / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    assert len(files) == 4
    return losses(folder), [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]


@pytest.mark.parametrize(
    ("stage", "precision"),
    [
        *[(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "bf16"), (3, "bf16"), ("offload-2", "fp32")],
        *[
            pytest.param(stage, precision, marks=pytest.mark.slow)
            for stage, precision in [(1, "fp32"), (2, "fp32"), (3, "fp32")]
            + [("offload-2", "bf16"), ("offload-3", "fp32"), ("offload-3", "bf16")]
        ],
    ],
    ids=stage_id,
)
def test_resuming_from_the_middle_gives_the_same_result(tmp_path, data, stage, precision):
    """Equal in every bit: losses, weights, averages and moments. offload-3 shards also small parameters."""
    training = {
        "precision": precision,
        "checkpointing_steps": 2,
        "max_train_steps": 4,
        "deepspeed_file": tmp_path / "ds",
    }
    write_json(tmp_path / "ds", {"zero_optimization": OFFLOADED.get(stage, {"stage": stage})})
    train_here(tmp_path / "run", data, **training)
    expected = fingerprint(tmp_path / "run", 4)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    train_here(tmp_path / "run", data, resume="latest", **training)
    assert fingerprint(tmp_path / "run", 4) == expected
    assert [step for step, _ in expected[0]] == [1, 2, 3, 4]


def test_a_finished_run_is_left_unchanged(uninterrupted, data):
    before = fingerprint(uninterrupted)
    status = (uninterrupted / "run_status.json").stat().st_mtime_ns
    assert train_here(uninterrupted, data, resume="latest", **STEPS) == 0
    assert fingerprint(uninterrupted) == before and (uninterrupted / "run_status.json").stat().st_mtime_ns == status


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("training.lr", 1e-4),
        ("training.max_train_steps", 30),
        ("training.batch_size", 2),
        ("training.seed", 1),
        ("model.num_latents", 8),
        ("scheduler.beta_end", 0.02),
    ],
)
def test_a_changed_setting_raises_an_error_that_names_it(uninterrupted, data, field, value):
    name = field.removeprefix("training.").replace(".", "__")
    with pytest.raises(ConfigError) as caught:
        train_here(uninterrupted, data, resume="latest", **{**STEPS, name: value})
    assert caught.value.field == field


def test_changed_data_raises_but_some_settings_may_change(uninterrupted, data, tmp_path):
    other = write_prepared(tmp_path / "other", cases=4)
    with pytest.raises(ConfigError, match="data_sha256"):
        train_here(uninterrupted, other, resume="latest", **STEPS)
    assert (
        train_here(uninterrupted, data, resume="latest", **STEPS, logging_steps=5, activation_checkpointing=True) == 0
    )


def test_a_missing_checkpoint_and_an_existing_run_raise(tmp_path, uninterrupted, data, caplog):
    with pytest.raises(CheckpointError, match="this path does not exist(.|\n)*give a step folder of "):
        train_here(tmp_path / "run", data, resume=str(tmp_path / "nowhere"), **STEPS)
    with pytest.raises(ConfigError, match="already contains a run"):
        train_here(uninterrupted, data, **STEPS)
    assert not (tmp_path / "run").exists()


def test_with_nothing_to_resume_a_new_run_starts(tmp_path, data, caplog):
    caplog.set_level("INFO", logger="ccella_fast")
    assert train_here(tmp_path / "run", data, resume="latest", max_train_steps=1) == 0
    assert "nothing to resume" in caplog.text


def test_an_incomplete_metrics_line_is_removed(tmp_path, data, uninterrupted):
    folder = tmp_path / "model"
    shutil.copytree(uninterrupted, folder)
    shutil.rmtree(folder / "checkpoints" / "step-00000024")
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 25, "lo')
    train_here(folder, data, resume="latest", **STEPS)
    assert fingerprint(folder) == fingerprint(uninterrupted)


def killed_and_resumed(tmp_path, data, kills, seed):
    """Kill the run at random moments of training and saving, each time at a later step, then resume it to the end."""
    config, folder, source = write_config(tmp_path / "config.json", **STEPS), tmp_path / "model", random.Random(seed)
    arguments = ("--config", config, "--data", data, "--output_dir", folder, "--resume")
    for _ in range(kills):
        process = start(*arguments)
        logged = len(losses(folder)) if (folder / "metrics.jsonl").exists() else 0
        deadline = time.monotonic() + 120
        target = min(logged + source.randrange(2, 7), STEPS["max_train_steps"] - 2)
        while time.monotonic() < deadline and process.poll() is None:
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


def test_killed_and_resumed_runs_equal_the_uninterrupted_one(tmp_path, data, uninterrupted):
    assert killed_and_resumed(tmp_path, data, kills=2, seed=1) == fingerprint(uninterrupted)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGTERM, 143, id="SIGTERM"),
        pytest.param(signal.SIGINT, 130, id="SIGINT", marks=pytest.mark.slow),
    ],
)
def test_a_signal_saves_a_checkpoint(tmp_path, data, uninterrupted, number, code):
    """Checkpoints are written every 1000 steps, so the one that is found was written because of the signal."""
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
    assert fingerprint(folder) == fingerprint(uninterrupted)


def test_the_comparison_can_fail(uninterrupted, tmp_path, data):
    """Negative control: another seed gives other losses and other weights."""
    train_here(tmp_path / "model", data, **{**STEPS, "seed": 1})
    losses_a, hashes_a = fingerprint(tmp_path / "model")
    losses_b, hashes_b = fingerprint(uninterrupted)
    assert losses_a != losses_b and not set(hashes_a) & set(hashes_b)


def test_a_checkout_that_is_not_installed_writes_checkpoints(tmp_path, data, monkeypatch):
    from importlib import metadata

    plain = metadata.version

    def version(name):
        if name.replace("_", "-") == "ccella-fast":
            raise metadata.PackageNotFoundError(name)
        return plain(name)

    monkeypatch.setattr(metadata, "version", version)
    assert train_here(tmp_path / "run", data, max_train_steps=1) == 0
    manifest = json.loads((tmp_path / "run" / "checkpoints" / "step-00000001" / "manifest.json").read_text())
    assert manifest["versions"]["ccella-fast"] == ccella_fast.__version__
