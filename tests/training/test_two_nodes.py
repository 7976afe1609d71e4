"""`deepspeed --hostfile` over ssh on two machines, which are namespaces of this one. Needs root."""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from ccella_fast.checkpoint import read_state, verify_checkpoint
from ccella_fast.storage import read_json
from training_fixtures import ROOT, TRAIN_SCRIPT, environment, losses, write_config
from two_nodes import PORT, skip_if_impossible, two_nodes

pytestmark = pytest.mark.slow
DEEPSPEED = Path(sys.executable).parent / "deepspeed"


@pytest.fixture
def nodes(tmp_path):
    skip_if_impossible()
    with two_nodes(tmp_path) as started:
        yield started


@pytest.fixture
def launch(nodes, tmp_path, data):
    """A function that starts `deepspeed --hostfile` on the first node. Returns what captures its output, and the command."""
    # Variables of this shell reach the other node only if DeepSpeed's file or its list of prefixes names them.
    (tmp_path / "variables").write_text("DS_ACCELERATOR=cpu\nOMP_NUM_THREADS=1\n")

    def start(*options: str, run: Path = tmp_path / "run", **training):
        config = write_config(tmp_path / "config.json", batch_size=1, **{"max_train_steps": 3, **training})
        (tmp_path / "hosts.txt").write_text("node0 slots=1\nnode1 slots=1\n")
        command = [DEEPSPEED, "--hostfile", tmp_path / "hosts.txt", "--ssh_port", PORT, *options, TRAIN_SCRIPT]
        arguments = ["--config", config, "--data", data, "--output_dir", run]
        variables = environment(PYTHONPATH=str(ROOT), DS_ENV_FILE="variables")
        variables["PATH"] = f"{tmp_path / 'bin'}:{variables['PATH']}"
        return nodes[0].start(*command, *arguments, folder=tmp_path, **variables)

    return start


@pytest.mark.parametrize("options", [[], ["--master_addr", "node0"]], ids=["", "--master_addr"])
def test_it_trains_on_both(launch, nodes, tmp_path, options):
    process, _ = launch(*options)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    assert "node0: " in output and "node1: " in output  # as pdsh marks what each prints
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3]
    assert read_state(tmp_path / "run" / "checkpoints" / "step-00000003")["world_size"] == 2
    assert read_json(tmp_path / "run" / "run_status.json")["state"] == "finished"
    assert [node.processes() for node in nodes] == [[], []]


def test_sigterm_to_the_command_saves_and_leaves_no_process(launch, nodes, tmp_path):
    run = tmp_path / "run"
    process, command = launch(max_train_steps=10**6, checkpointing_steps=10**6)
    while process.poll() is None and not ((run / "metrics.jsonl").exists() and len(losses(run)) >= 3):
        time.sleep(0.05)
    family = [member for node in nodes for member in node.processes()]
    ranks = [member for member in family if member.is_running() and str(TRAIN_SCRIPT) in member.cmdline()[1:3]]
    assert len(ranks) == 2, process.communicate()[0]
    command.send_signal(signal.SIGTERM)
    _, alive = psutil.wait_procs(family, timeout=30)
    output, _ = process.communicate(timeout=10)
    assert not alive and [node.processes() for node in nodes] == [[], []], output
    status = read_json(run / "run_status.json")
    assert (status["state"], status["exit_code"]) == ("terminated", 143), output
    assert status["step"] == losses(run)[-1][0]
    (saved,) = (run / "checkpoints").iterdir()
    assert verify_checkpoint(saved)["step"] == status["step"]


def test_a_process_that_cannot_be_started_is_named(launch, nodes, tmp_path):
    """By pdsh at once, and by the other after the time-out."""
    ssh = tmp_path / "bin" / "ssh"
    ssh.write_text(ssh.read_text().replace("exec", 'case "$*" in *node1*) exit 255;; esac\nexec'))
    process, _ = launch(collective_timeout=0.001)
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and "node1: ssh exited with exit code 255" in output, output
    assert "error: process 1 of 2 did not arrive at 10.77.0.1:29500 within 1 minutes" in output, output
    assert not (tmp_path / "run").exists() and [node.processes() for node in nodes] == [[], []]


def test_a_run_folder_that_is_not_shared_is_refused(launch, nodes, tmp_path):
    process, _ = launch(run=tmp_path / "local" / "run")
    output, _ = process.communicate(timeout=120)
    assert process.returncode != 0, output
    assert "process 1 on node1 sees no such file, where process 0 sees one" in output
    assert "use an --output_dir on a disk that all machines share" in output
    assert [node.processes() for node in nodes] == [[], []]
