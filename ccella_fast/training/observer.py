"""What is measured of the model at intervals while it is trained: validation loss, and volumes that it generates.

Nothing here changes the training. The model computes with the moving average of the weights meanwhile, if there is one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ccella_fast.config import MonitoringConfig
from ccella_fast.processes import HostCollectives
from ccella_fast.training.ema import Ema
from ccella_fast.training.metrics_log import read_metrics
from ccella_fast.training.overfitting import overfits_since
from ccella_fast.training.telemetry import Telemetry
from ccella_fast.training.validation import FixedNoiseLoss

logger = logging.getLogger("ccella_fast")


class FixedNoiseLosses(NamedTuple):
    """The losses that tell learning from learning by heart: at the same noise levels, of as many studies."""

    validation: FixedNoiseLoss
    training: FixedNoiseLoss


class Preview(NamedTuple):
    """Volumes that a model generates, and an evaluation of them.

    Attributes:
        volumes: (n, sequences, X, Y, Z) float32 in [0, 1], axes R, A, S.
        spacings: of each volume, in mm.
        metrics: `sample_distance`, the smaller the better, and `sample_copies`, a share; None where it cannot be measured.
    """

    volumes: np.ndarray
    spacings: list[list[float]]
    metrics: dict[str, float | None]


PreviewSampler = Callable[[Any], Preview | None]  # of a model; None if it generates nothing finite
MakePreviews = Callable[[Path, Any, Any], PreviewSampler]  # from prepared folder, configuration and device


class Observer:
    """Measures the model after the steps at which it is due. All processes call it.

    Args:
        engine: the DeepSpeed engine.
        ema: the moving average, if there is one.
        settings: the intervals.
        total_steps: length of the run; the last step is always measured.
        losses: None without validation.
        sample: generates a preview; None on all processes but rank 0, and without previews.
        telemetry: None on all processes but rank 0.
        collectives: of all processes.
    """

    def __init__(
        self,
        engine: Any,
        ema: Ema | None,
        settings: MonitoringConfig,
        *,
        total_steps: int,
        losses: FixedNoiseLosses | None,
        sample: PreviewSampler | None,
        telemetry: Telemetry | None,
        collectives: HostCollectives,
    ):
        self._engine, self._ema, self._settings, self._total_steps = engine, ema, settings, total_steps
        self._losses, self._sample, self._telemetry, self._collectives = losses, sample, telemetry, collectives
        earlier = [] if telemetry is None else read_metrics(telemetry.path)
        self._validations = [line for line in earlier if "val_loss" in line]

    def observe(self, step: int) -> dict[str, Any]:
        """Measure what is due after `step` finished steps.

        Returns:
            The values by name, on rank 0 all of them; empty if nothing is due.
        """
        validates = self._is_due(step, self._settings.validation_steps)
        samples = self._is_due(step, self._settings.sample_steps)
        if not validates and not samples:
            return {}
        values: dict[str, float | None] = {}
        preview = None
        with nullcontext() if self._ema is None else self._ema.in_model():
            self._engine.eval()
            if validates and self._losses is not None:
                values = {f"val_{name}": value for name, value in self._losses.validation.measure(self._engine).items()}
                values["train_eval_loss"] = self._losses.training.measure(self._engine)["loss"]
            if samples:
                preview = self._make_preview()
            self._engine.train()
        if preview is not None:
            values |= preview.metrics
        if self._telemetry is not None:
            self._log(self._telemetry, step, values, preview)
        return values

    def _is_due(self, step: int, interval: int) -> bool:
        return interval > 0 and (step % interval == 0 or step == self._total_steps)

    def _make_preview(self) -> Preview | None:
        """The preview on rank 0, from whole weights, while the other processes wait; None there."""
        with _whole_weights(self._engine):
            sample, model = self._sample, self._engine.module
            return self._collectives.together(lambda: None if sample is None else sample(model))

    def _log(self, telemetry: Telemetry, step: int, values: dict[str, float | None], preview: Preview | None) -> None:
        line: dict[str, Any] = {"weights": "averaged" if self._ema else "raw", **values}
        if "val_loss" in values:
            before = self._validations[-1].get("overfits_since") if self._validations else None
            self._validations.append({"step": step, **line})
            line["overfits_since"] = self._validations[-1]["overfits_since"] = overfits_since(self._validations)
            if line["overfits_since"] is not None and before is None:
                why = "step %d: the validation loss has risen since step %d while that of training studies falls: the model is "
                why += "learning them by heart; a checkpoint near that step is the better one"
                logger.warning(why, step, line["overfits_since"])
        if copies := values.get("sample_copies"):
            why = "step %d: %.0f %% of the generated volumes are near copies of training studies"
            logger.warning(why, step, 100 * copies)
        telemetry.log_measured(step, line)
        if preview is not None:
            telemetry.log_preview(step, preview.volumes, preview.spacings)


def _whole_weights(engine: Any) -> AbstractContextManager[Any]:
    """Every process has whole weights in the block, also with ZeRO 3."""
    from deepspeed import zero

    return zero.GatheredParameters(list(engine.module.parameters()))
