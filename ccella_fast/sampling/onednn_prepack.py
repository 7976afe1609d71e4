"""Convolution weights in oneDNN's own blocked layout, made once.

PyTorch hands oneDNN the weights as they lie, and every call reorders them for the CPU's matrix units: at the reference's size
322 MB a step in bf16, a third of a step on a small latent. Packed weights give the same bits. They are copies beside the
parameters; the operators are those that PyTorch's own compiler uses for frozen models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ccella_fast.kernels.upsample_conv3d import UpsampleConv3d, phase_weights, upsample_conv3d_phase


class PackedConvolution:
    """In place of `nn.Conv3d._conv_forward`: x (B, C, X, Y, Z), a weight that is not read (this object has its own), bias."""

    def __init__(self, weight: Tensor, stride: Sequence[int], padding: Sequence[int]):
        self.dtype = weight.dtype
        self._plain, self._stride, self._padding = weight, list(stride), list(padding)
        self._packed: Tensor | None = None

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        ones = [1, 1, 1]
        if self._packed is None:  # oneDNN chooses the layout for a size of input; others are still computed rightly
            reorder: Any = torch._C._nn.mkldnn_reorder_conv3d_weight
            dense = self._plain.detach().to_mkldnn()
            self._packed = reorder(dense, self._padding, self._stride, ones, 1, list(x.shape))
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last_3d)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self._packed, bias, self._padding, self._stride, ones, 1, "none", [], ""
        )


class PackedUpsampling:
    """In place of `UpsampleConv3d.forward`: its eight phases, each packed."""

    def __init__(self, module: UpsampleConv3d):
        self._weight, self._bias = module.weight, module.bias
        self._phases = [PackedConvolution(phase, (1, 1, 1), (0, 0, 0)) for phase in phase_weights(module.weight)]

    def __call__(self, x: Tensor) -> Tensor:
        apply = lambda corner, phase, bias: phase(corner, None, bias)  # noqa: E731
        return upsample_conv3d_phase(x, self._weight, self._bias, self._phases, apply)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """bf16 on a CPU where oneDNN's operator supports it; on one without AVX-512 it raises an error. In fp32 the reordering is
    small beside the convolution, and the layout no better."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def pack(network: nn.Module) -> None:
    """Change the forward passes of the convolutions of `network`, which takes no gradients any more; parameters stay."""
    for module in network.modules():
        if isinstance(module, UpsampleConv3d):
            if module.backend is None:
                module.forward = PackedUpsampling(module)  # type: ignore[method-assign]
        elif isinstance(module, nn.Conv3d):
            packed = PackedConvolution(module.weight, module.stride, [int(each) for each in module.padding])
            module._conv_forward = packed  # type: ignore[assignment]
