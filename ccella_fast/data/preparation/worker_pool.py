"""The same work for many studies, on all cores, with bounded memory. A worker that dies ends in a message, not in a wait."""

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
_WORTH = 4  # tasks a process, below which it is not worth its start


class TaskResult(NamedTuple):
    """task: its number. result: what the function gave, or the DataError that it raised."""

    task: int
    result: Any
    seconds: float


class WorkerPool:
    """`with Pool(workers) as pool: pool.run(...)`. workers: None, as many as are worth it; 1, none beside this process.

    Processes start when they are first needed and serve every `run`."""

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
        """`function(task)` for every task, as they get done. function and tasks cross process borders, so they are plain.

        Results depend on the task alone, never on the number of workers. Raises DataError, naming the studies, when a worker
        dies."""
        workers = min(len(tasks), self.workers or count_workers(len(tasks), bytes_each))
        if workers > 1 and self._start(workers):
            assert self._executor is not None
            with _one_thread_each(), _main_left_alone():
                yield from _collect(self._executor, function, tasks, names, 2 * workers)
        else:
            for number, task in enumerate(tasks):
                yield TaskResult(number, *_timed(function, task))

    def _start(self, workers: int) -> bool:
        """Is there an executor? The first submit starts its processes."""
        if self._executor is None:
            try:  # Not forked: this process may hold locks of torch's threads.
                context = multiprocessing.get_context("spawn")
                self._executor = ProcessPoolExecutor(workers, context, initializer=_end_with_parent)
            except OSError as bad:  # its semaphores lie in /dev/shm
                why = os.strerror(bad.errno or 0)
                logger.warning("no worker processes (%s; is /dev/shm full?): studies are done one after another", why)
        return self._executor is not None


def count_workers(tasks: int, bytes_each: int) -> int:
    """As many as there are cores, tasks for them and memory; at least 1."""
    cores, memory = len(os.sched_getaffinity(0)), free_memory() // 2
    return max(1, min(cores, tasks // _WORTH, memory // max(1, bytes_each)))


def _collect(
    executor: ProcessPoolExecutor,
    function: Callable[[Task], Any],
    tasks: Sequence[Task],
    names: Sequence[str],
    ahead: int,  # tasks handed out at a time: what a dead worker may have been at is then a short list
) -> Iterator[TaskResult]:
    waiting: dict[Future[Any], int] = {}
    left = iter(range(len(tasks)))
    try:
        while True:
            while len(waiting) < ahead and (number := next(left, None)) is not None:
                waiting[executor.submit(_timed, function, tasks[number])] = number
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                result, seconds = future.result()
                yield TaskResult(waiting.pop(future), result, seconds)
    except BrokenProcessPool:
        among = ", ".join(names[number] for number in sorted(waiting.values())[:6])
        why = f"a worker process was killed (out of memory?) at one of: {among}"
        fix = "run it again: what is done is kept; with --workers 1 if it recurs"
        raise DataError(why, field="prepare", fix=fix) from None


def _timed(function: Callable[[Task], Any], task: Task) -> tuple[Any, float]:
    begun = time.perf_counter()
    try:
        result = function(task)
    except DataError as defect:
        result = defect
    return result, time.perf_counter() - begun


@contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes started inside use one thread for arithmetic: there is a process for every core."""
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
def _main_left_alone() -> Iterator[None]:
    """A spawned process would first run the caller's script again, which takes seconds and needs a guard in it. Ours need not:
    what they run lives in modules."""
    main = sys.modules["__main__"]
    before = {name: main.__dict__.pop(name) for name in ("__file__", "__spec__") if name in main.__dict__}
    main.__spec__ = None
    try:
        yield
    finally:
        vars(main).update(before)  # type: ignore[arg-type]


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
