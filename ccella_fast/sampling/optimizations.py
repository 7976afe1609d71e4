"""What makes sampling fast, each with a switch of its own, so that its worth can be measured alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ccella_fast import hardware
from ccella_fast.deprecation import deprecated_arguments
from ccella_fast.errors import ConfigError, did_you_mean
from ccella_fast.kernels.upsample_conv3d import UpsampleConv3d

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@deprecated_arguments(hoist="precompute_conditioning")
@dataclass(frozen=True)
class Optimizations:
    """The sampler's optimisations. All are exact up to rounding. (Lower precision is the sampler's `dtype`; `Reuse` is an
    approximation.)

    Attributes:
        precompute_conditioning: compute adapter, class vector, embeddings, keys and values before the loop instead of in every
            step.
        channels_last: convolutions in channels_last_3d; None: on CUDA, and on a CPU where the weights are bf16.
        packed_weights: with channels_last where oneDNN supports bf16: convolution weights in its layout; None: unless compiled.
        phase_upsampler: nearest x2 and convolution as eight small convolutions: 3.4 times fewer multiplications there.
        cuda_graph: on CUDA, capture a step once and replay it: one launch instead of hundreds.
        overlap_decode: on CUDA, decode on a second stream during the next batch's denoising.
        compile: torch.compile of the network; the first step then takes minutes.
    """

    precompute_conditioning: bool = True
    channels_last: bool | None = None
    packed_weights: bool | None = None
    phase_upsampler: bool = True
    cuda_graph: bool = True
    overlap_decode: bool = True
    compile: bool = False

    @classmethod
    def off(cls) -> Optimizations:
        """The plain loop, to measure against."""
        return cls(
            precompute_conditioning=False, channels_last=False, packed_weights=False, phase_upsampler=False, cuda_graph=False,
            overlap_decode=False,
        )  # fmt: skip


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto": bf16 on CUDA and on CPUs with instructions for it (AVX512-BF16, AMX), fp32 elsewhere."""
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        fast = device.type == "cuda" or (device.type == "cpu" and hardware.cpu_multiplies_bf16())
        return torch.bfloat16 if fast else torch.float32
    if dtype not in DTYPES:
        fix = did_you_mean(dtype, [*DTYPES, "auto"])
        raise ConfigError(f"there is no dtype '{dtype}'", field="dtype", fix=fix)
    if dtype == "float16" and device.type == "cpu":
        raise ConfigError("float16 is not for CPUs", field="dtype", fix="use bfloat16 or float32")
    return DTYPES[dtype]


def channels_last(optimizations: Optimizations, dtype: torch.dtype, device: torch.device) -> bool:
    """fp32 on a CPU is the exception: there oneDNN is as fast, or faster, with NCDHW."""
    if optimizations.channels_last is not None:
        return optimizations.channels_last
    return device.type == "cuda" or dtype != torch.float32


def apply_optimizations(
    twin: ModuleT, source: nn.Module, optimizations: Optimizations, dtype: torch.dtype, device: torch.device
) -> ModuleT:
    """Give `twin`, built like `source` on the meta device, the weights of `source` in the wanted form.

    `source` stays as it is. A tensor that already has dtype, device and layout is shared with it, any other is copied."""
    last = channels_last(optimizations, dtype, device)

    def converted(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        return tensor.contiguous(memory_format=torch.channels_last_3d) if last and tensor.ndim == 5 else tensor

    twin.load_state_dict({name: converted(tensor) for name, tensor in source.state_dict().items()}, assign=True)
    if not optimizations.phase_upsampler:
        for module in twin.modules():
            if isinstance(module, UpsampleConv3d):
                module.backend = "reference"
    return twin.eval().requires_grad_(False)
