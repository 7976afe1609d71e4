"""The processes of a run: initialization, collectives in host memory, signals.

The launchers set the same five environment variables (see `launchers`); plain `python` is a world of one process. This module
must be imported before DeepSpeed, which chooses its accelerator on import.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ccella_fast.errors import CcellaError, ConfigError
from ccella_fast.launchers import adopt_launcher

logger = logging.getLogger("ccella_fast")
_TIMEOUT = timedelta(minutes=30)


def uses_gpu() -> bool:
    """Whether training uses a GPU: one is available, and DS_ACCELERATOR does not select the CPU."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def initialize_processes() -> torch.device:
    """Join the process group, with NCCL on GPUs and gloo on CPUs. Returns the device of this process."""
    adopt_launcher()
    if os.environ.get("WORLD_SIZE", "1") == "1":  # plain `python`, or one process of a launcher
        single = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        for name, value in single.items():
            os.environ.setdefault(name, str(value))
    gpu = uses_gpu()
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    # torch warns DeepSpeed of deprecated names, about which the reader of a training log can do nothing.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    import deepspeed
    import deepspeed.ops

    if not gpu:
        # DeepSpeed would compile a shared-memory all-reduce with g++ here, which takes half a minute or more, needs a compiler,
        # and hangs if a killed build has left its lock. It only accelerates gloo, and DeepSpeed omits every op that this
        # private table of compatible ops does not contain: so replace the table with an empty one.
        vars(deepspeed.ops)["__compatible_ops__"] = {}
    if gpu and int(os.environ["LOCAL_RANK"]) >= torch.cuda.device_count():
        why = f"process {os.environ['LOCAL_RANK']} of this machine sees {torch.cuda.device_count()} GPUs"
        fix = "start as many processes as there are GPUs; under srun let each see all of them, with --gpu-bind=none"
        raise ConfigError(why, field="LOCAL_RANK", fix=fix)
    deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", timeout=_TIMEOUT, verbose=False)
    if not gpu:
        return torch.device("cpu")
    index = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextmanager
def translate_peer_failure() -> Iterator[None]:
    """Raise CcellaError in place of the broken connection that a process sees when another one has ended."""
    try:
        yield
    except RuntimeError as error:
        if dist.get_world_size() == 1 or "by peer" not in str(error):  # gloo: "Connection closed by peer"
            raise
        raise CcellaError("another process of this run has ended", fix="see that process's own message") from None


class SignalHandler:
    """Context manager that records SIGTERM and SIGINT for the loop to read, and detects that the launcher has ended.

    SIGTERM to the `deepspeed` command ends only that command; its launcher and the training processes continue as orphans and
    receive no signal. Under a launcher, a change of the parent processes therefore counts as SIGTERM.
    """

    def __init__(self) -> None:
        self._signal = 0
        self._ancestors = _launchers()

    def __enter__(self) -> SignalHandler:
        in_main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
        numbers = (signal.SIGTERM, signal.SIGINT) if in_main else ()
        self._before = {number: signal.signal(number, self._record) for number in numbers}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @property
    def signal(self) -> int:
        """The number of the first signal, or 0."""
        if not self._signal and self._ancestors != _launchers():
            self._signal = signal.SIGTERM
        return self._signal

    def _record(self, number: int, frame: object) -> None:
        self._signal = self._signal or number


def _launchers() -> list[int]:
    """Ids of the parent processes that launched this one: torchrun, or DeepSpeed's launch.py and the `deepspeed` command."""
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return [parent]
    # Only DeepSpeed's launch.py sets LOCAL_SIZE.
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
