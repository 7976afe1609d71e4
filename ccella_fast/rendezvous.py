"""The start of several processes: each waits until all have arrived, and names those that have not.

torch waits for them too, when the process group is formed, but in C++, where a signal has no effect, and it does not say who is
missing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from ccella_fast.errors import CcellaError, StalledError

_ARRIVED, _ALL_ARRIVED = "ccella_fast/arrived", "ccella_fast/all_arrived"  # keys of the store
T = TypeVar("T")


@contextmanager
def rendezvous(timeout: timedelta, check: Callable[[], object] = lambda: None) -> Iterator[None]:
    """Wait for all processes of the launcher, then execute the block, in which they form the process group.

    Does nothing for a process alone, or if the group exists.

    Args:
        timeout: how long a process waits.
        check: is called ten times a second while the process waits, and may raise to end that.

    Raises:
        StalledError: a process has not arrived in time.
    """
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if world_size == 1 or dist.is_initialized():
        yield
        return
    deadline = time.monotonic() + timeout.total_seconds()

    def wait(until: Callable[[], T]) -> T:
        while not (found := until()) and time.monotonic() < deadline:
            check()
            time.sleep(0.1)
        return found

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    where = f"at {address}:{port} within {timeout.total_seconds() / 60:.3g} minutes"
    # As in torch: the store is that of torchrun or, otherwise, of process 0, which has one for each port (`multi_tenant`).
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = _serve(address, port) if serves else wait(lambda: _connect(address, port))
    if store is None:
        fix = f"check that process 0 was started, and that {socket.gethostname()} reaches this address and port"
        raise StalledError(f"process 0 did not answer {where}", field="MASTER_ADDR", fix=fix)
    keys = [f"{_ARRIVED}/{number}" for number in range(world_size)]
    try:
        store.set(keys[rank], "")
        # Only process 0 asks for all of them: a thousand processes that each ask for a thousand keys would be too much.
        if not wait(lambda: store.check(keys if rank == 0 else [_ALL_ARRIVED])):
            missing = [str(number) for number, key in enumerate(keys) if not store.check([key])] or ["0"]
            who = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(missing):.60}"
            fix = "check that each was started, and that its machine reaches this address and port"
            raise StalledError(f"{who} of {world_size} did not arrive {where}", field="RANK", fix=fix)
        if rank == 0:
            store.set(_ALL_ARRIVED, "")
    except dist.DistError:
        raise CcellaError("process 0 of this run has ended", fix="see that process's own message") from None
    yield  # with the store, which is torch's in the block too


def _serve(address: str, port: int) -> dist.TCPStore:
    return dist.TCPStore(address, port, None, True, wait_for_workers=False, multi_tenant=True)


def _connect(address: str, port: int) -> dist.TCPStore | None:
    """The store that is served there, or None."""
    try:
        socket.create_connection(
            (address, port), timeout=1.0
        ).close()  # a store that finds no server prints a traceback
        return dist.TCPStore(address, port, None, False, timedelta(seconds=2), wait_for_workers=False)
    except (OSError, dist.DistError):
        return None
