"""The sampler's optimizations. Each has its own switch, so that its effect can be measured separately."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from ccella_fast import hardware
from ccella_fast.deprecation import DeprecatedAttribute, deprecated_arguments
from ccella_fast.errors import ConfigError, did_you_mean
from ccella_fast.kernels.backend import ENVIRONMENT, BackendError, explain
from ccella_fast.kernels.upsample_conv3d import UpsampleConv3d
from ccella_fast.models.low_rank import plain_state_dict
from ccella_fast.models.unet3d import UNet3d

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@deprecated_arguments(hoist="precompute_conditioning")
@dataclass(frozen=True)
class Optimizations:
    """The sampler's optimizations, all exact up to rounding.

    Lower precision is the sampler's `dtype`, and `Reuse` is an approximation; neither is listed here.

    Attributes:
        precompute_conditioning: compute adapter, class vector, embeddings, keys and values before the loop instead of in every
            step.
        channels_last: convolutions in channels_last_3d; None: on CUDA, and on a CPU if the weights are not fp32.
        packed_weights: on a CPU with oneDNN support for bf16, with bf16 weights in channels_last_3d: store convolution weights
            in oneDNN's blocked layout; None: on, unless `compile` is.
        phase_upsampler: nearest x2 upsampling and convolution as eight convolutions of the small grid, in one kernel on a GPU,
            with 3.4 times fewer multiplications.
        cuda_graph: on CUDA, capture a step once and replay it: one launch instead of hundreds.
        overlap_decode: on CUDA, decode on a second stream while the next batch is denoised.
        compile: apply torch.compile to the network; the first step then takes minutes.
    """

    precompute_conditioning: bool = True
    channels_last: bool | None = None
    packed_weights: bool | None = None
    phase_upsampler: bool = True
    cuda_graph: bool = True
    overlap_decode: bool = True
    compile: bool = False

    hoist = DeprecatedAttribute("precompute_conditioning")

    @classmethod
    def off(cls) -> Optimizations:
        """All optimizations off: the eager baseline for measurements."""
        return cls(
            precompute_conditioning=False, channels_last=False, packed_weights=False, phase_upsampler=False, cuda_graph=False,
            overlap_decode=False,
        )  # fmt: skip


def check_backends(device: torch.device, dtype: torch.dtype) -> None:
    """Check that the kernel backends that the environment requests can run.

    Raises:
        ConfigError: one of them does not exist or is not supported for this device and dtype.
    """
    try:
        explain(device, dtype)
    except BackendError as bad:
        fix = f"unset {ENVIRONMENT}, or request another backend (`ccella-fast env` lists what runs here)"
        raise ConfigError(str(bad), field=ENVIRONMENT, fix=fix) from None


@contextlib.contextmanager
def fastest_convolutions() -> Iterator[None]:
    """Context manager in which cuDNN tries its algorithms on the first convolution of each shape; its other flags stay."""
    cudnn = torch.backends.cudnn
    flags = {"enabled": cudnn.enabled, "deterministic": cudnn.deterministic, "allow_tf32": cudnn.allow_tf32}
    with cudnn.flags(**flags, benchmark=True):
        yield


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype for its name; "auto" is bf16 on CUDA and on CPUs with bf16 instructions (AVX512-BF16, AMX), otherwise fp32.

    Raises:
        ConfigError: the name is unknown, or the device does not support the dtype.
    """
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        fast = device.type == "cuda" or (device.type == "cpu" and hardware.cpu_multiplies_bf16())
        return torch.bfloat16 if fast else torch.float32
    if dtype not in DTYPES:
        fix = did_you_mean(dtype, [*DTYPES, "auto"])
        raise ConfigError(f"there is no dtype '{dtype}'", field="dtype", fix=fix)
    if dtype == "float16" and device.type == "cpu":
        why = "dtype float16 is not supported on CPUs"
        raise ConfigError(why, field="dtype", fix="use bfloat16 or float32")
    return DTYPES[dtype]


def uses_channels_last(optimizations: Optimizations, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether convolutions run in channels_last_3d.

    By default all but fp32 on a CPU do, where oneDNN is at least as fast with NCDHW.
    """
    if optimizations.channels_last is not None:
        return optimizations.channels_last
    return device.type == "cuda" or dtype != torch.float32


def apply_optimizations(
    twin: ModuleT, source: nn.Module, optimizations: Optimizations, dtype: torch.dtype, device: torch.device
) -> ModuleT:
    """Load the weights of `source` into `twin`, with the given dtype and device and the layout of the optimizations.

    `source` is not modified. A tensor that already has that dtype, device and layout is shared; others are copied.

    Args:
        twin: a network like `source`, on the meta device.
        source: the network with the weights.
        optimizations: the sampler's optimizations.
        dtype: of the floating-point weights.
        device: of the weights.

    Returns:
        `twin`, in evaluation mode and without gradients.
    """
    last = uses_channels_last(optimizations, dtype, device)

    def convert(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        return tensor.contiguous(memory_format=torch.channels_last_3d) if last and tensor.ndim == 5 else tensor

    twin.load_state_dict({name: convert(tensor) for name, tensor in plain_state_dict(source).items()}, assign=True)
    for module in twin.modules():
        if isinstance(module, UpsampleConv3d) and not optimizations.phase_upsampler:
            module.backend = "reference"
        elif isinstance(module, UNet3d):
            module.channels_last = last
    return twin.eval().requires_grad_(False)
