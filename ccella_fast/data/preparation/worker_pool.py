"""A pool of worker processes for many studies, with bounded memory. A worker that is killed raises an error."""

from __future__ import annotations

import logging
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from ccella_fast.errors import DataError
from ccella_fast.hardware import free_memory

logger = logging.getLogger("ccella_fast")
Task = TypeVar("Task")
_MIN_TASKS_PER_WORKER = 4  # with fewer, starting the process takes longer than it saves


class TaskResult(NamedTuple):
    """The result of one task.

    Attributes:
        task: index of the task.
        result: the function's return value, or the DataError that it raised.
        seconds: run time of the function.
    """

    task: int
    result: Any
    seconds: float


class WorkerPool:
    """A context manager that runs tasks in worker processes, which start when first needed and are reused by every `run`.

    Args:
        workers: number of processes; None chooses it for each `run`, 1 runs everything in the calling process.
    """

    def __init__(self, workers: int | None = None):
        self.workers = workers
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

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
            DataError: a worker was killed; the message names the studies it may have been processing.
        """
        workers = min(len(tasks), self.workers or count_workers(len(tasks), bytes_each))
        if workers > 1 and self._start(workers):
            assert self._executor is not None
            with _single_threaded_workers(), _without_main_module():
                yield from _collect(self._executor, function, tasks, names, 2 * workers)
        else:
            for number, task in enumerate(tasks):
                yield TaskResult(number, *_timed(function, task))

    def _start(self, workers: int) -> bool:
        """Create the executor if needed and return whether there is one. The first submit starts its processes."""
        if self._executor is None:
            try:  # Spawned, not forked: torch's threads may hold locks in this process.
                context = multiprocessing.get_context("spawn")
                self._executor = ProcessPoolExecutor(workers, context, initializer=_exit_with_parent)
            except OSError as error:  # the executor's semaphores are in /dev/shm
                why = os.strerror(error.errno or 0)
                logger.warning(
                    "worker processes cannot be started (%s; is /dev/shm full?): studies are processed one by one", why
                )
        return self._executor is not None


def count_workers(tasks: int, bytes_each: int) -> int:
    """Number of workers for `tasks` tasks that the cores and half of the free memory allow, at least 1."""
    cores, memory = len(os.sched_getaffinity(0)), free_memory() // 2
    return max(1, min(cores, tasks // _MIN_TASKS_PER_WORKER, memory // max(1, bytes_each)))


def _collect(
    executor: ProcessPoolExecutor,
    function: Callable[[Task], Any],
    tasks: Sequence[Task],
    names: Sequence[str],
    max_pending: int,  # few tasks are submitted at a time, so that an error names few candidates
) -> Iterator[TaskResult]:
    pending: dict[Future[Any], int] = {}
    remaining = iter(range(len(tasks)))
    try:
        while True:
            while len(pending) < max_pending and (number := next(remaining, None)) is not None:
                pending[executor.submit(_timed, function, tasks[number])] = number
            if not pending:
                return
            for future in wait(pending, return_when=FIRST_COMPLETED).done:
                result, seconds = future.result()
                yield TaskResult(pending.pop(future), result, seconds)
    except BrokenProcessPool:
        candidates = ", ".join(names[number] for number in sorted(pending.values())[:6])
        why = f"a worker process was killed (out of memory?) at one of: {candidates}"
        fix = "run the command again (what is done is kept), with --workers 1 if it recurs"
        raise DataError(why, field="prepare", fix=fix) from None


def _timed(function: Callable[[Task], Any], task: Task) -> tuple[Any, float]:
    start = time.perf_counter()
    try:
        result = function(task)
    except DataError as error:
        result = error
    return result, time.perf_counter() - start


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
    """Processes that are spawned inside do not run the caller's script again, since their functions are in modules.

    Running it again would take seconds and would require a `__main__` guard in the script.
    """
    main = sys.modules["__main__"]
    before = {name: main.__dict__.pop(name) for name in ("__file__", "__spec__") if name in main.__dict__}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(before)  # type: ignore[arg-type]


def _exit_with_parent() -> None:
    """Let a worker exit when its parent is killed; otherwise it would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
