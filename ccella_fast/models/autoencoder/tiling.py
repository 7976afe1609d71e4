"""Exact decoding and encoding of the autoencoder in slabs, according to a `TilingPlan`.

A slab is a range of planes along the first spatial axis. For each slab, a convolution reads the planes of its input that its
3x3x3 windows cover, including one neighboring plane on either side. Nothing is approximated, and no convolution is computed
twice. GroupNorm needs the statistics of the whole volume: the mean and the squared deviations of every slab are computed when
it is written, and then merged (Chan, Golub and LeVeque 1983). The normalized input of a convolution and the output of an
upsampling (2 GB in bf16, 4 GB in fp32, at 256x256x128) never exist as a whole.

Between two convolutions, an activation is stored in chunks: ranges of planes that are freed as soon as they have been read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.hardware import free_memory
from ccella_fast.kernels import group_norm_silu as norms
from ccella_fast.kernels import residual_shift as residuals
from ccella_fast.kernels.backend import choose
from ccella_fast.kernels.group_norm_silu import GroupNormSiLU, group_norm_silu_apply, group_norm_statistics
from ccella_fast.kernels.residual_shift import residual_shift_
from ccella_fast.kernels.upsample_trilinear import upsample_trilinear
from ccella_fast.models.autoencoder.tiling_plan import (
    GPU_SLAB_BYTES,
    HALO,
    TiledConv,
    TilingPlan,
    TilingStep,
    chunk_edges,
    make_tiling_plan,
    slab_bounds,
)

logger = logging.getLogger("ccella_fast")
# read(lo, hi) returns planes lo to hi - 1 of the input of a convolution, (1, C, hi - lo, Y, Z)
ReadPlanes = Callable[[int, int], Tensor]


class ChunkedTensor:
    """An activation (1, C, X, Y, Z) stored in chunks along X, which are written in order.

    Each chunk begins with the last `HALO` planes of the previous one, so that every window of planes can be read from one chunk
    without a copy.

    Attributes:
        edges: first plane of each chunk, then the number of planes.
        store: the device that holds the chunks.
        chunks: None for a chunk that has not been written yet or has been freed.
        shift: values per channel (C,) that the reader adds: the bias of the convolution that wrote the chunks.
    """

    def __init__(self, edges: list[int], store: torch.device, whole: Tensor | None = None):
        self.edges, self.store = edges, store
        self.shift: Tensor | None = None
        self.chunks: list[Tensor | None] = [whole] if whole is not None else [None] * (len(edges) - 1)

    def read(self, lo: int, hi: int, device: torch.device) -> Tensor:
        """Return planes lo to hi - 1, which must be in one chunk, on `device`."""
        for index, chunk in enumerate(self.chunks):
            start = self._start(index)
            if chunk is not None and start <= lo and hi <= self.edges[index + 1]:
                return chunk[:, :, lo - start : hi - start].to(device)
        raise AssertionError(f"no chunk contains planes {lo} to {hi}: {self.edges}")

    def write(self, lo: int, y: Tensor) -> None:
        """Write y (1, C, planes, Y, Z) from plane `lo` on; all planes before must have been written."""
        if y.shape[2] == self.edges[-1]:
            self.chunks = [y.to(self.store)]
            return
        for index, begin, end in self._overlaps(lo, y.shape[2], halo=False):
            start = self._start(index)
            chunk = self.chunks[index]
            if chunk is None:
                chunk = self.chunks[index] = _empty_like(y, self.edges[index + 1] - start, self.store)
                if index:
                    previous = self.chunks[index - 1]
                    assert previous is not None
                    chunk[:, :, :HALO] = previous[:, :, -HALO:]
            chunk[:, :, begin - start : end - start] = y[:, :, begin - lo : end - lo]

    def add(self, lo: int, y: Tensor) -> Iterator[Tensor]:
        """Add y (1, C, planes, Y, Z) from plane `lo` on, and the shift. Yields the sums, each plane once."""
        for index, begin, end in self._overlaps(lo, y.shape[2], halo=True):
            chunk, start = self.chunks[index], self._start(index)
            assert chunk is not None
            total = chunk[:, :, begin - start : end - start]
            added = y[:, :, begin - lo : end - lo].to(self.store)
            if self.shift is None:
                total += added
            else:
                residual_shift_(added, total, self.shift.to(self.store))
            repeated = max(self.edges[index] - begin, 0)
            if begin + repeated < end:
                yield total[:, :, repeated:]

    def _start(self, index: int) -> int:
        """The first plane of a chunk, including those that it repeats."""
        return self.edges[index] - (HALO if index else 0)

    def _overlaps(self, lo: int, planes: int, *, halo: bool) -> Iterator[tuple[int, int, int]]:
        """Yield (chunk, first plane, end) of the overlap with each chunk, with or without the planes that it repeats."""
        for index, end in enumerate(self.edges[1:]):
            first = max(self._start(index) if halo else self.edges[index], lo)
            if first < min(end, lo + planes):
                yield index, first, min(end, lo + planes)


class GroupNormStatistics:
    """The statistics of a GroupNorm over a volume that is added slab by slab."""

    def __init__(self, norm: GroupNormSiLU):
        self.norm = norm
        self.parts: list[tuple[int, Tensor, Tensor]] = []  # elements per group, mean and variance (B, G)

    def add(self, slab: Tensor, shift: Tensor | None = None) -> None:
        """Add a slab (B, C, X, Y, Z), to which the shift (C,) is added.

        Its deviations are taken from its own mean in fp32, so that a mean far from zero costs no precision.
        """
        groups = self.norm.num_groups
        per_group = slab[0].numel() // groups
        support = norms.backend_support(slab.device, slab.dtype, channels_per_group=slab.shape[1] // groups)
        if choose("group_norm_silu", support) == "triton":
            shift = None if shift is None else shift.expand(slab.shape[:2])
            self.parts.append((per_group, *group_norm_statistics(slab, groups, shift=shift)))
            return
        wide = slab.to(torch.promote_types(slab.dtype, torch.float32))
        if shift is not None:
            wide = wide + shift[:, None, None, None]
        if wide.is_cuda:
            variance, mean = torch.var_mean(wide.unflatten(1, (groups, -1)), dim=(2, 3, 4, 5), correction=0)
        else:  # on a CPU var_mean is not vectorized, unlike native_group_norm
            batch, channels, voxels = *wide.shape[:2], wide[0, 0].numel()
            if not wide.is_contiguous(memory_format=torch.channels_last_3d):
                wide = wide.contiguous()
            _, mean, rstd = torch.native_group_norm(wide, None, None, batch, channels, voxels, groups, 0.0)
            variance = rstd.double() ** -2
        self.parts.append((per_group, mean, variance))

    def merge(self) -> tuple[Tensor, Tensor]:
        """Return mean and 1/sqrt(variance + eps) of all slabs together, fp32 (B, G)."""
        counts, means, variances = zip(*self.parts, strict=True)
        part = torch.stack(means).double()
        count = torch.tensor(counts, dtype=torch.float64, pin_memory=part.is_cuda)[:, None, None]
        count = count.to(part.device, non_blocking=True)
        mean = (count * part).sum(0) / sum(counts)
        deviations = count * torch.stack(variances).double() + count * (part - mean) ** 2
        variance = deviations.sum(0) / sum(counts)
        return mean.float(), torch.rsqrt(variance + self.norm.eps).float()


def can_tile(module: nn.Module, x: Tensor, memory: int | None = None) -> bool:
    """Whether `run_tiled` can be used for x: not if gradients are needed or the computation is traced.

    Raises:
        ValueError: a memory budget is given, but it cannot be used.
    """
    gradients = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))
    if not (gradients or torch.compiler.is_compiling() or x.is_meta):
        return True
    if memory is not None:
        raise ValueError("a memory budget requires a computation without gradients: use torch.no_grad()")
    return False


def tiling_plan_for(
    convs: list[TiledConv], shape: tuple[int, ...], device: torch.device, memory: int | None = None
) -> TilingPlan:
    """Plan the computation of one volume.

    Args:
        convs: the convolutions, in order.
        shape: (C, X, Y, Z) of the volume.
        device: where it is computed.
        memory: bytes that may be allocated; by default three quarters of the free memory of the device.

    Raises:
        ConfigError: the memory is not sufficient for any plan.
    """
    dtype = convs[0].conv.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    # A quarter is left for the workspaces of the convolutions and for fragmentation.
    budget = free_memory(device) * 3 // 4 if memory is None else memory
    # A slab is at most a third of the budget, so at most that quarter: cuDNN may copy the slab into another layout.
    slab_bytes = min(GPU_SLAB_BYTES, budget // 3) if device.type == "cuda" else None
    return make_tiling_plan(convs, shape, dtype.itemsize, budget, host=device.type != "cpu", slab_bytes=slab_bytes)


@torch.no_grad()
def run_tiled(convs: list[TiledConv], x: Tensor, memory: int | None = None) -> Tensor:
    """Apply all convolutions to x (B, C, X, Y, Z), one volume at a time: results do not depend on the rest of the batch."""
    plan = tiling_plan_for(convs, tuple(x.shape[1:]), x.device, memory)
    if plan.slabs:
        logger.info("autoencoder: %s", str(plan).splitlines()[0])
    logger.debug("%s", plan)
    if x.is_cuda:
        x = x.to(memory_format=torch.channels_last_3d)
    volumes = [run_plan(convs, plan, volume) for volume in x.split(1)]
    return volumes[0] if len(volumes) == 1 else torch.cat(volumes)


def run_plan(convs: list[TiledConv], plan: TilingPlan, x: Tensor) -> Tensor:
    """Apply all convolutions to x (1, C, X, Y, Z) according to `plan`. The result is not differentiable."""
    device = x.device
    # The Triton kernels add a bias together with what follows; without them, a convolution adds its bias at no cost.
    defer_bias = choose("residual_shift", residuals.backend_support(device, x.dtype)) == "triton"
    volume = ChunkedTensor([0, x.shape[2]], device, x)
    del x
    kept: ChunkedTensor | None = None  # for the end of the residual block
    statistics: GroupNormStatistics | None = None
    for index, (conv, step) in enumerate(zip(convs, plan.steps, strict=True)):
        last = index + 1 == len(convs)
        # A norm whose convolution is computed whole computes the statistics itself.
        next_norm = None if last or plan.steps[index + 1].slabs == 1 else convs[index + 1].norm
        next_statistics = None if next_norm is None else GroupNormStatistics(next_norm)
        store = torch.device("cpu") if plan.on_host and not last else device
        planes = step.output_shape[1]
        edges = [0, planes] if step.slabs == 1 or last else chunk_edges(planes)
        result, shortcut = ChunkedTensor(edges, store), ChunkedTensor(edges, store)
        if defer_bias and not conv.ends_block and not last and convs[index + 1].norm is not None:
            result.shift = conv.conv.bias
        if conv.starts_block:
            kept = volume if conv.shortcut is None else shortcut
            if defer_bias and conv.shortcut is not None:
                shortcut.shift = _shortcut_shift(conv.shortcut, volume.shift)
        if conv.ends_block:
            assert kept is not None
            result, kept = kept, None
            result.shift = _sum_of_shifts(result.shift, conv.conv.bias) if defer_bias else None
        _run_step(
            conv, step, _input_reader(conv, volume, statistics, device), volume, result, shortcut, next_statistics
        )
        volume, statistics = result, next_statistics
    whole = volume.chunks[0]
    assert whole is not None
    return whole


def _run_step(
    conv: TiledConv,
    step: TilingStep,
    read: ReadPlanes,
    x: ChunkedTensor,
    result: ChunkedTensor,
    shortcut: ChunkedTensor,
    statistics: GroupNormStatistics | None,
) -> None:
    """Compute all slabs of one convolution.

    Args:
        conv: the convolution.
        step: its step of the plan.
        read: reads planes of the input of the convolution, that is x after norm or resampling.
        x: its chunks are freed once they have been read, unless the residual block keeps x.
        result: is written, or added to at the end of a residual block.
        shortcut: is written if the convolution has a shortcut.
        statistics: of the result, for the next norm.
    """
    device = conv.conv.weight.device
    bias = conv.conv.bias if result.shift is None else None
    length = conv.input_shape((1, x.edges[-1]))[1]
    for index, slabs in enumerate(slab_bounds(conv, x.edges, step.output_shape[1], step.planes)):
        for lo, hi in slabs:
            if conv.shortcut is not None:
                planes = x.read(lo, hi, device)
                plain = shortcut.shift is None
                shortcut.write(lo, conv.shortcut(planes) if plain else F.conv3d(planes, conv.shortcut.weight))
                del planes
            y = _convolve_planes(conv.conv, read, length, lo, hi, bias)
            outputs = [y]
            if conv.ends_block:
                outputs = list(result.add(lo, y))
            else:
                result.write(lo, y)
            if statistics is not None:
                for output in outputs:
                    statistics.add(output.to(device), None if conv.ends_block else result.shift)
            del y, outputs
        if not conv.starts_block or conv.shortcut is not None:
            x.chunks[index] = None  # every window in it has been read
    if conv.ends_block:
        result.shift = None  # has been added


def _shortcut_shift(shortcut: nn.Conv3d, shift: Tensor | None) -> Tensor:
    """The values per channel that a 1x1x1 convolution without its bias leaves to add, if its input leaves `shift` to add."""
    assert shortcut.bias is not None
    return shortcut.bias if shift is None else F.linear(shift, shortcut.weight.flatten(1), shortcut.bias)


def _sum_of_shifts(shift: Tensor | None, bias: Tensor | None) -> Tensor:
    assert bias is not None
    return bias if shift is None else shift.to(torch.promote_types(shift.dtype, torch.float32)) + bias


def _convolve_planes(conv: nn.Conv3d, read: ReadPlanes, length: int, lo: int, hi: int, bias: Tensor | None) -> Tensor:
    """Compute output planes lo to hi - 1 of a convolution whose input has `length` planes, with the given bias."""
    kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    first, last = lo * stride - padding, (hi - 1) * stride - padding + kernel
    inside = first >= 0 and last <= length
    first, last = max(first, 0), min(last, length)
    # At an end of the volume the convolution pads both ends of its input; the extra plane at the inner end is dropped.
    y = F.conv3d(read(first, last), conv.weight, bias, conv.stride, (0 if inside else padding, *conv.padding[1:]))
    skip = 0 if inside else lo - first // stride
    return y[:, :, skip : skip + hi - lo]


def _input_reader(
    conv: TiledConv, x: ChunkedTensor, statistics: GroupNormStatistics | None, device: torch.device
) -> ReadPlanes:
    """Return a function that reads planes of the input of the convolution: x, normalized or resampled, on `device`."""
    norm, end = conv.norm, x.edges[-1]
    shift = None if x.shift is None else x.shift[None]
    assert norm is not None or shift is None, "only a norm adds the bias of the previous convolution"
    if conv.resample == "up":
        return lambda lo, hi: _upsample_planes(x, lo, hi, device)
    if conv.resample == "down":
        return lambda lo, hi: F.pad(x.read(lo, min(hi, end), device), (0, 1, 0, 1, 0, int(hi > end)))
    if norm is None:
        return lambda lo, hi: x.read(lo, hi, device)
    if statistics is None:
        return lambda lo, hi: norm(x.read(lo, hi, device), shift)
    mean, rstd = statistics.merge()
    groups, weight, bias, silu = norm.num_groups, norm.weight, norm.bias, norm.silu

    def read_normalized(lo: int, hi: int) -> Tensor:
        slab = x.read(lo, hi, device)
        return group_norm_silu_apply(slab, groups, mean, rstd, weight, bias, silu=silu, shift=shift)

    return read_normalized


def _upsample_planes(x: ChunkedTensor, lo: int, hi: int, device: torch.device) -> Tensor:
    """Compute planes lo to hi - 1 of x after trilinear upsampling.

    Plane i becomes planes 2i and 2i + 1, each with a weight of 1/4 for its other neighbor.
    """
    first, last = max((lo - 1) // 2, 0), min(hi // 2 + 1, x.edges[-1])
    return upsample_trilinear(x.read(first, last, device), (lo - 2 * first, hi - 2 * first))


def _empty_like(y: Tensor, planes: int, store: torch.device) -> Tensor:
    """An uninitialized tensor on `store` with the dtype, layout and shape of y except for the number of planes."""
    last = y.is_contiguous(memory_format=torch.channels_last_3d)
    layout = torch.channels_last_3d if last else torch.contiguous_format
    shape = (*y.shape[:2], planes, *y.shape[3:])
    return torch.empty(shape, dtype=y.dtype, device=store, memory_format=layout)
