"""3x3x3 convolution of a channels-last volume with zero padding 1, and what follows it in a residual block.

    y = conv3d(x, weight) + bias + shift + residual        dx = conv3d(dy, weight flipped along X, Y and Z, C and O exchanged)

The convolution is a matrix product over the 27 taps and the input channels. The three taps along Z read the same rows of x,
moved by one voxel. So a program reads the rows of each of the 9 taps along X and Y once, multiplies them by three weights, and
moves two of the three fp32 sums along Z at the end: 9 reads of x instead of 27. A program computes whole lines along Z, so
that what is moved in at their ends is zero.

There are two forms of the kernel. One reads x and the weight through tensor descriptors: the copy engine of sm_90 and newer
fills in the zeros of the padding, and the operands go to the tensor cores without passing through registers. The other
computes addresses and masks; it also serves grids whose lines do not divide a tile, by tiles that overlap by two voxels. Small
grids have few programs: there the 9 taps are divided among 3 or 9 programs, whose fp32 sums a second kernel adds in fixed
order. So equal inputs always have equal results.

Shapes: x (B, C, X, Y, Z), weight (O, C, 3, 3, 3), bias (O,), shift (B, O), residual (B, O, X, Y, Z) -> (B, O, X, Y, Z).
Memory traffic for n = B X Y Z voxels in bf16, in bytes: 2nC read and 2nO written, 2nO read with a residual; plain PyTorch reads
and writes 2nO once more for each of bias, shift and residual.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.grad import conv3d_weight

from ccella_fast.kernels.aot import CompileCase
from ccella_fast.kernels.backend import (
    BackendSupport,
    choose,
    compute_dtype,
    interpreted,
    jit,
    library_op,
    tl,
    triton,
    triton_unsupported_reason,
)
from ccella_fast.kernels.layout import contiguous_or_none, multiprocessor_count
from ccella_fast.kernels.residual_shift import residual_shift, residual_shift_reference
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, LaunchConfig, launch_config

SPLITS = (1, 3, 9)  # into how many parts the 9 taps are divided


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
    if shift is None or bias is None:
        per_channel = bias if shift is None else shift
    else:
        per_channel = shift + bias
    return residual_shift(F.conv3d(x, weight, padding=1), residual, per_channel)


def kernel_layout(weight: Tensor) -> Tensor:
    """`weight` (O, C, 3, 3, 3) in the order in memory that the Triton kernels read: tap, C, O."""
    return weight.permute(2, 3, 4, 1, 0).contiguous().permute(4, 3, 0, 1, 2)


@jit
def _sum_along_z(b_before, b_middle, b_after, o_z, Z, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """b_before of the row above + b_middle + b_after of the row below, within lines along Z."""
    o_i = tl.arange(0, BLOCK_M)
    o_above = tl.broadcast_to(tl.maximum(o_i - 1, 0)[:, None], [BLOCK_M, BLOCK_N])
    o_below = tl.broadcast_to(tl.minimum(o_i + 1, BLOCK_M - 1)[:, None], [BLOCK_M, BLOCK_N])
    b_y = b_middle + tl.where((o_z > 0)[:, None], tl.gather(b_before, o_above, 0), 0.0)
    return b_y + tl.where((o_z < Z - 1)[:, None], tl.gather(b_after, o_below, 0), 0.0)


@jit
def _bias_and_shift(bias_ptr, shift_ptr, o_b, o_n, O, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # noqa: E741
    """The first terms of the sums [BLOCK_M, BLOCK_N]; o_b are the samples of the rows, or the one sample of all of them."""
    b_y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    m_n = o_n < O
    if bias_ptr is not None:
        b_y += tl.load(bias_ptr + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    if shift_ptr is not None:
        o_shift = o_b[:, None] * O + o_n[None, :]
        b_y += tl.load(shift_ptr + o_shift, mask=m_n[None, :], other=0.0).to(tl.float32)
    return b_y


@jit
def _store(b_y, residual_ptr, y_ptr, i_part, voxels, i_row, o_row, m_row, o_n, O):  # noqa: E741
    """Store the rows i_row + o_row, of which only i_row may be large, after adding the residual."""
    m_y = m_row[:, None] & (o_n < O)[None, :]
    o_y = o_row[:, None] * O + o_n[None, :]
    if residual_ptr is not None:
        p_residual = residual_ptr + i_row.to(tl.int64) * O
        b_y += tl.load(p_residual + o_y, mask=m_y, other=0.0).to(tl.float32)
    p_y = y_ptr + (i_part.to(tl.int64) * voxels + i_row) * O
    tl.store(p_y + o_y, b_y.to(y_ptr.dtype.element_ty), mask=m_y)


@jit(do_not_specialize=["voxels", "X", "Y"])
def _conv3d_descriptors_fwd_kernel(
    x_desc,  # of (B, X, Y Z, C) where a tile is part of one plane along Y and Z, else of (B, X, Y, Z, C)
    weight_desc,  # of (27 taps, C, O)
    bias_ptr,  # (O,) or None
    shift_ptr,  # (B, O) or None
    residual_ptr,  # (B, X, Y, Z, O) or None
    y_ptr,  # (B, X, Y, Z, O), or fp32 (SPLIT, B, X, Y, Z, O)
    voxels,  # B X Y Z
    X,
    Y,
    O,  # noqa: E741
    Z: tl.constexpr,
    C: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y, or the sum over part of the taps, for BLOCK_X x BLOCK_Y lines along Z and BLOCK_N output channels."""
    i_program, i_part = tl.program_id(0), tl.program_id(1)
    n_blocks, y_blocks, x_blocks = tl.cdiv(O, BLOCK_N), tl.cdiv(Y, BLOCK_Y), tl.cdiv(X, BLOCK_X)
    i_tile, i_n = i_program // n_blocks, i_program % n_blocks * BLOCK_N
    i_y, i_x = i_tile % y_blocks * BLOCK_Y, i_tile // y_blocks % x_blocks * BLOCK_X
    i_b = i_tile // (y_blocks * x_blocks)

    K_BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    TAPS: tl.constexpr = 9 // SPLIT
    o_n = i_n + tl.arange(0, BLOCK_N)
    b_before = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_middle = _bias_and_shift(bias_ptr, shift_ptr, i_b + tl.arange(0, 1), o_n, O, BLOCK_M, BLOCK_N)
    b_after = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_step in range(0, TAPS * K_BLOCKS):
        i_tap, i_k = i_part * TAPS + i_step // K_BLOCKS, i_step % K_BLOCKS * BLOCK_K
        i_sx, i_sy = i_x + i_tap // 3 - 1, i_y + i_tap % 3 - 1
        if BLOCK_X == 1:
            b_x = x_desc.load([i_b, i_sx, i_sy * Z, i_k]).reshape(BLOCK_M, BLOCK_K)
        else:
            b_x = x_desc.load([i_b, i_sx, i_sy, 0, i_k]).reshape(BLOCK_M, BLOCK_K)
        b_before = tl.dot(b_x, weight_desc.load([3 * i_tap, i_k, i_n]).reshape(BLOCK_K, BLOCK_N), b_before)
        b_middle = tl.dot(b_x, weight_desc.load([3 * i_tap + 1, i_k, i_n]).reshape(BLOCK_K, BLOCK_N), b_middle)
        b_after = tl.dot(b_x, weight_desc.load([3 * i_tap + 2, i_k, i_n]).reshape(BLOCK_K, BLOCK_N), b_after)

    o_i = tl.arange(0, BLOCK_M)
    o_z, o_y, o_x = o_i % Z, o_i // Z % BLOCK_Y, o_i // (BLOCK_Y * Z)
    b_y = _sum_along_z(b_before, b_middle, b_after, o_z, Z, BLOCK_M, BLOCK_N)
    i_row, o_row = ((i_b * X + i_x) * Y + i_y) * Z, (o_x * Y + o_y) * Z + o_z
    m_row = (i_x + o_x < X) & (i_y + o_y < Y)
    _store(b_y, residual_ptr, y_ptr, i_part, voxels, i_row, o_row, m_row, o_n, O)


@jit(do_not_specialize=["voxels", "X", "Y", "Z"])
def _conv3d_pointers_fwd_kernel(
    x_ptr,  # (B, X, Y, Z, C)
    weight_ptr,  # (27 taps, C, O)
    bias_ptr,  # the others as in the kernel above
    shift_ptr,
    residual_ptr,
    y_ptr,
    voxels,
    X,
    Y,
    Z,
    O,  # noqa: E741
    C: tl.constexpr,
    HALO: tl.constexpr,  # 1: the first and the last voxel of a tile are only read; 0: a tile consists of whole lines along Z
    SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y, or the sum over part of the taps, for BLOCK_M - 2 HALO consecutive voxels and BLOCK_N output channels."""
    i_program, i_part = tl.program_id(0), tl.program_id(1)
    n_blocks = tl.cdiv(O, BLOCK_N)
    o_i, o_k = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    i_row = i_program // n_blocks * (BLOCK_M - 2 * HALO) - HALO
    o_m = i_row + o_i
    o_n = i_program % n_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = (o_m >= 0) & (o_m < voxels), o_n < O
    o_z, o_y, o_x = o_m % Z, o_m // Z % Y, o_m // (Z * Y) % X

    K_BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    TAPS: tl.constexpr = 9 // SPLIT
    p_x = x_ptr + (o_m.to(tl.int64) * C)[:, None] + o_k[None, :]
    p_weight = weight_ptr + o_k[:, None] * O + o_n[None, :]
    o_b = tl.minimum(tl.maximum(o_m, 0), voxels - 1) // (X * Y * Z)
    b_before = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_middle = _bias_and_shift(bias_ptr, shift_ptr, o_b, o_n, O, BLOCK_M, BLOCK_N)
    b_after = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_step in range(0, TAPS * K_BLOCKS):
        i_tap, i_k = i_part * TAPS + i_step // K_BLOCKS, i_step % K_BLOCKS * BLOCK_K
        i_dx, i_dy = i_tap // 3 - 1, i_tap % 3 - 1
        m_row = m_m & (o_x + i_dx >= 0) & (o_x + i_dx < X) & (o_y + i_dy >= 0) & (o_y + i_dy < Y)
        o_from_row = (i_dx * Y + i_dy).to(tl.int64) * Z * C + i_k
        p_tap = p_weight + (3 * i_tap * C + i_k).to(tl.int64) * O
        m_x, m_weight = m_row[:, None], m_n[None, :]
        if C % BLOCK_K:
            m_x, m_weight = m_x & (i_k + o_k < C)[None, :], m_weight & (i_k + o_k < C)[:, None]
        b_x = tl.load(p_x + o_from_row, mask=m_x, other=0.0)
        b_first = tl.load(p_tap, mask=m_weight, other=0.0)
        b_second = tl.load(p_tap + C * O, mask=m_weight, other=0.0)
        b_third = tl.load(p_tap + 2 * C * O, mask=m_weight, other=0.0)
        b_before = tl.dot(b_x, b_first, b_before, input_precision="ieee")
        b_middle = tl.dot(b_x, b_second, b_middle, input_precision="ieee")
        b_after = tl.dot(b_x, b_third, b_after, input_precision="ieee")

    b_y = _sum_along_z(b_before, b_middle, b_after, o_z, Z, BLOCK_M, BLOCK_N)
    m_row = m_m & (o_i >= HALO) & (o_i < BLOCK_M - HALO)
    _store(b_y, residual_ptr, y_ptr, i_part, voxels, i_row, o_i, m_row, o_n, O)


@jit(do_not_specialize=["elements", "elements_per_sample"])
def _conv3d_sum_kernel(
    parts_ptr,  # fp32 (SPLIT, B, X, Y, Z, O)
    bias_ptr,  # the others as in the kernels above
    shift_ptr,
    residual_ptr,
    y_ptr,
    elements,  # of y
    elements_per_sample,
    O,  # noqa: E741
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """y from the sums over parts of the taps, added in the order of the taps."""
    o_e = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_e = o_e < elements
    b_y = tl.load(parts_ptr + o_e, mask=m_e, other=0.0)
    for i_part in tl.static_range(1, SPLIT):
        b_y += tl.load(parts_ptr + i_part * elements.to(tl.int64) + o_e, mask=m_e, other=0.0)
    if bias_ptr is not None:
        b_y += tl.load(bias_ptr + o_e % O, mask=m_e, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        b_y += tl.load(shift_ptr + o_e // elements_per_sample * O + o_e % O, mask=m_e, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        b_y += tl.load(residual_ptr + o_e, mask=m_e, other=0.0).to(tl.float32)
    tl.store(y_ptr + o_e, b_y.to(y_ptr.dtype.element_ty), mask=m_e)


class _Tiling(NamedTuple):
    """How a volume is divided among programs.

    Attributes:
        key: Of the launch configuration.
        config: The launch configuration.
        box: Extents (BLOCK_X, BLOCK_Y) of a tile for the kernel with descriptors; None for the one with pointers.
        tiles: Programs for one part of the taps.
        split: Parts of the taps.
    """

    key: str
    config: LaunchConfig
    box: tuple[int, int] | None
    tiles: int
    split: int


def _tiling(x: Tensor, outputs: int, *, descriptors: bool) -> _Tiling:
    """The tiling of channels-last `x` (B, C, X, Y, Z) for this many output channels.

    Large tiles read least. On grids with fewer of them than three quarters of the multiprocessors, small ones are faster.
    """
    B, C, X, Y, Z = x.shape
    multiprocessors = multiprocessor_count(x.device)
    keys = ["descriptors narrow" if outputs <= 64 else "descriptors wide", "descriptors small"]
    found = None
    for key in keys if descriptors and C % 8 == 0 and outputs % 8 == 0 else []:
        config = launch_config("conv3d", key, x.device)
        box = _box(config.constants["BLOCK_M"], Y, Z)
        if box is None:
            continue
        tiles = B * -(-X // box[0]) * -(-Y // box[1]) * -(-outputs // config.constants["BLOCK_N"])
        found = key, config, box, tiles
        if 4 * tiles >= 3 * multiprocessors:
            break
    if found is None:
        key = "pointers fp32" if x.dtype == torch.float32 else "pointers 16bit"
        config = launch_config("conv3d", key, x.device)
        rows = config.constants["BLOCK_M"] - 2 * _halo(config, Z)
        found = key, config, None, -(-B * X * Y * Z // rows) * -(-outputs // config.constants["BLOCK_N"])
    split = next((split for split in SPLITS if 2 * split * found[-1] >= multiprocessors), SPLITS[-1])
    return _Tiling(*found, split)


def _box(block_m: int, Y: int, Z: int) -> tuple[int, int] | None:
    """Extents along X and Y of a tile of `block_m` voxels in whole lines along Z, all powers of two; None if there is none."""
    if block_m % Z:
        return None
    block_y = min(Y, block_m // Z)
    return None if block_y & (block_y - 1) else (block_m // Z // block_y, block_y)


def _halo(config: LaunchConfig, Z: int) -> int:
    """Whether the tiles of the kernel with pointers overlap, because they do not consist of whole lines."""
    return int(config.constants["BLOCK_M"] % Z > 0)


def _descriptors_unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel with descriptors is not used, None if it is."""
    if dtype == torch.float32:
        return "fp32 products are computed without tensor cores"
    if interpreted():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    # sm_120 has descriptors as well, but not the shared memory of these tiles.
    return None if major in (9, 10) else f"the GPU is sm_{major}{minor}, not sm_90 or sm_100"


@library_op("conv3d")
def _conv3d_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None
) -> Tensor:
    """Launch the Triton kernels. The weight is best in `kernel_layout`."""
    B, C, X, Y, Z = x.shape
    outputs, voxels, last = weight.shape[0], B * X * Y * Z, torch.channels_last_3d
    x = x.contiguous(memory_format=last)
    taps = weight.permute(2, 3, 4, 1, 0).contiguous()  # no copy of the result of `kernel_layout`
    y = _output_like(x, outputs)
    if y.numel() == 0:
        return y
    bias, shift = contiguous_or_none(bias), contiguous_or_none(shift)
    residual = None if residual is None else residual.contiguous(memory_format=last)
    aligned = x.data_ptr() % 16 == 0 and taps.data_ptr() % 16 == 0
    descriptors = aligned and _descriptors_unsupported_reason(x.device, x.dtype) is None
    tiling = _tiling(x, outputs, descriptors=descriptors)
    config, split = tiling.config, tiling.split
    added = bias, shift, residual
    parts = None if split == 1 else torch.empty((split, voxels * outputs), dtype=torch.float32, device=x.device)
    written = (*added, y) if parts is None else (None, None, None, parts)
    grid = (tiling.tiles, split)
    if tiling.box is not None:
        block_x, block_y = tiling.box
        x_desc, weight_desc = _descriptors(x, taps, block_x, config.constants)
        _conv3d_descriptors_fwd_kernel[grid](
            x_desc, weight_desc, *written, voxels, X, Y, outputs,
            Z=Z, C=C, BLOCK_X=block_x, BLOCK_Y=block_y, SPLIT=split, **config.launch(),
        )  # fmt: skip
    else:
        _conv3d_pointers_fwd_kernel[grid](
            x, taps, *written, voxels, X, Y, Z, outputs, C=C, HALO=_halo(config, Z), SPLIT=split, **config.launch()
        )
    if parts is not None:
        config = launch_config("conv3d", "sum", x.device)
        grid = (triton.cdiv(y.numel(), config.constants["BLOCK"]),)
        _conv3d_sum_kernel[grid](parts, *added, y, y.numel(), y[0].numel(), outputs, SPLIT=split, **config.launch())
    return y


def _descriptors(x: Tensor, taps: Tensor, block_x: int, blocks: dict[str, int]) -> tuple[Any, Any]:
    """The descriptors of channels-last `x` and of `taps` (3, 3, 3, C, O)."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    B, C, X, Y, Z = x.shape
    outputs = taps.shape[-1]
    rows, depth, columns = blocks["BLOCK_M"], blocks["BLOCK_K"], blocks["BLOCK_N"]
    # The strides are written out, because PyTorch leaves those of axes of size 1 undefined.
    if block_x == 1:
        shape, block = [B, X, Y * Z, C], [1, 1, rows, depth]
    else:
        shape, block = [B, X, Y, Z, C], [1, block_x, rows // Z // block_x, Z, depth]
    x_desc = TensorDescriptor(x, shape, _dense_strides(shape), block)
    shape = [27, C, outputs]
    return x_desc, TensorDescriptor(taps, shape, _dense_strides(shape), [1, depth, columns])


def _dense_strides(shape: list[int]) -> list[int]:
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return strides


@_conv3d_op.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None) -> Tensor:
    return _output_like(x, weight.shape[0])


def _output_like(x: Tensor, outputs: int) -> Tensor:
    batch, _, *grid = x.shape
    return torch.empty(
        (batch, outputs, *grid), dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d
    )


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


def backend_support(device: torch.device, dtype: torch.dtype) -> BackendSupport:
    """The backends in order of preference, each with the reason why it is unsupported, None if it is supported.

    `triton` is available by name only: it was measured by itself, but not yet within the model. On an NVIDIA H200 (Triton 3.6.0,
    PyTorch 2.11, cuDNN 9.19, bf16, replayed from a CUDA graph, without bias and residual), in microseconds:

        level, channels    batch 1: cuDNN, Triton    batch 8: cuDNN, Triton
        0, 64              74.4, 61.2                478, 447
        1, 128             38.4, 25.5                162, 188
        2, 256             20.9, 19.9                75.0, 82.2
        3, 512             21.6, 18.2                87.9, 50.0
        0, 128 to 64       134, 101
        1, 256 to 128      69.4, 42.3

    With bias and residual at level 0, batch 1: 102 for cuDNN and PyTorch, 66.2 for Triton.

    Args:
        device: Device of the tensors.
        dtype: Dtype of the convolution.
    """
    cudnn_reason = _cudnn_unsupported_reason(device)
    order = {"cudnn": cudnn_reason, "reference": None} if device.type == "cuda" else {"reference": None, "cudnn": cudnn_reason}
    return {**order, "triton": triton_unsupported_reason(device, dtype)}


def _cudnn_unsupported_reason(device: torch.device) -> str | None:
    """Why PyTorch does not use cuDNN for such tensors, None if it does."""
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on a GPU"
    return None if torch.backends.cudnn.enabled else "torch.backends.cudnn.enabled is False"


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    shift: Tensor | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Convolve a volume with a 3x3x3 weight and zero padding 1, then add a bias, a shift per sample and channel, and a residual.

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
    if x.ndim != 5 or weight.shape[1:] != (x.shape[1], 3, 3, 3):
        raise ValueError(
            "x and weight must have shapes (B, C, X, Y, Z) and (O, C, 3, 3, 3), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    expected = {
        "bias": (bias, weight.shape[:1]),
        "shift": (shift, (x.shape[0], weight.shape[0])),
        "residual": (residual, (x.shape[0], weight.shape[0], *x.shape[2:])),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    chosen = choose("conv3d", backend_support(x.device, x.dtype), backend)
    if chosen == "triton":
        dtype = compute_dtype(x)
        return _conv3d_op(x.to(dtype), weight.to(dtype), bias, shift, residual)
    return (_conv3d_cudnn if chosen == "cudnn" else conv3d_reference)(x, weight, bias, shift, residual)
