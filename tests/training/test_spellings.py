"""Every documented way to start a training runs, or is refused by name (goal E3)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ccella_fast.checkpoint import read_state
from ccella_fast.storage import write_json
from training_fixtures import ROOT, TRAIN_SCRIPT, environment, free_port, losses, write_config

BIN = Path(sys.executable).parent
SCRIPT, MODULE = str(TRAIN_SCRIPT), "ccella_fast.train"
# The command before the options of training, without the ports; {hosts} is a hostfile with two lines.
ONE = {
    "python": ["python", SCRIPT],
    "python -m": ["python", "-m", MODULE],
    "ccella-fast": ["python", "-m", "ccella_fast.cli", "train"],
}
TWO = {
    "torchrun": ["torchrun", "--nproc-per-node", "2", SCRIPT],
    "torchrun -m": ["torchrun", "--nproc-per-node", "2", "-m", MODULE],
    "python -m torch.distributed.run": ["python", "-m", "torch.distributed.run", "--nproc-per-node", "2", SCRIPT],
    "--num_gpus": ["deepspeed", "--num_gpus", "2", SCRIPT],
    "--num_accelerators": ["deepspeed", "--num_accelerators", "2", SCRIPT],
    "--module": ["deepspeed", "--num_gpus", "2", "--module", MODULE],
    "--no_local_rank": ["deepspeed", "--num_gpus", "2", "--no_local_rank", SCRIPT],
    "--no_python": ["deepspeed", "--num_gpus", "2", "--no_local_rank", "--no_python", sys.executable, SCRIPT],
    "--enable_each_rank_log": ["deepspeed", "--num_gpus", "2", "--enable_each_rank_log", "{tmp}/logs", SCRIPT],
    "--include": ["deepspeed", "--hostfile", "{host}", "--no_ssh", "--node_rank", "0", "--master_addr", "127.0.0.1",
                  "--include", "localhost:0,1", SCRIPT],
    "--exclude": ["deepspeed", "--hostfile", "{host}", "--no_ssh", "--node_rank", "0", "--master_addr", "127.0.0.1",
                  "--exclude", "localhost:2", SCRIPT],
}  # fmt: skip
NODES = {
    "--no_ssh": ["deepspeed", "--hostfile", "{hosts}", "--no_ssh", "--node_rank", "{node}", "--master_addr", "127.0.0.1",
                 SCRIPT],
    "torchrun --nnodes": ["torchrun", "--nnodes", "2", "--node-rank", "{node}", "--nproc-per-node", "1",
                          "--master-addr", "127.0.0.1", SCRIPT],
}  # fmt: skip


@pytest.fixture
def begin(tmp_path, data):
    """A function that starts a command, followed by the options of training for three steps."""
    config = write_config(tmp_path / "config.json", max_train_steps=3, batch_size=1)
    (tmp_path / "host").write_text("localhost slots=3\n")
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    port = free_port()

    def start(command: list[str], *options: str, node: int = 0, **extra: str) -> subprocess.Popen[str]:
        names = {"tmp": tmp_path, "host": tmp_path / "host", "hosts": tmp_path / "hosts", "node": node}
        words = [word.format(**names) for word in command]
        if words[0] in ("torchrun", "deepspeed"):
            words[1:1] = ["--master-port" if words[0] == "torchrun" else "--master_port", port]
        elif "torch.distributed.run" in words:
            words[3:3] = ["--master-port", port]
        words[0] = str(BIN / words[0])
        given = ["--config", str(config), "--data", str(data), "--output_dir", str(tmp_path / "run")]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.Popen(
            [*words, *given, *options], env=environment(PYTHONPATH=path, **extra), cwd=tmp_path,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return start


def check_ran(folder: Path, processes: int) -> None:
    assert [step for step, _ in losses(folder)] == [1, 2, 3]
    assert read_state(folder / "checkpoints" / "step-00000003")["world_size"] == processes


def some(spellings: dict[str, list[str]], *fast: str) -> list:
    """Parameters; all but `fast` are slow."""
    marks = {name: () if name in fast else pytest.mark.slow for name in spellings}
    return [pytest.param(spellings[name], marks=mark, id=name) for name, mark in marks.items()]


def check_trains(process: subprocess.Popen, run: Path, processes: int) -> None:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    check_ran(run, processes)


@pytest.mark.parametrize("command", some(ONE))
def test_one_process(begin, tmp_path, command):
    check_trains(begin(command), tmp_path / "run", 1)


@pytest.mark.parametrize("command", some(TWO))
def test_two_processes(begin, tmp_path, command):
    check_trains(begin(command), tmp_path / "run", 2)


@pytest.mark.parametrize("command", some(NODES, "--no_ssh"))
def test_two_nodes_on_this_machine(begin, tmp_path, command):
    """Each node has a command of its own."""
    nodes = [begin(command, node=node) for node in (0, 1)]
    output = [process.communicate(timeout=120)[0] for process in nodes]
    assert [process.returncode for process in nodes] == [0, 0], output
    check_ran(tmp_path / "run", 2)


# With what is on the path in place of a scheduler, DeepSpeed's other launchers start two tasks.
TASKS = {
    "slurm": ("srun", "sinfo", "SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_GTIDS=0,1 SLURM_PROCID={} SLURM_LOCALID={}"),
    "openmpi": ("mpirun", "ompi_info", "OMPI_COMM_WORLD_RANK={} OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK={} "
                "OMPI_COMM_WORLD_LOCAL_SIZE=2"),
    "mpich": ("mpirun", "mpichversion", "PMI_RANK={} PMI_SIZE=2 MPI_LOCALRANKID={} MPI_LOCALNRANKS=2 WORLD_SIZE=2 LOCAL_SIZE=2 "
              "MASTER_ADDR=127.0.0.1"),
}  # fmt: skip
START = """#!{python}
import os, subprocess, sys
command = sys.argv[sys.argv.index("{python}"):]
ranks = [dict(os.environ, **dict(item.split("=") for item in "{variables}".format(rank, rank).split())) for rank in "01"]
tasks = [subprocess.Popen(command, env=each) for each in ranks]
sys.exit(max(task.wait() for task in tasks))
"""


@pytest.mark.slow
@pytest.mark.parametrize("launcher", TASKS)
def test_launchers_of_clusters(begin, tmp_path, launcher):
    command, known, variables = TASKS[launcher]
    (tmp_path / "bin").mkdir()
    for name in (command, known):
        file = tmp_path / "bin" / name
        file.write_text(START.replace("{variables}", variables).replace("{python}", sys.executable))
        file.chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"
    words = [
        "deepspeed",
        "--hostfile",
        "{hosts}",
        "--no_ssh_check",
        "--master_addr",
        "127.0.0.1",
        "--launcher",
        launcher,
        SCRIPT,
    ]
    port = free_port()
    process = begin(words, PATH=path, MASTER_PORT=port)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output
    check_ran(tmp_path / "run", 2)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["tune", "run"])
def test_autotuning_is_refused(begin, tmp_path, mode):
    write_json(tmp_path / "deepspeed.json", {"autotuning": {"enabled": True}})
    process = begin(
        ["deepspeed", "--autotuning", mode, "--num_gpus", "1", SCRIPT],
        "--deepspeed_config",
        str(tmp_path / "deepspeed.json"),
    )
    output, _ = process.communicate(timeout=120)
    assert "autotuning" in output and process.returncode != 0, output
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_binding_cores_needs_numactl(begin, tmp_path):
    process = begin(["deepspeed", "--num_gpus", "2", "--bind_cores_to_rank", SCRIPT])
    output, _ = process.communicate(timeout=120)
    if process.returncode == 0:
        check_ran(tmp_path / "run", 2)
    else:
        assert re.search("numactl", output), output
        assert not (tmp_path / "run").exists()
