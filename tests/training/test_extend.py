"""A longer run: the learning rate in closed form, the same losses as a run of the new length, what is recorded and refused."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from ccella_fast.errors import ConfigError
from ccella_fast.storage import write_json
from plain_training import EVERY_STEP, difference, plain_training
from training_fixtures import losses, rewrite_manifest, stage_id, train_here, weights

SHORT = {"max_train_steps": 3, "lr": 2e-3, **EVERY_STEP}


def rates(run) -> dict[int, float]:
    return {line["step"]: line["lr"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())}


def state_of(run, step):
    return json.loads((run / "checkpoints" / f"step-{step:08d}" / "training_state.json").read_text())


@pytest.mark.parametrize("stage", [0, 2], ids=stage_id)
def test_a_finished_run_is_extended(tmp_path, data, stage):
    """After k steps the rate is lr (1 - k/3)^2 before and lr (1 - k/5)^2 after the extension, as in the plain loop."""
    run = tmp_path / "run"
    train_here(run, data, **SHORT, zero_stage=stage)
    assert train_here(run, data, **SHORT, zero_stage=stage, resume="latest", extend_to=5) == 0
    expected = {step: 2e-3 * (1 - (step - 1) / (3 if step <= 3 else 5)) ** 2 for step in range(1, 6)}
    assert rates(run) == pytest.approx(expected)
    found = difference(run, plain_training(data, max_train_steps=3, extend_to=5), at=[4, 5])
    assert all(found[key] < 1e-5 for key in ("loss", "loss_l1", "loss_class", "lr", "grad_norm")), found
    assert found["model"] < 2e-3 and found["ema"] < 2e-3
    other = difference(run, plain_training(data, max_train_steps=5), at=[5])
    assert other["lr"] > 1e-2 and other["model"] > 1e-2  # negative control: that of the new length from the beginning
    state = state_of(run, 5)
    assert state["total_steps"] == 5 and state["extensions"] == [{"step": 3, "from": 3, "to": 5}]
    assert json.loads((run / "run_status.json").read_text())["state"] == "finished"


def test_from_the_extension_on_it_is_the_run_of_the_new_length(tmp_path, data):
    """A checkpoint that has the same weights as one of a run of 6 steps, but says that it has 4, is extended to 6."""
    run, long = tmp_path / "run", {**SHORT, "max_train_steps": 6}
    train_here(run, data, **long)
    expected, after = losses(run), weights(run, 6)
    for step in range(3, 7):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    folder = run / "checkpoints" / "step-00000002"
    state, config = (json.loads((folder / name).read_text()) for name in ("training_state.json", "config.json"))
    config["training"]["max_train_steps"] = 4
    write_json(folder / "training_state.json", {**state, "total_steps": 4})
    write_json(folder / "config.json", config)
    rewrite_manifest(folder)
    short = {**SHORT, "max_train_steps": 4}
    assert train_here(run, data, **short, resume="latest", extend_to=6) == 0
    assert losses(run) == expected
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(run, 6).items())
    assert state_of(run, 6)["extensions"] == [{"step": 2, "from": 4, "to": 6}]


def test_a_later_resume_continues_the_extended_run(tmp_path, data):
    """With the command of the beginning, or again with --extend_to; and it can be extended once more."""
    run = tmp_path / "run"
    train_here(run, data, **SHORT)
    train_here(run, data, **SHORT, resume="latest", extend_to=5)
    whole = weights(run, 5)
    for again in ({}, {"extend_to": 5}):
        shutil.rmtree(run / "checkpoints" / "step-00000005")
        assert train_here(run, data, **SHORT, resume="latest", **again) == 0
        assert all(torch.equal(tensor, whole[name]) for name, tensor in weights(run, 5).items())
        assert state_of(run, 5)["extensions"] == [{"step": 3, "from": 3, "to": 5}]
    assert train_here(run, data, **SHORT, resume="latest") == 0  # complete
    assert train_here(run, data, **SHORT, resume="latest", extend_to=6) == 0
    assert state_of(run, 6)["extensions"] == [{"step": 3, "from": 3, "to": 5}, {"step": 5, "from": 5, "to": 6}]
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5, 6]


def test_a_run_of_epochs_is_extended_in_steps(tmp_path, data):
    """Five studies in two epochs and batches of 2: five steps."""
    epochs = {"n_epochs": 2, "max_train_steps": None, "checkpointing_steps": 5}
    train_here(tmp_path / "run", data, **epochs)
    train_here(tmp_path / "run", data, **epochs, resume="latest", extend_to=7)
    assert state_of(tmp_path / "run", 7)["extensions"] == [{"step": 5, "from": 5, "to": 7}]


def test_what_cannot_be_extended_is_refused(tmp_path, data):
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="there is no checkpoint to continue from") as caught:
        train_here(run, data, **SHORT, resume="latest", extend_to=5)
    assert caught.value.field == "--extend_to" and "--max_train_steps" in caught.value.fix
    train_here(run, data, **SHORT)
    for number in (1, 2):
        with pytest.raises(ConfigError, match=f"--extend_to {number} is less than the length of this run, 3 steps"):
            train_here(run, data, **SHORT, resume="latest", extend_to=number)
    for steps in (5, 2):
        with pytest.raises(ConfigError) as caught:
            train_here(run, data, **{**SHORT, "max_train_steps": steps}, resume="latest")
        assert caught.value.field == "training.max_train_steps"
        assert ("--extend_to 5" in caught.value.fix) == (steps == 5)
    assert train_here(run, data, **SHORT, resume="latest", extend_to=3) == 0
    assert [step for step, _ in losses(run)] == [1, 2, 3] and "extensions" in state_of(run, 3)
