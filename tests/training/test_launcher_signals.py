"""Signals to each process of a launcher: all processes end, and the run continues (goals R2 and R5)."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack

import pytest

from ccella_fast.checkpoint import step_folders, verify_checkpoint
from launched_training import LaunchedTraining, launcher
from soak import trials
from training_fixtures import losses, run, write_config

SETTINGS = {"max_train_steps": 80, "batch_size": 1, "checkpointing_steps": 20, "zero_stage": 2}
STEPS = 50  # until the last instant; those that are left take longer than a signal
TARGETS = {"deepspeed": ("0", "1", "child", "command"), "torchrun": ("0", "1", "command")}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, data):
    config = write_config(tmp_path_factory.mktemp("config") / "config.json", **SETTINGS)
    return "--config", config, "--data", data


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, arguments):
    """Losses and the hashes of the last checkpoint."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run(*arguments, "--output_dir", folder, launcher=launcher("torchrun"))
    return found_in(folder)


def found_in(folder):
    return losses(folder), verify_checkpoint(step_folders(folder)[0])["files"]


def is_continued(folder, arguments, name, unbroken) -> bool:
    run(*arguments, "--output_dir", folder, "--resume", launcher=launcher(name))
    return found_in(folder) == unbroken and not list(folder.rglob(".partial*"))


@pytest.mark.soak
def test_a_training_whose_processes_are_killed_continues(tmp_path, arguments, unbroken):
    """One or both, mostly at an instant of the run, but also before it."""
    for trial in trials("R2"):
        with trial, ExitStack() as ends:
            folder = tmp_path / str(trial.number)
            training = LaunchedTraining("deepspeed", folder, *arguments)
            ends.callback(training.end)
            if trial.random.random() < 0.2:
                training.wait(lambda: {"0", "1"} <= training.processes().keys())  # noqa: B023
                time.sleep(trial.random.random() * 6)
            else:
                trial.counts["while_saving"] += training.wait_for_an_instant(trial.random, STEPS) == "save"
            alive = training.processes()
            for rank in trial.random.choice(["0", "1", "01"]):
                alive[rank].kill()
            assert not training.wait_for_all(35)
            assert all(map(verify_checkpoint, step_folders(folder)))
            assert is_continued(folder, arguments, "deepspeed", unbroken)


@pytest.mark.soak
def test_a_signal_anywhere_saves_and_ends_all(tmp_path, arguments, unbroken):
    """A signal to `deepspeed` ends only that command: the training processes must detect this."""
    # A job in the background ignores it, and so would its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    places = [(name, target) for name, targets in TARGETS.items() for target in targets]
    for trial in trials("R5"):
        with trial, ExitStack() as ends:
            name, target = places[trial.number % len(places)]
            number = trial.random.choice([signal.SIGTERM, signal.SIGINT])
            folder = tmp_path / str(trial.number)
            training = LaunchedTraining(name, folder, *arguments)
            ends.callback(training.end)
            kind = training.wait_for_an_instant(trial.random, STEPS)
            trial.counts[f"{name}_{'rank' if target in '01' else target}"] += 1
            trial.counts[kind] += 1
            training.processes()[target].send_signal(number)
            training.wait(lambda: training.status()["state"] != "running", seconds=20)  # noqa: B023
            status = training.status()
            assert (status["state"], status["exit_code"]) in [("terminated", 143), ("terminated", 130)], status
            assert status["step"] == training.steps  # saved, unless the signal came before the first step
            assert not training.wait_for_all(35)
            assert training.status() == status
            assert is_continued(folder, arguments, name, unbroken)
