"""Tensors derived from weights, such as sums of taps, which inference computes once instead of in every call."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ccella_fast.kernels.backend import compute_dtype


class DerivedWeight:
    """A function of weights whose result is kept between calls that need no gradient, as long as the weights do not change.

    A change through `.data`, as DeepSpeed's optimizers make it, cannot be detected: so a call with gradients discards the
    result, and a module that has a derived weight calls `clear` in `train()`, which `eval()` calls too.

    Args:
        compute: the function.
    """

    def __init__(self, compute: Callable[..., Tensor]):
        self._compute = compute
        self._kept: tuple[tuple, Tensor] | None = None

    def clear(self) -> None:
        """Discard the result."""
        self._kept = None

    def of(self, *weights: Tensor) -> Tensor | None:
        """The result for these weights; None where none is kept: with gradients, under autocast, while compiling."""
        if torch.compiler.is_compiling():
            return None
        if torch.is_grad_enabled() or any(w.is_inference() or compute_dtype(w) != w.dtype for w in weights):
            self._kept = None
            return None
        key = tuple((w.data_ptr(), w._version, w.dtype, w.device) for w in weights)
        if self._kept is None or self._kept[0] != key:
            self._kept = key, self._compute(*weights)
        return self._kept[1]
