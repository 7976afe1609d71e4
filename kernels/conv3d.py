"""3x3x3 convolution of a channels-last volume with zero padding 1, and what follows it in a residual block.

    y = conv3d(x, weight) + bias + shift + residual        dx = conv3d(dy, weight flipped along X, Y and Z, C and O exchanged)

The convolution is a matrix product over the 27 taps and the input channels. The three taps along Z read the same rows of x,
moved by one voxel. So a program reads the rows of each of the 9 taps along X and Y once, multiplies them by three weights, and
moves two of the three fp32 sums along Z at the end: 9 reads of x instead of 27. A program computes whole lines along Z, so
that what is moved in at their ends is zero.

There are two forms of the kernel. One reads x and the weight through tensor descriptors: the copy engine of sm_90 and newer
fills in the zeros of the padding, and the operands go to the tensor cores without passing through registers. Its products may
be transposed, which is a choice of the launch configuration. The other computes addresses and masks; it also serves grids whose
lines do not divide a tile, by tiles that overlap by two voxels. Small grids have few programs: there the 9 taps are divided
among 3 or 9 programs, whose fp32 sums a second kernel adds in fixed order. So equal inputs always have equal results.

Shapes: x (B, C, X, Y, Z), weight (O, C, 3, 3, 3), bias (O,), shift (B, O), residual (B, O, X, Y, Z) -> (B, O, X, Y, Z).
Memory traffic for n = B X Y Z voxels in bf16, in bytes: 2nC read and 2nO written, 2nO read with a residual; plain PyTorch reads
and writes 2nO once more for each of bias, shift and residual.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv3d_weight

from ccella_fast.kernels import conv3d_forward
from ccella_fast.kernels.aot import CompileCase
from ccella_fast.kernels.backend import BackendSupport, choose, compute_dtype, library_op, triton_unsupported_reason
from ccella_fast.kernels.conv3d_forward import launch
from ccella_fast.kernels.layout import check_conv3d_shapes, contiguous_or_none
from ccella_fast.kernels.residual_shift import residual_shift, residual_shift_reference


def conv3d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """The plain PyTorch implementation, in the dtype of the convolution."""
    y = F.conv3d(x, weight, bias, padding=1)
    if shift is not None:
        y = y + shift.to(y.dtype)[:, :, None, None, None]
    return y if residual is None else residual_shift_reference(y, residual)


def _conv3d_cudnn(
    x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None
) -> Tensor:
    """cuDNN on channels-last tensors; with a residual, all that follows the convolution is one pass of `residual_shift`."""
    last = torch.channels_last_3d
    x, weight = x.contiguous(memory_format=last), weight.contiguous(memory_format=last)
    if residual is None:
        return conv3d_reference(x, weight, bias, shift)
    per_channel = bias
    if shift is not None:
        per_channel = shift if bias is None else shift + bias
    return residual_shift(F.conv3d(x, weight, padding=1), residual, per_channel)


def kernel_layout(weight: Tensor) -> Tensor:
    """`weight` (O, C, 3, 3, 3) in the order in memory that the Triton kernels read: tap, C, O."""
    return weight.permute(2, 3, 4, 1, 0).contiguous().permute(4, 3, 0, 1, 2)


@library_op("conv3d")
def _conv3d_op(x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None) -> Tensor:
    last = torch.channels_last_3d
    x = x.contiguous(memory_format=last)
    taps = weight.permute(2, 3, 4, 1, 0).contiguous()  # no copy of the result of `kernel_layout`
    residual = None if residual is None else residual.contiguous(memory_format=last)
    y = _output_like(x, weight.shape[0])
    if y.numel():
        launch(x, taps, contiguous_or_none(bias), contiguous_or_none(shift), residual, y)
    return y


@_conv3d_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None) -> Tensor:
    return _output_like(x, weight.shape[0])


def _output_like(x: Tensor, outputs: int) -> Tensor:
    batch, _, *grid = x.shape
    return torch.empty((batch, outputs, *grid), dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


def _setup_context(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    x, weight, *added = inputs
    ctx.save_for_backward(x, weight)
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in added]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """dx by the same kernel, dweight by PyTorch; the others are dy and its sums."""
    x, weight = ctx.saved_tensors
    bias_dtype, shift_dtype, residual_dtype = ctx.dtypes
    dx = dweight = dbias = dshift = None
    if ctx.needs_input_grad[0]:
        dx = _conv3d_op(dy, weight.flip(2, 3, 4).transpose(0, 1), None, None, None)
    if ctx.needs_input_grad[1]:
        # With Triton's interpreter the tensors are on a CPU, where oneDNN's bf16 weight gradient is wrong on small grids.
        wide = torch.float32 if dy.device.type == "cpu" else dy.dtype
        dweight = conv3d_weight(x.to(wide), weight.shape, dy.to(wide), padding=1).to(weight.dtype)
    if bias_dtype is not None and ctx.needs_input_grad[2]:
        dbias = dy.sum((0, 2, 3, 4), dtype=torch.float32).to(bias_dtype)
    if shift_dtype is not None and ctx.needs_input_grad[3]:
        dshift = dy.sum((2, 3, 4), dtype=torch.float32).to(shift_dtype)
    return dx, dweight, dbias, dshift, None if residual_dtype is None else dy.to(residual_dtype)


_conv3d_op.register_autograd(_backward, setup_context=_setup_context)


def backend_support(
    device: torch.device, dtype: torch.dtype, *, training: bool = False, descriptors: bool = True
) -> BackendSupport:
    """The backends in order of preference, each with the reason why it is unsupported, None if it is supported.

    `triton` comes first where it reads through tensor descriptors and the weight's order in memory is kept between calls. On an
    NVIDIA H100 (Triton 3.6.0, PyTorch 2.11, cuDNN 9.19, bf16) a denoising step of the default model took 5.03 ms with it and
    5.54 with `cudnn`; a convolution with bias and residual at batch 1 took 67.0 and 98.3 us at 64 channels, 27.6 and 48.1 at
    128, 19.8 and 24.2 at 256. The kernel with pointers was not measured, and in training, where the weight is copied in
    each step, the times were equal within the noise.

    Args:
        device: Device of the tensors.
        dtype: Dtype of the convolution.
        training: Whether gradients are needed.
        descriptors: Whether the sizes suit the kernel with descriptors, see `conv3d_forward.suits_descriptors`.
    """
    cudnn_reason = _cudnn_unsupported_reason(device)
    triton_reason = triton_unsupported_reason(device, dtype)
    if device.type != "cuda":
        return {"reference": None, "cudnn": cudnn_reason, "triton": triton_reason}
    if descriptors and not training and conv3d_forward.descriptors_unsupported_reason(device, dtype) is None:
        return {"triton": triton_reason, "cudnn": cudnn_reason, "reference": None}
    return {"cudnn": cudnn_reason, "reference": None, "triton": triton_reason}


def choose_backend(x: Tensor, outputs: int, requested: str | None = None) -> str:
    """The backend that convolves x (B, C, X, Y, Z) to this many channels.

    Raises:
        BackendError: `requested` is unsupported here.
    """
    support = backend_support(
        x.device, compute_dtype(x), training=torch.is_grad_enabled(),
        descriptors=conv3d_forward.suits_descriptors(x, outputs),
    )  # fmt: skip
    return choose("conv3d", support, requested)


def _cudnn_unsupported_reason(device: torch.device) -> str | None:
    """Why PyTorch does not use cuDNN for such tensors, None if it does."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on a GPU"
    return None if torch.backends.cudnn.enabled else "torch.backends.cudnn.enabled is False"


def aot_cases() -> list[CompileCase]:
    """The cases that `kernels/aot.py` compiles."""
    return conv3d_forward.aot_cases()


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolve a volume with a 3x3x3 weight and zero padding 1; add a bias, a shift per sample and channel, and a residual.

    Args:
        x: (B, C, X, Y, Z).
        weight: (O, C, 3, 3, 3); for `triton` best in `kernel_layout`, for a weight that does not change (inference).
        bias: (O,) or None.
        shift: (B, O) or None.
        residual: (B, O, X, Y, Z) or None.
        backend: "cudnn", "reference" or "triton"; None for the first supported one.

    Returns:
        (B, O, X, Y, Z) in the dtype of the convolution.

    Raises:
        ValueError: The shapes do not match.
        BackendError: `backend` is unsupported here.
    """
    check_conv3d_shapes(x, weight)
    expected = {
        "bias": (bias, weight.shape[:1]),
        "shift": (shift, (x.shape[0], weight.shape[0])),
        "residual": (residual, (x.shape[0], weight.shape[0], *x.shape[2:])),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    chosen = choose_backend(x, weight.shape[0], backend)
    if chosen == "triton":
        dtype = compute_dtype(x)
        return _conv3d_op(x.to(dtype), weight.to(dtype), bias, shift, residual)
    return (_conv3d_cudnn if chosen == "cudnn" else conv3d_reference)(x, weight, bias, shift, residual)
