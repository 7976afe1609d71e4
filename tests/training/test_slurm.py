"""The batch script of docs/how-to/slurm.md, with commands in place of SLURM's: two tasks train as two and are queued again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from ccella_fast.checkpoint import verify_checkpoint
from ccella_fast.storage import read_json
from training_fixtures import ROOT, TRAIN_SCRIPT, environment, free_port, losses, train_here, write_config

STEPS = 40
SRUN = """#!{python}
import os, subprocess, sys
names = "SLURM_STEP_ID SLURM_STEP_NUM_TASKS SLURM_NTASKS SLURM_GTIDS SLURM_STEP_NODELIST".split()
step = dict(zip(names, ["0", "2", "2", "0,1", "node[1]"]))
ranks = [dict(os.environ, **step, SLURM_PROCID=rank, SLURM_LOCALID=rank) for rank in "01"]
tasks = [subprocess.Popen(sys.argv[1:], env=each) for each in ranks]
open("{folder}/tasks", "w").write(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/sh
echo "$@" >> {folder}/requeued
"""


@pytest.fixture
def job(tmp_path, data):
    """A function that starts the page's script on the prepared folder, as SLURM would."""
    page = (ROOT / "docs" / "how-to" / "slurm.md").read_text()
    (script,) = re.findall(r"```bash\n(.*?)```", page, re.DOTALL)
    config = write_config(tmp_path / "config.json", max_train_steps=STEPS, batch_size=1, checkpointing_steps=STEPS)
    places = {
        "source .venv/bin/activate\n": "", "python ccella_fast/train.py": f"{sys.executable} {TRAIN_SCRIPT}",
        "configs/ccella.json": str(config), "prepared": str(data), "--output_dir model": f"--output_dir {tmp_path / 'model'}",
    }  # fmt: skip
    for name, place in places.items():
        assert name in script
        script = script.replace(name, place)
    (tmp_path / "train.sh").write_text(script)
    for name, content in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(content.format(python=sys.executable, folder=tmp_path))
        (tmp_path / "bin" / name).chmod(0o755)

    def start() -> subprocess.Popen[str]:
        known = environment(
            SLURM_JOB_ID="4711", SLURM_JOB_NODELIST="node[1]", SLURM_NTASKS="2", MASTER_PORT=free_port()
        )
        known["PATH"] = f"{tmp_path / 'bin'}{os.pathsep}{known['PATH']}"
        return subprocess.Popen(
            ["bash", str(tmp_path / "train.sh")], env=known, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    return start


def test_a_job_saves_at_usr1_is_queued_again_and_continues(job, tmp_path, data):
    model = tmp_path / "model"
    first = job()
    while first.poll() is None and not (model / "metrics.jsonl").exists():
        time.sleep(0.05)
    for task in (tmp_path / "tasks").read_text().split():
        os.kill(int(task), signal.SIGUSR1)
    output, _ = first.communicate(timeout=120)
    assert first.returncode == 138, output
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    status = read_json(model / "run_status.json")
    assert (status["state"], status["exit_code"]) == ("terminated", 138) and 1 <= status["step"] < STEPS
    (saved,) = (model / "checkpoints").iterdir()
    assert verify_checkpoint(saved)["world_size"] == 2 and output.count("training in fp32 on cpu") == 1
    second = job()
    output, _ = second.communicate(timeout=120)
    assert second.returncode == 0, output
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"  # not again
    status = read_json(model / "run_status.json")
    assert (status["state"], status["step"]) == ("finished", STEPS)
    # Two processes of one study each, as one process of two.
    train_here(tmp_path / "one", data, max_train_steps=STEPS, batch_size=2, checkpointing_steps=STEPS)
    assert losses(model) == [(step, pytest.approx(loss, rel=1e-3)) for step, loss in losses(tmp_path / "one")]
