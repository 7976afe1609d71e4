"""The processes of a launcher and their devices: collectives of host values, errors of one for all, and shared work."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from ccella_fast import errors
from ccella_fast.errors import CcellaError, ConfigError, did_you_mean
from ccella_fast.folder_lock import lock_folder
from ccella_fast.launchers import adopt_launcher
from ccella_fast.rendezvous import rendezvous

_TIMEOUT = timedelta(minutes=30)
_numbers = itertools.count()  # of groups in this process, which share a store
T = TypeVar("T")


class HostCollectives:
    """Collectives of small host values, over gloo, so that no process waits for its GPU.

    Without a process group they are those of a single process.

    Args:
        timeout: how long a process waits for the others.

    Attributes:
        rank: of this process.
        world_size: the number of processes.
    """

    def __init__(self, timeout: timedelta = _TIMEOUT) -> None:
        grouped = dist.is_initialized()
        self.rank, self.world_size = (dist.get_rank(), dist.get_world_size()) if grouped else (0, 1)
        self._group = None if self.world_size == 1 else dist.new_group(backend="gloo", timeout=timeout)
        self._number = next(_numbers)

    def max(self, value: int) -> int:
        """The largest `value` of any process."""
        if self._group is None:
            return value
        tensor = torch.tensor(value)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return int(tensor)

    def all_gather(self, value: object) -> list:
        """The `value` of each process, in rank order. Values must be plain Python values."""
        if self._group is None:
            return [value]
        values: list = [None] * self.world_size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_rank_zero(self, value: T) -> T:
        """The `value` of rank 0, a plain Python value."""
        if self._group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, group=self._group)
        return values[0]

    def after_rank_zero(self, timeout: timedelta) -> None:
        """Wait until rank 0, which does not wait itself, calls this too. Not longer than `timeout`: rank 0 may have failed."""
        if self._group is None:
            return
        store, key = dist.distributed_c10d._get_default_store(), f"ccella_fast/after_rank_zero/{self._number}"
        with suppress(dist.DistError):
            if self.rank == 0:
                store.set(key, "")
            else:
                store.wait([key], timeout)

    def together(self, work: Callable[[], T]) -> T:
        """The result of `work` on this process. If it raises a CcellaError on one of them, that is raised on all."""
        if self._group is None:
            return work()
        refusal = result = None
        try:
            result = work()
        except CcellaError as error:
            refusal = error
        raise_together(refusal, self)
        return result  # type: ignore[return-value]


def raise_together(error: CcellaError | None, collectives: HostCollectives | None = None) -> None:
    """Raise the error of the first process that has one, on all processes. Those of other processes than rank 0 are named."""
    mine = None if error is None else [type(error).__name__, error.why, error.path, error.field, error.fix]
    collectives = collectives or HostCollectives()
    for rank, given in enumerate(collectives.all_gather(mine)):
        if given is not None:
            kind, why, path, field, fix = given
            why += f" (process {rank})" if rank and f"process {rank}" not in why else ""
            raise getattr(errors, kind)(why, path=path, field=field, fix=fix)


def resolve_device(device: str | torch.device | None) -> torch.device:
    """The device for its name; None is the GPU if there is one, otherwise the CPU.

    Raises:
        ConfigError: there is no such device here.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        fix = did_you_mean(str(device), ["cpu", "cuda"])
        raise ConfigError(f"there is no device '{str(device):.40}'", field="device", fix=fix) from None
    if found.type not in ("cpu", "cuda"):
        raise ConfigError(f"device '{found}' is not supported", field="device", fix="use cpu or cuda")
    if found.type == "cuda" and not torch.cuda.is_available():
        reason = "this PyTorch was built without CUDA" if torch.version.cuda is None else "PyTorch finds no GPU"
        raise ConfigError(f"device '{found}' cannot be used: {reason}", field="device", fix="use device cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        last = torch.cuda.device_count() - 1
        raise ConfigError(f"there is no device '{found}'", field="device", fix=f"use cuda:0 to cuda:{last}, or cpu")
    return found


class DistributedContext:
    """The processes started by torchrun or another launcher, each with one GPU; a single process without one.

    Attributes:
        rank: of this process.
        world_size: the number of processes.
    """

    def __init__(self) -> None:
        adopt_launcher()
        self.rank, self.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        if self.world_size > 1 and not dist.is_initialized():
            with rendezvous(_TIMEOUT):
                # Long, because a rank waits for the last volumes of the others; torchrun stops all ranks if one fails.
                dist.init_process_group("gloo", timeout=timedelta(days=7))

    @classmethod
    def alone(cls) -> DistributedContext:
        """A single process, also within a process group: what it does is not shared."""
        context = cls.__new__(cls)
        context.rank, context.world_size = 0, 1
        return context

    def select_device(self, requested: str | torch.device | None) -> torch.device:
        """The requested device; by default the GPU of this process, or the CPU if there is no GPU."""
        if requested is not None:
            return resolve_device(requested)
        if not torch.cuda.is_available():
            return torch.device("cpu")
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        return device

    def barrier(self) -> None:
        """Wait for all processes."""
        if self.world_size > 1:
            dist.barrier()

    def shard(self, items: Sequence[Any]) -> list[Any]:
        """The items of this process: item i belongs to rank i modulo the number of processes."""
        return list(items[self.rank :: self.world_size])

    def sum(self, array: np.ndarray) -> np.ndarray:
        """The sum of the arrays of all processes, which have the same shape and type."""
        if self.world_size == 1:
            return array
        total = torch.from_numpy(array.copy())
        dist.all_reduce(total)
        return total.numpy()

    @contextmanager
    def lock_folder(self, folder: Path, command: str) -> Iterator[None]:
        """Hold the lock of the folder that the processes write to. Raises on all processes if another command holds it."""
        refusal = None
        with ExitStack() as held:
            try:
                if self.rank == 0:
                    held.enter_context(lock_folder(folder, command))
            except CcellaError as error:
                refusal = error
                if self.world_size == 1:
                    raise
            if self.world_size > 1:
                raise_together(refusal)
            yield
