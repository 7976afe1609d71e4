"""Volumes with torch, on a CPU or a GPU: the plain implementation of the augmentations that parameters.py defines.

On a CPU a volume is processed in slabs that stay in the cache: one pass through memory instead of one per operator.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from threading import Barrier

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ccella_fast.config import AugmentationConfig
from ccella_fast.data.augmentation.engine import threads_per_process
from ccella_fast.data.augmentation.parameters import BIAS_FIELD_SIZE, NOISE_FADE_LIMIT, standard_normals
from ccella_fast.data.augmentation.requests import VolumeRequest

_SLAB_VOXELS = 2**17  # sampling grid, source and result fit into the cache of a core


class TorchEngine:
    """An `AugmentationEngine` that uses torch; `make` produces a single volume.

    On a GPU, threads read two batches ahead into pinned memory. On a CPU nothing runs concurrently with the training, which
    needs every core itself; the volumes of a batch are processed in parallel, one thread per volume. The order of requests and
    the batch size do not change a volume. `DaliEngine` states the tolerance within which both engines agree.
    """

    name = "torch"

    def __init__(self, config: AugmentationConfig, device: torch.device, size: Sequence[int]):
        self.config, self.device = config, device
        table = standard_normals(math.prod(size)) if config.noise else None
        self._normals = None if table is None else torch.tensor(table, device=device)

    def stream(
        self, paths: Sequence[Path], requests: Callable[[int], list[VolumeRequest]], count: int
    ) -> Iterator[Tensor]:
        """Yield `count` batches; see `AugmentationEngine.stream`."""
        if self.device.type == "cpu":
            with _single_threaded(threads_per_process()) as pool:
                for n in range(count):
                    yield torch.stack(list(pool.map(self.make, requests(n))))
            return
        with ThreadPoolExecutor(threads_per_process(), thread_name_prefix="volumes") as pool:
            pending: deque[tuple[list[VolumeRequest], list[Future[Tensor]]]] = deque()
            for n in range(count + 2):  # two batches ahead
                if n < count:
                    batch = requests(n)
                    pending.append((batch, [pool.submit(_read_pinned, request) for request in batch]))
                if n >= 2:
                    batch, reads = pending.popleft()
                    boxes = [read.result().to(self.device, non_blocking=True) for read in reads]
                    yield torch.stack([self.apply(box, request) for box, request in zip(boxes, batch, strict=True)])

    def make(self, request: VolumeRequest) -> Tensor:
        """Read and augment one volume.

        Returns:
            (1, X, Y, Z) float32 on the engine's device.

        Raises:
            DataError: the file of the request cannot be used.
        """
        return self.apply(torch.from_numpy(request.read()).to(self.device), request)

    @torch.no_grad()
    def apply(self, box: Tensor, request: VolumeRequest) -> Tensor:
        """Augment `box`, the part `request.box` of the file, to a volume (1, X, Y, Z)."""
        if not self.config.active:
            return box[None]
        size = request.size
        slabs, thickness = [], max(1, _SLAB_VOXELS // math.prod(size[1:])) if box.device.type == "cpu" else size[0]
        ranges = [(low, min(low + thickness, size[0])) for low in range(0, size[0], thickness)]
        field = _BiasField(request, box.device) if self.config.brightness or self.config.bias else None
        for low, high in ranges:
            slab = warp(box, request.local_matrix, size, low, high) if self.config.moves else box[low:high].clone()
            if not self.config.blur:
                self._change_intensity_(slab, request, field, low)
            slabs.append(slab)
        image = torch.cat(slabs)
        if self.config.blur:
            image = blur(image, request.sigmas)
            for low, high in ranges:
                self._change_intensity_(image[low:high], request, field, low)
        return image[None]

    def _change_intensity_(self, x: Tensor, request: VolumeRequest, field: _BiasField | None, low: int) -> None:
        """Apply the intensity operators in place to a slab whose first plane is plane `low` of the volume."""
        drawn = request.augmentation
        if field is not None:
            x.mul_(field.planes(low, low + len(x))).clamp_(0, 1)
        if self.config.gamma:
            x.pow_(drawn.gamma)
        if self.config.contrast:
            x.add_(x * (1 - x) * (x - 0.5), alpha=4 * drawn.contrast)
        if self._normals is not None:
            plane = math.prod(request.size[1:])
            start = drawn.noise_start + low * plane
            noise = self._normals[start : start + x.numel()].view(x.shape)
            x.add_((x / NOISE_FADE_LIMIT).clamp_(max=1).mul_(noise), alpha=drawn.noise).clamp_(0, 1)


class _BiasField:
    """Gain times bias field, interpolated linearly between its points and constant beyond the outermost ones."""

    def __init__(self, request: VolumeRequest, device: torch.device):
        size, count = request.size, BIAS_FIELD_SIZE
        points = torch.from_numpy(request.augmentation.field()).to(device)
        self._rows = F.interpolate(points[:, None], size=list(size[1:]), mode="bilinear")[:, 0].flatten(1)
        position = ((torch.arange(size[0], device=device) + 0.5) * (count / size[0]) - 0.5).clamp(0, count - 1)
        self._weights = (1 - (position[:, None] - torch.arange(count, device=device)).abs()).clamp(min=0)
        self._size = size[1:]

    def planes(self, low: int, high: int) -> Tensor:
        """Planes low ... high-1 of the field, (high - low, Y, Z) float32."""
        return (self._weights[low:high] @ self._rows).view(high - low, *self._size)


def warp(box: Tensor, matrix: np.ndarray, size: Sequence[int], low: int, high: int) -> Tensor:
    """Resample `box` with an affine map: trilinear interpolation, 0 outside.

    Args:
        box: (X, Y, Z) float32.
        matrix: (3, 4), maps the index of an output voxel to an index into `box`.
        size: shape of the whole output.
        low: first plane that is computed.
        high: end of the planes that are computed.

    Returns:
        Planes low ... high-1 of the output, (high - low, Y, Z) float32.
    """
    shape = np.array(box.shape, float)
    linear = torch.tensor((matrix[:, :3] * 2 / shape[:, None])[::-1].copy(), dtype=torch.float32, device=box.device)
    offset = torch.tensor(((matrix[:, 3] * 2 + 1) / shape - 1)[::-1].copy(), dtype=torch.float32, device=box.device)
    x, y, z = (
        torch.arange(*ends, dtype=torch.float32, device=box.device) for ends in ((low, high), (size[1],), (size[2],))
    )
    plane = y[:, None, None] * linear[:, 1] + z[:, None] * linear[:, 2] + offset
    grid = (
        plane + (x[:, None] * linear[:, 0])[:, None, None]
    )  # (X, Y, Z, 3): coordinates in the order z, y, x, from -1 to 1
    moved = F.grid_sample(box[None, None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved[0, 0]


def blur(image: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Separable Gaussian blur, truncated at ceil(3 sigma) and mirrored about the outermost voxels.

    Args:
        image: (X, Y, Z) float32.
        sigmas: standard deviation along each axis in voxels; an axis with 0 is not blurred.
    """
    for axis, sigma in enumerate(sigmas):
        radius = min(math.ceil(3 * sigma), image.shape[axis] - 1)
        if radius == 0:
            continue
        weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
        weights /= weights.sum()
        n = image.shape[axis]
        ends = [image.narrow(axis, 1, radius).flip(axis), image, image.narrow(axis, n - 1 - radius, radius).flip(axis)]
        padded = torch.cat(ends, axis)
        image = padded.narrow(axis, radius, n) * float(weights[radius])
        for offset in range(1, radius + 1):
            both = padded.narrow(axis, radius - offset, n) + padded.narrow(axis, radius + offset, n)
            image.add_(both, alpha=float(weights[radius + offset]))
    return image


def _read_pinned(request: VolumeRequest) -> Tensor:
    return torch.from_numpy(request.read()).pin_memory()


@contextmanager
def _single_threaded(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads each use one torch thread: parallel over volumes rather than within a volume."""
    threads_before, started = torch.get_num_threads(), Barrier(workers)
    with ThreadPoolExecutor(workers, "volumes", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(lambda _: started.wait(), range(workers)))
        torch.set_num_threads(threads_before)  # the setting is per thread, but later threads inherit the last one
        yield pool
