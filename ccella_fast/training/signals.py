"""Signals during training, and the end of the launcher, which counts as one."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ccella_fast.errors import Stopped

_NUMBERS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SLURM announces the end of a job with one of your choice


class SignalHandler:
    """Context manager for SIGTERM, SIGINT, SIGUSR1 and SIGHUP: they raise `Stopped`, or from `record` on the loop reads them.

    SIGTERM to the `deepspeed` command ends only that command; its launcher and the training processes continue as orphans and
    receive no signal. Under a launcher, a change of the parent processes therefore counts as SIGTERM, and so does output that
    nobody reads any more: over ssh, the connections end first. SIGHUP comes from a terminal that is closed; `nohup` ignores it.
    """

    def __init__(self) -> None:
        self._signal, self._recorded = 0, False
        self._ancestors = _launchers()

    def __enter__(self) -> SignalHandler:
        in_main = threading.current_thread() is threading.main_thread()  # no other thread may set handlers
        not_ignored = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
        numbers = (*_NUMBERS, signal.SIGHUP) if not_ignored else _NUMBERS
        self._before = {number: signal.signal(number, self._handle) for number in (numbers if in_main else ())}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def record(self) -> None:
        """From now on only record signals: the loop ends after its step, with a checkpoint."""
        self._recorded = True

    @property
    def signal(self) -> int:
        """The number of the first signal, or 0."""
        if not self._signal and self._ancestors != _launchers():
            self._signal = signal.SIGTERM
        return self._signal

    @contextmanager
    def output(self) -> Iterator[None]:
        """Write output in the block."""
        try:
            yield
        except OSError as error:
            terminal_is_closed = error.errno == errno.EIO and self._signal == signal.SIGHUP
            if not terminal_is_closed and not (isinstance(error, BrokenPipeError) and self._ancestors):
                raise
            self._signal = self._signal or signal.SIGTERM

    def check(self) -> None:
        """Raise `Stopped` if the launcher has ended, or after a signal that is only recorded."""
        if self.signal:
            raise Stopped(self.signal)

    def _handle(self, number: int, frame: object) -> None:
        if not self._recorded:
            signal.signal(number, signal.SIG_DFL)  # a second one ends the process at once
            raise Stopped(number)
        self._signal = self._signal or number


def _launchers() -> list[int]:
    """Ids of the parent processes that launched this one: torchrun, or DeepSpeed's launch.py and the `deepspeed` command."""
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return [parent]
    # Only DeepSpeed's launch.py sets LOCAL_SIZE.
    return [parent, parent_of(parent)] if "LOCAL_SIZE" in os.environ else []


def parent_of(process: int) -> int:
    """The process id of the parent, or 0 if the process does not exist."""
    try:
        with open(f"/proc/{process}/stat", encoding="utf-8", errors="replace") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0
