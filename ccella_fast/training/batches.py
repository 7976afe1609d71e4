"""What the model sees at optimizer step s: a pure function of (seed, s), whatever the number of processes.

The data is an endless stream: epoch after epoch, each a permutation drawn from (seed, epoch). Step s takes the next global
batch of it; micro-steps and processes take slices. All randomness of a sample (posterior draw, timestep, noise) comes from one
generator seeded by (seed, position in the stream). So a resumed run, another world size of the same global batch, and
another micro-batch all see the same numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccella_fast.data.augmentation.engine import threads_per_process
from ccella_fast.data.loading.dataset import LatentSource, PreparedDataset, StudyEpoch, TrainingSample, to_device
from ccella_fast.diffusion.noise import generator

_CPU = torch.device("cpu")


class MicroBatch(NamedTuple):
    """The studies of one micro-step and what was drawn for each of them, on the device."""

    batch: TrainingSample
    latents: Tensor  # x0: a draw from the posterior (B, C, X, Y, Z) float32, times the scale factor
    noise: Tensor  # like latents
    timesteps: Tensor  # (B,) int64
    # Corrects the class loss, a mean over the local samples that have a class, to the mean over those of the global batch
    # (which is what the reference computes on one process).
    class_share: float

    def tensors(self) -> Iterator[Tensor]:
        """Every tensor of the micro-batch."""
        return (part for part in (*self, *self.batch) if isinstance(part, Tensor))


@lru_cache(maxsize=8)
def epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    """The permutation of `range(size)` that epoch `epoch` runs through."""
    return torch.randperm(size, generator=generator(seed, "order", epoch)).tolist()


class BatchStream:
    """`feed.micro_batch(step, micro)`, or `feed.steps(first, last)` for whole steps in order.

    source: what gives the latents (default: the dataset itself, from memory maps). scale: one factor a channel.
    num_timesteps: T, the timesteps drawn are 0 ... T-1. waited: seconds that `steps` has kept its caller waiting."""

    def __init__(
        self,
        dataset: PreparedDataset,
        *,
        seed: int,
        batch_size: int,
        accumulation: int,
        rank: int,
        world_size: int,
        scale: Tensor,
        num_timesteps: int,
        source: LatentSource | None = None,
        device: torch.device = _CPU,
    ):
        self.dataset, self.seed, self.num_timesteps = dataset, seed, num_timesteps
        self.batch_size, self.accumulation, self.rank, self.world_size = batch_size, accumulation, rank, world_size
        self.global_batch = batch_size * accumulation * world_size
        self.source, self.device = source or dataset, device
        self.scale = scale.view(-1, 1, 1, 1).to(device)
        self.waited = 0.0

    def index(self, position: int) -> int:
        """The case at `position` of the stream."""
        return self.pick(position).study

    def pick(self, position: int) -> StudyEpoch:
        epoch, offset = divmod(position, len(self.dataset))
        return StudyEpoch(epoch_order(self.seed, epoch, len(self.dataset))[offset], epoch)

    def epoch(self, step: int) -> int:
        return step * self.global_batch // len(self.dataset)

    def micro_batch(self, step: int, micro: int) -> MicroBatch:
        """This process's micro-batch number `micro` of step `step` (both from 0)."""
        return next(self._stream([(step, micro)], map))

    def steps(self, first: int, last: int, *, background: bool) -> Iterator[list[MicroBatch]]:
        """The micro-batches of steps first ... last-1, a list a step. background: prepare the next while one is used.

        Worth it beside a GPU only: on a CPU a second thread that computes makes OpenMP put the workers of the first to sleep
        after every operation, which costs far more than the few milliseconds that it hides."""
        wanted = [(step, micro) for step in range(first, last) for micro in range(self.accumulation)]
        with ThreadPoolExecutor(threads_per_process(), thread_name_prefix="noise") as pool:
            ready = self._ahead(self._stream(wanted, pool.map)) if background else self._stream(wanted, map)
            for _ in range(first, last):
                begun = time.perf_counter()
                micro_batches = [next(ready) for _ in range(self.accumulation)]
                self.waited += time.perf_counter() - begun
                yield micro_batches

    def _positions(self, step: int, micro: int) -> range:
        start = step * self.global_batch + (micro * self.world_size + self.rank) * self.batch_size
        return range(start, start + self.batch_size)

    def _stream(self, wanted: Sequence[tuple[int, int]], mapped: Callable[..., Iterable[Any]]) -> Iterator[MicroBatch]:
        """The micro-batches `wanted`, on the device. mapped: draws a batch's samples, one after the other or side by side."""

        def picks(n: int) -> list[StudyEpoch]:
            return [self.pick(position) for position in self._positions(*wanted[n])]

        for (step, micro), batch in zip(wanted, self.source.batches(picks, len(wanted)), strict=True):
            positions, shape = self._positions(step, micro), batch.latent_mean.shape[1:]
            draws = mapped(lambda position, shape=shape: self._draw(position, shape), positions)
            posterior, noise, timesteps = (
                to_device(torch.stack(part), self.device) for part in zip(*draws, strict=True)
            )
            batch = batch.to(self.device)
            latents = (batch.latent_mean + batch.latent_sigma * posterior) * self.scale
            yield MicroBatch(batch, latents, noise, timesteps, self._class_share(step, positions))

    def _class_share(self, step: int, positions: range) -> float:
        start, has_class = step * self.global_batch, self.dataset.has_class
        in_all = sum(has_class[self.index(start + i)] for i in range(self.global_batch))
        here = sum(has_class[self.index(position)] for position in positions)
        return here * self.accumulation * self.world_size / max(1, in_all)

    def _draw(self, position: int, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        source = generator(self.seed, "sample", position)
        posterior = torch.randn(shape, generator=source)
        noise = torch.randn(shape, generator=source)
        return posterior, noise, torch.randint(self.num_timesteps, (), generator=source)

    def _ahead(self, stream: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """One micro-batch ahead, made by a thread; on a GPU in a CUDA stream of its own, beside the training's."""
        side = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if side is not None:  # resident latents, the scale and the autoencoder were put there by the training's stream
            side.wait_stream(torch.cuda.current_stream(self.device))

        def make() -> tuple[MicroBatch | None, torch.cuda.Event | None]:
            if side is None:
                return next(stream, None), None
            with torch.cuda.device(self.device), torch.cuda.stream(side):
                return next(stream, None), side.record_event()

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed") as pool:
            coming = pool.submit(make)
            while True:
                micro_batch, made = coming.result()
                if micro_batch is None:
                    return
                coming = pool.submit(make)
                if made is not None:
                    torch.cuda.current_stream(self.device).wait_event(made)
                    for tensor in micro_batch.tensors():
                        tensor.record_stream(torch.cuda.current_stream(self.device))
                yield micro_batch
