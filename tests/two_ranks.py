"""Several trainings one after the other in the same processes, because starting DeepSpeed takes longer than training.

torchrun --nproc-per-node 2 two_ranks.py JOBS.json        [{"config", "data", "run", "resume", "deepspeed_file"}, ...]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from ccella_fast.config import load_config
from ccella_fast.training.run import train

for job in json.loads(Path(sys.argv[1]).read_text()):
    file = job.get("deepspeed_file")
    code = train(
        load_config(job["config"], job.get("set", [])),
        data=Path(job["data"]),
        run=Path(job["run"]),
        resume=job.get("resume"),
        deepspeed_file=Path(file) if file else None,
    )
    assert code == 0, (job, code)
