"""What is measured of the model at intervals while it is trained. Nothing here changes the training."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from typing import Any, NamedTuple

from ccella_fast.config import MonitoringConfig
from ccella_fast.training.ema import Ema
from ccella_fast.training.telemetry import Telemetry
from ccella_fast.training.validation import FixedNoiseLoss

logger = logging.getLogger("ccella_fast")


class FixedNoiseLosses(NamedTuple):
    """The losses that tell learning from learning by heart: at the same noise levels, of as many studies."""

    validation: FixedNoiseLoss
    training: FixedNoiseLoss


class Observer:
    """Measures the model after the steps at which it is due. All processes call it.

    Args:
        engine: the DeepSpeed engine.
        ema: the moving average, whose weights are measured if there is one.
        settings: the intervals.
        total_steps: length of the run; the last step is always measured.
        losses: None without validation.
        telemetry: None on all processes but rank 0.
    """

    def __init__(
        self,
        engine: Any,
        ema: Ema | None,
        settings: MonitoringConfig,
        *,
        total_steps: int,
        losses: FixedNoiseLosses | None,
        telemetry: Telemetry | None,
    ):
        self._engine, self._ema, self._settings, self._total_steps = engine, ema, settings, total_steps
        self._losses, self._telemetry = losses, telemetry

    def observe(self, step: int) -> None:
        """Measure what is due after `step` finished steps."""
        if not self._is_due(step, self._settings.validation_steps) or self._losses is None:
            return
        with self._averaged():
            self._engine.eval()
            values = {f"val_{name}": value for name, value in self._losses.validation.measure(self._engine).items()}
            values["train_eval_loss"] = self._losses.training.measure(self._engine)["loss"]
            self._engine.train()
        if self._telemetry is not None:
            self._telemetry.log_validation(step, {"weights": "averaged" if self._ema else "raw", **values})

    def _is_due(self, step: int, interval: int) -> bool:
        return interval > 0 and (step % interval == 0 or step == self._total_steps)

    def _averaged(self) -> Any:
        """The model computes with the moving average in this block, if there is one."""
        return nullcontext() if self._ema is None else self._ema.in_model()
