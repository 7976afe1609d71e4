"""The two memory layouts that the element-wise kernels walk, and how they share a volume among programs.

Channels first: (B, C, *spatial) contiguous. Channels last: the same shape with stride 1 along C, that is channels_last,
channels_last_3d, or tokens (B, S, C) seen as (B, C, S). A kernel sees (B, C, S), S voxels, and takes tiles of BLOCK_S voxels x
BLOCK_C channels. Offsets are int64 from the sample's number on, so tensors beyond 2^31 elements are addressed correctly.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccella_fast.kernels.aot import CompileCase
from ccella_fast.kernels.backend import jit, tl
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS, LaunchConfig

PARTS = 256  # most shares of a sample: as many partial results a program merges in one tile
PROGRAMS_EACH = 2  # programs that a multiprocessor gets of a walk: few, as each merges partial results first


def is_channels_last(x: Tensor) -> bool:
    """Whether to walk `x` channels last; both are right where C or S is 1, and that counts as channels first."""
    return not x.is_contiguous() and x.movedim(1, -1).is_contiguous()


def to_supported_layout(x: Tensor) -> Tensor:
    """`x` in one of the two layouts: itself, or a contiguous copy where its strides are others."""
    return x if x.is_contiguous() or is_channels_last(x) else x.contiguous()


def laid_out_like(x: Tensor, other: Tensor) -> Tensor:
    """`x` in the layout of the dense tensor `other`, copied where needed."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1) if is_channels_last(other) else x.contiguous()


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of the GPU; an H200's number where there is none, for the interpreter and ahead-of-time compilation."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def layout_key(kernel: str, x: Tensor) -> str:
    """The key of a kernel's launch configuration for dense `x`."""
    return f"{kernel} {'last' if is_channels_last(x) else 'first'}"


def contiguous_or_none(tensor: Tensor | None) -> Tensor | None:
    """A small parameter as the kernels read it: contiguous."""
    return None if tensor is None else tensor.contiguous()


class LaunchGrid(NamedTuple):
    """How one kernel goes over a tensor: programs in the grid, voxels (`rows`) of each, programs (`shares`) to a block of
    channels of a sample, and the kernel's compile-time sizes."""

    programs: int
    rows: int
    shares: int
    sizes: dict[str, Any]


def launch_grid(x: Tensor, groups: int, tuned: LaunchConfig) -> LaunchGrid:
    """For dense `x` of which a program takes whole groups: one where channels are first; where they are last so many that it
    reads pieces of rows of at most 128 channels."""
    return _launch_grid(*sizes(x), groups, tuned.constants["TILE"], PROGRAMS_EACH * multiprocessors(x.device))


@functools.lru_cache(4096)
def _launch_grid(B: int, C: int, S: int, last: bool, groups: int, tile: int, programs: int) -> LaunchGrid:
    width = C // groups
    taken = max(d for d in range(1, 33) if groups % d == 0 and (d == 1 or (last and d * width <= 128)))
    block = power_of_two(taken * width)
    blocks = B * (groups // taken)
    voxels = tile // block
    tiles = max(1, -(-S // voxels))
    shares = min(tiles, PARTS, max(1, programs // max(1, blocks)))
    rows = -(-tiles // shares) * voxels
    shares = max(1, -(-S // rows))
    constants = dict(C=C, CPG=width, GROUPS=taken, BLOCK_G=power_of_two(taken), BLOCK_C=block, LAST=last)
    return LaunchGrid(blocks * shares, rows, shares, constants)


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
    """The case for `kernels/aot.py` of a kernel that walks x (1, channels, voxels) in 32 groups. Parameters and statistics are
    fp32; `dtype` is that of what is as large as x, and of the shift. constants: those that `walk` does not set."""
    x = torch.empty((1, voxels, channels) if last else (1, channels, voxels), device="meta")
    x = x.movedim(-1, 1) if last else x
    tuned = DEFAULT_LAUNCH_CONFIGS[kernel][layout_key(step, x)]
    large = ("x_ptr", "y_ptr", "dy_ptr", "dx_ptr", "h_ptr", "residual_ptr", "shift_ptr")
    pointers = [name for name in function.arg_names if name.endswith("_ptr")]
    signature = {name: f"*{dtype}" if name in large else "*fp32" for name in pointers}
    signature |= dict.fromkeys(("S", "rows", "shares", "part_rows", "parts", "shift_stride"), "i32") | {"eps": "fp32"}
    title = f"{kernel} {layout_key(step, x)} c{channels} {dtype}"
    known = {**launch_grid(x, 32, tuned).sizes, **constants}
    sizes_and_more = {key: value for key, value in known.items() if key in function.arg_names}
    return CompileCase(title, function, signature, tuned, sizes_and_more, ("S", "rows", "part_rows"), wide_loads=True)


def sizes(x: Tensor) -> tuple[int, int, int, bool]:
    """B, C, S of a dense tensor, and whether its channels are last."""
    return x.shape[0], x.shape[1], x.shape[2:].numel(), is_channels_last(x)


def power_of_two(n: int) -> int:
    """The smallest that is not less than n."""
    return 1 << (n - 1).bit_length()


@jit
def program_coords(shares, blocks, REVERSED: tl.constexpr):
    """(sample as int64, channel block, share of the voxels) of this program in a flat grid. REVERSED: last ones first, to meet
    in the L2 cache what the launch before touched last."""
    pid = tl.program_id(0)
    if REVERSED:
        pid = tl.num_programs(0) - 1 - pid
    rest = pid // shares
    return (rest // blocks).to(tl.int64), rest % blocks, pid % shares


@jit
def tile_origin(b, first, S, C: tl.constexpr, LAST: tl.constexpr):
    """Offset of voxel `first`, channel 0 of sample `b`; b is int64."""
    return (b * S + first) * C if LAST else b * S * C + first


@jit
def tile_offsets(channels, S, C: tl.constexpr, BLOCK_S: tl.constexpr, LAST: tl.constexpr):
    """Offsets [BLOCK_S, BLOCK_C] of a tile from its origin."""
    voxels = tl.arange(0, BLOCK_S)
    return voxels[:, None] * C + channels[None, :] if LAST else channels[None, :].to(tl.int64) * S + voxels[:, None]


@jit
def channel_lanes(block, CPG: tl.constexpr, GROUPS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Lanes of a program, their channels, and which of them there are."""
    lane = tl.arange(0, BLOCK_C)
    return lane, block * GROUPS * CPG + lane, lane < GROUPS * CPG


@jit
def voxel_range(k, rows, S):
    """First voxel and end of share `k`."""
    start = k.to(tl.int64) * rows
    return start, tl.minimum(start + rows, S)


@jit
def to_groups(values, group, BLOCK_G: tl.constexpr):
    """Sums [BLOCK_G] over the channels of each group of values [BLOCK_C]."""
    return tl.sum(tl.where(group[:, None] == tl.arange(0, BLOCK_G)[None, :], values[:, None], 0.0), axis=0)


@jit
def to_channels(values, group, BLOCK_G: tl.constexpr):
    """For each channel [BLOCK_C] the value of its group, of values [BLOCK_G]."""
    return tl.sum(tl.where(group[:, None] == tl.arange(0, BLOCK_G)[None, :], values[None, :], 0.0), axis=1)


@jit
def channel_parameters(weight_ptr, bias_ptr, shift_ptr, b, channels, inside, C: tl.constexpr):
    weight = tl.load(weight_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + channels, mask=inside, other=0.0).to(tl.float32)
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + b * C + channels, mask=inside, other=0.0).to(tl.float32)
    else:
        shift = tl.zeros_like(bias)
    return weight, bias, shift
