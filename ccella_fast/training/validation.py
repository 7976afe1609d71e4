"""The loss of the model at fixed noise and fixed timesteps: on studies that are not trained on, and on as many that are.

Each study enters once per band of timesteps. Within a band, the studies have evenly spaced timesteps. Noise and timesteps
depend on the study and the band alone: not on the step, the seed of the training or the number of processes. Two measurements
therefore differ by the weights alone, and nothing here draws from the random stream of the training.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ccella_fast.data.loading.dataset import PreparedDataset, collate
from ccella_fast.diffusion.noise import generator
from ccella_fast.diffusion.objective import Objective
from ccella_fast.processes import HostCollectives
from ccella_fast.training.batches import MicroBatch
from ccella_fast.training.loop import joint_loss

logger = logging.getLogger("ccella_fast")
BANDS = 4  # of timesteps, from little noise to much
_SEED = 0


class FixedNoiseLoss:
    """The mean loss of some studies of a dataset, as they were prepared, without augmentation.

    Args:
        dataset: the studies.
        chosen: the indices of those that are used.
        batch_size: studies per call of the model.
        scale: the latents' scale factor per channel, shape (C,).
        objective: of the training.
        weight: of the class loss.
        collectives: of all processes.
    """

    def __init__(
        self,
        dataset: PreparedDataset,
        chosen: Sequence[int],
        *,
        batch_size: int,
        scale: Tensor,
        objective: Objective,
        weight: float,
        collectives: HostCollectives,
    ):
        self._dataset, self._chosen, self._objective = dataset, list(chosen), objective
        self._scale, self._weight, self._collectives = scale.view(-1, 1, 1, 1), weight, collectives
        edges = [objective.num_timesteps * band // BANDS for band in range(BANDS + 1)]
        self._bands = list(zip(edges[:-1], edges[1:], strict=True))
        times = [_spread(len(self._chosen), *band) for band in self._bands]
        self._timesteps = [objective.as_timesteps(each) for each in times]
        batches = [range(start, len(chosen))[:batch_size] for start in range(0, len(chosen), batch_size)]
        self._work = [(band, batch) for batch in batches for band in range(BANDS)]
        self._known = sum(dataset.has_class[study] for study in self._chosen)

    @torch.no_grad()
    def measure(self, engine: Any) -> dict[str, float | None]:
        """The means over all studies and bands. All processes call it, and each computes its share.

        Returns:
            `loss`, the sum of both terms; `loss_l1`; `loss_class`, None if no study enters it; and the first term of each
            band of timesteps, `loss_l1_0_249` and so on. All are None if a prediction is not finite; the log names the study.
        """
        sums = torch.zeros(len(self._work), 2, dtype=torch.float64, device=engine.device)
        nonfinite: set[str] = set()
        rank, processes = self._collectives.rank, self._collectives.world_size
        # With ZeRO 3 all processes take part in every call, so those that have no work left repeat some.
        for place in range(rank, -(-len(self._work) // processes) * processes, processes):
            micro_batch = self._micro_batch(*self._work[place % len(self._work)], engine.device)
            losses = joint_loss(engine, micro_batch, self._objective, self._weight)
            if place < len(self._work):
                known = micro_batch.batch.has_class.sum()
                sums[place] = torch.stack([losses.noise * len(micro_batch.timesteps), losses.classes * known])
                nonfinite |= {
                    study
                    for study, finite in zip(micro_batch.batch.ids, losses.finite.tolist(), strict=True)
                    if not finite
                }
        dist.all_reduce(sums)  # one process has computed each row and the others have zeros, so no sum is rounded
        named = sorted(set().union(*self._collectives.all_gather(nonfinite)))
        if named:
            logger.warning("the validation is not finite; cases: %.400s", ", ".join(named))
        return self._means(sums.cpu(), finite=not named)

    def _means(self, sums: Tensor, *, finite: bool) -> dict[str, float | None]:
        """The means from the sums of each entry of the work."""
        count, weight = len(self._chosen), self._weight
        l1 = [
            sum(float(row[0]) for (at, _), row in zip(self._work, sums, strict=True) if at == band) / count
            for band in range(BANDS)
        ]
        has_classes = weight > 0 and self._known > 0 and self._dataset.variant.head != "none"
        classes = float(sums[:, 1].sum()) / (self._known * BANDS) if has_classes else None
        mean = sum(l1) / BANDS
        values = {"loss": mean + weight * (classes or 0.0), "loss_l1": mean, "loss_class": classes}
        values |= {f"loss_l1_{low}_{high - 1}": value for (low, high), value in zip(self._bands, l1, strict=True)}
        return {name: value if finite else None for name, value in values.items()}

    def _micro_batch(self, band: int, batch: range, device: torch.device) -> MicroBatch:
        """The inputs of the studies at these places of `chosen`, at their timesteps of a band."""
        samples = collate([self._dataset.item(self._chosen[place]) for place in batch])
        shape = samples.latent_mean.shape[1:]
        sources = [generator(_SEED, "validation", study, band) for study in samples.ids]
        posterior, noise = (torch.stack([torch.randn(shape, generator=source) for source in sources]) for _ in range(2))
        latents = (samples.latent_mean + samples.latent_sigma * posterior) * self._scale
        timesteps = self._timesteps[band][batch.start : batch.stop]
        return MicroBatch(
            samples.to(device), latents.to(device), noise.to(device), timesteps.to(device), class_share=1.0
        )


def _spread(count: int, low: int, high: int) -> Tensor:
    """Times in the middle of `count` equal parts of [low, high), in a random order."""
    middles = low + (torch.arange(count, dtype=torch.float64) + 0.5) * (high - low) / count
    return middles[torch.randperm(count, generator=generator(_SEED, "validation timesteps", low, high))]
