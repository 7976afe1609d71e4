"""The processes that torchrun has started for a command that shares its work among them."""

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
from ccella_fast.errors import CcellaError
from ccella_fast.folder_lock import lock_folder


class DistributedContext:
    """The processes started by torchrun, each with one GPU; a single process without torchrun.

    Attributes:
        rank: of this process.
        world_size: the number of processes.
    """

    def __init__(self) -> None:
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
            self.raise_together(refusal)
            yield

    def raise_together(self, error: CcellaError | None) -> None:
        """Raise the error of the first process that has one, on all processes."""
        if self.world_size == 1:
            if error is not None:
                raise error
            return
        mine = None if error is None else [type(error).__name__, error.why, error.path, error.field, error.fix]
        given: list[Any] = [None] * self.world_size
        dist.all_gather_object(given, mine)
        for each in given:
            if each is not None:
                kind, why, path, field, fix = each
                raise getattr(errors, kind)(why, path=path, field=field, fix=fix)
