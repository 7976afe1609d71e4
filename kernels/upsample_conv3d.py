"""Nearest-neighbor upsampling of a volume by 2, then a 3x3x3 convolution with zero padding 1, computed on the small grid.

    y = conv3d(repeat each voxel twice along each axis, w) + b

Along one axis, an output voxel 2i + p depends on only two of the inputs i - 1, i, i + 1, with sums of taps as weights:

    p = 0:  w0 x[i-1] + (w1 + w2) x[i]            p = 1:  (w0 + w1) x[i] + w2 x[i+1]

so the layer equals eight 2x2x2 convolutions ("phases") on the small grid: 8 instead of 27 taps per output voxel, 3.375 times
fewer FLOPs, the same result up to the rounding of the sums. The upsampled volume is never materialized. The backward pass uses
the same fact: the layer is the transposed convolution of stride 2 and padding 1 with the 4x4x4 weight
[w2, w1 + w2, w0 + w1, w0] along each axis, so dx is one convolution of stride 2.

Shapes: x (B, C, X, Y, Z), weight (O, C, 3, 3, 3), bias (O,) or None -> (B, O, 2X, 2Y, 2Z); 2x2x2 = 8 taps per phase, 8 phases.
Memory traffic for n = B X Y Z voxels in bf16, in bytes: plain PyTorch reads 2nC, writes and reads 16nC, writes 16nO; here 2nC
are read and 16nO written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv3d_weight

from ccella_fast.kernels.aot import CompileCase
from ccella_fast.kernels.backend import (
    BackendSupport,
    choose,
    compute_dtype,
    jit,
    library_op,
    tl,
    triton_unsupported_reason,
)
from ccella_fast.kernels.derived_weight import DerivedWeight
from ccella_fast.kernels.layout import check_conv3d_shapes
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, launch_config

AXES = (2, 3, 4)
PHASES = [(p, q, r) for p in (0, 1) for q in (0, 1) for r in (0, 1)]  # also the order of the taps of a phase
MIN_PHASE_VOXELS = 256  # below this, computing the sums of taps costs more than the phases save


def upsample_conv3d_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The plain PyTorch implementation, in the dtype of the convolution."""
    return F.conv3d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def phase_weights(weight: Tensor) -> Tensor:
    """(O, C, 3, 3, 3) -> (8, O, C, 2, 2, 2), the phases in the order of `PHASES`; summed in fp32 or wider."""
    parts = [weight.to(torch.promote_types(weight.dtype, torch.float32))]
    for axis in AXES:
        split = []
        for part in parts:
            first, middle, last = part.unbind(axis)
            split += [torch.stack([first, middle + last], axis), torch.stack([first + middle, last], axis)]
        parts = split
    return torch.stack(parts).to(weight.dtype)


def kernel_layout(phases: Tensor) -> Tensor:
    """`phases` (8, O, C, 2, 2, 2) in the order in memory that the Triton kernel reads: phase, tap, C, O."""
    return phases.permute(0, 3, 4, 5, 2, 1).contiguous().permute(0, 5, 4, 1, 2, 3)


def upsample_conv3d_phase(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    phases: Iterable[Any] | None = None,
    convolve: Callable[..., Tensor] = F.conv3d,
) -> Tensor:
    """`upsample_conv3d` as one PyTorch convolution per phase, in the memory format of `x`.

    Args:
        x: (B, C, X, Y, Z).
        weight: (O, C, 3, 3, 3).
        bias: (O,) or None.
        phases: `phase_weights(weight)`, precomputed; any objects with a dtype that `convolve` accepts.
        convolve: Called as `convolve(x, phase, bias)` for each phase.
    """
    phases = phase_weights(weight) if phases is None else phases
    B, _, X, Y, Z = x.shape
    outputs = weight.shape[0]
    channels_last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    padded = F.pad(x, (1,) * 6)
    # Through a wider dtype, so that the eight gradients of the bias are added in it.
    wide = None if bias is None else bias.to(torch.promote_types(bias.dtype, torch.float32))
    parts = []
    for (p, q, r), phase in zip(PHASES, phases, strict=True):
        corner = padded[:, :, p : p + X + 1, q : q + Y + 1, r : r + Z + 1]
        parts.append(convolve(corner, phase, None if wide is None else wide.to(phase.dtype)))
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        y = torch.stack(parts, 2).unflatten(2, (2, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return y.reshape(B, outputs, 2 * X, 2 * Y, 2 * Z)
    y = torch.empty(
        (B, outputs, 2 * X, 2 * Y, 2 * Z),
        dtype=parts[0].dtype,
        device=x.device,
        memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format,
    )
    for (p, q, r), part in zip(PHASES, parts, strict=True):
        y[:, :, p::2, q::2, r::2] = part
    return y


def transposed_weight(weight: Tensor) -> Tensor:
    """(O, C, 3, 3, 3) -> (O, C, 4, 4, 4), the weight of the transposed convolution; summed in fp32 or wider."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for axis in AXES:
        first, middle, last = wide.unbind(axis)
        wide = torch.stack([last, middle + last, first + middle, first], axis)
    return wide.to(weight.dtype)


def _transposed_weight_adjoint(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The adjoint of `transposed_weight`: (O, C, 4, 4, 4) -> (O, C, 3, 3, 3)."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    for axis in AXES:
        first, second, third, fourth = wide.unbind(axis)
        wide = torch.stack([third + fourth, second + third, first + second], axis)
    return wide.to(dtype)


@jit
def _upsample_conv3d_fwd_kernel(
    x_ptr,  # (B, X, Y, Z, C)
    weight_ptr,  # (8 phases, 8 taps, C, O)
    bias_ptr,  # (O,)
    y_ptr,  # (B, 2X, 2Y, 2Z, O)
    voxels,  # B X Y Z
    X,
    Y,
    Z,
    O,  # noqa: E741
    C: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y for BLOCK_M voxels of the small grid and BLOCK_N output channels of one phase.

    This is a matrix product over the taps and input channels.
    """
    i_phase = tl.program_id(2)
    i_p, i_q, i_r = i_phase // 4, (i_phase // 2) % 2, i_phase % 2
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_m, m_n = o_m < voxels, o_n < O
    o_z, o_y, o_x, o_b = o_m % Z, (o_m // Z) % Y, (o_m // (Z * Y)) % X, o_m // (Z * Y * X)

    K_BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    p_x = x_ptr + (o_m.to(tl.int64) * C)[:, None] + o_k[None, :]
    p_weight = weight_ptr + o_k[:, None] * O + o_n[None, :]
    b_acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_step in range(8 * K_BLOCKS):  # a single loop, so that loads are pipelined from tap to tap
        i_tap, i_k = i_step // K_BLOCKS, i_step % K_BLOCKS * BLOCK_K
        i_dx, i_dy, i_dz = i_tap // 4 + i_p - 1, (i_tap // 2) % 2 + i_q - 1, i_tap % 2 + i_r - 1
        m_source = m_m & (o_x + i_dx >= 0) & (o_x + i_dx < X) & (o_y + i_dy >= 0) & (o_y + i_dy < Y)
        m_x, m_weight = (m_source & (o_z + i_dz >= 0) & (o_z + i_dz < Z))[:, None], m_n[None, :]
        if C % BLOCK_K:
            m_x, m_weight = m_x & (i_k + o_k < C)[None, :], m_weight & (i_k + o_k < C)[:, None]
        o_source = ((i_dx * Y + i_dy) * Z + i_dz).to(tl.int64) * C + i_k  # relative to the voxel itself
        o_tap = ((i_phase * 8 + i_tap).to(tl.int64) * C + i_k) * O
        b_x = tl.load(p_x + o_source, mask=m_x, other=0.0)
        b_weight = tl.load(p_weight + o_tap, mask=m_weight, other=0.0)
        b_acc = tl.dot(b_x, b_weight, b_acc, input_precision="ieee")
    if HAS_BIAS:
        b_acc += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    o_out = ((o_b * 2 * X + 2 * o_x + i_p) * 2 * Y + 2 * o_y + i_q).to(tl.int64) * 2 * Z + 2 * o_z + i_r
    b_y = b_acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + o_out[:, None] * O + o_n[None, :], b_y, mask=m_m[:, None] & m_n[None, :])


@library_op("upsample_conv3d")
def _upsample_conv3d_op(x: Tensor, weight: Tensor, bias: Tensor | None, phases: Tensor | None) -> Tensor:
    """Launch the Triton kernel. phases: `phase_weights(weight)` if it is already computed, best in `kernel_layout`."""
    B, C, X, Y, Z = x.shape
    outputs = weight.shape[0]
    x = x.contiguous(memory_format=torch.channels_last_3d)
    phases = phase_weights(weight) if phases is None else phases
    kernel_weight = phases.permute(0, 3, 4, 5, 2, 1).contiguous()  # no copy of the result of `kernel_layout`
    y = _output_like(x, outputs)
    voxels = B * X * Y * Z
    key = "fp32" if x.dtype == torch.float32 else "16bit" if outputs >= 128 else "narrow"
    config = launch_config("upsample_conv3d", key, x.device)
    blocks = config.constants
    grid = (-(-voxels // blocks["BLOCK_M"]), -(-outputs // blocks["BLOCK_N"]), 8)
    kernel_bias = kernel_weight if bias is None else bias.contiguous()  # without a bias, any pointer: it is not read
    _upsample_conv3d_fwd_kernel[grid](
        x, kernel_weight, kernel_bias, y, voxels, X, Y, Z, outputs, C=C, HAS_BIAS=bias is not None, **config.launch()
    )
    return y


@_upsample_conv3d_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, phases: Tensor | None) -> Tensor:
    return _output_like(x, weight.shape[0])


def _output_like(x: Tensor, outputs: int) -> Tensor:
    batch, _, *grid = x.shape
    shape = (batch, outputs, *(2 * size for size in grid))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


def _setup_context(ctx, inputs, output) -> None:
    x, weight, bias, _ = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx, dy: Tensor):
    """dx and dweight from the transposed convolution; dbias is the sum of dy."""
    x, weight = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last_3d)
    dx = dweight = None
    if ctx.needs_input_grad[0]:
        dx = _input_gradient(dy, weight)
    if ctx.needs_input_grad[1]:
        shape = (x.shape[1], weight.shape[0], 4, 4, 4)
        # With Triton's interpreter the tensors are on a CPU, where oneDNN's bf16 weight gradient is wrong on small grids.
        wide = torch.float32 if dy.device.type == "cpu" else dy.dtype
        gradient = conv3d_weight(dy.to(wide), shape, x.to(wide), stride=2, padding=1)
        dweight = _transposed_weight_adjoint(gradient.transpose(0, 1), weight.dtype)
    dbias = dy.sum((0, 2, 3, 4), dtype=torch.float32).to(ctx.bias_dtype) if ctx.bias_dtype else None
    return dx, dweight, dbias, None


def _input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """dx as one convolution of stride 2; in fp32 phase by phase, as eight short sums round less than one of 64 O terms."""
    if dy.dtype != torch.float32:
        return F.conv3d(dy, transposed_weight(weight).transpose(0, 1), stride=2, padding=1)
    X, Y, Z = (size // 2 for size in dy.shape[2:])
    padded = dy.new_zeros(dy.shape[0], weight.shape[1], X + 2, Y + 2, Z + 2)
    for (p, q, r), phase in zip(PHASES, phase_weights(weight), strict=True):
        padded[:, :, p : p + X + 1, q : q + Y + 1, r : r + Z + 1] += F.conv_transpose3d(
            dy[:, :, p::2, q::2, r::2], phase
        )
    return padded[:, :, 1:-1, 1:-1, 1:-1]


_upsample_conv3d_op.register_autograd(_backward, setup_context=_setup_context)


def backend_support(
    device: torch.device, dtype: torch.dtype, *, voxels: int = 2048, phases_given: bool = True
) -> BackendSupport:
    """The backends in order of preference, each with the reason why it is unsupported, None if it is supported.

    On an NVIDIA H200 (Triton 3.6.0, PyTorch 2.11, bf16) a denoising step of the default model took 6.17 ms with `triton`, 6.60
    with `reference` and 6.78 with `phase`, whose many small operations convert the layout back and forth. Training was not
    measured; there `triton` is the one whose output and gradients stay channels-last. On a CPU (two cores with AVX-512, PyTorch
    2.13), forward and backward with 128 channels and 16 x 16 x 8 voxels took 103 ms with `phase` and 215 with `reference` in
    fp32, 54 and 103 ms in bf16.

    Args:
        device: Device of the tensors.
        dtype: Dtype of the convolution.
        voxels: B X Y Z of the small grid.
        phases_given: Whether the phase weights are already computed.
    """
    triton_reason = triton_unsupported_reason(device, dtype)
    worthwhile = phases_given or voxels >= MIN_PHASE_VOXELS
    order = dict.fromkeys(["phase", "reference"] if worthwhile else ["reference", "phase"])
    if device.type == "cuda":
        return {"triton": triton_reason, **order}
    return {**order, "triton": triton_reason}


def aot_cases() -> list[CompileCase]:
    """The cases that `kernels/aot.py` compiles: each configuration with its dtype."""
    return [_aot_case(key, dtype) for key, dtype in (("16bit", "bf16"), ("narrow", "bf16"), ("fp32", "fp32"))]


def _aot_case(key: str, dtype: str) -> CompileCase:
    pointers = {name: f"*{dtype}" for name in ("x_ptr", "weight_ptr", "bias_ptr", "y_ptr")}
    sizes = dict.fromkeys(("voxels", "X", "Y", "Z", "O"), "i32")
    return CompileCase(
        f"upsample_conv3d {key} {dtype}",
        _upsample_conv3d_fwd_kernel,
        pointers | sizes,
        DEFAULT_LAUNCH_CONFIGS["upsample_conv3d"][key],
        {"HAS_BIAS": True, "C": 128},
        divisible=("O",),
        wide_loads=True,
        async_loads=True,
        tensor_cores=dtype != "fp32",
    )


def upsample_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    phases: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Upsample a volume by 2 (nearest neighbor) and convolve it with a 3x3x3 weight.

    Args:
        x: (B, C, X, Y, Z).
        weight: (O, C, 3, 3, 3).
        bias: (O,) or None.
        phases: `phase_weights(weight)`, precomputed for a weight that does not change (inference).
        backend: "phase", "triton" or "reference"; None for the first supported one.

    Returns:
        (B, O, 2X, 2Y, 2Z) in the dtype of the convolution.

    Raises:
        ValueError: The shapes do not match.
        BackendError: `backend` is unsupported here.
    """
    check_conv3d_shapes(x, weight)
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape (O,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    voxels = x.shape[0] * x.shape[2:].numel()
    support = backend_support(x.device, x.dtype, voxels=voxels, phases_given=phases is not None)
    chosen = choose("upsample_conv3d", support, backend)
    if chosen == "triton":
        dtype = compute_dtype(x)
        return _upsample_conv3d_op(x.to(dtype), weight.to(dtype), bias, None if phases is None else phases.to(dtype))
    if chosen == "phase":
        return upsample_conv3d_phase(x, weight, bias, phases)
    return upsample_conv3d_reference(x, weight, bias)


class UpsampleConv3d(torch.nn.Conv3d):
    """Nearest-neighbor upsampling by 2 followed by this 3x3x3 convolution; parameters are those of `nn.Conv3d`.

    The phase weights are kept between calls that need no gradient, see `DerivedWeight`.

    Attributes:
        backend: As in `upsample_conv3d`.
    """

    backend: str | None = None

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)
        self._phases = DerivedWeight(self._compute_phases)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, X, Y, Z) -> (B, C, 2X, 2Y, 2Z)."""
        phases = None if self.backend == "reference" else self._phases.of(self.weight)
        return upsample_conv3d(x, self.weight, self.bias, phases=phases, backend=self.backend)

    def train(self, mode: bool = True) -> UpsampleConv3d:
        """Set the mode as in `nn.Module`, and clear the kept phase weights."""
        self._phases.clear()
        return super().train(mode)

    def _compute_phases(self, weight: Tensor) -> Tensor:
        phases = phase_weights(weight)
        backend = choose("upsample_conv3d", backend_support(weight.device, weight.dtype), self.backend)
        return kernel_layout(phases) if backend == "triton" else phases
