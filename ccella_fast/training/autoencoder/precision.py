"""The precision in which the autoencoder's training runs its networks."""

from __future__ import annotations

import torch
from torch import Tensor


def network_precision(x: Tensor) -> torch.autocast:
    """A context in which networks compute in bf16 on a GPU. On a CPU, the result would depend on the CPU's instructions."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda")
