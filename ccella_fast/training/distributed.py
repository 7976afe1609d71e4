"""The processes of a run: who am I, how do we talk, and when must we stop.

`deepspeed`, `torchrun` and plain `python` all end up here with the same five environment variables. Imported before DeepSpeed,
because DeepSpeed chooses its accelerator on import.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ccella_fast.errors import CcellaError

logger = logging.getLogger("ccella_fast")
_TIMEOUT = timedelta(minutes=30)


def uses_gpu() -> bool:
    """Whether training uses a GPU: there is one, and DS_ACCELERATOR does not name the CPU."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def initialize_processes() -> torch.device:
    """Join the process group (NCCL on CUDA, gloo on CPU); returns this process's device."""
    if "RANK" not in os.environ and "OMPI_COMM_WORLD_RANK" not in os.environ:  # plain `python`: a world of one
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        os.environ.update({name: str(value) for name, value in alone.items()})
    gpu = uses_gpu()
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # Notes from torch to DeepSpeed about names that will go; the reader of a training log can do nothing about them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    import deepspeed.ops

    if not gpu:
        # DeepSpeed would compile a shared-memory all-reduce with g++ now: half a minute or more, a compiler on the user's
        # machine, and a hang wherever a killed build left its lock. It is only a faster path beside gloo, and DeepSpeed
        # goes without any op that this table does not call compatible.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", timeout=_TIMEOUT, verbose=False)
    if not gpu:
        return torch.device("cpu")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


@contextmanager
def translate_peer_failure() -> Iterator[None]:
    """What a process sees of another that ends is a connection that breaks: no fault of its own, and no bug."""
    try:
        yield
    except RuntimeError as error:
        if dist.get_world_size() == 1 or "by peer" not in str(error):  # gloo: "Connection closed by peer"
            raise
        raise CcellaError("another process of this run has ended", fix="its own message says why") from None


class HostCollectives:
    """Small decisions that all processes take together. They travel over gloo in host memory: no GPU is waited for."""

    def __init__(self) -> None:
        alone = dist.get_world_size() == 1
        self._group = None if alone else dist.new_group(backend="gloo", timeout=_TIMEOUT)

    def max(self, value: int) -> int:
        """The largest `value` of any process."""
        if self._group is None:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return int(tensor)

    def all_gather(self, value: object) -> list:
        """Every process's `value` (plain values), in rank order."""
        if self._group is None:
            return [value]
        values: list = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values


class SignalHandler:
    """Remembers SIGTERM and SIGINT until the step is over, and notices when the launcher has gone.

    SIGTERM to the `deepspeed` command kills that command alone; its launcher and our processes live on as orphans and nobody
    tells them. So under a launcher the ancestors are watched as well. Used as a context; `signal` is 0 while nothing was
    asked."""

    def __init__(self) -> None:
        self._signal = 0
        self._ancestors = _launchers()

    def __enter__(self) -> SignalHandler:
        self._before = {number: signal.signal(number, self._remember) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def signal(self) -> int:
        if not self._signal and self._ancestors != _launchers():
            self._signal = signal.SIGTERM
        return self._signal

    def _remember(self, number: int, frame: object) -> None:
        self._signal = self._signal or number


def _launchers() -> list[int]:
    """Process ids above us that belong to the launch: torchrun; DeepSpeed's launch.py and the `deepspeed` command above it."""
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return [parent]
    # LOCAL_SIZE is set by DeepSpeed's launch.py alone.
    return [parent, _parent_of(parent)] if "LOCAL_SIZE" in os.environ else []


def _parent_of(process: int) -> int:
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
