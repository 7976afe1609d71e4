"""Ends a run in which a process no longer arrives, and names that process.

A process that waits in a collective executes no Python until the collective's own time-out, and NCCL's ends it without a
message. Therefore a thread of each process watches the steps. If none is finished in time, the threads that still run report to
the store of the process group; the others wait for the process that does not.
"""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import ccella_fast
from ccella_fast.errors import StalledError
from ccella_fast.processes import HostCollectives
from ccella_fast.training.run_status import RunStatus
from ccella_fast.training.signals import parent_of

_ANSWER = 4.0  # seconds in which the threads of all processes find that a step is overdue
_numbers = itertools.count()  # of runs in this process, which share a store


class StallWatch:
    """Context manager that ends all processes with exit code 7 if no step is finished for a time.

    Args:
        timeout: the time, to which twice the longest step so far is added. The first step may take three times as long.
        status: records the ending.
        collectives: of all processes. All must create the object.
    """

    def __init__(self, timeout: timedelta, status: RunStatus, collectives: HostCollectives):
        self._timeout, self._status = timeout.total_seconds(), status
        self._rank, self._peers = collectives.rank, collectives.all_gather((socket.gethostname(), os.getpid()))
        self._prefix = f"ccella_fast/stalled/{next(_numbers)}"
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._last: float | None = None  # when the last step was finished; None: not watching
        self._step, self._longest, self._patience = 0, 0.0, 3 * self._timeout
        self._thread = threading.Thread(target=self._watch, name="stall watch", daemon=True)

    def __enter__(self) -> StallWatch:
        self._last = time.monotonic()
        if len(self._peers) > 1:
            self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()

    def finished(self, step: int) -> None:
        """Tell that this process has finished a step."""
        now = time.monotonic()
        if self._last is not None and self._step:  # not the first step, which compiles and allocates
            self._longest = max(self._longest, now - self._last)
        self._step, self._last, self._patience = step, now, self._timeout + 2 * self._longest

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not watch during the block, in which only the collectives' own time-out counts."""
        self._last = None
        yield
        self._last = time.monotonic()

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self._timeout / 4)):
            last = self._last
            if last is not None and time.monotonic() - last > self._patience:
                self._end()

    def _end(self) -> None:
        places: dict[int, str] = {}
        asking = threading.Thread(target=self._ask, args=(places,), daemon=True)
        asking.start()
        asking.join(2 * _ANSWER)
        places[self._rank] = self._place()
        if self._ended.is_set():  # the others have only just finished
            return
        missing = [rank for rank in range(len(self._peers)) if rank not in places]
        if asking.is_alive() and missing == [rank for rank in range(len(self._peers)) if rank != self._rank]:
            missing = [0]  # the store does not answer: it is in the process of rank 0
        error = self._error(missing, places)
        if self._rank == min(rank for rank in range(len(self._peers)) if rank not in missing):
            print(f"\n{error}", file=sys.stderr, flush=True)
            self._status.record(error)
        host, parent = self._peers[self._rank][0], os.getppid()
        for rank in missing:  # a stopped process does not react to the launcher's SIGTERM
            with suppress(OSError):
                if self._peers[rank][0] == host and parent_of(self._peers[rank][1]) == parent:
                    os.kill(self._peers[rank][1], signal.SIGKILL)
        os._exit(StalledError.exit_code)  # the main thread is waiting and would not notice an exception

    def _ask(self, places: dict[int, str]) -> None:
        """Report this process to the store and collect where those that report are."""
        from torch.distributed import distributed_c10d

        store = distributed_c10d._get_default_store()
        store.set(f"{self._prefix}/{self._rank}", self._place())
        time.sleep(_ANSWER)
        for rank in range(len(self._peers)):
            if store.check([key := f"{self._prefix}/{rank}"]):
                places[rank] = store.get(key).decode()

    def _error(self, missing: list[int], places: dict[int, str]) -> StalledError:
        minutes = f"{self._timeout / 60:.3g} minutes"
        if missing:
            who = " and ".join(f"process {rank} on {self._peers[rank][0]}" for rank in missing)
            why = f"{who} did not arrive within {minutes}; the last step of this run was {self._step}"
            fix = "see what happened on that machine, then run the same command with --resume"
        else:
            where = ", ".join(f"process {rank} at {place}" for rank, place in sorted(places.items()))
            why = f"no step was finished within {minutes} after step {self._step}: {where}"
            fix = "run the same command with --resume; if steps may take so long, raise training.collective_timeout"
        return StalledError(why, field="training.collective_timeout", fix=fix)

    def _place(self) -> str:
        """The file and line of this package that the main thread is executing."""
        root, frame = Path(ccella_fast.__file__).parent, sys._current_frames().get(self._main)
        while frame is not None and not Path(frame.f_code.co_filename).is_relative_to(root):
            frame = frame.f_back
        if frame is None:
            return "an unknown place"
        return f"{Path(frame.f_code.co_filename).relative_to(root)}:{frame.f_lineno}"
