"""metrics.jsonl of a run: one JSON object per logged step; `step` is the number of finished steps."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ccella_fast.storage import atomic_path, disk_error


def append_metrics(path: Path, values: Mapping[str, Any]) -> None:
    """Add one line. Raises DiskError, and ValueError for a number that is not finite."""
    line = json.dumps(values, allow_nan=False)
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
    except OSError as error:
        raise disk_error(error, path) from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines, after `discard_metrics_after`, which removes those that are damaged. Raises DiskError."""
    if not path.exists():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise disk_error(error, path) from error


def discard_metrics_after(path: Path, step: int) -> None:
    """Remove the lines of steps after `step`, which a resumed run repeats. Raises DiskError."""
    if not path.exists():
        return
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()  # a damaged line is removed too
    except OSError as error:
        raise disk_error(error, path) from error
    kept = [line for line in lines if _logged_up_to(line, step)]
    with atomic_path(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")


def _logged_up_to(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] <= step
    except (json.JSONDecodeError, KeyError, TypeError):
        return False  # an incomplete line: the run was killed while writing it
