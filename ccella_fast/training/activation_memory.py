"""Memory of the activations that a training step keeps, counted without computing them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ccella_fast.config import Config
from ccella_fast.losses import noise_loss
from ccella_fast.models import build_model
from ccella_fast.models.parts import select_trained


def activation_bytes(config: Config, *, tokens: int, device_type: str) -> int:
    """Bytes that one micro-batch keeps from the forward pass for the backward pass, without activation checkpointing.

    The configured model runs with the kernels of the device on fake tensors, which have shapes but no values. The temporary
    memory of the backward pass and of the allocator is not included.

    Args:
        config: the configuration, whose precision is resolved.
        tokens: length of the text features.
        device_type: "cpu" or "cuda".
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    size, grid = config.training.batch_size, config.check_grid()
    dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    with FakeTensorMode(), torch.device(device_type):
        model = _build(config, dtype)
        x = torch.empty(size, sum(config.model.latent_channels), *grid, dtype=dtype)
        inputs: dict[str, Any] = {
            "spacing": torch.empty(size, 3),
            "pirads": torch.empty(size, config.model.num_classes),
        }
        if config.model.traits.text:
            inputs["text"] = torch.empty(size, tokens, config.model.input_dim, dtype=dtype)
        timesteps = torch.zeros(size, dtype=torch.long)
        return saved_bytes(lambda: noise_loss(model(x, timesteps, **inputs)[0], x), without=model.parameters())


def _build(config: Config, dtype: torch.dtype) -> Any:
    """The model with weights of `dtype`; fake parameters cannot be converted by `Module.to`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = build_model(config)
        select_trained(model, config)
        return model
    finally:
        torch.set_default_dtype(before)


def saved_bytes(run: Callable[[], Any], *, without: Iterable[Tensor] = ()) -> int:
    """Bytes that autograd keeps for the backward pass of `run`, without leaves that require gradients.

    Each storage counts once, and those of `without`, of which views may be kept, do not count.
    """
    kept: dict[int, int] = {}
    alive = []
    excluded = {tensor.untyped_storage()._cdata for tensor in without}

    def pack(tensor: Tensor) -> Tensor:
        if not tensor.is_leaf or not tensor.requires_grad:
            storage = tensor.untyped_storage()
            alive.append(storage)
            if storage._cdata not in excluded:
                kept[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(kept.values())
