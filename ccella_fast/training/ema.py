"""Exponential moving average of the fp32 weights. With ZeRO, each process averages its own shards.

The decay of update n is min(decay, (1 + n) / (10 + n)), so that the average of a short run does not stay at the random weights
that the run started with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ccella_fast.training.engine import master_weights
from ccella_fast.training.flat_adamw import FlatAdamW
from ccella_fast.training.full_tensors import full_tensors, set_full_tensors, set_model_weights

_PART = 2**18  # elements


class WeightAverage:
    """An average of an engine's master weights, which starts at the weights as they are.

    Args:
        engine: the DeepSpeed engine.

    Attributes:
        averages: fp32 tensors like `master_weights(engine)`.
    """

    def __init__(self, engine: Any):
        self.engine = engine
        self.averages = [weights.clone() for weights in master_weights(engine)]

    @torch.no_grad()
    def decay_towards_weights(self, decay: float) -> None:
        """Set each average to decay * average + (1 - decay) * weights."""
        torch._foreach_lerp_(self.averages, master_weights(self.engine), 1 - decay)

    def full_weights(self, *, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yield name and average of every parameter, as `full_tensors` does. All processes must iterate to the end."""
        with self._swapped():
            yield from full_tensors(self.engine, "weights", trained_only=trained_only)

    @torch.no_grad()
    def restore(self, values: dict[str, Tensor]) -> None:
        """Restore averages from whole parameters, as yielded by `full_weights`. All processes must call it."""
        with self._swapped():
            set_full_tensors(self.engine, "weights", values)

    @contextmanager
    def _swapped(self) -> Iterator[None]:
        # DeepSpeed can gather and scatter nothing but its master weights, so exchange their values with the averages meanwhile.
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for weights, average in zip(master_weights(self.engine), self.averages, strict=True):
            # In parts that stay in the cache: with ZeRO these are all weights in one tensor.
            for part, other in zip(weights.view(-1).split(_PART), average.view(-1).split(_PART), strict=True):
                kept = part.clone()
                part.copy_(other)
                other.copy_(kept)


class Ema(WeightAverage):
    """Exponential moving average of an engine's master weights.

    Args:
        engine: the DeepSpeed engine.
        decay: the largest decay.

    Attributes:
        updates: the number of updates so far.
    """

    def __init__(self, engine: Any, decay: float):
        super().__init__(engine)
        self.decay, self.updates = decay, 0
        self._by_optimizer = isinstance(engine.optimizer, FlatAdamW)
        if self._by_optimizer:
            engine.optimizer.average, engine.optimizer.average_decay = self.averages[0], self.next_decay

    def next_decay(self) -> float:
        """The decay of the next update."""
        return min(self.decay, (2 + self.updates) / (11 + self.updates))

    def update(self) -> None:
        """Move the averages towards the weights with the next decay, unless the optimizer's step has done it."""
        if not self._by_optimizer:
            self.decay_towards_weights(self.next_decay())
        self.updates += 1

    def full_weights(self, *, trained_only: bool = False) -> Iterator[tuple[str, Tensor]]:
        """As `WeightAverage.full_weights`."""
        if self._by_optimizer:
            return full_tensors(self.engine, "average", trained_only=trained_only)
        return super().full_weights(trained_only=trained_only)

    def restore(self, values: dict[str, Tensor]) -> None:
        """As `WeightAverage.restore`; `updates` is set by the caller."""
        if self._by_optimizer:
            set_full_tensors(self.engine, "average", values)
        else:
            super().restore(values)

    @contextmanager
    def in_model(self) -> Iterator[None]:
        """Let the model compute with the averages in the block. All processes must call it; no step may be taken meanwhile."""
        try:
            with self._swapped():
                set_model_weights(self.engine, full_tensors(self.engine, "weights"))
                yield
        finally:
            set_model_weights(self.engine, full_tensors(self.engine, "weights"))
