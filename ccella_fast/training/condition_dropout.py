"""Report and class dropout: samples that are trained with the null conditions of classifier-free guidance.

Ho and Salimans 2022, arXiv 2207.12598, section 3.2. The null report is the encoded empty report, the null class a vector of
zeros; guidance in sampling uses the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ccella_fast.config import Config
from ccella_fast.data.loading.dataset import PreparedDataset, TrainingSample
from ccella_fast.diffusion.noise import generator


class ConditionDropout:
    """Which samples of a run lose their report or their class, and what they get instead.

    One number per sample, drawn from (seed, position in the stream), decides both. With equal probabilities report and class
    are dropped together, which is the null condition of guidance.

    Args:
        seed: of the run.
        report: the probability that the report is dropped.
        pirads: the probability that the class is dropped.
        null: the features of the null report, (L, E); None if no report is dropped.
    """

    def __init__(self, seed: int, *, report: float, pirads: float, null: Tensor | None):
        self.seed, self.report, self.pirads, self.null = seed, report, pirads, null

    @classmethod
    def from_config(cls, config: Config, dataset: PreparedDataset) -> ConditionDropout | None:
        """The dropout of a configuration; None if nothing is dropped.

        Raises:
            DataError: the prepared folder does not contain the features of the null report.
        """
        training = config.training
        if not training.report_dropout and not training.class_dropout:
            return None
        null = dataset.null_report() if training.report_dropout else None
        return cls(training.seed, report=training.report_dropout, pirads=training.class_dropout, null=null)

    def drops_report(self, position: int) -> bool:
        """Whether the sample at this position of the stream loses its report."""
        return self._drawn(position) < self.report

    def apply(self, batch: TrainingSample, positions: Sequence[int]) -> None:
        """Drop reports and classes of a batch in place, without a wait for the device.

        A sample without its report does not enter the class loss, because its class cannot be read from the null report.
        """
        for row, position in enumerate(positions):
            drawn = self._drawn(position)
            if drawn < self.report and batch.text is not None and self.null is not None:
                self.null = self.null.to(batch.text)
                batch.text[row] = self.null
                batch.has_class[row] = False
            if drawn < self.pirads:
                batch.pirads[row] = 0

    @lru_cache(maxsize=2**16)  # noqa: B019  there is one in a process; each micro-batch asks for the whole global batch
    def _drawn(self, position: int) -> float:
        """Uniform in [0, 1)."""
        return torch.rand((), generator=generator(self.seed, "dropout", position)).item()
