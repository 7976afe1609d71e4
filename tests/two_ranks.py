"""Several trainings one after the other in the same processes, because starting DeepSpeed takes longer than training.

torchrun --nproc-per-node 2 two_ranks.py JOBS.json        [{"config", "data", "run", "set", "fault", "continues"}, ...]

fault: "disk", the second process can write no file of more than 4 kB; "signal", it alone is sent SIGTERM in its second step;
null. continues: the run of which `run` becomes a copy that goes on; null. Each process writes the exit codes of the jobs to
JOBS.json.RANK."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
from pathlib import Path

import torch.distributed as dist

from ccella_fast.config import load_config
from ccella_fast.errors import CcellaError
from ccella_fast.training import loop
from ccella_fast.training.run import train

second = os.environ["RANK"] == "1"
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit is an OSError then
joint_loss = loop.joint_loss
calls = 0


def signalled(*arguments):
    global calls
    calls += 1
    if calls == config.training.gradient_accumulation_steps + 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return joint_loss(*arguments)


codes = []
for job in json.loads(Path(sys.argv[1]).read_text()):
    if job["continues"]:
        if not second:
            shutil.copytree(job["continues"], job["run"])
        dist.barrier()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    if second and job["fault"] == "disk":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    loop.joint_loss = signalled if second and job["fault"] == "signal" else joint_loss
    config = load_config(job["config"], job["set"])
    try:
        resume = "latest" if job["continues"] else None
        codes.append(train(config, data=Path(job["data"]), run=Path(job["run"]), resume=resume))
    except CcellaError as error:
        codes.append(error.exit_code)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
Path(f"{sys.argv[1]}.{os.environ['RANK']}").write_text(json.dumps(codes))
