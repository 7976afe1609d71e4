"""The start of several processes: each waits until all have arrived, and names those that have not.

torch waits for them too, when the process group is formed, but in C++, where a signal has no effect, and it does not say who is
missing. gloo then lets each process listen at the address of its host name, which is 127.0.1.1 on Debian and Ubuntu: out of
reach of other machines. So we choose the network over which the processes have met.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple, TypeVar

import torch.distributed as dist

from ccella_fast.errors import CcellaError, StalledError

_ARRIVED, _ALL_ARRIVED = "ccella_fast/arrived", "ccella_fast/all_arrived"  # keys of the store
T = TypeVar("T")


class _Connection(NamedTuple):
    """A store, and the addresses of both ends of the connection to it."""

    store: dist.TCPStore
    near: str = "127.0.0.1"
    far: str = "127.0.0.1"


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
    connection = _serve(address, port) if serves else wait(lambda: _connect(address, port))
    if connection is None:
        fix = f"check that process 0 was started, and that {socket.gethostname()} reaches this address and port"
        raise StalledError(f"process 0 did not answer {where}", field="MASTER_ADDR", fix=fix)
    store, near, far = connection
    keys = [f"{_ARRIVED}/{number}" for number in range(world_size)]
    try:
        store.set(keys[rank], far)
        # Only process 0 asks for all of them: a thousand processes that each ask for a thousand keys would be too much.
        if not wait(lambda: store.check(keys if rank == 0 else [_ALL_ARRIVED])):
            missing = [str(number) for number, key in enumerate(keys) if not store.check([key])] or ["0"]
            who = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(missing):.60}"
            fix = "check that each was started, and that its machine reaches this address and port"
            raise StalledError(f"{who} of {world_size} did not arrive {where}", field="RANK", fix=fix)
        if rank == 0:  # the machine of process 0 may know itself by a name that is a loopback address there
            store.set(_ALL_ARRIVED, _first_reachable([store.get(key).decode() for key in keys]))
        _use_interface_of(_first_reachable([near, store.get(_ALL_ARRIVED).decode()]))
    except dist.DistError:
        raise CcellaError("process 0 of this run has ended", fix="see that process's own message") from None
    yield  # with the store, which is torch's in the block too


def _serve(address: str, port: int) -> _Connection:
    return _Connection(dist.TCPStore(address, port, None, True, wait_for_workers=False, multi_tenant=True))


def _connect(address: str, port: int) -> _Connection | None:
    """The connection to the store that is served there, or None."""
    try:
        # Tried first with a socket, because a store that finds no server prints a traceback.
        with socket.create_connection((address, port), timeout=1.0) as tried:
            near, far = tried.getsockname()[0], tried.getpeername()[0]
        store = dist.TCPStore(address, port, None, False, timedelta(seconds=2), wait_for_workers=False)
        return _Connection(store, near, far)
    except (OSError, dist.DistError):
        return None


def _first_reachable(addresses: list[str]) -> str:
    """The first address that is not one of the loopback, if there is one."""
    outside = [address for address in addresses if not ipaddress.ip_address(address).is_loopback]
    return [*outside, *addresses][0]


def _use_interface_of(address: str) -> None:
    """Let gloo use the network interface with this address, unless the user has chosen one."""
    import psutil  # which DeepSpeed requires

    for name, entries in psutil.net_if_addrs().items():
        if address in [entry.address for entry in entries]:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
