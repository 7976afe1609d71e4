"""A process that no longer arrives ends all of them in time, and is named (goal R17)."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from ccella_fast.storage import read_json
from training_fixtures import free_port, start, write_config

TIMEOUT = 0.05  # minutes


def steps(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


LAUNCHERS = {
    "torchrun": ("torchrun", "--nproc-per-node", "2", "--master-port"),
    "deepspeed": ("deepspeed", "--num_gpus", "2", "--master_port"),  # the store is in the process of rank 0
}


@pytest.fixture
def two(tmp_path, data, request):
    """A launcher with two training processes by rank, which have made steps; and the run's folder."""
    config = write_config(
        tmp_path / "config.json", max_train_steps=10**6, batch_size=1, checkpointing_steps=10**6,
        collective_timeout=TIMEOUT,
    )  # fmt: skip
    folder, (command, *options) = tmp_path / "run", LAUNCHERS[request.param]
    launcher = (str(Path(sys.executable).parent / command), *options, free_port())
    process = start("--config", config, "--data", data, "--output_dir", folder, launcher=launcher)
    while process.poll() is None and steps(folder) < 3:
        time.sleep(0.05)
    family = {child.environ().get("RANK"): child for child in psutil.Process(process.pid).children(recursive=True)}
    yield process, folder, family
    for left in family.values():
        if left.is_running():
            left.kill()
    process.communicate()


@pytest.mark.parametrize(
    ("two", "stuck"),
    [
        ("torchrun", "1"),
        pytest.param("torchrun", "0", marks=pytest.mark.slow),
        pytest.param("deepspeed", "0", marks=pytest.mark.slow),
        pytest.param("deepspeed", "1", marks=pytest.mark.slow),
    ],
    indirect=["two"],
)
def test_a_stopped_process_ends_all_and_is_named(two, stuck):
    process, folder, family = two
    ranks = [family["0"], family["1"]]
    os.kill(family[stuck].pid, signal.SIGSTOP)
    stopped = time.monotonic()
    _, alive = psutil.wait_procs(ranks, timeout=60 * TIMEOUT + 10)
    assert not alive, (time.monotonic() - stopped, read_json(folder / "run_status.json"))
    output, _ = process.communicate(timeout=40)
    assert process.returncode != 0
    status = read_json(folder / "run_status.json")
    assert (status["state"], status["exit_code"]) == ("failed", 7)
    assert status["why"].startswith(f"process {stuck} on ") and "did not arrive within 0.05 minutes" in status["why"]
    assert abs(int(status["why"].rpartition(" ")[2]) - steps(folder)) <= 1
    assert output.count("did not arrive") == 1
