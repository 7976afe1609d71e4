"""The processes of a launcher and their devices: collectives of host values, errors of one for all, and shared work."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ccella_fast import errors
from ccella_fast.errors import CcellaError, ConfigError, did_you_mean
from ccella_fast.folder_lock import lock_folder
from ccella_fast.launchers import adopt_launcher

_TIMEOUT = timedelta(minutes=30)


class HostCollectives:
    """Collectives of small host values, over gloo, so that no process waits for its GPU."""

    def __init__(self) -> None:
        single = dist.get_world_size() == 1
        self._group = None if single else dist.new_group(backend="gloo", timeout=_TIMEOUT)

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
        values: list = [None] * dist.get_world_size()
        dist.all_gather_object(values, value, group=self._group)
        return values


def raise_together(error: CcellaError | None) -> None:
    """Raise the error of the first process that has one, on all processes."""
    mine = None if error is None else [type(error).__name__, error.why, error.path, error.field, error.fix]
    for given in HostCollectives().all_gather(mine):
        if given is not None:
            kind, why, path, field, fix = given
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
