"""A process that no longer arrives ends all of them in time, and is named (goal R17)."""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from random import Random

import pytest

from launched_training import LaunchedTraining
from soak import trials
from training_fixtures import write_config

TIMEOUT = 0.05  # minutes


def check_that_a_stopped_process_is_named(tmp_path, data, name: str, rank: str, random: Random) -> None:
    settings = {"max_train_steps": 10**6, "batch_size": 1, "checkpointing_steps": 10**6, "collective_timeout": TIMEOUT}
    with ExitStack() as ends:
        config = write_config(tmp_path / "config.json", **settings)
        training = LaunchedTraining(name, tmp_path / "run", "--config", config, "--data", data)
        ends.callback(training.end)
        after = random.randrange(1, 60)
        training.wait(lambda: training.steps >= after)
        time.sleep(random.random() / 10)
        training.processes()[rank].send_signal(signal.SIGSTOP)
        training.wait(lambda: not {"0", "1"} & training.processes().keys(), seconds=60 * TIMEOUT + 10)
        assert not training.wait_for_all(40)
        output, status = training.end(), training.status()
    assert training.command.returncode != 0
    assert (status["state"], status["exit_code"]) == ("failed", 7)
    assert status["why"].startswith(f"process {rank} on ") and "did not arrive within 0.05 minutes" in status["why"]
    assert abs(int(status["why"].rpartition(" ")[2]) - training.steps) <= 1
    assert output.count("did not arrive") == 1


def test_a_stopped_process_ends_all_and_is_named(tmp_path, data):
    check_that_a_stopped_process_is_named(tmp_path, data, "torchrun", "1", Random(0))


@pytest.mark.soak
def test_either_process_of_both_launchers_at_random_steps(tmp_path, data):
    """DeepSpeed's launcher is the harder one for rank 0: the store is in that process."""
    places = [(name, rank) for name in ("torchrun", "deepspeed") for rank in "01"]
    for trial in trials("R17"):
        with trial:
            (tmp_path / str(trial.number)).mkdir()
            place = places[trial.number % len(places)]
            check_that_a_stopped_process_is_named(tmp_path / str(trial.number), data, *place, trial.random)
