"""Nearest-neighbour x2 enlargement of a volume, then a 3x3x3 convolution with zero padding 1, at an eighth of the grid.

    y = conv3d(repeat each voxel twice along each axis, w) + b

Along one axis an output voxel 2i + p sees the inputs i - 1, i, i, i + 1 only through sums of taps, two distinct inputs each:

    p = 0:  w0 x[i-1] + (w1 + w2) x[i]            p = 1:  (w0 + w1) x[i] + w2 x[i+1]

so the layer is eight 2x2x2 convolutions ("phases") on the small grid: 8 taps instead of 27 an output voxel, 3.375 times fewer
FLOPs, the same numbers but for the rounding of the sums. The enlarged volume is never made. Backward uses the same fact: the
layer is the transposed convolution of stride 2 and padding 1 with the 4x4x4 weight [w2, w1 + w2, w0 + w1, w0] along each axis,
so dx is one convolution of stride 2.

Shapes: x (B, C, X, Y, Z), weight (O, C, 3, 3, 3), bias (O,) or None -> (B, O, 2X, 2Y, 2Z); taps T = 2x2x2 = 8, phases 8.
Bytes (bf16, elements n = B X Y Z): reference reads 2nC, writes and reads 16nC, writes 16nO; here 2nC read, 16nO written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
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
    triton,
    triton_refusal,
)
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, LaunchConfig, launch_config

AXES = (2, 3, 4)
OFFSETS = [(p, q, r) for p in (0, 1) for q in (0, 1) for r in (0, 1)]  # of the phases, and of the taps within one
FEW_VOXELS = 512  # below this the sums of taps cost more than they save, unless they are there already


def upsample_conv3d_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The enlarged and convolved volume, in the dtype of the convolution."""
    return F.conv3d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def phase_weights(weight: Tensor) -> Tensor:
    """(O, C, 3, 3, 3) -> (8, O, C, 2, 2, 2), the phases in the order of `OFFSETS`; summed in fp32 or wider."""
    parts = [weight.to(torch.promote_types(weight.dtype, torch.float32))]
    for axis in AXES:
        split = []
        for part in parts:
            first, middle, last = part.unbind(axis)
            split += [torch.stack([first, middle + last], axis), torch.stack([first + middle, last], axis)]
        parts = split
    return torch.stack(parts).to(weight.dtype)


def transposed_weight(weight: Tensor) -> Tensor:
    """(O, C, 3, 3, 3) -> (O, C, 4, 4, 4), the transposed convolution's weight; summed in fp32 or wider."""
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    for axis in AXES:
        first, middle, last = wide.unbind(axis)
        wide = torch.stack([last, middle + last, first + middle, first], axis)
    return wide.to(weight.dtype)


def _weight_gradient(gradient: Tensor, dtype: torch.dtype) -> Tensor:
    """The adjoint of `transposed_weight`: (O, C, 4, 4, 4) -> (O, C, 3, 3, 3)."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    for axis in AXES:
        first, second, third, fourth = wide.unbind(axis)
        wide = torch.stack([third + fourth, second + third, first + second], axis)
    return wide.to(dtype)


@jit
def _upsample_fwd_kernel(
    x_ptr,  # (B, X, Y, Z, C)
    w_ptr,  # (8 phases, 8 taps, C, O)
    b_ptr,  # (O,)
    y_ptr,  # (B, 2X, 2Y, 2Z, O)
    n_voxels,  # B X Y Z
    X,
    Y,
    Z,
    C,
    O,  # noqa: E741
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of small-grid voxels x output channels of one phase: a matrix product over taps and input channels."""
    phase = tl.program_id(2)
    p, q, r = phase // 4, (phase // 2) % 2, phase % 2
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    in_range, in_width = m < n_voxels, n < O
    iz, iy, ix, ib = m % Z, (m // Z) % Y, (m // (Z * Y)) % X, m // (Z * Y * X)

    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for tap in range(8):
        dx, dy, dz = tap // 4 + p - 1, (tap // 2) % 2 + q - 1, tap % 2 + r - 1
        sx, sy, sz = ix + dx, iy + dy, iz + dz
        inside = in_range & (sx >= 0) & (sx < X) & (sy >= 0) & (sy < Y) & (sz >= 0) & (sz < Z)
        row = (((ib * X + sx) * Y + sy) * Z + sz).to(tl.int64) * C
        w_tap = w_ptr + (phase * 8 + tap).to(tl.int64) * C * O
        for k0 in range(0, C, BLOCK_K):
            in_depth = k0 + k < C
            a = tl.load(x_ptr + row[:, None] + (k0 + k)[None, :], mask=inside[:, None] & in_depth[None, :], other=0.0)
            w = tl.load(
                w_tap + (k0 + k)[:, None] * O + n[None, :], mask=in_depth[:, None] & in_width[None, :], other=0.0
            )
            acc += tl.dot(a, w, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(b_ptr + n, mask=in_width, other=0.0).to(tl.float32)[None, :]
    out = ((ib * 2 * X + 2 * ix + p) * 2 * Y + 2 * iy + q).to(tl.int64) * 2 * Z + 2 * iz + r
    y = acc.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + out[:, None] * O + n[None, :], y, mask=in_range[:, None] & in_width[None, :])


DEFAULT_LAUNCH_CONFIGS["upsample_conv3d"] = {
    "16bit": LaunchConfig({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, num_warps=8, num_stages=3),
    "narrow": LaunchConfig({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=3),
    "fp32": LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16}, num_warps=4, num_stages=2),
}


@library_op("upsample_conv3d")
def _upsample_op(x: Tensor, weight: Tensor, bias: Tensor | None, phases: Tensor | None) -> Tensor:
    """The Triton launch. phases: `phase_weights(weight)` where the caller has them already."""
    batch, width, *grid = x.shape
    outputs = weight.shape[0]
    x = x.contiguous(memory_format=torch.channels_last_3d)
    tabled = phase_weights(weight) if phases is None else phases
    table = tabled.flatten(3).permute(0, 3, 2, 1).contiguous()
    y = _output_like(x, outputs)
    voxels = batch * grid[0] * grid[1] * grid[2]
    key = "fp32" if x.dtype == torch.float32 else "16bit" if outputs >= 128 else "narrow"
    tile = launch_config("upsample_conv3d", key, x.device)
    blocks = tile.constants
    launch = (triton.cdiv(voxels, blocks["BLOCK_M"]), triton.cdiv(outputs, blocks["BLOCK_N"]), 8)
    given = table if bias is None else bias.contiguous()
    _upsample_fwd_kernel[launch](
        x, table, given, y, voxels, *grid, width, outputs, HAS_BIAS=bias is not None, **tile.launch()
    )
    return y


@_upsample_op.register_fake
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
    """dx and dweight of the transposed convolution; dbias sums dy."""
    x, weight = ctx.saved_tensors
    dy = dy.contiguous(memory_format=torch.channels_last_3d)
    dx = dw = None
    if ctx.needs_input_grad[0]:
        dx = _input_gradient(dy, weight)
    if ctx.needs_input_grad[1]:
        shape = (x.shape[1], weight.shape[0], 4, 4, 4)
        # In Triton's interpreter the tensors are on a CPU, where oneDNN's bf16 weight gradient is wrong on small grids.
        wide = torch.float32 if dy.device.type == "cpu" else dy.dtype
        gradient = conv3d_weight(dy.to(wide), shape, x.to(wide), stride=2, padding=1)
        dw = _weight_gradient(gradient.transpose(0, 1), weight.dtype)
    db = dy.sum((0, 2, 3, 4), dtype=torch.float32).to(ctx.bias_dtype) if ctx.bias_dtype else None
    return dx, dw, db, None


def _input_gradient(dy: Tensor, weight: Tensor) -> Tensor:
    """One convolution of stride 2. In fp32 the eight phases one by one: eight short sums err less than one over 64 O terms."""
    if dy.dtype != torch.float32:
        return F.conv3d(dy, transposed_weight(weight).transpose(0, 1), stride=2, padding=1)
    X, Y, Z = (size // 2 for size in dy.shape[2:])
    padded = dy.new_zeros(dy.shape[0], weight.shape[1], X + 2, Y + 2, Z + 2)
    for (p, q, r), phase in zip(OFFSETS, phase_weights(weight), strict=True):
        padded[:, :, p : p + X + 1, q : q + Y + 1, r : r + Z + 1] += F.conv_transpose3d(
            dy[:, :, p::2, q::2, r::2], phase
        )
    return padded[:, :, 1:-1, 1:-1, 1:-1]


_upsample_op.register_autograd(_backward, setup_context=_setup_context)


def upsample_conv3d_phase(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    phases: Iterable[Any] | None = None,
    convolve: Callable[..., Tensor] = F.conv3d,
) -> Tensor:
    """The same through convolutions, one a phase, in the memory format of `x`. phases: see `upsample_conv3d`; in a form of its
    own if `convolve(x, phase, bias)` knows it and it has a dtype."""
    phases = phase_weights(weight) if phases is None else phases
    batch, _, *grid = x.shape
    outputs = weight.shape[0]
    last = x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()
    padded = F.pad(x, (1,) * 6)
    # Through a wider dtype, so that the eight gradients of the bias are added in it.
    wide = None if bias is None else bias.to(torch.promote_types(bias.dtype, torch.float32))
    X, Y, Z = grid
    parts = []
    for (p, q, r), phase in zip(OFFSETS, phases, strict=True):
        corner = padded[:, :, p : p + X + 1, q : q + Y + 1, r : r + Z + 1]
        parts.append(convolve(corner, phase, None if wide is None else wide.to(phase.dtype)))
    if torch.is_grad_enabled() and any(part.requires_grad for part in parts):
        y = torch.stack(parts, 2).unflatten(2, (2, 2, 2)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return y.reshape(batch, outputs, 2 * X, 2 * Y, 2 * Z)
    y = torch.empty(
        (batch, outputs, 2 * X, 2 * Y, 2 * Z),
        dtype=parts[0].dtype,
        device=x.device,
        memory_format=torch.channels_last_3d if last else torch.contiguous_format,
    )
    for (p, q, r), part in zip(OFFSETS, parts, strict=True):
        y[:, :, p::2, q::2, r::2] = part
    return y


def backend_support(
    device: torch.device, dtype: torch.dtype, *, voxels: int = 2048, summed: bool = True, training: bool = False
) -> BackendSupport:
    """voxels: B X Y Z of the small grid. summed: the sums of taps are there already. training: a gradient will be asked for,
    and on a CPU the many small operations of eight backward passes cost more than they save."""
    # Eight cuDNN convolutions go before our kernel until a measurement on a GPU says otherwise.
    pays = summed or (voxels >= FEW_VOXELS and not (training and device.type == "cpu"))
    order = ["phase", "reference"] if pays else ["reference", "phase"]
    return {**dict.fromkeys(order), "triton": triton_refusal(device, dtype)}


def upsample_conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    phases: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """The enlarged and convolved volume (B, O, 2X, 2Y, 2Z), in the dtype of the convolution.

    phases: `phase_weights(weight)` made beforehand, for a weight that does not change (inference). Raises ValueError for
    shapes that do not fit, BackendError for a `backend` that cannot run here."""
    if x.ndim != 5 or weight.shape[1:] != (x.shape[1], 3, 3, 3):
        raise ValueError(
            f"x is {tuple(x.shape)}, weight {tuple(weight.shape)}: (B, C, X, Y, Z) and (O, C, 3, 3, 3) are needed"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias is {tuple(bias.shape)}, (O,) = ({weight.shape[0]},) is needed")
    training = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    voxels = x.shape[0] * x.shape[2:].numel()
    where = backend_support(x.device, x.dtype, voxels=voxels, summed=phases is not None, training=training)
    chosen = choose("upsample_conv3d", where, backend)
    if chosen == "triton":
        dtype = compute_dtype(x)
        return _upsample_op(x.to(dtype), weight.to(dtype), bias, None if phases is None else phases.to(dtype))
    if chosen == "phase":
        return upsample_conv3d_phase(x, weight, bias, phases)
    return upsample_conv3d_reference(x, weight, bias)


class UpsampleConv3d(torch.nn.Conv3d):
    """Nearest x2, then this 3x3x3 convolution. Parameters as `nn.Conv3d`. backend: as in `upsample_conv3d`.

    The sums of taps are kept between calls that need no gradient, for as long as the weight stays what it was. A weight that is
    written through `.data`, as DeepSpeed's optimizers do, does not show that it changed: so a call with gradients, `train()`
    and `eval()` forget the sums."""

    backend: str | None = None

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, padding=1)
        self._summed: tuple[tuple, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return upsample_conv3d(x, self.weight, self.bias, phases=self._phases(), backend=self.backend)

    def train(self, mode: bool = True) -> UpsampleConv3d:
        self._summed = None
        return super().train(mode)

    def _phases(self) -> Tensor | None:
        weight = self.weight
        if torch.compiler.is_compiling() or self.backend == "reference":
            return None
        if torch.is_grad_enabled() or compute_dtype(weight) != weight.dtype or weight.is_inference():
            self._summed = None
            return None
        key = (weight.data_ptr(), weight._version, weight.dtype, weight.device)
        if self._summed is None or self._summed[0] != key:
            self._summed = (key, phase_weights(weight))
        return self._summed[1]


def aot_cases() -> Iterator[CompileCase]:
    """The three shipped configurations at their dtypes."""
    for key, dtype in (("16bit", "bf16"), ("narrow", "bf16"), ("fp32", "fp32")):
        types = {name: f"*{dtype}" for name in ("x_ptr", "w_ptr", "b_ptr", "y_ptr")}
        sizes = {name: "i32" for name in ("n_voxels", "X", "Y", "Z", "C", "O")}
        yield CompileCase(
            f"upsample_conv3d {key} {dtype}",
            _upsample_fwd_kernel,
            types | sizes,
            DEFAULT_LAUNCH_CONFIGS["upsample_conv3d"][key],
            {"HAS_BIAS": True},
            divisible=("C", "O"),
            wide_loads=True,
            tensor_cores=dtype != "fp32",
        )
