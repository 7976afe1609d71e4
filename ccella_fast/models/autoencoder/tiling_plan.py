"""Plans how the convolutions of the autoencoder are computed in slabs, so that decoding and encoding fit a memory budget.

A plan is made from shapes alone, before anything is computed, and executed by `tiling.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from ccella_fast.errors import ConfigError
from ccella_fast.kernels.group_norm_silu import GroupNormSiLU
from ccella_fast.quantities import format_bytes

# Bytes of transient tensors. More are not faster, so even a volume that fits in memory is computed in slabs of this size.
SLAB_BYTES = 2**29
# On a GPU larger slabs repeat fewer planes and take fewer launches, and an activation that is computed whole is not copied.
# With this size a volume of 256x256x128 is decoded whole in bf16, and no tensor of a slab has more than 2^31 elements.
GPU_SLAB_BYTES = 2**32
# Chunks in which a large activation is stored: a chunk that has been read is freed while the others are still needed.
CHUNKS = 4
# Planes of the previous chunk that each chunk repeats, so that a 3x3x3 window never spans two chunks.
HALO = 2


class TiledConv(NamedTuple):
    """A convolution with the operations around it: y = conv(resample(silu(norm(x)))), plus a residual at the end of a block.

    Attributes:
        name: for the plan and its error messages.
        conv: the convolution.
        norm: the GroupNorm before it.
        resample: "up", trilinear upsampling by 2; "down", a plane of zeros appended to each axis; or "".
        starts_block: this is the first convolution of a residual block: x, or shortcut(x), is kept for the last one.
        shortcut: the 1x1x1 convolution of the residual connection.
        ends_block: this is the last convolution of a residual block: the kept activation is added to y.
    """

    name: str
    conv: nn.Conv3d
    norm: GroupNormSiLU | None = None
    resample: str = ""
    starts_block: bool = False
    shortcut: nn.Conv3d | None = None
    ends_block: bool = False

    def input_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(C, X, Y, Z) of the input of `conv`, after resampling, for an x of `shape` (C, X, Y, Z)."""
        channels, *axes = shape
        return (channels, *(2 * n if self.resample == "up" else n + (self.resample == "down") for n in axes))

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """(C, X, Y, Z) of y, for an x of `shape` (C, X, Y, Z)."""
        kernel, stride, padding = self.conv.kernel_size[0], self.conv.stride[0], int(self.conv.padding[0])
        axes = self.input_shape(shape)[1:]
        return (self.conv.out_channels, *((n + 2 * padding - kernel) // stride + 1 for n in axes))


def find_conv3d(module: nn.Module) -> nn.Conv3d:
    """Return the first `nn.Conv3d` in `module`, which the reference implementation nests in wrappers."""
    return next(child for child in module.modules() if isinstance(child, nn.Conv3d))


def residual_block_convs(name: str, block: Any) -> list[TiledConv]:
    """Return the convolutions of a residual block with `norm1`, `conv1`, `norm2`, `conv2` and `nin_shortcut`."""
    shortcut = None if isinstance(block.nin_shortcut, nn.Identity) else find_conv3d(block.nin_shortcut)
    return [
        TiledConv(f"{name}.conv1", find_conv3d(block.conv1), block.norm1, starts_block=True, shortcut=shortcut),
        TiledConv(f"{name}.conv2", find_conv3d(block.conv2), block.norm2, ends_block=True),
    ]


class TilingStep(NamedTuple):
    """How one convolution of a plan is computed.

    Attributes:
        name: of the convolution.
        output_shape: (C, X, Y, Z).
        planes: planes of the largest slab.
        slabs: number of slabs.
        bytes: peak of the allocated memory, including every activation that is alive at that time.
    """

    name: str
    output_shape: tuple[int, ...]
    planes: int
    slabs: int
    bytes: int


@dataclass(frozen=True)
class TilingPlan:
    """How a volume is decoded or encoded; `print(plan)` shows it.

    Attributes:
        steps: one per convolution.
        budget: bytes that may be allocated.
        on_host: activations are stored in host memory, and only slabs are on the device.
    """

    steps: tuple[TilingStep, ...]
    budget: int
    on_host: bool

    @property
    def bytes(self) -> int:
        """Estimated peak of the memory on the device, including the input and the result."""
        return max(step.bytes for step in self.steps)

    @property
    def slabs(self) -> int:
        """Total number of slabs of all convolutions that are split; 0 if none is."""
        return sum(step.slabs for step in self.steps if step.slabs > 1)

    def __str__(self) -> str:
        how = f"{self.slabs} slabs" if self.slabs else "whole"
        where = ", activations on the host" if self.on_host else ""
        lines = [f"{how}{where}: peak {format_bytes(self.bytes)} of {format_bytes(self.budget)}"]
        for step in self.steps:
            shape = " x ".join(map(str, step.output_shape))
            lines.append(f"  {step.name:<16} {shape:<24} {step.slabs:>4} {format_bytes(step.bytes):>10}")
        return "\n".join(lines)


def make_tiling_plan(
    convs: list[TiledConv],
    shape: tuple[int, ...],
    itemsize: int,
    budget: int,
    *,
    host: bool = False,
    slab_bytes: int | None = None,
) -> TilingPlan:
    """Plan the fewest slabs with which every convolution stays within a memory budget.

    The estimate counts the tensors that the fused kernels allocate, but not the private workspace of a convolution.

    Args:
        convs: the convolutions, in order.
        shape: (C, X, Y, Z) of the input.
        itemsize: bytes per element of an activation.
        budget: bytes that may be allocated.
        host: activations may be stored in host memory if the device memory is too small.
        slab_bytes: bytes of transient tensors; default `SLAB_BYTES`.

    Raises:
        ConfigError: not even slabs of one plane fit; the message contains the estimate.
    """
    for on_host in (False, True) if host else (False,):
        steps = _plan_steps(convs, shape, itemsize, budget, slab_bytes or SLAB_BYTES, on_host)
        if all(step.bytes <= budget for step in steps):
            return TilingPlan(tuple(steps), budget, on_host)
    worst = max(steps, key=lambda step: step.bytes)
    needed, available = format_bytes(worst.bytes), format_bytes(budget)
    why = f"slabs of a single plane need {needed} of memory, but at most {available} may be used"
    fix = "free memory on this device, use a smaller grid, or use bf16 instead of fp32"
    raise ConfigError(why, field=f"autoencoder, {worst.name}", fix=fix)


def chunk_edges(length: int) -> list[int]:
    """Return the first plane of each chunk of an activation with `length` planes, followed by `length`."""
    count = max(1, min(CHUNKS, length // (4 * HALO)))
    return [length * chunk // count for chunk in range(count + 1)]


def slab_bounds(conv: TiledConv, edges: list[int], length: int, planes: int) -> list[list[tuple[int, int]]]:
    """Split the output planes of a convolution into slabs.

    Args:
        conv: the convolution.
        edges: the chunks of its input, as `chunk_edges` returns them.
        length: number of output planes.
        planes: largest size of a slab.

    Returns:
        For each chunk of the input, the slabs (first plane, end) that are computed from that chunk alone.
    """
    scale = {"": 1, "up": 2, "down": 0.5}[conv.resample]
    chunk_bounds = [0, *(int((edge - 1) * scale) for edge in edges[1:-1]), length]
    slabs_of_chunks = []
    for first, end in zip(chunk_bounds, chunk_bounds[1:], strict=False):
        count = math.ceil((end - first) / planes)
        bounds = [first + (end - first) * slab // count for slab in range(count + 1)]
        slabs_of_chunks.append(list(zip(bounds, bounds[1:], strict=False)))
    return slabs_of_chunks


def _plan_steps(
    convs: list[TiledConv], shape: tuple[int, ...], itemsize: int, budget: int, slab_bytes: int, on_host: bool
) -> list[TilingStep]:
    steps: list[TilingStep] = []
    chunked = kept_chunked = False  # whether x, and the activation kept for the end of the block, are stored in chunks
    for conv in convs:
        output = conv.output_shape(shape)
        edges = chunk_edges(shape[1]) if chunked else [0, shape[1]]
        for planes in range(output[1], 0, -1):
            slabs = [hi - lo for chunk in slab_bounds(conv, edges, output[1], planes) for lo, hi in chunk]
            whole = len(slabs) == 1
            transient = _transient_bytes(conv, shape, max(slabs), itemsize, whole=whole, on_host=on_host)
            resident = 0
            if not on_host:
                resident = _resident_bytes(
                    conv, shape, itemsize, chunked=chunked, kept_chunked=kept_chunked, whole=whole
                )
            if transient <= min(slab_bytes, budget - resident):
                break
        steps.append(TilingStep(conv.name, output, max(slabs), len(slabs), resident + transient))
        if conv.starts_block:
            kept_chunked = chunked if conv.shortcut is None else not whole
        shape, chunked = output, kept_chunked if conv.ends_block else not whole
    return steps


def _resident_bytes(
    conv: TiledConv, shape: tuple[int, ...], itemsize: int, *, chunked: bool, kept_chunked: bool, whole: bool
) -> int:
    """Peak bytes of x, the results and the kept activation. A result that is computed whole counts as transient."""
    source, output = _activation_bytes(shape, itemsize, chunked), conv.output_shape(shape)
    kept = _activation_bytes(output, itemsize, kept_chunked) if conv.ends_block else 0  # y is added to it in place
    results = 0
    if not whole and not conv.ends_block:
        results = _activation_bytes(output, itemsize, True) * (1 + (conv.shortcut is not None))
    if conv.starts_block and conv.shortcut is None:  # x itself is kept
        return source + results
    chunks = len(chunk_edges(shape[1])) - 1 if chunked else 1  # x is freed chunk by chunk while the results grow
    return kept + max(source + results // chunks, source // chunks + results)


def _activation_bytes(shape: tuple[int, ...], itemsize: int, chunked: bool) -> int:
    repeated = HALO * (len(chunk_edges(shape[1])) - 2) if chunked else 0
    return math.prod(shape) // shape[1] * (shape[1] + repeated) * itemsize


def _transient_bytes(
    conv: TiledConv, shape: tuple[int, ...], planes: int, itemsize: int, *, whole: bool, on_host: bool
) -> int:
    """Bytes that are allocated and freed while `planes` planes of the output are computed."""
    conv_input, output = conv.input_shape(shape), conv.output_shape(shape)
    kernel, stride = conv.conv.kernel_size[0], conv.conv.stride[0]
    window = min((planes - 1) * stride + kernel, conv_input[1])
    if conv.resample == "up":
        window = min(window + 2, conv_input[1])
    input_bytes = window * math.prod(conv_input) // conv_input[1] * itemsize
    output_bytes = (planes + (not whole)) * math.prod(output) // output[1] * itemsize
    prepared = input_bytes if conv.norm is not None or conv.resample else 0
    copied = math.prod(shape) // shape[1] * window * itemsize if on_host else 0
    # Statistics are computed from an fp32 copy; on a CPU, a normalized output is written as well, and discarded.
    statistics = 0 if whole else 2 * output_bytes * 4 // itemsize
    shortcut_and_output = output_bytes * (1 + (conv.shortcut is not None))
    return copied + max(prepared + output_bytes, shortcut_and_output, output_bytes + statistics)
