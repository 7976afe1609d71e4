"""Memory layouts of the element-wise kernels, and the division of a volume among programs.

Two layouts are supported. Channels first: (B, C, *spatial) contiguous. Channels last: the same shape with stride 1 along C,
that is channels_last, channels_last_3d, or tokens (B, S, C) viewed as (B, C, S). A kernel addresses (B, C, S) with S voxels, in
tiles of BLOCK_S voxels x BLOCK_C channels. Offsets are int64 from the sample index on, so tensors beyond 2^31 elements are
addressed correctly.

All Triton kernels of this package name their variables by one code, that of flash-linear-attention:

    x_ptr       a pointer argument of a kernel
    x_desc      a tensor descriptor argument of a kernel
    p_x         pointers into the tensor x, a scalar or a block, derived from x_ptr
    i_b, i_n    scalar index of a sample, head, part, ... or of the first element of a block
    o_s, o_c    offsets or indices along an axis or within a tensor, usually a block
    m_s, m_c    boolean mask of a block
    b_x         values in registers: a block, or a scalar reduced from one; b_xs is a tuple of blocks
    stride_xn   stride of x along the axis n, in elements
    S, BLOCK_S  upper case: sizes of axes, and compile-time constants

Other scalars (`start`, `end`, `eps`) are plain words.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccella_fast.kernels.aot import CompileCase
from ccella_fast.kernels.backend import jit, tl
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, LaunchConfig

# Most partial results of a sample's channel block: every program of the next launch merges all of them first.
MAX_PARTS = 128
PROGRAMS_PER_MULTIPROCESSOR = 2  # few, because each program merges the partial results first


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` is addressed as channels last. Where C or S is 1 both layouts hold, and it counts as channels first."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def to_supported_layout(x: Tensor) -> Tensor:
    """`x` itself if it has one of the two layouts, else a contiguous copy."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def to_layout_of(x: Tensor, other: Tensor) -> Tensor:
    """`x` in the layout of the dense tensor `other`, copied where needed."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if is_channels_last(other) else x.contiguous()


@functools.cache
def multiprocessor_count(device: torch.device) -> int:
    """Multiprocessors of the GPU; without one, for the interpreter and ahead-of-time compilation, those of an H200."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def layout_key(step: str, x: Tensor) -> str:
    """The key of the launch configuration of one step of a kernel for dense `x`, such as "apply last"."""
    return f"{step} {'last' if is_channels_last(x) else 'first'}"


def check_conv3d_shapes(x: Tensor, weight: Tensor) -> None:
    """Raise ValueError unless x is (B, C, X, Y, Z) and weight (O, C, 3, 3, 3)."""
    if x.ndim != 5 or weight.shape[1:] != (x.shape[1], 3, 3, 3):
        raise ValueError(
            "x and weight must have shapes (B, C, X, Y, Z) and (O, C, 3, 3, 3), "
            f"got {tuple(x.shape)} and {tuple(weight.shape)}"
        )


def contiguous_or_none(tensor: Tensor | None) -> Tensor | None:
    """An optional small parameter, contiguous as the kernels read it."""
    return None if tensor is None else tensor.contiguous()


class LaunchGrid(NamedTuple):
    """How the programs of a kernel divide a tensor.

    Attributes:
        programs: Size of the flat grid.
        voxels_per_program: Voxels of each program; the last program of a sample may have fewer.
        programs_per_sample: Programs per channel block of a sample.
        constants: The kernel's compile-time sizes by parameter name.
    """

    programs: int
    voxels_per_program: int
    programs_per_sample: int
    constants: dict[str, Any]


def launch_grid(x: Tensor, groups: int, config: LaunchConfig, *, partial: bool = False) -> LaunchGrid:
    """The grid over dense `x` in which a program takes whole groups of channels.

    With channels first a program takes one group; with channels last it takes as many as make up at most 128 channels, so that
    it reads long runs of adjacent elements. If each program writes a `partial` result, a sample has at most `MAX_PARTS`
    programs per channel block.
    """
    max_programs = PROGRAMS_PER_MULTIPROCESSOR * multiprocessor_count(x.device)
    most = MAX_PARTS if partial else max_programs
    return _launch_grid(*sizes_and_layout(x), groups, config.constants["TILE"], max_programs, most)


@functools.lru_cache(4096)
def _launch_grid(
    B: int, C: int, S: int, last: bool, groups: int, tile: int, max_programs: int, most: int
) -> LaunchGrid:
    channels_per_group = C // groups
    groups_per_program = max(
        d for d in range(1, 33) if groups % d == 0 and (d == 1 or (last and d * channels_per_group <= 128))
    )
    block_c = next_power_of_two(groups_per_program * channels_per_group)
    channel_blocks = B * (groups // groups_per_program)
    block_s = tile // block_c
    tiles = max(1, -(-S // block_s))
    programs_per_sample = min(tiles, most, max(1, max_programs // max(1, channel_blocks)))
    voxels_per_program = -(-tiles // programs_per_sample) * block_s
    programs_per_sample = max(1, -(-S // voxels_per_program))
    constants = {
        "C": C,
        "CPG": channels_per_group,
        "GROUPS": groups_per_program,
        "BLOCK_G": next_power_of_two(groups_per_program),
        "BLOCK_C": block_c,
        "LAST": last,
    }
    return LaunchGrid(channel_blocks * programs_per_sample, voxels_per_program, programs_per_sample, constants)


def layout_compile_case(
    kernel: str,
    step: str,
    function: Any,
    *,
    channels: int,
    voxels: int,
    last: bool,
    dtype: str = "bf16",
    **constants: Any,
) -> CompileCase:
    """The ahead-of-time compile case of an element-wise kernel on x (1, channels, voxels) in 32 groups.

    Args:
        kernel: Name of the kernel in `DEFAULT_LAUNCH_CONFIGS`.
        step: Which of its launches, as in `layout_key`.
        function: The Triton function.
        channels: C.
        voxels: S.
        last: Channels last.
        dtype: Triton's name for the dtype of the shift and of all tensors as large as x; parameters and statistics are fp32.
        **constants: Compile-time constants that `launch_grid` does not set.
    """
    x = torch.empty((1, voxels, channels) if last else (1, channels, voxels), device="meta")
    x = x.movedim(-1, 1) if last else x
    config = DEFAULT_LAUNCH_CONFIGS[kernel][layout_key(step, x)]
    large = ("x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "h_ptr", "residual_ptr", "shift_ptr")
    pointers = [name for name in function.arg_names if name.endswith("_ptr")]
    signature = {name: f"*{dtype}" if name in large else "*fp32" for name in pointers}
    integers = ("S", "voxels_per_program", "programs_per_sample", "voxels_per_part", "parts", "stride_shift_b")
    signature |= dict.fromkeys(integers, "i32") | {"eps": "fp32"}
    title = f"{kernel} {layout_key(step, x)} c{channels} {dtype}"
    known = {**launch_grid(x, 32, config).constants, **constants}
    taken = {name: value for name, value in known.items() if name in function.arg_names}
    divisible = ("S", "voxels_per_program", "voxels_per_part")
    return CompileCase(title, function, signature, config, taken, divisible, wide_loads=True)


def sizes_and_layout(x: Tensor) -> tuple[int, int, int, bool]:
    """B, C and S of a dense tensor, and whether it is channels last."""
    return x.shape[0], x.shape[1], x.shape[2:].numel(), is_channels_last(x)


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


@jit
def program_coords(programs_per_sample, channel_blocks, REVERSED: tl.constexpr):
    """(sample as int64, channel block, part of the voxels) of this program in a flat grid.

    REVERSED starts with the last program: where not all run at once, the previous launch has left its data in the L2 cache.
    """
    i_program = tl.program_id(0)
    if REVERSED:
        i_program = tl.num_programs(0) - 1 - i_program
    i_row = i_program // programs_per_sample
    return (i_row // channel_blocks).to(tl.int64), i_row % channel_blocks, i_program % programs_per_sample


@jit
def tile_origin(i_b, first, S, C: tl.constexpr, LAST: tl.constexpr):
    """Offset of voxel `first`, channel 0 of sample `i_b`, which is int64."""
    return (i_b * S + first) * C if LAST else i_b * S * C + first


@jit
def tile_offsets(o_c, S, C: tl.constexpr, BLOCK_S: tl.constexpr, LAST: tl.constexpr):
    """Offsets [BLOCK_S, BLOCK_C] of a tile from its origin."""
    o_s = tl.arange(0, BLOCK_S)
    return o_s[:, None] * C + o_c[None, :] if LAST else o_c[None, :].to(tl.int64) * S + o_s[:, None]


@jit
def channel_lanes(i_block, CPG: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """(lanes of a program, their channels, mask of the lanes in use), each [BLOCK_C]."""
    o_lane = tl.arange(0, BLOCK_C)
    return o_lane, i_block * GROUPS * CPG + o_lane, o_lane < GROUPS * CPG


@jit
def voxel_range(i_part, voxels_per_program, S):
    """First voxel of part `i_part`, and the end (exclusive)."""
    start = i_part.to(tl.int64) * voxels_per_program
    return start, tl.minimum(start + voxels_per_program, S)


@jit
def sum_over_groups(b_values, o_g, BLOCK_G: tl.constexpr):
    """Sums [BLOCK_G] over the channels of each group of values [BLOCK_C]; o_g is the group of each channel."""
    return tl.sum(tl.where(o_g[:, None] == tl.arange(0, BLOCK_G)[None, :], b_values[:, None], 0.0), axis=0)


@jit
def broadcast_to_channels(b_values, o_g, BLOCK_G: tl.constexpr):
    """The value of its group for each channel [BLOCK_C], from values [BLOCK_G]; o_g is the group of each channel."""
    return tl.sum(tl.where(o_g[:, None] == tl.arange(0, BLOCK_G)[None, :], b_values[None, :], 0.0), axis=1)


@jit
def load_channel_parameters(weight_ptr, bias_ptr, shift_ptr, i_b, o_c, m_c, C: tl.constexpr):
    """Weight, bias and shift [BLOCK_C] in fp32; the shift is 0 where shift_ptr is None."""
    b_weight = tl.load(weight_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_bias = tl.load(bias_ptr + o_c, mask=m_c, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        b_shift = tl.load(shift_ptr + i_b * C + o_c, mask=m_c, other=0.0).to(tl.float32)
    else:
        b_shift = tl.zeros_like(b_bias)
    return b_weight, b_bias, b_shift
