"""The processes of a run: initialization, and what one sees when another has ended.

The launchers set the same five environment variables (see `launchers`); plain `python` is a world of one process. This module
must be imported before DeepSpeed, which chooses its accelerator on import.
"""

from __future__ import annotations

import logging
import os
import socket
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import ccella_fast
from ccella_fast.errors import CcellaError, ConfigError, StalledError
from ccella_fast.foreign_errors import is_out_of_memory
from ccella_fast.launchers import adopt_launcher
from ccella_fast.rendezvous import rendezvous

logger = logging.getLogger("ccella_fast")


def uses_gpu() -> bool:
    """Whether training uses a GPU: one is available, and DS_ACCELERATOR does not select the CPU."""
    return torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR", "cuda") == "cuda"


def initialize_processes(timeout: timedelta, check: Callable[[], object] = lambda: None) -> torch.device:
    """Join the process group, with NCCL on GPUs and gloo on CPUs, unless this has happened. Returns this process's device.

    Args:
        timeout: of the start and of the collectives.
        check: is called while this process waits for the others, see `rendezvous`.
    """
    adopt_launcher()
    if os.environ.get("WORLD_SIZE", "1") == "1":  # plain `python`, or one process of a launcher
        single = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port()}
        if "RANK" not in os.environ:  # then a shell may have an address that is left over: a process alone needs none
            for name in ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
                os.environ.pop(name, None)
        for name, value in single.items():
            os.environ.setdefault(name, str(value))
    _check_address()
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
    with rendezvous(timeout, check):
        deepspeed.init_distributed(dist_backend="nccl" if gpu else "gloo", timeout=timeout, verbose=False)
    if not gpu:
        return torch.device("cpu")
    index = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def _check_address() -> None:
    """Raise ConfigError if the host of MASTER_ADDR is not known: torch would ask for it until the time-out."""
    host = os.environ["MASTER_ADDR"]
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        why = f"the host {host:.80} cannot be found: {error.strerror}"
        fix = "set it to the name or address of the machine of process 0"
        raise ConfigError(why, field="MASTER_ADDR", fix=fix) from None


@contextmanager
def translate_peer_failure() -> Iterator[None]:
    """Raise CcellaError in place of what a process sees in a collective when another one has ended or is stuck."""
    try:
        yield
    except RuntimeError as error:
        alone = not dist.is_initialized() or dist.get_world_size() == 1
        if not alone and "Timed out waiting" in str(error):  # gloo
            fix = "see which of the processes is missing, then run the same command again"
            raise StalledError("another process of this run did not arrive in time", fix=fix) from None
        if alone or "by peer" not in str(error):  # gloo: "Connection closed by peer"
            raise
        raise CcellaError("another process of this run has ended", fix="see that process's own message") from None


@contextmanager
def translate_refusal(path: Path | None) -> Iterator[None]:
    """Raise ConfigError in place of what DeepSpeed raises for a value that it cannot use.

    path: the user's DeepSpeed file.
    """
    try:
        yield
    except (AssertionError, ImportError, KeyError, NotImplementedError, TypeError, ValueError, RuntimeError) as error:
        if is_out_of_memory(error) or not _raised_in_deepspeed(error):
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        why = f"DeepSpeed cannot train with this configuration: {first:.200}"
        raise ConfigError(why, path=path, fix="correct the value; see deepspeed.ai, config-json") from error


def _raised_in_deepspeed(error: BaseException) -> bool:
    """Whether DeepSpeed has raised the error, or what it has called has, except for a function of ours."""
    import deepspeed

    theirs, ours = Path(deepspeed.__file__).parent, Path(ccella_fast.__file__).parent
    frames = [Path(frame.filename) for frame in traceback.extract_tb(error.__traceback__)]
    found = [file for file in frames if file.is_relative_to(theirs) or file.is_relative_to(ours)]
    return found[-1].is_relative_to(theirs)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
