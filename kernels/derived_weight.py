"""Tensors derived from weights, such as sums of taps, which inference computes once instead of in every call."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ccella_fast.kernels.backend import compute_dtype


class DerivedWeight:
    """A function of weights whose result is kept between calls that need no gradient, as long as the weights do not change.

    A change through `.data`, as DeepSpeed's optimizers make it, cannot be detected: so a call with gradients discards the
    result, and a module that has a derived weight calls `clear` in `train()`, which `eval()` calls too. Copies and pickles do
    not contain the result. A CUDA graph reads the result that was kept when it was captured, so it must be captured again after
    a change of the weights.

    Args:
        compute: the function.
    """

    def __init__(self, compute: Callable[..., Tensor]):
        self._compute = compute
        self._kept: tuple[list[weakref.ref[Tensor]], list[tuple], Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    def clear(self) -> None:
        """Discard the result."""
        self._kept = None

    def of(self, *weights: Tensor) -> Tensor | None:
        """The result for these weights; None where none is kept: with gradients, under autocast, while compiling.

        In the capture of a CUDA graph nothing is computed for later calls, since a capture runs nothing.
        """
        if torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled() or any(w.is_inference() or compute_dtype(w) != w.dtype for w in weights):
            self._kept = None
            return None
        kept = self._kept  # read once: the replicas of nn.DataParallel share this object among threads
        state = [(w.data_ptr(), w._version, w.dtype, w.device) for w in weights]
        # An address alone does not identify a tensor: it may be that of an earlier one that has been freed.
        if kept is None or kept[1] != state or any(ref() is not w for ref, w in zip(kept[0], weights, strict=True)):
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                return None
            kept = self._kept = [weakref.ref(w) for w in weights], state, self._compute(*weights)
        return kept[2]
