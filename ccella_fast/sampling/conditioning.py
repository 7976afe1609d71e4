"""Precomputed step-invariant conditioning. Exact.

Adapter, class vector, embeddings, the projections into every residual block, and the keys and values of every cross-attention
do not depend on the noisy latent. The timesteps of a plan are known beforehand, so they go through the adapter in batches
instead of one by one. At the reference's size, the conditioning of one report takes 4.5 MB per timestep in bf16. All 1000
timesteps would exceed the spare memory of a small GPU, so the cache is filled in windows ahead of the loop.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ccella_fast.models import Conditioning, DiffusionModel
from ccella_fast.sampling.prompts import PromptRows

CACHE_BYTES = 2**30  # per window
_ADAPTER_ROWS = {"cuda": 64, "cpu": 16}  # rows (timesteps x prompts) per call of the adapter


class Conditioner(Protocol):
    """Provides the conditioning of each step.

    Attributes:
        class_logits: (R, classes), predicted at the last timestep; None if no class is predicted.
    """

    class_logits: Tensor | None

    def set_prompts(self, prompts: PromptRows) -> None:
        """Use the prompts of another batch, with the same `shape_signature`."""

    def prepare(self, i: int) -> None:
        """Called on the host before evaluation i."""

    def at(self, index: Tensor) -> Conditioning:
        """The conditioning of evaluation `index`, (1,) on the device. Can be captured in a CUDA graph."""
        ...


class UncachedConditioning:
    """Evaluates the adapter in every step; the eager baseline."""

    def __init__(self, model: DiffusionModel, timesteps: Tensor):
        self._model, self._timesteps = model, timesteps
        self._prompts: PromptRows | None = None
        self.class_logits: Tensor | None = None

    def set_prompts(self, prompts: PromptRows) -> None:
        """See `Conditioner.set_prompts`."""
        if self._prompts is None:
            self._prompts = prompts
            self._rows = torch.tensor(prompts.rows, device=prompts.spacing.device)
            return
        assert self._prompts.shape_signature == prompts.shape_signature
        for old, new in zip(self._prompts[:3], prompts[:3], strict=True):  # a captured step reads the old tensors
            if isinstance(old, Tensor) and isinstance(new, Tensor):
                old.copy_(new)

    def prepare(self, i: int) -> None:
        """Nothing is prepared."""

    def at(self, index: Tensor) -> Conditioning:
        """See `Conditioner.at`."""
        assert self._prompts is not None
        computed = self._prompts.condition(self._model, self._timesteps.index_select(0, index))
        shifts = tuple(each.index_select(0, self._rows) for each in computed.shifts)
        keys_values = tuple(
            (keys.index_select(0, self._rows), values.index_select(0, self._rows))
            for keys, values in computed.keys_values
        )
        if computed.class_logits is not None:
            logits = computed.class_logits.index_select(0, self._rows)
            self.class_logits = logits if self.class_logits is None else self.class_logits.copy_(logits)
        return Conditioning(shifts, keys_values, None)


class ConditioningCache:
    """The conditioning of a window of evaluations, one row each, packed so that a step gathers its row with two kernels.

    The tensors keep their addresses, so a captured step can be replayed with the next window and the next batch.

    Args:
        model: the denoiser.
        timesteps: (E,), one per evaluation.
        max_bytes: the size of a window.
        row_by_row: call the adapter with one row at a time, so that the rounding of a row does not depend on the others.
        batch_size: B. A single row of shifts is stored B times, so that no step copies it; keys and values, which are a hundred
            times larger, are read by all samples.
    """

    def __init__(
        self,
        model: DiffusionModel,
        timesteps: Tensor,
        *,
        max_bytes: int = CACHE_BYTES,
        row_by_row: bool = False,
        batch_size: int = 1,
    ):
        self._model, self._timesteps, self._batch_size = model, timesteps, batch_size
        self._max_bytes = max_bytes
        self._rows_per_call = 1 if row_by_row else _ADAPTER_ROWS.get(timesteps.device.type, 16)
        self._first = torch.zeros(1, dtype=torch.int64, device=timesteps.device)
        self._window = range(0)
        self._layout: list[_Slot] = []
        self._prompts: PromptRows
        self.class_logits: Tensor | None = None

    def set_prompts(self, prompts: PromptRows) -> None:
        """Use other prompts. Nothing is recomputed if they are equal and the window covers all timesteps."""
        if len(self._window) == len(self._timesteps) and _equal(prompts, self._prompts):
            return
        self._prompts, self._window = prompts, range(0)
        self._rows = torch.tensor(prompts.rows, device=prompts.spacing.device)

    def prepare(self, i: int) -> None:
        """Fill the window that starts at evaluation i, unless the current one contains it."""
        if i not in self._window:
            self._fill(i)

    def at(self, index: Tensor) -> Conditioning:
        """See `Conditioner.at`."""
        row = index - self._first
        shifts, context = (buffer.index_select(0, row)[0] for buffer in (self._shifts, self._context))
        views = [slot.view(context if slot.context else shifts) for slot in self._layout]
        keys_values = [tensor for tensor, slot in zip(views, self._layout, strict=True) if slot.context]
        projections = [tensor for tensor, slot in zip(views, self._layout, strict=True) if not slot.context]
        return Conditioning(tuple(projections), tuple(zip(keys_values[::2], keys_values[1::2], strict=True)), None)

    def _fill(self, first: int) -> None:
        """Compute the window that starts at evaluation `first`."""
        per_call = max(1, self._rows_per_call // len(self._prompts.spacing))
        i, end = first, self._end(first)
        while i < end:
            computed = self._prompts.condition(self._model, self._timesteps[i : min(i + per_call, end)])
            self._allocate(computed)  # the first call determines the sizes
            end = self._end(first)
            count = min(per_call, end - i)
            self._store(computed, i - first, count)
            i += count
        self._window = range(first, end)
        self._first.fill_(first)

    def _end(self, first: int) -> int:
        return min(len(self._timesteps), first + len(self._shifts)) if self._layout else len(self._timesteps)

    def _store(self, computed: Conditioning, at: int, count: int) -> None:
        """Copy the first `count` timesteps of `computed` to the window, from its row `at` on."""
        prompts = len(self._prompts.spacing)
        tensors = [*computed.shifts, *(each for pair in computed.keys_values for each in pair)]
        for tensor, slot in zip(tensors, self._layout, strict=True):
            rows = tensor.unflatten(0, (-1, prompts))[:count].index_select(1, self._rows)
            rows = rows.expand(count, *slot.shape)
            (self._context if slot.context else self._shifts)[at : at + count, slot.start : slot.stop] = rows.flatten(1)
        if computed.class_logits is not None:
            logits = computed.class_logits.unflatten(0, (-1, prompts))[count - 1].index_select(0, self._rows)
            self.class_logits = logits

    def _allocate(self, computed: Conditioning) -> None:
        """On the first call, allocate buffers for as many evaluations as `max_bytes` allows."""
        if self._layout:
            return
        rows, sizes = len(self._prompts.rows), [0, 0]
        contexts = [each for pair in computed.keys_values for each in pair]
        for tensor in [*computed.shifts, *contexts]:
            context = len(self._layout) >= len(computed.shifts)
            repeated = self._batch_size if rows == 1 and not context else rows
            shape = (repeated, *tensor.shape[1:])
            self._layout.append(_Slot(context, sizes[context], sizes[context] + math.prod(shape), shape))
            sizes[context] += math.prod(shape)
        shift_dtype = computed.shifts[0].dtype
        context_dtype = contexts[0].dtype if contexts else shift_dtype
        bytes_per_evaluation = sizes[0] * shift_dtype.itemsize + sizes[1] * context_dtype.itemsize
        count = min(len(self._timesteps), max(1, self._max_bytes // bytes_per_evaluation))
        device = self._timesteps.device
        self._shifts = torch.empty(count, sizes[0], dtype=shift_dtype, device=device)
        self._context = torch.empty(count, sizes[1], dtype=context_dtype, device=device)


class _Slot(NamedTuple):
    """The position of one tensor of the conditioning in a row of its buffer.

    Attributes:
        context: whether it is a key or a value of a cross-attention.
        start: first element.
        stop: one past the last element.
        shape: the tensor's shape.
    """

    context: bool
    start: int
    stop: int
    shape: tuple[int, ...]

    def view(self, row: Tensor) -> Tensor:
        """The tensor as a view of its row."""
        return row[self.start : self.stop].view(self.shape)


def _equal(one: PromptRows, other: PromptRows) -> bool:
    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))

    tensors = all(same(a, b) for a, b in zip(one[:3], other[:3], strict=True))
    return tensors and one[3:] == other[3:]
