"""Runs commands of ccella-fast as forks of one process that has imported what they need, which takes seconds each time.

    python -m ccella_fast.cli.forkserver CHANNEL

CHANNEL is the file descriptor of a socket. A request is the JSON `[name, words, log, processes]`: the words of a command line,
the file for what the command prints, and the number of processes that share its work. More than one are started by torchrun.
When the command has ended, the answer is `[name, code]`, with the exit code as of `subprocess`. A command is a process of its
own, which ends as any other does. When the other side of CHANNEL is closed, or its process is killed, the commands that run
get SIGTERM.

This process only imports: a fork could not use CUDA, an OpenMP pool or an autograd engine that had been started before it.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import os
import signal
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

from ccella_fast.cli import main

_PATIENCE = 60  # seconds for a command to end after SIGTERM
_PR_SET_PDEATHSIG = 1
_MODULES = (
    "ccella_fast.data.phantom.phantom", "ccella_fast.data.preparation.prepare",
    "ccella_fast.training.autoencoder.run", "ccella_fast.training.run",
    "ccella_fast.sampling.command", "ccella_fast.sampling.synthesis",
    "ccella_fast.evaluation.folders", "ccella_fast.report.evaluation", "ccella_fast.downstream.classify",
    "nibabel", "torch._dynamo", "transformers.modeling_utils", "transformers.models.auto.tokenization_auto",
)  # fmt: skip


def import_modules() -> None:
    """Import what commands import. If torch has been built for GPUs, only torch: other packages may start CUDA."""
    import torch

    for name in () if torch.backends.cuda.is_built() else _MODULES:
        with suppress(Exception):  # a command that needs it imports it again, and says what is wrong
            importlib.import_module(name)
    gc.freeze()  # else the first collection in each command would copy the memory that they share


class _Command(NamedTuple):
    """A command that runs."""

    name: str
    process: int


def serve(channel: Connection) -> list[str] | None:
    """Answer requests until the other side is closed. Returns the words of its command in a fork, and None at the end."""
    # Ctrl-C in a terminal goes to all processes, and is for the commands. A signal that a fork gets before it can act on it
    # waits.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    server = os.getpid()
    running: dict[int, _Command] = {}  # by one end of a pipe, whose other end is open in the command until it has ended
    while True:
        for ready in wait([channel, *running]):
            if isinstance(ready, int):
                command = running.pop(ready)
                os.close(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(command.process, 0)[1])
                with suppress(OSError):  # closed, as is read next
                    channel.send_bytes(json.dumps([command.name, code]).encode())
                continue
            try:
                name, words, log, processes = json.loads(channel.recv_bytes())
            except (EOFError, OSError):
                _stop(running)
                return None
            end, other_end = os.pipe()
            process = os.fork()
            if process == 0:
                channel.close()
                for each in (end, *running):
                    os.close(each)
                _begin(log, mask, server)
                if processes > 1:
                    os.set_inheritable(other_end, True)
                    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
                    os.execv(sys.executable, [sys.executable, *torchrun, "-m", "ccella_fast.cli", *words])
                return words
            os.close(other_end)
            running[end] = _Command(name, process)


def _begin(log: str, mask: set[int | signal.Signals], server: int) -> None:
    """Make a fork what a new process would be."""
    import numpy as np

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # if the server is killed
    if os.getppid() != server:
        os._exit(128 + signal.SIGTERM)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    np.random.seed()  # Python's own generator does that by itself, and torch's starts with the same seed in any process
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _stop(running: dict[int, _Command]) -> None:
    """End the commands that run."""
    for command in running.values():
        os.kill(command.process, signal.SIGTERM)
    deadline = time.monotonic() + _PATIENCE
    while running and (ended := wait([*running], max(0, deadline - time.monotonic()))):
        for end in ended:
            assert isinstance(end, int)
            os.waitpid(running.pop(end).process, 0)
    for command in running.values():
        os.kill(command.process, signal.SIGKILL)


if __name__ == "__main__":
    import_modules()
    sys.stdout.flush()  # otherwise every fork would print buffered output again
    sys.stderr.flush()
    words = serve(Connection(int(sys.argv[1])))
    if words is None:
        sys.exit(0)
    sys.argv[1:] = words
    sys.exit(main())
