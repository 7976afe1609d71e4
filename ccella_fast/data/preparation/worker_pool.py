"""A pool of worker processes for many studies. Files of unknown origin are read in workers only: a crash names the study.

A worker has one task at a time, so a worker that crashes, is killed or does not come back is the result of one study, a
DataError; another worker takes its place and the other studies go on. A study is blamed for a crash only if it was the first of
its process: after others, whose files may have damaged the memory, it is read once more in a new process.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import connection, resource_tracker
from typing import Any, NamedTuple, TypeVar

from ccella_fast.errors import ConfigError, DataError
from ccella_fast.hardware import free_memory

Task = TypeVar("Task")
_MIN_TASKS_PER_WORKER = 4  # with fewer, starting the process takes longer than it saves
_SECONDS = 600  # for one study; a series takes seconds, also over a network
_PRELOADED = ["ccella_fast.data.preparation.images", "SimpleITK", "nibabel"]  # what every worker imports


class TaskResult(NamedTuple):
    """The result of one task.

    Attributes:
        task: index of the task.
        result: the function's return value, or the DataError that it raised or that its process ended with.
        seconds: run time of the function.
    """

    task: int
    result: Any
    seconds: float


class WorkerPool:
    """A context manager that runs tasks in worker processes, which start when first needed and are reused by every `run`.

    Args:
        workers: number of processes; None chooses it for each `run`.
        seconds: time after which a task is given up and its process killed.
    """

    def __init__(self, workers: int | None = None, *, seconds: float = _SECONDS):
        self.workers, self.seconds = workers, seconds
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._idle + self._busy:
            worker.kill()

    def run(
        self, function: Callable[[Task], Any], tasks: Sequence[Task], names: Sequence[str], *, bytes_each: int
    ) -> Iterator[TaskResult]:
        """Call `function(task)` for every task and yield the results in the order of completion.

        A result depends on its task alone, not on the number of workers.

        Args:
            function: a picklable function of a module.
            tasks: picklable arguments.
            names: name of each task for error messages.
            bytes_each: memory that one task needs.

        Raises:
            ConfigError: no process can be started.
        """
        count = min(len(tasks), self.workers or count_workers(len(tasks), bytes_each))
        waiting, repeated = deque(range(len(tasks))), set[int]()
        while waiting or self._busy:
            while waiting and len(self._busy) < count:
                number = waiting.popleft()
                worker = self._idle.pop() if self._idle and number not in repeated else _start_worker()
                self._busy.append(worker)
                worker.begin(number, function, tasks[number])
            for worker in self._ready():
                self._busy.remove(worker)
                result = worker.finish(names[worker.task], self.seconds)
                if worker.process.is_alive():
                    self._idle.append(worker)
                if result is None:
                    waiting.appendleft(worker.task)
                    repeated.add(worker.task)
                else:
                    yield result

    def _ready(self) -> list[_Worker]:
        """The workers that have a result or have ended, or whose time is up."""
        now = time.monotonic()
        next_end = min(worker.start for worker in self._busy) + self.seconds
        ready = connection.wait([worker.channel for worker in self._busy], timeout=max(0, next_end - now))
        return [
            worker for worker in self._busy
            if worker.channel in ready or time.monotonic() - worker.start > self.seconds
        ]  # fmt: skip


class _Worker:
    """A process and the channel to it."""

    def __init__(self, process: Any, channel: connection.Connection):
        self.process, self.channel = process, channel
        self.task, self.start, self.begun = -1, 0.0, 0

    def begin(self, task: int, function: Callable[[Any], Any], argument: Any) -> None:
        """Give the worker a task."""
        self.task, self.start, self.begun = task, time.monotonic(), self.begun + 1
        with suppress(BrokenPipeError):  # the process has ended since its last task, as `finish` finds
            self.channel.send((function, argument))

    def finish(self, name: str, seconds: float) -> TaskResult | None:
        """The result of the task. A process that has none is killed, and what happened to it is the result.

        None if the process has ended and had other tasks before.
        """
        try:
            result, duration = self.channel.recv() if self.channel.poll() else (None, None)
        except (EOFError, OSError):
            self.process.join()
            if self.begun > 1:
                return None
            return TaskResult(self.task, _crash(name, self.process.exitcode), time.monotonic() - self.start)
        if duration is None:
            self.kill()
            why = f"reading the study '{name}' takes more than {seconds:g} s"
            fix = "check its files and the disk that they are on, then run the command again"
            return TaskResult(self.task, DataError(why, field=name, fix=fix), seconds)
        if isinstance(result, Exception) and not isinstance(result, DataError):
            raise result
        return TaskResult(self.task, result, duration)

    def kill(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.channel.close()


def count_workers(tasks: int, bytes_each: int) -> int:
    """Number of workers for `tasks` tasks that the cores and half of the free memory allow, at least 1."""
    cores, memory = len(os.sched_getaffinity(0)), free_memory() // 2
    return max(1, min(cores, tasks // _MIN_TASKS_PER_WORKER, memory // max(1, bytes_each)))


def _crash(name: str, code: int | None) -> DataError:
    """The defect of a study whose worker ended with this exit code; a negative one is a signal."""
    if code == -signal.SIGKILL:
        why = f"the process that was reading the study '{name}' was killed (out of memory?)"
        fix = "run the command again (what is done is kept), with --workers 1 if it recurs"
    else:
        how = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        why = f"the process that was reading the study '{name}' crashed ({how}): one of its files is damaged"
        fix = "export the series of this study again"
    return DataError(why, field=name, fix=fix)


def _start_worker() -> _Worker:
    """Start a process. It is forked from a server that holds one thread and has imported what workers need.

    Forking this process instead would copy locks that torch's threads may hold.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    try:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs,), daemon=True)
        with _single_threaded_workers(), _without_main_module(), _without_interrupts():
            process.start()
    except OSError as error:
        why = f"no worker process can be started: {os.strerror(error.errno or 0)}"
        raise ConfigError(why, field="--workers", fix="free memory and processes, or give --workers 1") from None
    theirs.close()
    return _Worker(process, ours)


def _work(channel: connection.Connection) -> None:
    """Run tasks until the channel is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all processes of a terminal; the parent ends this one
    _exit_with_parent()
    while True:
        try:
            function, task = channel.recv()
        except EOFError:
            return
        start = time.perf_counter()
        try:
            result = function(task)
        except MemoryError:
            fix = "free memory, or run the command with --workers 1"
            result = DataError("there is not enough memory to read this study", fix=fix)
        except Exception as error:
            result = error
        channel.send((result, time.perf_counter() - start))


@contextmanager
def _single_threaded_workers() -> Iterator[None]:
    """Processes that are started inside use one thread for arithmetic, since there is one process per core."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
    before = {name: os.environ[name] for name in names if name in os.environ}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(before)


@contextmanager
def _without_main_module() -> Iterator[None]:
    """Processes that are started inside do not run the caller's script again, since their functions are in modules.

    Running it again would take seconds and would require a `__main__` guard in the script.
    """
    main = sys.modules["__main__"]
    before = {name: main.__dict__.pop(name) for name in ("__file__", "__spec__") if name in main.__dict__}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(before)  # type: ignore[arg-type]


@contextmanager
def _without_interrupts() -> Iterator[None]:
    """Processes that are started inside are not ended by Ctrl-C, also while the server that they are forked from imports.

    This process gets a signal that arrives meanwhile afterwards.
    """
    resource_tracker.ensure_running()  # starting it later would end the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _exit_with_parent() -> None:
    """Let a worker exit when its parent is killed, also in the middle of a task."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
