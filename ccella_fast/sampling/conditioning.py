"""Everything that does not depend on the noisy latent, computed before the loop: adapter, class vector, embeddings, the
projections into every residual block, keys and values of every cross-attention. Exact.

The timesteps of a plan are known beforehand, so they go through the adapter as one batch instead of one by one. At the
reference's size a timestep of one report is 4.5 MB in bf16: all 1000 are more than a small GPU has to spare, so the table is
filled in windows, ahead of the loop.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ccella_fast.models import Conditioning, DiffusionModel

TABLE_BYTES = 2**30  # of a window
_ROWS = {"cuda": 64, "cpu": 16}  # rows (timesteps x prompts) that go through the adapter together


class PromptRows(NamedTuple):
    """The conditioning inputs of one network call, duplicates left out: U different prompts for R rows.

    For a batch of B volumes, R is 1 if all are alike and B if not. Where guidance acts in any step of the run, R is 2B: one row
    for each volume, then the same again with the null report. Steps without guidance use the first B rows, or the single one.

    text (U, L, E) or None; spacing (U, 3) in mm x 100; pirads (U, classes) x 100 or None; rows: R indices into them."""

    text: Tensor | None
    spacing: Tensor
    pirads: Tensor | None
    override_class: bool
    rows: tuple[int, ...]

    @property
    def form(self) -> tuple:
        """What must not change from batch to batch where a step has been recorded: only the numbers in the tensors may."""
        shapes = tuple(None if tensor is None else tuple(tensor.shape) for tensor in self[:3])
        return shapes, self.override_class, self.rows

    def condition(self, model: DiffusionModel, timesteps: Tensor) -> Conditioning:
        """timesteps (n,) -> conditioning of n x U rows, timestep by timestep."""
        count, prompts = len(timesteps), len(self.spacing)
        return model.condition(
            timesteps.repeat_interleave(prompts),
            spacing=self.spacing.repeat(count, 1),
            text=self.text,
            pirads=None if self.pirads is None else self.pirads.repeat(count, 1),
            override_class=self.override_class,
        )


class Conditioner(Protocol):
    """Where a step finds its conditioning. class_logits: of the last timestep, (R, classes), None where none is predicted."""

    class_logits: Tensor | None

    def start(self, prompts: PromptRows) -> None:
        """Take the prompts of another batch, of the same `form`."""

    def prepare(self, i: int) -> None:
        """Called on the host before evaluation i."""

    def at(self, index: Tensor) -> Conditioning:
        """The conditioning at evaluation `index`, (1,) on the device. Can be captured in a CUDA graph."""
        ...


class UncachedConditioning:
    """The plain loop: the adapter runs in every step."""

    def __init__(self, model: DiffusionModel, timesteps: Tensor):
        self._model, self._timesteps = model, timesteps
        self._prompts: PromptRows | None = None
        self.class_logits: Tensor | None = None

    def start(self, prompts: PromptRows) -> None:
        if self._prompts is None:
            self._prompts = prompts
            self._rows = torch.tensor(prompts.rows, device=prompts.spacing.device)
            return
        assert self._prompts.form == prompts.form
        for old, new in zip(self._prompts[:3], prompts[:3], strict=True):  # a captured step reads the old tensors
            if isinstance(old, Tensor) and isinstance(new, Tensor):
                old.copy_(new)

    def prepare(self, i: int) -> None:
        pass

    def at(self, index: Tensor) -> Conditioning:
        assert self._prompts is not None
        found = self._prompts.condition(self._model, self._timesteps.index_select(0, index))
        shifts = tuple(each.index_select(0, self._rows) for each in found.shifts)
        keys_values = tuple(
            (keys.index_select(0, self._rows), values.index_select(0, self._rows)) for keys, values in found.keys_values
        )
        if found.class_logits is not None:
            logits = found.class_logits.index_select(0, self._rows)
            self.class_logits = logits if self.class_logits is None else self.class_logits.copy_(logits)
        return Conditioning(shifts, keys_values, None)


class ConditioningCache:
    """A window of evaluations, one row each, packed so that a step gathers all it needs with two kernels.

    Its tensors keep their addresses, so that a captured step can be replayed with the next window and the next batch."""

    def __init__(
        self, model: DiffusionModel, timesteps: Tensor, *, max_bytes: int = TABLE_BYTES, row_by_row: bool = False
    ):
        """timesteps (E,). row_by_row: one row at a time through the adapter, so that no row's rounding depends on others."""
        self._model, self._timesteps = model, timesteps
        self._max_bytes = max_bytes
        self._chunk = 1 if row_by_row else _ROWS.get(timesteps.device.type, 16)
        self._first = torch.zeros(1, dtype=torch.int64, device=timesteps.device)
        self._window = range(0)
        self._layout: list[_Slot] = []
        self._prompts: PromptRows
        self.class_logits: Tensor | None = None

    def start(self, prompts: PromptRows) -> None:
        """Take other prompts. An equal set whose timesteps are all in the window is not computed again."""
        if len(self._window) == len(self._timesteps) and _equal(prompts, self._prompts):
            return
        self._prompts, self._window = prompts, range(0)
        self._rows = torch.tensor(prompts.rows, device=prompts.spacing.device)

    def prepare(self, i: int) -> None:
        if i not in self._window:
            self._fill(i)

    def at(self, index: Tensor) -> Conditioning:
        place = index - self._first
        shifts, context = (buffer.index_select(0, place)[0] for buffer in (self._shifts, self._context))
        found = [slot.view(context if slot.context else shifts) for slot in self._layout]
        pairs = [tensor for tensor, slot in zip(found, self._layout, strict=True) if slot.context]
        plain = [tensor for tensor, slot in zip(found, self._layout, strict=True) if not slot.context]
        return Conditioning(tuple(plain), tuple(zip(pairs[::2], pairs[1::2], strict=True)), None)

    def _fill(self, first: int) -> None:
        per_call = max(1, self._chunk // len(self._prompts.spacing))
        i, end = first, self._end(first)
        while i < end:
            found = self._prompts.condition(self._model, self._timesteps[i : min(i + per_call, end)])
            self._allocate(found)  # the first call shows the sizes
            end = self._end(first)
            count = min(per_call, end - i)
            self._store(found, i - first, count)
            i += count
        self._window = range(first, end)
        self._first.fill_(first)

    def _end(self, first: int) -> int:
        return min(len(self._timesteps), first + len(self._shifts)) if self._layout else len(self._timesteps)

    def _store(self, found: Conditioning, at: int, count: int) -> None:
        prompts = len(self._prompts.spacing)
        tensors = [*found.shifts, *(each for pair in found.keys_values for each in pair)]
        for tensor, slot in zip(tensors, self._layout, strict=True):
            rows = tensor.unflatten(0, (-1, prompts))[:count].index_select(1, self._rows)
            (self._context if slot.context else self._shifts)[at : at + count, slot.start : slot.stop] = rows.flatten(1)
        if found.class_logits is not None:
            logits = found.class_logits.unflatten(0, (-1, prompts))[count - 1].index_select(0, self._rows)
            self.class_logits = logits

    def _allocate(self, found: Conditioning) -> None:
        """Once: buffers for as many evaluations as the cap allows."""
        if self._layout:
            return
        rows, sizes = len(self._prompts.rows), [0, 0]
        contexts = [each for pair in found.keys_values for each in pair]
        for tensor in [*found.shifts, *contexts]:
            context = len(self._layout) >= len(found.shifts)
            shape = (rows, *tensor.shape[1:])
            self._layout.append(_Slot(context, sizes[context], sizes[context] + math.prod(shape), shape))
            sizes[context] += math.prod(shape)
        wide, narrow = found.shifts[0].dtype, contexts[0].dtype if contexts else found.shifts[0].dtype
        bytes_each = sizes[0] * wide.itemsize + sizes[1] * narrow.itemsize
        count = min(len(self._timesteps), max(1, self._max_bytes // bytes_each))
        device = self._timesteps.device
        self._shifts = torch.empty(count, sizes[0], dtype=wide, device=device)
        self._context = torch.empty(count, sizes[1], dtype=narrow, device=device)


class _Slot(NamedTuple):
    """Where a tensor of the conditioning lies in a row of its buffer. context: it is a key or a value."""

    context: bool
    start: int
    stop: int
    shape: tuple[int, ...]

    def view(self, row: Tensor) -> Tensor:
        return row[self.start : self.stop].view(self.shape)


def _equal(one: PromptRows, other: PromptRows) -> bool:
    def same(a: Tensor | None, b: Tensor | None) -> bool:
        return (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b))

    tensors = all(same(a, b) for a, b in zip(one[:3], other[:3], strict=True))
    return tensors and one[3:] == other[3:]
