"""What the model sees at optimizer step s: a pure function of (seed, s), whatever the number of processes.

The data is an endless stream: epoch after epoch, each a permutation drawn from (seed, epoch). Step s takes the next global
batch of it; micro-steps and processes take slices. All randomness of a sample (posterior draw, timestep, noise) comes from one
generator seeded by (seed, position in the stream). So a resumed run, another world size of the same global batch, and
another micro-batch all see the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ccella_fast.data.dataset import PreparedDataset, collate
from ccella_fast.diffusion.noise import generator


class Samples(NamedTuple):
    """One micro-batch. `class_share` corrects the class loss, a mean over the local samples that have a class, to the mean over
    those of the whole global batch (the reference's own value on one process)."""

    ids: list[str]
    latents: Tensor  # (B, C, X, Y, Z) float32, times the scale factor: x0
    noise: Tensor  # like latents
    timesteps: Tensor  # (B,) int64
    text: Tensor | None  # (B, L, E); None: a variant without text
    pirads: Tensor  # (B, 2) one-hot x 100
    spacing: Tensor  # (B, 3) mm x 100
    has_class: Tensor  # (B,) bool: a report and a class
    class_share: float

    def to(self, device: torch.device) -> Samples:
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: value.pin_memory().to(device, non_blocking=True)
            for name, value in self._asdict().items()
            if isinstance(value, Tensor)
        }
        return self._replace(**moved)


@lru_cache(maxsize=8)
def epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    """The permutation of `range(size)` that epoch `epoch` runs through."""
    return torch.randperm(size, generator=generator(seed, "order", epoch)).tolist()


class Feed:
    """`feed.micro_batch(step, micro)`, or `feed.steps(first, last)` for whole steps in order.

    scale: one factor a channel. num_timesteps: T, the timesteps drawn are 0 ... T-1."""

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
    ):
        self.dataset, self.seed, self.num_timesteps = dataset, seed, num_timesteps
        self.batch_size, self.accumulation, self.rank, self.world_size = batch_size, accumulation, rank, world_size
        self.global_batch = batch_size * accumulation * world_size
        self.scale = scale.view(-1, 1, 1, 1)

    def index(self, position: int) -> int:
        """The case at `position` of the stream."""
        epoch, offset = divmod(position, len(self.dataset))
        return epoch_order(self.seed, epoch, len(self.dataset))[offset]

    def epoch(self, step: int) -> int:
        return step * self.global_batch // len(self.dataset)

    def micro_batch(self, step: int, micro: int) -> Samples:
        """This process's micro-batch number `micro` of step `step` (both from 0)."""
        start = step * self.global_batch
        mine = start + (micro * self.world_size + self.rank) * self.batch_size
        positions = range(mine, mine + self.batch_size)
        batch = collate([self.dataset[self.index(position)] for position in positions])
        draws = [self._draw(position, batch.latent_mean[i].shape) for i, position in enumerate(positions)]
        posterior, noise, timesteps = (torch.stack(part) for part in zip(*draws, strict=True))
        latents = (batch.latent_mean + batch.latent_sigma * posterior) * self.scale
        in_all = sum(self.dataset.has_class[self.index(start + i)] for i in range(self.global_batch))
        share = int(batch.has_class.sum()) * self.accumulation * self.world_size / max(1, in_all)
        known = batch.text, batch.pirads, batch.spacing, batch.has_class
        return Samples(batch.ids, latents, noise, timesteps, *known, class_share=share)

    def _draw(self, position: int, shape: torch.Size) -> tuple[Tensor, Tensor, Tensor]:
        source = generator(self.seed, "sample", position)
        posterior = torch.randn(shape, generator=source)
        noise = torch.randn(shape, generator=source)
        return posterior, noise, torch.randint(self.num_timesteps, (), generator=source)

    def steps(self, first: int, last: int, *, background: bool) -> Iterator[list[Samples]]:
        """The micro-batches of steps first ... last-1, a list a step. background: prepare the next while one is used.

        Worth it beside a GPU only: on a CPU a second thread that computes makes OpenMP put the workers of the first to sleep
        after every operation, which costs far more than the few milliseconds that it hides."""
        wanted = [(step, micro) for step in range(first, last) for micro in range(self.accumulation)]
        ready = self._ahead(wanted) if background else (self.micro_batch(*which) for which in wanted)
        for _ in range(first, last):
            yield [next(ready) for _ in range(self.accumulation)]

    def _ahead(self, wanted: list[tuple[int, int]]) -> Iterator[Samples]:
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="feed") as pool:
            coming = pool.submit(self.micro_batch, *wanted[0]) if wanted else None
            for following in [*wanted[1:], None]:
                assert coming is not None
                ready = coming.result()
                coming = pool.submit(self.micro_batch, *following) if following else None
                yield ready
