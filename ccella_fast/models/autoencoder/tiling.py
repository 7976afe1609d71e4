"""The autoencoder's convolutions in slabs: exact decoding and encoding, as a `Plan` says.

A slab is a run of planes along the first spatial axis. Each convolution reads its slab and the plane on either side that its
3x3x3 window needs from the activation before it: nothing is approximate, and no convolution is computed twice. GroupNorm needs
the whole volume's statistics: every slab leaves its mean and its squared deviations behind when it is written, and the parts
are merged (Chan, Golub, LeVeque 1983). What never exists whole is the normalised input of a convolution, and the enlarged input
of an upsampling (2 GB in bf16, 4 GB in fp32, at 256x256x128).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccella_fast.hardware import free_memory
from ccella_fast.kernels.group_norm_silu import GroupNormSiLU, group_norm_silu_apply
from ccella_fast.models.autoencoder.tiling_plan import (
    HALO,
    TiledConv,
    TilingPlan,
    TilingStep,
    cuts,
    edges_of,
    make_tiling_plan,
)

logger = logging.getLogger("ccella_fast")
Read = Callable[[int, int], Tensor]


class SlabbedTensor:
    """An activation (1, C, X, Y, Z) in pieces along X, written in order. Each piece begins with the last planes of the one
    before it, so that a window of planes is read without a copy, and a piece is freed as soon as it has been read."""

    def __init__(self, edges: list[int], store: torch.device, whole: Tensor | None = None):
        self.edges, self.store = edges, store
        self.pieces: list[Tensor | None] = [whole] if whole is not None else [None] * (len(edges) - 1)

    def read(self, lo: int, hi: int, device: torch.device) -> Tensor:
        """Planes lo to hi, which one piece holds."""
        for number, piece in enumerate(self.pieces):
            start = self._start(number)
            if piece is not None and start <= lo and hi <= self.edges[number + 1]:
                return piece[:, :, lo - start : hi - start].to(device)
        raise AssertionError(f"no piece holds planes {lo} to {hi}: {self.edges}")

    def write(self, lo: int, y: Tensor) -> None:
        """The planes from `lo` on; all planes before have been written."""
        if y.shape[2] == self.edges[-1]:
            self.pieces = [y.to(self.store)]
            return
        for number, begin, stop in self._overlaps(lo, y.shape[2], halo=False):
            start = self._start(number)
            piece = self.pieces[number]
            if piece is None:
                piece = self.pieces[number] = _empty(y, self.edges[number + 1] - start, self.store)
                if number:
                    before = self.pieces[number - 1]
                    assert before is not None
                    piece[:, :, :HALO] = before[:, :, -HALO:]
            piece[:, :, begin - start : stop - start] = y[:, :, begin - lo : stop - lo]

    def add(self, lo: int, y: Tensor) -> Iterator[Tensor]:
        """Add y to the planes from `lo` on. Yields the sums, every plane once."""
        for number, begin, stop in self._overlaps(lo, y.shape[2], halo=True):
            piece, start = self.pieces[number], self._start(number)
            assert piece is not None
            total = piece[:, :, begin - start : stop - start]
            total += y[:, :, begin - lo : stop - lo].to(self.store)
            own = max(self.edges[number] - begin, 0)
            if begin + own < stop:
                yield total[:, :, own:]

    def _start(self, number: int) -> int:
        return self.edges[number] - (HALO if number else 0)

    def _overlaps(self, lo: int, planes: int, *, halo: bool) -> Iterator[tuple[int, int, int]]:
        """(piece, first, end) of the planes of each piece, with its repeated ones or without."""
        for number, end in enumerate(self.edges[1:]):
            first = max(self._start(number) if halo else self.edges[number], lo)
            if first < min(end, lo + planes):
                yield number, first, min(end, lo + planes)


class Statistics:
    """Those of a GroupNorm over a volume that arrives slab by slab."""

    def __init__(self, norm: GroupNormSiLU):
        self.norm = norm
        self.parts: list[tuple[int, Tensor, Tensor]] = []  # elements a group, mean (B, G), squared deviations (B, G)

    def add(self, slab: Tensor) -> None:
        """In fp32, about the slab's own mean: a volume whose mean is far from zero loses nothing."""
        wide, groups = slab.to(torch.promote_types(slab.dtype, torch.float32)), self.norm.num_groups
        count = slab[0].numel() // groups
        if wide.is_cuda:
            variance, mean = torch.var_mean(wide.unflatten(1, (groups, -1)), dim=(2, 3, 4, 5), correction=0)
        else:  # var_mean has no vectorised path here, the norm has one
            batch, channels, voxels = *wide.shape[:2], wide[0, 0].numel()
            if not wide.is_contiguous(memory_format=torch.channels_last_3d):
                wide = wide.contiguous()
            _, mean, rstd = torch.native_group_norm(wide, None, None, batch, channels, voxels, groups, 0.0)
            variance = rstd.double() ** -2
        self.parts.append((count, mean.double(), count * variance.double()))

    def merge(self) -> tuple[Tensor, Tensor]:
        """mean and 1/sqrt(variance + eps) of all slabs together, fp32 (B, G)."""
        total = sum(count for count, _, _ in self.parts)
        mean = torch.stack([count * part for count, part, _ in self.parts]).sum(0) / total
        spread = [squares + count * (part - mean) ** 2 for count, part, squares in self.parts]
        variance = torch.stack(spread).sum(0) / total
        return mean.float(), torch.rsqrt(variance + self.norm.eps).float()


def can_tile(module: nn.Module, x: Tensor, memory: int | None = None) -> bool:
    """Can x go through as planned? Not where gradients are needed or the graph is traced: then module follows module.

    Raises ValueError when a memory budget is given all the same."""
    gradients = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in module.parameters()))
    if not (gradients or torch.compiler.is_compiling() or x.is_meta):
        return True
    if memory is not None:
        raise ValueError("a memory budget is kept only without gradients: use it under torch.no_grad()")
    return False


def tiling_plan_for(
    passes: list[TiledConv], shape: tuple[int, ...], device: torch.device, memory: int | None = None
) -> TilingPlan:
    """The plan for one volume of `shape` (C, X, Y, Z) on `device`, within `memory` bytes or three quarters of what is free."""
    dtype = passes[0].conv.weight.dtype
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
    # A quarter stays free for the convolutions' workspaces and for fragmentation.
    budget = free_memory(device) * 3 // 4 if memory is None else memory
    return make_tiling_plan(passes, shape, dtype.itemsize, budget, host=device.type != "cpu")


@torch.no_grad()
def run_tiled(passes: list[TiledConv], x: Tensor, memory: int | None = None) -> Tensor:
    """x (B, C, X, Y, Z) through all passes, one volume after the other: each is the same in any batch."""
    plan = tiling_plan_for(passes, tuple(x.shape[1:]), x.device, memory)
    if plan.tiles:
        logger.info("autoencoder: %s", str(plan).splitlines()[0])
    logger.debug("%s", plan)
    if x.is_cuda:
        x = x.to(memory_format=torch.channels_last_3d)
    volumes = [run(passes, plan, volume) for volume in x.split(1)]
    return volumes[0] if len(volumes) == 1 else torch.cat(volumes)


def run(passes: list[TiledConv], plan: TilingPlan, x: Tensor) -> Tensor:
    """x (1, C, X, Y, Z) through all passes, as planned. Not differentiable."""
    device = x.device
    volume = SlabbedTensor([0, x.shape[2]], device, x)
    del x
    block: SlabbedTensor | None = None
    statistics: Statistics | None = None
    for number, (each, step) in enumerate(zip(passes, plan.steps, strict=True)):
        last = number + 1 == len(passes)
        # A norm that reads the volume in one piece takes the statistics itself.
        follower = None if last or plan.steps[number + 1].slabs == 1 else passes[number + 1].norm
        following = None if follower is None else Statistics(follower)
        store = torch.device("cpu") if plan.on_host and not last else device
        edges = [0, step.output[1]] if step.slabs == 1 or last else edges_of(step.output[1])
        result, branch = SlabbedTensor(edges, store), SlabbedTensor(edges, store)
        if each.opens:
            block = volume if each.branch is None else branch
        if each.adds:
            assert block is not None
            result, block = block, None
        _carry_out(each, step, _input(each, volume, statistics, device), volume, result, branch, following)
        volume, statistics = result, following
    whole = volume.pieces[0]
    assert whole is not None
    return whole


def _carry_out(
    each: TiledConv,
    step: TilingStep,
    read: Read,
    x: SlabbedTensor,
    result: SlabbedTensor,
    branch: SlabbedTensor,
    statistics: Statistics | None,
) -> None:
    """All slabs of one pass, from `read` (planes of the convolution's input) into `result` and `branch`."""
    device = each.conv.weight.device
    length = each.grid((1, x.edges[-1]))[1]
    for number, slabs in enumerate(cuts(each, x.edges, step.output[1], step.planes)):
        for lo, hi in slabs:
            if each.branch is not None:
                branch.write(lo, each.branch(x.read(lo, hi, device)))
            y = _planes(each.conv, read, length, lo, hi)
            sums = [y]
            if each.adds:
                sums = list(result.add(lo, y))
            else:
                result.write(lo, y)
            if statistics is not None:
                for part in sums:
                    statistics.add(part.to(device))
            del y, sums
        if not each.opens or each.branch is not None:
            x.pieces[number] = None  # all windows that lie in it have been read


def _planes(conv: nn.Conv3d, read: Read, length: int, lo: int, hi: int) -> Tensor:
    """Planes lo to hi of the convolution, from the planes of its input that they need."""
    kernel, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    first, last = lo * stride - padding, (hi - 1) * stride - padding + kernel
    inside = first >= 0 and last <= length
    first, last = max(first, 0), min(last, length)
    # At the volume's ends the convolution pads; where it then also pads inwards, that plane is dropped.
    y = F.conv3d(read(first, last), conv.weight, conv.bias, conv.stride, (0 if inside else padding, *conv.padding[1:]))
    skip = 0 if inside else lo - first // stride
    return y[:, :, skip : skip + hi - lo]


def _input(each: TiledConv, x: SlabbedTensor, statistics: Statistics | None, device: torch.device) -> Read:
    """read(lo, hi): planes of what enters the convolution, on `device`."""
    norm, end = each.norm, x.edges[-1]
    if each.resample == "up":
        return lambda lo, hi: _enlarged(x, lo, hi, device)
    if each.resample == "down":
        return lambda lo, hi: F.pad(x.read(lo, min(hi, end), device), (0, 1, 0, 1, 0, int(hi > end)))
    if norm is None:
        return lambda lo, hi: x.read(lo, hi, device)
    if statistics is None:
        return lambda lo, hi: norm(x.read(lo, hi, device))
    mean, rstd = statistics.merge()
    groups, weight, bias, silu = norm.num_groups, norm.weight, norm.bias, norm.silu

    def normalised(lo: int, hi: int) -> Tensor:
        return group_norm_silu_apply(x.read(lo, hi, device), groups, mean, rstd, weight, bias, silu=silu)

    return normalised


def _enlarged(x: SlabbedTensor, lo: int, hi: int, device: torch.device) -> Tensor:
    """Planes lo to hi of the trilinear enlargement: plane i becomes 2i and 2i + 1, each with 1/4 of the neighbour there."""
    first, last = max((lo - 1) // 2, 0), min(hi // 2 + 1, x.edges[-1])
    return enlarge(x.read(first, last, device))[:, :, lo - 2 * first : hi - 2 * first]


def enlarge(x: Tensor) -> Tensor:
    """Trilinear x2, corners not aligned."""
    return F.interpolate(x, scale_factor=2.0, mode="trilinear", align_corners=False)


def _empty(y: Tensor, planes: int, store: torch.device) -> Tensor:
    last = y.is_contiguous(memory_format=torch.channels_last_3d)
    layout = torch.channels_last_3d if last else torch.contiguous_format
    shape = (*y.shape[:2], planes, *y.shape[3:])
    return torch.empty(shape, dtype=y.dtype, device=store, memory_format=layout)
