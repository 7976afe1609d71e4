"""Memory in which a backward pass computes the gradient of a weight: that of the optimizer, see `FlatAdamW`.

A weight has it as the attribute `gradient_memory`, which is called for a tensor, or for None, which stands for new memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

GradientMemory = Callable[[], Tensor | None] | None


def gradient_memory_of(weight: Tensor) -> GradientMemory:
    """The attribute of the weight, None if it has none."""
    return getattr(weight, "gradient_memory", None)


def empty_gradient(weight: Tensor, memory: GradientMemory) -> Tensor:
    """A tensor for the gradient of the weight, in the given memory if it can be had."""
    given = memory() if memory is not None else None
    # Another tensor in the given memory: autograd would copy one that is referred to elsewhere.
    return torch.empty_like(weight) if given is None else given.detach()
