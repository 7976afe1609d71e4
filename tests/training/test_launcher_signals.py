"""SIGTERM to each process of a launcher: a checkpoint is saved, all processes end, and the run continues (goal R5)."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from training_fixtures import free_port, losses, run, start, write_config

BIN = Path(sys.executable).parent


def deepspeed(processes: int) -> tuple[str, ...]:
    return (str(BIN / "deepspeed"), "--master_port", free_port(), "--num_gpus", str(processes))


def torchrun(processes: int) -> tuple[str, ...]:
    return (str(BIN / "torchrun"), "--master-port", free_port(), "--nproc-per-node", str(processes))


LONG = {"max_train_steps": 80, "batch_size": 1, "checkpointing_steps": 80}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("unbroken")
    config = write_config(folder / "config.json", **LONG)
    run("--config", config, "--data", data, "--output_dir", folder / "run", launcher=torchrun(2))
    return losses(folder / "run")


@pytest.mark.slow
@pytest.mark.parametrize("steps", [1, 25])
@pytest.mark.parametrize(
    ("launcher", "target"),
    [(deepspeed, "command"), (deepspeed, "child"), (deepspeed, "rank"), (torchrun, "command"), (torchrun, "rank")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_sigterm_anywhere_saves_and_ends_all(tmp_path, data, unbroken, launcher, target, steps):
    """A signal to `deepspeed` ends only that command: the training processes must detect this (goal R5)."""
    config, folder = write_config(tmp_path / "config.json", **LONG), tmp_path / "run"
    arguments = ("--config", config, "--data", data, "--output_dir", folder)
    process = start(*arguments, launcher=launcher(2))
    while process.poll() is None and not ((folder / "metrics.jsonl").exists() and len(losses(folder)) >= steps):
        time.sleep(0.05)
    command = psutil.Process(process.pid)
    family = command.children(recursive=True)
    found = {"command": command}
    for member in family:
        found["child"] = member if "deepspeed.launcher.launch" in member.cmdline() else found.get("child", command)
        found["rank"] = member if member.environ().get("RANK") == "1" else found.get("rank", command)
    assert len(family) >= 2 and (target == "command") == (found[target] is command)
    found[target].send_signal(signal.SIGTERM)
    sent = time.monotonic()
    while time.monotonic() - sent < 20 and not list(folder.glob("checkpoints/step-*/manifest.json")):
        time.sleep(0.05)
    assert list(folder.glob("checkpoints/step-*/manifest.json"))
    _, alive = psutil.wait_procs(family, timeout=35 - (time.monotonic() - sent))
    for left in alive:
        left.kill()
    process.communicate()
    assert not alive
    status = json.loads((folder / "run_status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("terminated", 143)
    run(*arguments, "--resume", launcher=launcher(2))
    assert losses(folder) == unbroken
