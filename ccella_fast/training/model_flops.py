"""Floating-point operations of a training step, counted once, and the rate that a GPU is specified for.

MFU, the model FLOPs utilization (Chowdhery et al. 2022, arXiv 2204.02311, appendix B), is the first per second over the second.
The matrix products and convolutions of forward and backward pass count, as the plain model has them: what activation
checkpointing repeats does not, nor what a kernel saves.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from ccella_fast.config import Config
from ccella_fast.kernels.backend import ENVIRONMENT
from ccella_fast.losses import noise_loss
from ccella_fast.models import build_model
from ccella_fast.models.parts import select_trained

# Dense bf16 with fp32 sums, TFLOP/s, from NVIDIA's data sheets; the first name that is a part of the device's counts.
_PEAKS = {
    "B200": 2250.0, "GH200": 989.5, "H200 NVL": 835.5, "H200": 989.5, "H100 NVL": 835.5, "H100 PCIe": 756.5, "H100": 989.5,
    "A100": 312.0, "A30": 165.0, "A40": 149.7, "L40S": 362.0, "L40": 181.0, "L4": 121.0,
    "RTX 6000 Ada": 364.2, "RTX A6000": 154.8, "RTX 4090": 165.2, "RTX 3090": 71.0,
}  # fmt: skip
# The settings on which the FLOPs of a micro-batch depend.
_DECIDING: Any = {
    "model": True, "autoencoder": True, "data": {"dim", "sequences"}, "training": {"batch_size", "freeze"},
}  # fmt: skip


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s that the data sheet of the device gives for its matrix units in bf16; None in fp32, on a CPU and if unknown."""
    if device.type != "cuda" or precision != "bf16":
        return None
    name = torch.cuda.get_device_name(device)
    if "MIG" in name or "Laptop" in name:  # a part of the device; a slower one of the same name
        return None
    return next((1e12 * rate for known, rate in _PEAKS.items() if re.search(rf"\b{known}\b", name)), None)


def step_flops(config: Config, *, tokens: int) -> int:
    """FLOPs of one process in an optimizer step. Those of the gradients of frozen parts do not count.

    Args:
        config: the configuration.
        tokens: length of the text features.
    """
    return (
        _micro_batch_flops(config.model_dump_json(include=_DECIDING), tokens)
        * config.training.gradient_accumulation_steps
    )


@functools.lru_cache
def _micro_batch_flops(settings: str, tokens: int) -> int:
    """FLOPs of forward and backward pass, counted on tensors without values, which takes seconds for the default model."""
    config = Config.model_validate_json(settings)
    size, model_config = config.training.batch_size, config.model
    with _reference_kernels(), torch.device("meta"):
        model = build_model(config)
        select_trained(model, config)
        x = torch.empty(size, sum(model_config.latent_channels), *config.check_grid())
        inputs: dict[str, Any] = {
            "spacing": torch.empty(size, 3),
            "pirads": torch.empty(size, model_config.num_classes),
        }
        if model_config.traits.text:
            inputs["text"] = torch.empty(size, tokens, model_config.input_dim)
        with FlopCounterMode(display=False) as counter:
            predicted, logits = model(x, torch.zeros(size, dtype=torch.long), **inputs)
            loss = noise_loss(predicted, x)
            (loss if logits is None else loss + logits.sum()).backward()
    return counter.get_total_flops()


@contextmanager
def _reference_kernels() -> Iterator[None]:
    """Kernels are computed with plain PyTorch in the block, whose operations PyTorch can count."""
    before = os.environ.get(ENVIRONMENT)
    os.environ[ENVIRONMENT] = "reference"
    try:
        yield
    finally:
        os.environ.pop(ENVIRONMENT) if before is None else os.environ.update({ENVIRONMENT: before})
