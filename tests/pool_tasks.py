"""What the tests give to worker processes, which import it by name."""

from __future__ import annotations

import os
import signal

from ccella_fast.errors import DataError


def die(task: int) -> int:
    """A task whose worker is killed, as the kernel does when memory runs out."""
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task


def refuse(task: int) -> int:
    if task == 2:
        raise DataError("not this one", path="two")
    return os.getpid()


def threads(task: int) -> tuple[int, str | None]:
    """The process, and how many threads it was told to use."""
    return os.getpid(), os.environ.get("OMP_NUM_THREADS")
