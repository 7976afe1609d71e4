"""How the autoencoder's convolutions are cut into slabs, so that decoding and encoding stay within a memory budget.

Planned from shapes alone, before anything is computed; carried out by `tiles.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from ccella_fast.errors import ConfigError
from ccella_fast.kernels.group_norm_silu import GroupNormSiLU

SLAB = 2**29  # bytes of short-lived tensors: more buy no speed, so even a volume that fits is cut there
PIECES = 4  # of an activation that is cut: what has been read can be freed while the rest is still needed
HALO = 2  # planes of the piece before, repeated in each piece: a 3x3x3 window never spans two


class TiledConv(NamedTuple):
    """One convolution and what happens on its way in and out: y = conv(resample(silu(norm(x)))).

    The two passes of a residual block: the first `opens` it, and its x, or branch(x), is what the second one `adds` to y."""

    name: str
    conv: nn.Conv3d
    norm: GroupNormSiLU | None = None
    resample: str = ""  # "up": trilinear x2; "down": a plane of zeros at the high end of each axis
    opens: bool = False
    branch: nn.Conv3d | None = None  # 1x1x1
    adds: bool = False

    def grid(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(C, X, Y, Z) of what enters the convolution, for an x of this shape."""
        channels, *axes = shape
        return (channels, *(2 * n if self.resample == "up" else n + (self.resample == "down") for n in axes))

    def output(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        kernel, stride, padding = self.conv.kernel_size[0], self.conv.stride[0], int(self.conv.padding[0])
        return (self.conv.out_channels, *((n + 2 * padding - kernel) // stride + 1 for n in self.grid(shape)[1:]))


class TilingStep(NamedTuple):
    """One pass of a plan. bytes: what is allocated at its peak, every activation that is alive then included."""

    name: str
    output: tuple[int, ...]  # (C, X, Y, Z)
    planes: int  # of the largest slab
    slabs: int
    bytes: int


@dataclass(frozen=True)
class TilingPlan:
    """How a volume goes through the passes; `print(plan)` shows it."""

    steps: tuple[TilingStep, ...]
    budget: int  # bytes
    on_host: bool  # whole activations wait in the host's memory, only slabs are on the device

    @property
    def bytes(self) -> int:
        """Estimated peak of the tensors on the device, x and the result included."""
        return max(step.bytes for step in self.steps)

    @property
    def tiles(self) -> int:
        """Slabs in all passes that are cut; 0: the volume goes through whole."""
        return sum(step.slabs for step in self.steps if step.slabs > 1)

    def __str__(self) -> str:
        how = f"{self.tiles} tiles" if self.tiles else "whole"
        where = ", activations on the host" if self.on_host else ""
        lines = [f"{how}{where}: peak {self.bytes / 2**30:.2f} GiB of {self.budget / 2**30:.2f} GiB"]
        for step in self.steps:
            shape = " x ".join(map(str, step.output))
            lines.append(f"  {step.name:<16} {shape:<24} {step.slabs:>4} {step.bytes / 2**30:9.3f} GiB")
        return "\n".join(lines)


def make_tiling_plan(
    passes: list[TiledConv], shape: tuple[int, ...], itemsize: int, budget: int, *, host: bool = False
) -> TilingPlan:
    """The fewest slabs with which every pass stays within `budget` bytes, for an x of `shape` (C, X, Y, Z).

    itemsize: bytes of an activation's element. host: activations may wait in the host's memory where the device's is too small.
    Counted are tensors, with fused kernels; not the private workspace of a convolution.
    Raises ConfigError with the estimate when not even single planes fit."""
    for on_host in (False, True) if host else (False,):
        steps = _steps(passes, shape, itemsize, budget, on_host)
        if all(step.bytes <= budget for step in steps):
            return TilingPlan(tuple(steps), budget, on_host)
    worst = max(steps, key=lambda step: step.bytes)
    why = f"{worst.bytes / 2**30:.2f} GiB are needed even plane by plane, {budget / 2**30:.2f} GiB may be used"
    fix = "free memory on this device, use a smaller grid, or bf16 in place of fp32"
    raise ConfigError(why, field=f"autoencoder, {worst.name}", fix=fix)


def edges_of(length: int) -> list[int]:
    """The first plane of each piece of an activation that is cut, and at the end its length."""
    count = max(1, min(PIECES, length // (4 * HALO)))
    return [length * piece // count for piece in range(count + 1)]


def cuts(each: TiledConv, edges: list[int], length: int, planes: int) -> list[list[tuple[int, int]]]:
    """Slabs (lo, hi) of the `length` output planes, at most `planes` long, in lists: one a piece of x (whose edges are given),
    with the slabs whose windows that piece holds."""
    scale = {"": 1, "up": 2, "down": 0.5}[each.resample]
    bounds = [0, *(int((edge - 1) * scale) for edge in edges[1:-1]), length]
    segments = []
    for first, end in zip(bounds, bounds[1:], strict=False):
        count = math.ceil((end - first) / planes)
        steps = [first + (end - first) * slab // count for slab in range(count + 1)]
        segments.append(list(zip(steps, steps[1:], strict=False)))
    return segments


def _steps(
    passes: list[TiledConv], shape: tuple[int, ...], itemsize: int, budget: int, on_host: bool
) -> list[TilingStep]:
    steps: list[TilingStep] = []
    cut = block_cut = False  # is x in pieces? is what the block keeps?
    for each in passes:
        output = each.output(shape)
        edges = edges_of(shape[1]) if cut else [0, shape[1]]
        for planes in range(output[1], 0, -1):
            slabs = [hi - lo for segment in cuts(each, edges, output[1], planes) for lo, hi in segment]
            whole = len(slabs) == 1
            short = _short_lived(each, shape, max(slabs), itemsize, whole=whole, on_host=on_host)
            long = 0 if on_host else _long_lived(each, shape, itemsize, cut=cut, block_cut=block_cut, whole=whole)
            if short <= min(SLAB, budget - long):
                break
        steps.append(TilingStep(each.name, output, max(slabs), len(slabs), long + short))
        if each.opens:
            block_cut = cut if each.branch is None else not whole
        shape, cut = output, block_cut if each.adds else not whole
    return steps


def _long_lived(
    each: TiledConv, shape: tuple[int, ...], itemsize: int, *, cut: bool, block_cut: bool, whole: bool
) -> int:
    """Bytes of x, of the results and of what a block keeps, at the worst moment. A whole result counts as short-lived."""
    source, output = _stored(shape, itemsize, cut), each.output(shape)
    kept = _stored(output, itemsize, block_cut) if each.adds else 0  # y is added to it in place
    results = 0 if whole or each.adds else _stored(output, itemsize, True) * (1 + (each.branch is not None))
    if each.opens and each.branch is None:  # x itself is kept
        return source + results
    pieces = len(edges_of(shape[1])) - 1 if cut else 1  # x is freed piece by piece while the results grow
    return kept + max(source + results // pieces, source // pieces + results)


def _stored(shape: tuple[int, ...], itemsize: int, cut: bool) -> int:
    repeated = HALO * (len(edges_of(shape[1])) - 2) if cut else 0
    return math.prod(shape) // shape[1] * (shape[1] + repeated) * itemsize


def _short_lived(
    each: TiledConv, shape: tuple[int, ...], planes: int, itemsize: int, *, whole: bool, on_host: bool
) -> int:
    """Bytes that come and go while `planes` planes of the output are made."""
    inside, output = each.grid(shape), each.output(shape)
    kernel, stride = each.conv.kernel_size[0], each.conv.stride[0]
    window = min((planes - 1) * stride + kernel, inside[1])
    if each.resample == "up":
        window = min(window + 2, inside[1])
    entering = window * math.prod(inside) // inside[1] * itemsize
    leaving = (planes + (not whole)) * math.prod(output) // output[1] * itemsize
    prepared = entering if each.norm is not None or each.resample else 0
    fetched = math.prod(shape) // shape[1] * window * itemsize if on_host else 0
    measured = 0 if whole else 2 * leaving * 4 // itemsize  # statistics are taken in fp32, and the CPU writes the norm
    return fetched + max(prepared + leaving, leaving * (1 + (each.branch is not None)), leaving + measured)
