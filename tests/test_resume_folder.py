"""`--resume FOLDER`: nothing of a step folder is used before its hash is checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from training_fixtures import losses, train_here

from ccella_fast.errors import CheckpointError, ConfigError

SETTINGS = {"max_train_steps": 3, "checkpointing_steps": 1, "checkpoints_total_limit": 9, "zero_stage": 1}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_here(folder, data, **SETTINGS)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "ema.safetensors",
        "config.json",
        "training_state.json",
        "*optim_states.pt",
        "*model_states.pt",
    ],
)
def test_one_changed_byte_is_named(run, data, name):
    folder = run / "checkpoints" / "step-00000002"
    (file,) = folder.rglob(name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    before = (run / "run_status.json").read_bytes()
    with pytest.raises(CheckpointError, match="damaged") as caught:
        train_here(run, data, resume=str(folder), **SETTINGS)
    assert caught.value.path == str(file) and caught.value.exit_code == 4
    assert (run / "run_status.json").read_bytes() == before


def test_a_run_goes_on_from_the_folder_that_is_named(run, data, trained):
    """From step 1, although 2 and 3 are there: metrics are written anew from there and equal those of the first time."""
    marked = json.loads((run / "metrics.jsonl").read_text().splitlines()[2])
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace(json.dumps(marked["loss"]), "9.5"))
    assert losses(run) != losses(trained)
    assert train_here(run, data, resume=str(run / "checkpoints" / "step-00000001"), **SETTINGS) == 0
    assert losses(run) == losses(trained)


def test_a_folder_of_another_run_is_refused(run, trained, data):
    with pytest.raises(ConfigError, match="goes on in its own folder"):
        train_here(run, data, resume=str(trained / "checkpoints" / "step-00000002"), **SETTINGS)
