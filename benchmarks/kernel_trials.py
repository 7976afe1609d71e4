"""Tries launch configurations in worker processes, so that they compile in parallel and a crash ends one trial only.

A trial runs workloads once with a configuration and compares their results with those of the configuration in use. Triton
leaves what it has compiled in its cache on disk, where the process that measures finds it. Workers are spawned, not forked: a
process that is forked after CUDA has started cannot use the GPU.
"""

from __future__ import annotations

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from multiprocessing import connection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccella_fast.kernels import tuning
from ccella_fast.kernels.tuning import LaunchConfig
from kernel_workloads import Call, Workload, workloads

OK, NOT_TRIED = "ok", "not tried: the time was over"
WRONG = "the result differs from that of the shipped configuration"
SECONDS = 60.0  # after which a trial is given up


class Candidate(NamedTuple):
    """A launch configuration for one key of a kernel."""

    kernel: str
    key: str
    config: LaunchConfig


class Trial(NamedTuple):
    """Workloads, by name, to run with a candidate in effect, or, if it is None, with what is in use."""

    candidate: Candidate | None
    workloads: Sequence[str]


class TrialPool:
    """A context manager with the worker processes, which start when first needed.

    Args:
        workers: Number of processes.
        device: Where the workloads run.
        grid: As in `workloads`.
        seconds: Time limit of a trial.
    """

    def __init__(self, workers: int, device: torch.device, grid: Sequence[int], *, seconds: float = SECONDS):
        self.workers, self.device, self.grid, self.seconds = workers, device, grid, seconds
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []

    def __enter__(self) -> TrialPool:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill(self._idle + self._busy)

    def run(self, trials: Sequence[Trial], deadline: float) -> list[str]:
        """The verdict of each trial: `OK`, `NOT_TRIED` or what is wrong. Trials are begun in their order.

        Args:
            trials: The trials.
            deadline: On `time.monotonic()`; trials that have not ended by then are given up.
        """
        verdicts, waiting = [NOT_TRIED] * len(trials), deque(range(len(trials)))
        while (waiting or self._busy) and time.monotonic() < deadline:
            while waiting and len(self._busy) < self.workers:
                worker = self._idle.pop() if self._idle else _Worker(self.device, self.grid)
                self._busy.append(worker)
                number = waiting.popleft()
                worker.begin(number, trials[number])
            end = min(deadline, min(worker.start for worker in self._busy) + self.seconds)
            channels = [worker.channel for worker in self._busy]
            ready = connection.wait(channels, timeout=max(0.0, end - time.monotonic()))
            for worker in list(self._busy):
                if worker.channel in ready:
                    verdicts[worker.trial], usable = worker.finish()
                elif time.monotonic() - worker.start > self.seconds:
                    verdicts[worker.trial], usable = f"it takes more than {self.seconds:g} s", False
                else:
                    continue
                self._busy.remove(worker)
                self._idle.append(worker) if usable else self._kill([worker])
        self._kill(self._busy)
        self._busy = []
        return verdicts

    def _kill(self, workers: Sequence[_Worker]) -> None:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.process.join()


class _Worker:
    """A process and the channel to it."""

    def __init__(self, device: torch.device, grid: Sequence[int]):
        context = multiprocessing.get_context("spawn")
        self.channel, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, device, grid), daemon=True)
        self.process.start()
        theirs.close()
        self.trial, self.start = -1, 0.0

    def begin(self, number: int, trial: Trial) -> None:
        self.trial, self.start = number, time.monotonic()
        with suppress(BrokenPipeError):  # the process has ended, as `finish` finds
            self.channel.send(trial)

    def finish(self) -> tuple[str, bool]:
        """The verdict, and whether the process can be used again."""
        try:
            return self.channel.recv()
        except (EOFError, OSError):
            self.process.join()
            return f"its process ended with exit code {self.process.exitcode}", False


def _work(channel: Any, device: torch.device, grid: Sequence[int]) -> None:
    """Run trials until the channel is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the parent ends this one
    known, prepared = workloads(device, grid), dict[str, tuple[Call, list[Tensor]]]()
    while True:
        try:
            trial = channel.recv()
        except EOFError:
            return
        try:
            verdict = _try(trial, known, prepared)
        except Exception as error:  # expected: some candidates exceed the registers or the shared memory
            verdict = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        channel.send((verdict, _gpu_works(device)))


def _try(trial: Trial, known: dict[str, Workload], prepared: dict[str, tuple[Call, list[Tensor]]]) -> str:
    for name in prepared.keys() - set(trial.workloads):  # frees the memory: trials of a key follow each other
        del prepared[name]
    for name in trial.workloads:
        if name not in prepared:
            call = known[name].prepare()
            prepared[name] = call, call()
        call, truth = prepared[name]
        with tuning.override_launch_config(*trial.candidate) if trial.candidate else nullcontext():
            if not agrees(call(), truth):
                return WRONG
    return OK


def agrees(results: list[Tensor], truth: list[Tensor]) -> bool:
    """Whether the results differ only as the order of sums may make them: each tensor by 1 % of its largest element."""
    return all(float((a - b).abs().max()) <= 0.01 * float(b.abs().max()) for a, b in zip(results, truth, strict=True))


def _gpu_works(device: torch.device) -> bool:
    """False after an error that damages the process's CUDA context, such as an access to an illegal address."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True
