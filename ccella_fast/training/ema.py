"""Exponential moving average of the fp32 weights, kept where the optimizer keeps them: each process averages its own shards.

decay_n = min(decay, (1 + n) / (10 + n)) after n updates, so that a short run is not stuck at its random start.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ccella_fast.training.engine import full_weights, master_weights, set_master_weights


class Ema:
    """`decay` as configured, `updates` so far; `averages` are tensors like `master_weights(engine)`."""

    def __init__(self, engine: Any, decay: float):
        self.engine, self.decay, self.updates = engine, decay, 0
        self.averages = [weights.clone() for weights in master_weights(engine)]

    @torch.no_grad()
    def update(self) -> None:
        """average <- decay_n average + (1 - decay_n) weights."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(self.averages, master_weights(self.engine), self.updates)

    def full_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and average of every parameter, on all processes, one at a time. All processes must call it."""
        with self._in_place_of_the_weights():
            yield from full_weights(self.engine)

    @torch.no_grad()
    def restore(self, values: dict[str, Tensor], updates: int) -> None:
        """Take over what `full_weights` gave; on any process."""
        with self._in_place_of_the_weights():
            set_master_weights(self.engine, values)
        self.updates = updates

    @contextmanager
    def _in_place_of_the_weights(self) -> Iterator[None]:
        # DeepSpeed can gather and scatter its master weights and nothing else, so the averages take their place meanwhile.
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weights, average in zip(master_weights(self.engine), self.averages, strict=True):
            kept = weights.clone()
            weights.copy_(average)
            average.copy_(kept)
