"""The Triton kernels of conv3d, whose docstring has the formulas and describes the launches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccella_fast.kernels.aot import CompileCase
from ccella_fast.kernels.backend import interpreted, jit, tl
from ccella_fast.kernels.layout import multiprocessor_count
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, LaunchConfig, launch_config

SPLITS = (1, 3, 9)  # into how many parts the 9 taps along X and Y may be divided


@jit
def _sum_along_z(b_before, b_middle, b_after, o_z, Z, AXIS: tl.constexpr):
    """b_before of the previous voxel + b_middle + b_after of the next one, within lines along Z; AXIS is that of the voxels."""
    o_i = tl.arange(0, b_middle.shape[AXIS])
    o_previous = tl.broadcast_to(tl.expand_dims(tl.maximum(o_i - 1, 0), 1 - AXIS), b_middle.shape)
    o_next = tl.broadcast_to(tl.expand_dims(tl.minimum(o_i + 1, b_middle.shape[AXIS] - 1), 1 - AXIS), b_middle.shape)
    b_y = b_middle + tl.where(tl.expand_dims(o_z > 0, 1 - AXIS), tl.gather(b_before, o_previous, AXIS), 0.0)
    return b_y + tl.where(tl.expand_dims(o_z < Z - 1, 1 - AXIS), tl.gather(b_after, o_next, AXIS), 0.0)


@jit
def _add_product(b_sum, b_x, b_weight, TRANSPOSED: tl.constexpr):
    return tl.dot(tl.trans(b_weight), tl.trans(b_x), b_sum) if TRANSPOSED else tl.dot(b_x, b_weight, b_sum)


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
def _store(b_y, residual_ptr, y_ptr, i_part, voxels, i_row, o_i, m_row, o_n, O):  # noqa: E741
    """Store the rows i_row + o_i, of which only i_row may be large, after adding the residual."""
    m_y = m_row[:, None] & (o_n < O)[None, :]
    o_y = o_i[:, None] * O + o_n[None, :]
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
    TRANSPOSED: tl.constexpr,
):
    """y, or the sum over part of the taps, for BLOCK_X x BLOCK_Y lines along Z and BLOCK_N output channels.

    TRANSPOSED: the products are computed as weight^T x^T. A product of the tensor cores then has 64 output channels and up to
    256 voxels instead of 64 voxels and BLOCK_N channels, and so reads less shared memory per operation if BLOCK_N is small.
    """
    i_program, i_part = tl.program_id(0), tl.program_id(1)
    n_blocks, y_blocks, x_blocks = tl.cdiv(O, BLOCK_N), tl.cdiv(Y, BLOCK_Y), tl.cdiv(X, BLOCK_X)
    i_tile, i_n = i_program // n_blocks, i_program % n_blocks * BLOCK_N
    i_y, i_x = i_tile % y_blocks * BLOCK_Y, i_tile // y_blocks % x_blocks * BLOCK_X
    i_b = i_tile // (y_blocks * x_blocks)

    K_BLOCKS: tl.constexpr = (C + BLOCK_K - 1) // BLOCK_K
    TAPS: tl.constexpr = 9 // SPLIT
    o_n = i_n + tl.arange(0, BLOCK_N)
    o_b = i_b + tl.arange(0, 1)
    if TRANSPOSED:
        b_before = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        b_middle = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        b_after = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    else:
        b_before = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        b_after = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        b_middle = _bias_and_shift(bias_ptr, shift_ptr, o_b, o_n, O, BLOCK_M, BLOCK_N)
    for i_step in range(TAPS * K_BLOCKS):
        i_tap, i_k = i_part * TAPS + i_step // K_BLOCKS, i_step % K_BLOCKS * BLOCK_K
        i_sx, i_sy = i_x + i_tap // 3 - 1, i_y + i_tap % 3 - 1
        if BLOCK_X == 1:
            b_x = x_desc.load([i_b, i_sx, i_sy * Z, i_k]).reshape(BLOCK_M, BLOCK_K)
        else:
            b_x = x_desc.load([i_b, i_sx, i_sy, 0, i_k]).reshape(BLOCK_M, BLOCK_K)
        b_first = weight_desc.load([3 * i_tap, i_k, i_n]).reshape(BLOCK_K, BLOCK_N)
        b_second = weight_desc.load([3 * i_tap + 1, i_k, i_n]).reshape(BLOCK_K, BLOCK_N)
        b_third = weight_desc.load([3 * i_tap + 2, i_k, i_n]).reshape(BLOCK_K, BLOCK_N)
        b_before = _add_product(b_before, b_x, b_first, TRANSPOSED)
        b_middle = _add_product(b_middle, b_x, b_second, TRANSPOSED)
        b_after = _add_product(b_after, b_x, b_third, TRANSPOSED)

    # A tile is part of one plane, or several whole planes: in both cases its voxels are adjacent in memory.
    o_i = tl.arange(0, BLOCK_M)
    if TRANSPOSED:
        b_y = tl.trans(_sum_along_z(b_before, b_middle, b_after, o_i % Z, Z, 1))
        b_y += _bias_and_shift(bias_ptr, shift_ptr, o_b, o_n, O, BLOCK_M, BLOCK_N)
    else:
        b_y = _sum_along_z(b_before, b_middle, b_after, o_i % Z, Z, 0)
    i_row = ((i_b * X + i_x) * Y + i_y) * Z
    m_row = o_i < ((Y - i_y) * Z if BLOCK_X == 1 else (X - i_x) * (BLOCK_Y * Z))
    _store(b_y, residual_ptr, y_ptr, i_part, voxels, i_row, o_i, m_row, o_n, O)


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
    for i_step in range(TAPS * K_BLOCKS):
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

    b_y = _sum_along_z(b_before, b_middle, b_after, o_z, Z, 0)
    m_row = m_m & (o_i >= HALO) & (o_i < BLOCK_M - HALO)
    _store(b_y, residual_ptr, y_ptr, i_part, voxels, i_row, o_i, m_row, o_n, O)


@jit(do_not_specialize=["elements_per_sample"])
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
        config: The launch configuration.
        box: Extents (BLOCK_X, BLOCK_Y) of a tile of the kernel with descriptors; None for the one with pointers.
        halo: HALO of the kernel with pointers.
        programs: Programs for one part of the taps.
        split: Parts of the taps.
    """

    config: LaunchConfig
    box: tuple[int, int] | None
    halo: int
    programs: int
    split: int


def _tiling(x: Tensor, outputs: int, *, descriptors: bool) -> _Tiling:
    """The tiling of channels-last `x` (B, C, X, Y, Z) for this many output channels."""
    B, C, X, Y, Z = x.shape
    voxels, multiprocessors = B * X * Y * Z, multiprocessor_count(x.device)
    box = None
    if descriptors and C % 8 == 0 and outputs % 8 == 0:  # strides must be multiples of 16 bytes
        key, columns = ("descriptors narrow", 64) if outputs <= 64 else ("descriptors wide", 128)
        # Large tiles read least, but need enough programs.
        if 4 * -(-voxels // 128) * -(-outputs // columns) < 3 * multiprocessors:
            key = "descriptors small"
        config = launch_config("conv3d", key, x.device)
        box = _box(config.constants["BLOCK_M"], Y, Z)
    if box is None:
        key = "pointers fp32" if x.dtype == torch.float32 else "pointers 16bit"
        config = launch_config("conv3d", key, x.device)
        halo = int(config.constants["BLOCK_M"] % Z > 0)
        tiles = -(-voxels // (config.constants["BLOCK_M"] - 2 * halo))
    else:
        halo, tiles = 0, B * -(-X // box[0]) * -(-Y // box[1])
    programs = tiles * -(-outputs // config.constants["BLOCK_N"])
    split = next((split for split in SPLITS if 2 * split * programs >= multiprocessors), SPLITS[-1])
    return _Tiling(config, box, halo, programs, split)


def suits_descriptors(x: Tensor, outputs: int) -> bool:
    """Whether every tile of the kernel with descriptors, 64 voxels or more, can be whole lines along Z of x (B, C, X, Y, Z)."""
    _, C, _, Y, Z = x.shape
    lines_fill_tiles = 64 % Z == 0 and (Y * Z >= 128 or Y & (Y - 1) == 0)
    return C % 8 == 0 and outputs % 8 == 0 and lines_fill_tiles


def taps_are_divided(x: Tensor, outputs: int) -> bool:
    """Whether there is a second launch, which adds the sums over parts of the taps; on a GPU with descriptors."""
    return _tiling(x, outputs, descriptors=x.dtype != torch.float32).split > 1


def _box(block_m: int, Y: int, Z: int) -> tuple[int, int] | None:
    """Extents along X and Y of a tile of `block_m` voxels in whole lines along Z, all powers of two; None if there is none."""
    if block_m % Z:
        return None
    block_y = min(Y, block_m // Z)
    return None if block_y & (block_y - 1) else (block_m // Z // block_y, block_y)


def descriptors_unsupported_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel with descriptors is not used, None if it is."""
    if dtype == torch.float32:
        return "fp32 products are computed without tensor cores"
    if torch.version.hip is not None:
        return "the GPU is not NVIDIA's"
    if interpreted() or device.type != "cuda" or not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability(device)
    # sm_120 has descriptors as well, but not the shared memory of these tiles.
    return None if major in (9, 10) else f"the GPU is sm_{major}{minor}, not sm_90 or sm_100"


# As in `backend`: torch.compile takes the answer as a constant.
descriptors_unsupported_reason._dynamo_marked_constant = True  # type: ignore[attr-defined]


def launch(
    x: Tensor, taps: Tensor, bias: Tensor | None, shift: Tensor | None, residual: Tensor | None, y: Tensor
) -> None:
    """Write y.

    Args:
        x: (B, C, X, Y, Z) in channels_last_3d, as are residual and y.
        taps: (3, 3, 3, C, O), contiguous.
        bias: (O,) or None.
        shift: (B, O), contiguous, or None.
        residual: (B, O, X, Y, Z) or None.
        y: (B, O, X, Y, Z).
    """
    B, C, X, Y, Z = x.shape
    outputs, voxels = taps.shape[-1], B * X * Y * Z
    aligned = x.data_ptr() % 16 == 0 and taps.data_ptr() % 16 == 0
    descriptors = aligned and descriptors_unsupported_reason(x.device, x.dtype) is None
    config, box, halo, programs, split = _tiling(x, outputs, descriptors=descriptors)
    added = bias, shift, residual
    parts = None if split == 1 else torch.empty((split, y.numel()), dtype=torch.float32, device=x.device)
    written = (*added, y) if parts is None else (None, None, None, parts)
    if box is not None:
        descriptions = _descriptors(x, taps, box, config)
        _conv3d_descriptors_fwd_kernel[(programs, split)](
            *descriptions, *written, voxels, X, Y, outputs,
            Z=Z, C=C, BLOCK_X=box[0], BLOCK_Y=box[1], SPLIT=split, **config.launch(),
        )  # fmt: skip
    else:
        _conv3d_pointers_fwd_kernel[(programs, split)](
            x, taps, *written, voxels, X, Y, Z, outputs, C=C, HALO=halo, SPLIT=split, **config.launch()
        )
    if parts is not None:
        config = launch_config("conv3d", "sum", x.device)
        blocks = -(-y.numel() // config.constants["BLOCK"])
        _conv3d_sum_kernel[(blocks,)](
            parts, *added, y, y.numel(), y[0].numel(), outputs, SPLIT=split, **config.launch()
        )


def _descriptors(x: Tensor, taps: Tensor, box: tuple[int, int], config: LaunchConfig) -> tuple[Any, Any]:
    """The descriptors of channels-last `x` and of `taps` (3, 3, 3, C, O)."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    B, C, X, Y, Z = x.shape
    x_block, weight_block = _descriptor_blocks(box, Z, config)
    x_shape = [B, X, Y * Z, C] if box[0] == 1 else [B, X, Y, Z, C]
    weight_shape = [27, C, taps.shape[-1]]
    # The strides are computed, because PyTorch leaves those of axes of size 1 undefined.
    x_strides, weight_strides = ([math.prod(s[i + 1 :]) for i in range(len(s))] for s in (x_shape, weight_shape))
    x_desc = TensorDescriptor(x, x_shape, x_strides, x_block)
    return x_desc, TensorDescriptor(taps, weight_shape, weight_strides, weight_block)


def _descriptor_blocks(box: tuple[int, int], Z: int, config: LaunchConfig) -> tuple[list[int], list[int]]:
    """The blocks that one load by each of the descriptors gets."""
    block_m, block_n, block_k = (config.constants[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
    x_block = [1, 1, block_m, block_k] if box[0] == 1 else [1, *box, Z, block_k]
    return x_block, [1, block_k, block_n]


def aot_cases() -> list[CompileCase]:
    """The cases that `kernels/aot.py` compiles: sizes of the default model, with everything that can be added."""
    configs = DEFAULT_LAUNCH_CONFIGS["conv3d"]
    sizes = dict.fromkeys(("voxels", "X", "Y", "Z", "O"), "i32")
    cases = []
    for key, C, Y, Z, split in (
        ("narrow", 64, 64, 32, 1), ("wide", 128, 32, 16, 1), ("small", 256, 16, 8, 1), ("small", 512, 8, 4, 3),
    ):  # fmt: skip
        config = configs[f"descriptors {key}"]
        box = _box(config.constants["BLOCK_M"], Y, Z)
        assert box is not None
        blocks = _descriptor_blocks(box, Z, config)
        signature = {
            name: f"tensordesc<bf16{block}>" for name, block in zip(("x_desc", "weight_desc"), blocks, strict=True)
        }
        constants = {"Z": Z, "C": C, "BLOCK_X": box[0], "BLOCK_Y": box[1], "SPLIT": split}
        cases.append(
            CompileCase(
                f"conv3d descriptors {key} c{C} bf16", _conv3d_descriptors_fwd_kernel,
                signature | _added_and_output("bf16", split) | sizes, config, _without(split) | constants, ("O",),
                wide_loads=True, async_loads=True, tensor_cores=True, archs=(90, 100),
            )
        )  # fmt: skip
    for dtype, C, halo, split in (("bf16", 64, 0, 1), ("bf16", 64, 1, 1), ("bf16", 512, 0, 3), ("fp32", 64, 0, 1)):
        key = "pointers fp32" if dtype == "fp32" else "pointers 16bit"
        signature = {"x_ptr": f"*{dtype}", "weight_ptr": f"*{dtype}"}
        cases.append(
            CompileCase(
                f"conv3d pointers c{C} {dtype}{' halo' * halo}", _conv3d_pointers_fwd_kernel,
                signature | _added_and_output(dtype, split) | sizes, configs[key],
                _without(split) | {"C": C, "HALO": halo, "SPLIT": split}, ("O",),
                wide_loads=True, async_loads=True, tensor_cores=dtype != "fp32",
            )
        )  # fmt: skip
    signature = {"parts_ptr": "*fp32"} | _added_and_output("bf16", 1)
    signature |= dict.fromkeys(("elements", "elements_per_sample", "O"), "i32")
    summing = CompileCase(
        "conv3d sum bf16", _conv3d_sum_kernel, signature, configs["sum"], {"SPLIT": 3}, ("O", "elements")
    )
    return [*cases, summing._replace(wide_loads=True)]


def _added_and_output(dtype: str, split: int) -> dict[str, str]:
    added = dict.fromkeys(("bias_ptr", "shift_ptr", "residual_ptr"), f"*{dtype}")
    return {**added, "y_ptr": "*fp32" if split > 1 else f"*{dtype}"}


def _without(split: int) -> dict[str, None]:
    """The pointers that are None where the taps are split."""
    return dict.fromkeys(("bias_ptr", "shift_ptr", "residual_ptr")) if split > 1 else {}
