"""Power-function averages of the weights, of which any other can be made after the run (`training.snapshots`).

They follow from the number of finished steps alone, so a step that was skipped counts as one that has not changed the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ccella_fast.config import TrainingConfig
from ccella_fast.training.ema import WeightAverage
from ccella_fast.training.power_profiles import exponent, kept_share


class PowerEma:
    """Power-function averages of an engine's master weights, one for each width.

    Args:
        engine: the DeepSpeed engine.
        training: has the widths and the intervals.
        total_steps: the length of the run, at the end of which the averages are updated and stored in any case.

    Attributes:
        averages: by width.
        updated_at: the step of the last update.
    """

    def __init__(self, engine: Any, training: TrainingConfig, total_steps: int):
        self.averages = {width: WeightAverage(engine) for width in training.power_ema_widths}
        self.updated_at = 0
        self._every, self._snapshot_steps = training.power_ema_every, training.power_ema_snapshot_steps
        self._total_steps = total_steps

    @classmethod
    def from_config(cls, engine: Any, training: TrainingConfig, total_steps: int) -> PowerEma | None:
        """None if none are configured."""
        return cls(engine, training, total_steps) if training.power_ema_snapshot_steps else None

    def update(self, step: int) -> None:
        """Update the averages after `step` finished steps, unless it is between two updates."""
        if step % self._every and step != self._total_steps:
            return
        for width, average in self.averages.items():
            average.decay_towards_weights(kept_share(exponent(width), self.updated_at, step))
        self.updated_at = step

    def is_snapshot(self, step: int) -> bool:
        """Whether the averages are stored after `step` finished steps."""
        return step % self._snapshot_steps == 0 or step == self._total_steps

    def files(self) -> Iterator[tuple[str, WeightAverage]]:
        """Each average with its file in a checkpoint and in a snapshot."""
        return ((file_name(width), average) for width, average in self.averages.items())


def file_name(width: float) -> str:
    """The file of an average."""
    return f"power_ema-{width}.safetensors"
