"""Volumes with torch, on a CPU or a GPU: the plain definition of what an augmentation does (see augment.py).

On a CPU a volume is made in slabs that stay in the cache: one pass through memory instead of one for each operator.
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
from ccella_fast.data.augmentation.parameters import BIAS_FIELD, FAINT, normals
from ccella_fast.data.augmentation.requests import VolumeRequest

_SLAB = 2**17  # voxels: grid, source and result fit a core's cache


class TorchEngine:
    """See volumes.Engine. `make(job)` is one volume. On a GPU a thread reads ahead into pinned memory; on a CPU nothing runs
    beside the training, which needs every core itself, but the volumes of a batch are made on all of them."""

    name = "torch"

    def __init__(self, config: AugmentationConfig, device: torch.device, size: Sequence[int]):
        self.config, self.device = config, device
        table = normals(math.prod(size)) if config.noise else None
        self._normals = None if table is None else torch.tensor(table, device=device)

    def stream(self, paths: Sequence[Path], jobs: Callable[[int], list[VolumeRequest]], count: int) -> Iterator[Tensor]:
        if self.device.type == "cpu":
            with _single_threaded(threads_per_process()) as pool:
                for n in range(count):
                    yield torch.stack(list(pool.map(self.make, jobs(n))))
            return
        with ThreadPoolExecutor(threads_per_process(), thread_name_prefix="volumes") as pool:
            coming: deque[tuple[list[VolumeRequest], list[Future[Tensor]]]] = deque()
            for n in range(count + 2):  # two batches ahead
                if n < count:
                    wanted = jobs(n)
                    coming.append((wanted, [pool.submit(_pinned, job) for job in wanted]))
                if n >= 2:
                    wanted, read = coming.popleft()
                    boxes = [part.result().to(self.device, non_blocking=True) for part in read]
                    yield torch.stack([self.apply(box, job) for box, job in zip(boxes, wanted, strict=True)])

    def make(self, job: VolumeRequest) -> Tensor:
        """(1, X, Y, Z) on the engine's device. DataError names the file."""
        return self.apply(torch.from_numpy(job.read()).to(self.device), job)

    @torch.no_grad()
    def apply(self, box: Tensor, job: VolumeRequest) -> Tensor:
        """The part `job.box` of the file -> (1, X, Y, Z)."""
        if not self.config.active:
            return box[None]
        done, slab = [], max(1, _SLAB // math.prod(job.size[1:])) if box.device.type == "cpu" else job.size[0]
        parts = [(low, min(low + slab, job.size[0])) for low in range(0, job.size[0], slab)]
        field = _BiasField(job, box.device) if self.config.brightness or self.config.bias else None
        for low, high in parts:
            part = warp(box, job.local_matrix, job.size, low, high) if self.config.moves else box[low:high].clone()
            if not self.config.blur:
                self._intensity(part, job, field, low)
            done.append(part)
        image = torch.cat(done)
        if self.config.blur:
            image = blur(image, job.sigmas)
            for low, high in parts:
                self._intensity(image[low:high], job, field, low)
        return image[None]

    def _intensity(self, x: Tensor, job: VolumeRequest, field: _BiasField | None, low: int) -> None:
        """In place, on the planes `low` ... of the volume."""
        drawn = job.augmentation
        if field is not None:
            x.mul_(field.planes(low, low + len(x))).clamp_(0, 1)
        if self.config.gamma:
            x.pow_(drawn.gamma)
        if self.config.contrast:
            x.add_(x * (1 - x) * (x - 0.5), alpha=4 * drawn.contrast)
        if self._normals is not None:
            plane = math.prod(job.size[1:])
            start = drawn.noise_start + low * plane
            noise = self._normals[start : start + x.numel()].view(x.shape)
            x.add_((x / FAINT).clamp_(max=1).mul_(noise), alpha=drawn.noise).clamp_(0, 1)


class _BiasField:
    """Gain x receive field: linear between its points, clamped at the rim."""

    def __init__(self, job: VolumeRequest, device: torch.device):
        points = torch.from_numpy(job.augmentation.field()).to(device)
        self._rows = F.interpolate(points[:, None], size=list(job.size[1:]), mode="bilinear")[:, 0].flatten(1)
        at = ((torch.arange(job.size[0], device=device) + 0.5) * (BIAS_FIELD / job.size[0]) - 0.5).clamp(
            0, BIAS_FIELD - 1
        )
        self._weights = (1 - (at[:, None] - torch.arange(BIAS_FIELD, device=device)).abs()).clamp(min=0)
        self._size = job.size[1:]

    def planes(self, low: int, high: int) -> Tensor:
        return (self._weights[low:high] @ self._rows).view(high - low, *self._size)


def warp(box: Tensor, matrix: np.ndarray, size: Sequence[int], low: int, high: int) -> Tensor:
    """Planes low ... high-1 of the volume of `size` whose voxel o is `box` at matrix @ (o, 1): trilinear, 0 outside."""
    shape = np.array(box.shape, float)
    linear = torch.tensor((matrix[:, :3] * 2 / shape[:, None])[::-1].copy(), dtype=torch.float32, device=box.device)
    offset = torch.tensor(((matrix[:, 3] * 2 + 1) / shape - 1)[::-1].copy(), dtype=torch.float32, device=box.device)
    x, y, z = (
        torch.arange(*ends, dtype=torch.float32, device=box.device) for ends in ((low, high), (size[1],), (size[2],))
    )
    plane = y[:, None, None] * linear[:, 1] + z[:, None] * linear[:, 2] + offset
    grid = plane + (x[:, None] * linear[:, 0])[:, None, None]  # (X, Y, Z, 3): last axis first, from -1 to 1
    moved = F.grid_sample(box[None, None], grid[None], mode="bilinear", padding_mode="zeros", align_corners=False)
    return moved[0, 0]


def blur(image: Tensor, sigmas: Sequence[float]) -> Tensor:
    """A Gaussian of sigma voxels an axis, cut off at ceil(3 sigma), mirrored about the outermost voxels."""
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


def _pinned(job: VolumeRequest) -> Tensor:
    return torch.from_numpy(job.read()).pin_memory()


@contextmanager
def _single_threaded(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads that each compute alone: volumes are made side by side, not each by all cores."""
    here, started = torch.get_num_threads(), Barrier(workers)
    with ThreadPoolExecutor(workers, "volumes", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(lambda _: started.wait(), range(workers)))
        torch.set_num_threads(here)  # the setting is a thread's own, but threads that start later take the last one
        yield pool
