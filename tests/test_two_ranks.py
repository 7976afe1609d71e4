"""Two processes in one launch: equal to the plain loop, and what befalls one of them ends both alike."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from plain_training import difference, plain_training
from training_fixtures import CONFIG, ROOT, environment, write_prepared

from ccella_fast.checkpoint import verify
from ccella_fast.storage import write_json

UNUSUAL = {
    "batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_train_steps": 3,
    "weight_decay": 0.3,
    "adam_betas": (0.5, 0.7),
    "max_grad_norm": 0.05,
    "text_class_pred_weight": 3e-3,
    "ema_decay": 0.2,
    "seed": 5,
}
OFTEN = {"checkpointing_steps": 1, "checkpoints_total_limit": 9}
# Name: (settings, fault of the second process, exit code of both). With ZeRO 2 each process writes a shard of its own.
JOBS = {
    "plain": ({**UNUSUAL, **OFTEN}, None, 0),
    "zero2": ({**UNUSUAL, **OFTEN, "zero_stage": 2}, None, 0),
    "signal": ({"batch_size": 1, "max_train_steps": 9, "checkpointing_steps": 9}, "signal", 143),
    "disk": ({"batch_size": 1, "max_train_steps": 2, "checkpointing_steps": 1, "zero_stage": 2}, "disk", 5),
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Prepared data, the folder of the runs, and the exit codes of each process."""
    folder = tmp_path_factory.mktemp("two")
    data = write_prepared(folder / "prepared")
    write_json(folder / "config.json", CONFIG)
    common = {"config": str(folder / "config.json"), "data": str(data)}
    jobs = [
        {
            **common,
            "run": str(folder / name),
            "fault": fault,
            "set": [f"training.{key}={json.dumps(value)}" for key, value in settings.items()],
        }
        for name, (settings, fault, _) in JOBS.items()
    ]
    write_json(folder / "jobs.json", jobs)
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, str(ROOT / "tests" / "two_ranks_faults.py"), str(folder / "jobs.json")]
    done = subprocess.run(command, env=environment(), timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    codes = [json.loads((folder / f"jobs.json.{rank}").read_text()) for rank in (0, 1)]
    return data, folder, codes


def test_both_processes_end_alike(launched):
    _, _, codes = launched
    expected = [code for _, _, code in JOBS.values()]
    assert codes == [expected, expected]


@pytest.mark.parametrize("name", ["plain", "zero2"])
def test_two_processes_equal_the_plain_loop(launched, name):
    data, folder, _ = launched
    plain = plain_training(data, **UNUSUAL, processes=2)
    found = difference(folder / name, plain, at=[1, 2, 3])
    assert all(value < (2e-3 if key in ("model", "ema") else 1e-5) for key, value in found.items()), found
    other = difference(folder / name, plain_training(data, **UNUSUAL, processes=1), at=[1, 2, 3])
    assert min(other["loss"], other["loss_class"], other["model"]) > 1e-2


def test_a_signal_to_one_process_saves_and_ends_both(launched):
    _, folder, _ = launched
    status = json.loads((folder / "signal" / "run_status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("terminated", 2, 143)
    (saved,) = (folder / "signal" / "checkpoints").iterdir()
    assert saved.name == "step-00000002" and verify(saved)["step"] == 2


def test_a_full_disk_of_one_process_publishes_nothing(launched):
    _, folder, _ = launched
    status = json.loads((folder / "disk" / "run_status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("failed", 0, 5)
    assert "could not be written" in status["why"]
    assert list((folder / "disk" / "checkpoints").iterdir()) == []
