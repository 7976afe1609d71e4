"""Convolution weights prepacked in oneDNN's blocked layout.

PyTorch passes weights to oneDNN in their plain layout, and every call reorders them for the CPU's matrix units: 322 MB per step
in bf16 at the reference's size, a third of the time of a step on a small latent. Prepacked weights give the same bits; they are
copies in addition to the parameters.

PyTorch has no public API for this. The module calls two private operators, `mkldnn_reorder_conv3d_weight` and
`mkldnn._convolution_pointwise`, because PyTorch's own compiler uses them for the same purpose with frozen models.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ccella_fast.kernels.upsample_conv3d import UpsampleConv3d, phase_weights, upsample_conv3d_phase


class PackedConvolution:
    """Replaces `nn.Conv3d._conv_forward`, with prepacked weights."""

    def __init__(self, weight: Tensor, stride: Sequence[int], padding: Sequence[int]):
        self.dtype = weight.dtype
        self._plain, self._stride, self._padding = weight, list(stride), list(padding)
        self._packed: Tensor | None = None

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The convolution of x (B, C, X, Y, Z), in the dtype of the weights; `weight` is ignored."""
        ones = [1, 1, 1]
        if self._packed is None:  # oneDNN chooses the layout for one input size; it is valid for all
            reorder: Any = torch._C._nn.mkldnn_reorder_conv3d_weight
            dense = self._plain.detach().to_mkldnn()
            self._packed = reorder(dense, self._padding, self._stride, ones, 1, list(x.shape))
        x = x.to(self.dtype).contiguous(memory_format=torch.channels_last_3d)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self._packed, bias, self._padding, self._stride, ones, 1, "none", [], ""
        )


class PackedUpsampling:
    """Replaces `UpsampleConv3d.forward`, with the weights of its eight phases prepacked."""

    def __init__(self, module: UpsampleConv3d):
        self._weight, self._bias = module.weight, module.bias
        self._phases = [PackedConvolution(phase, (1, 1, 1), (0, 0, 0)) for phase in phase_weights(module.weight)]

    def __call__(self, x: Tensor) -> Tensor:
        """Nearest x2 upsampling and convolution of x (B, C, X, Y, Z)."""
        apply = lambda corner, phase, bias: phase(corner, None, bias)  # noqa: E731
        return upsample_conv3d_phase(x, self._weight, self._bias, self._phases, apply)


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether weights are prepacked: in bf16 on a CPU that oneDNN's bf16 convolution supports.

    Without AVX-512 that operator raises an error, so `mkldnn._is_mkldnn_bf16_supported`, which is private too, is checked.
    In fp32 the reordering costs little compared with the convolution, and the blocked layout is not faster.
    """
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def prepack_convolutions(network: nn.Module) -> None:
    """Replace the forward passes of the convolutions of `network`; its parameters stay, but no longer receive gradients.

    Assigns `forward` of each UpsampleConv3d and the private `_conv_forward` of each nn.Conv3d on the instance, so that the
    modules and the state dict stay as they are.
    """
    for module in network.modules():
        if isinstance(module, UpsampleConv3d):
            if module.backend is None:
                module.forward = PackedUpsampling(module)  # type: ignore[method-assign]
        elif isinstance(module, nn.Conv3d):
            packed = PackedConvolution(module.weight, module.stride, [int(each) for each in module.padding])
            module._conv_forward = packed  # type: ignore[assignment]
