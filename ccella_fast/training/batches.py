"""The model's inputs at optimizer step s: a pure function of (seed, s, studies left out), whatever the number of processes.

The data is an endless stream: epoch after epoch, each a permutation drawn from (seed, epoch). Step s takes the next global
batch of the stream; micro-steps and processes take slices of it. All random numbers of a sample (posterior draw, noise,
timestep; and whether its report is dropped) come from generators that are seeded by (seed, position in the stream). They are
therefore the same in a resumed run, and for any number of processes and micro-steps with the same global batch.
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
from ccella_fast.diffusion.objective import Objective
from ccella_fast.training.condition_dropout import ConditionDropout
from ccella_fast.training.quarantine import Quarantine

_CPU = torch.device("cpu")


class MicroBatch(NamedTuple):
    """The studies of one micro-step and the random numbers drawn for them, on the device."""

    batch: TrainingSample
    latents: Tensor  # (B, C, X, Y, Z) float32: x_0, a draw from the posterior times the scale factor
    noise: Tensor  # like latents
    timesteps: Tensor  # (B,) int64; float32 for a rectified flow
    # The class loss is a mean over the local samples that have a class. Times this factor, it averages over processes and
    # micro-steps to the mean over all such samples of the global batch, which is what the reference computes on one process.
    class_share: float

    def tensors(self) -> Iterator[Tensor]:
        """All tensors of the micro-batch."""
        return (part for part in (*self, *self.batch) if isinstance(part, Tensor))


@lru_cache(maxsize=8)
def epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    """The permutation of `range(size)` in which the studies of an epoch come."""
    return torch.randperm(size, generator=generator(seed, "order", epoch)).tolist()


class BatchStream:
    """The micro-batches of this process, by number with `micro_batch` or in order with `steps`.

    Args:
        dataset: the studies.
        seed: of the order of studies and of all random numbers.
        batch_size: samples per micro-step and process.
        accumulation: micro-steps per optimizer step.
        rank: of this process.
        world_size: number of processes.
        scale: the latents' scale factor per channel, shape (C,).
        objective: draws the timesteps.
        source: where latents come from; default: `dataset`, through memory maps.
        device: of the micro-batches.
        quarantine: the studies that are left out; default: none.
        dropout: drops reports and classes; default: none are.

    Attributes:
        waited: seconds for which the consumer of `steps` has waited for data.
    """

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
        objective: Objective,
        source: LatentSource | None = None,
        device: torch.device = _CPU,
        quarantine: Quarantine | None = None,
        dropout: ConditionDropout | None = None,
    ):
        self.dataset, self.seed, self.objective = dataset, seed, objective
        self.batch_size, self.accumulation, self.rank, self.world_size = batch_size, accumulation, rank, world_size
        self.global_batch = batch_size * accumulation * world_size
        self.source, self.device = source or dataset, device
        self.scale = scale.view(-1, 1, 1, 1).to(device)
        self.quarantine = quarantine or Quarantine(dataset.ids, {})
        self.dropout = dropout
        self.waited = 0.0

    def study_at(self, position: int) -> StudyEpoch:
        """The study at `position` of the stream, and the epoch. The next one in the order replaces a study that is left out."""
        epoch, offset = divmod(position, len(self.dataset))
        order, step = epoch_order(self.seed, epoch, len(self.dataset)), position // self.global_batch
        while not self.quarantine.uses(order[offset], step):
            offset = (offset + 1) % len(order)
        return StudyEpoch(order[offset], epoch)

    def epoch(self, step: int) -> int:
        """The epoch in which the global batch of `step` begins."""
        return step * self.global_batch // len(self.dataset)

    def micro_batch(self, step: int, micro: int) -> MicroBatch:
        """The micro-batch number `micro` of step `step`, both from 0."""
        return next(self._stream([(step, micro)], map))

    def steps(self, first: int, last: int, *, background: bool) -> Iterator[list[MicroBatch]]:
        """Yield the list of micro-batches of each of the steps first ... last-1.

        background: prepare the next micro-batch in a thread while one is used. This pays only when training on a GPU: on a CPU,
        a second computing thread makes OpenMP put the workers of the first to sleep after every operation, which costs far more
        than the few milliseconds that are hidden.
        """
        with ThreadPoolExecutor(threads_per_process(), thread_name_prefix="noise") as pool:
            left_out: int | None = None
            for step in range(first, last):
                if left_out != len(self.quarantine.left_out):  # what has been prepared ahead may contain the study
                    left_out = len(self.quarantine.left_out)
                    numbers = [(later, micro) for later in range(step, last) for micro in range(self.accumulation)]
                    stream = self._stream(numbers, pool.map if background else map)
                    stream = self._prefetch(stream) if background else stream
                begun = time.perf_counter()
                micro_batches = [next(stream) for _ in range(self.accumulation)]
                self.waited += time.perf_counter() - begun
                yield micro_batches

    def _positions(self, step: int, micro: int) -> range:
        """The positions in the stream of the samples of a micro-batch."""
        start = step * self.global_batch + (micro * self.world_size + self.rank) * self.batch_size
        return range(start, start + self.batch_size)

    def _stream(self, numbers: Sequence[tuple[int, int]], map_: Callable[..., Iterable[Any]]) -> Iterator[MicroBatch]:
        """Yield the micro-batches with the given numbers (step, micro), on the device.

        map_: `map`, or that of a thread pool; applied to draw the random numbers of a batch's samples.
        """

        def picks(n: int) -> list[StudyEpoch]:
            return [self.study_at(position) for position in self._positions(*numbers[n])]

        for (step, micro), batch in zip(numbers, self.source.batches(picks, len(numbers)), strict=True):
            positions, shape = self._positions(step, micro), batch.latent_mean.shape[1:]
            draws = map_(lambda position, shape=shape: self._draw(position, shape), positions)
            posterior, noise, timesteps = (
                to_device(torch.stack(part), self.device) for part in zip(*draws, strict=True)
            )
            batch = batch.to(self.device)
            if self.dropout is not None:
                self.dropout.apply(batch, positions)
            latents = (batch.latent_mean + batch.latent_sigma * posterior) * self.scale
            yield MicroBatch(batch, latents, noise, timesteps, self._class_share(step, positions))

    def _class_share(self, step: int, positions: range) -> float:
        start = step * self.global_batch
        total = self._count_classes(range(start, start + self.global_batch))
        return self._count_classes(positions) * self.accumulation * self.world_size / max(1, total)

    def _count_classes(self, positions: range) -> int:
        """The number of samples that have a class, and a report to predict it from."""
        return sum(
            self.dataset.has_class[self.study_at(position).study]
            for position in positions
            if self.dropout is None or not self.dropout.drops_report(position)
        )

    def _draw(self, position: int, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        """Posterior draw, noise and timestep of the sample at `position`."""
        rng = generator(self.seed, "sample", position)
        posterior = torch.randn(shape, generator=rng)
        noise = torch.randn(shape, generator=rng)
        return posterior, noise, self.objective.draw_timestep(rng)

    def _prefetch(self, stream: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        """Prepare one micro-batch ahead in a thread; on a GPU, in a CUDA stream of its own."""
        cuda_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        if cuda_stream is not None:  # the training's CUDA stream wrote latents, scale and autoencoder to the device
            cuda_stream.wait_stream(torch.cuda.current_stream(self.device))

        def make() -> tuple[MicroBatch | None, torch.cuda.Event | None]:
            if cuda_stream is None:
                return next(stream, None), None
            with torch.cuda.device(self.device), torch.cuda.stream(cuda_stream):
                return next(stream, None), cuda_stream.record_event()

        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch") as pool:
            pending = pool.submit(make)
            while True:
                micro_batch, made = pending.result()
                if micro_batch is None:
                    return
                pending = pool.submit(make)
                if made is not None:
                    torch.cuda.current_stream(self.device).wait_event(made)
                    for tensor in micro_batch.tensors():  # keeps the allocator from reusing memory that training reads
                        tensor.record_stream(torch.cuda.current_stream(self.device))
                yield micro_batch
