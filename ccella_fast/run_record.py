"""run_record.json: duration, peak memory and environment of a command."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ccella_fast.environment import describe_environment
from ccella_fast.hardware import peak_memory
from ccella_fast.storage import write_json


@contextmanager
def write_run_record(folder: str | Path, command: str, **facts: Any) -> Iterator[dict[str, Any]]:
    """Time a command and, if it succeeds, write `folder/run_record.json`. The yielded dictionary takes further facts."""
    start = time.perf_counter()
    yield facts
    record = {
        "command": command,
        "seconds": round(time.perf_counter() - start, 2),
        **peak_memory(),
        **facts,
        "environment": describe_environment(),
    }
    write_json(Path(folder) / "run_record.json", record)
