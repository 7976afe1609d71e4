"""The same work for many studies, on all cores, with bounded memory. A worker that dies ends in a message, not in a wait."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

from ccella_fast.environment import free_memory
from ccella_fast.errors import DataError

Task = TypeVar("Task")
_WORTH = 4  # tasks a process, below which it is not worth its start


class Done(NamedTuple):
    """task: its number. result: what the function gave, or the DataError that it raised."""

    task: int
    result: Any
    seconds: float


def count_workers(tasks: int, bytes_each: int) -> int:
    """As many as there are cores, tasks for them and memory; 1: no process beside this one."""
    cores, memory = len(os.sched_getaffinity(0)), free_memory() // 2
    return max(1, min(cores, tasks // _WORTH, memory // max(1, bytes_each)))


def run_all(
    function: Callable[[Task], Any], tasks: Sequence[Task], names: Sequence[str], *, workers: int
) -> Iterator[Done]:
    """`function(task)` for every task, in any order. function and tasks cross process borders, so they are plain.

    Results depend on the task alone, never on `workers`. Raises DataError, naming the studies, when a worker process dies."""
    if workers == 1:
        for index, task in enumerate(tasks):
            yield Done(index, *_timed(function, task))
        return
    with _one_thread_each():
        # Not forked: this process may hold locks of torch's threads.
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)
        try:
            yield from _collect(pool, function, tasks, names, workers)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _collect(
    pool: ProcessPoolExecutor,
    function: Callable[[Task], Any],
    tasks: Sequence[Task],
    names: Sequence[str],
    workers: int,
) -> Iterator[Done]:
    ahead = 2 * workers  # what a dead worker may have been at is then a short list
    waiting: dict[Future[Any], int] = {}
    left = iter(range(len(tasks)))
    try:
        while True:
            for index in left:
                waiting[pool.submit(_timed, function, tasks[index])] = index
                if len(waiting) >= ahead:
                    break
            if not waiting:
                return
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                result, seconds = future.result()
                yield Done(waiting.pop(future), result, seconds)
    except BrokenProcessPool:
        among = ", ".join(names[index] for index in sorted(waiting.values())[:6])
        why = f"a worker process was killed (out of memory?) at one of: {among}"
        raise DataError(
            why, field="prepare", fix="run it again: what is done is kept; with --workers 1 if it recurs"
        ) from None


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
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
