"""Logs of a run: progress bar, metrics.jsonl, TensorBoard through DeepSpeed's monitor.

On a GPU, the state of rank 0's device (utilization, clock, memory) is logged too, from NVIDIA's management library (NVML). The
horizontal axis of TensorBoard is the number of finished steps, as in metrics.jsonl.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from ccella_fast.hardware import peak_memory
from ccella_fast.nvml import Gpu, open_gpu
from ccella_fast.report.figures import COLUMNS, Panel, cut, montage
from ccella_fast.storage import atomic_path
from ccella_fast.training.metrics_log import append_metrics, discard_metrics_after

logger = logging.getLogger("ccella_fast")
PREVIEWS = "previews"  # the folder of pictures in that of the run
_SCALARS = ("loss", "loss_l1", "loss_class", "lr", "grad_norm")  # in TensorBoard under Train/


class Progress(NamedTuple):
    """The numbers of one logged step."""

    step: int  # finished optimizer steps
    epoch: int
    loss: float
    loss_l1: float
    loss_class: float | None  # None: no study enters the class loss
    lr: float
    grad_norm: float


class Telemetry:
    """Context manager that shows the bar and logs the steps. Only rank 0 has one.

    Args:
        run: the run's folder.
        engine: the DeepSpeed engine, whose monitor is used.
        first: finished steps at the start; lines of later steps are removed from metrics.jsonl.
        total: length of the run in steps.
        global_batch: samples per step over all processes.
        flops: of this process in a step.
        peak: FLOP/s of the device, if they are known.
    """

    def __init__(
        self,
        run: Path,
        engine: Any,
        first: int,
        total: int,
        global_batch: int,
        *,
        flops: int,
        peak: float | None = None,
    ):
        self.path, self.monitor, self.global_batch = run / "metrics.jsonl", engine.monitor, global_batch
        self.flops, self.peak = flops, peak
        # Disable the engine's own events, for which it would read the loss from the GPU at every micro-step. `log` writes
        # events of the same names to this monitor.
        self.monitor.enabled = False
        self.last = (first, time.perf_counter())
        self.gpu = _open_gpu(engine.device)
        discard_metrics_after(self.path, first)
        self.bar = tqdm(total=total, initial=first, desc="train", unit="step", mininterval=1, smoothing=0.05)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(OSError):  # what the run has reached does not depend on its last line
            self.bar.close()
        if not any(error):
            print_collectives()

    def log_measured(self, step: int, values: dict[str, Any]) -> None:
        """Write what was measured after a step as a line of its own to metrics.jsonl, and to TensorBoard."""
        append_metrics(self.path, {"step": step, **values})
        self._write_events("Measured", step, values)
        self.last = (step, time.perf_counter())  # measuring does not count as training time

    def log_preview(self, step: int, volumes: np.ndarray, spacings: list[list[float]]) -> None:
        """Write middle slices of the first volumes of (n, sequences, X, Y, Z) to previews/ and to TensorBoard."""
        panels = [
            Panel(volume, spacing, f"step {step}, volume {number}")
            for number, (several, spacing) in enumerate(zip(volumes, spacings, strict=True), start=1)
            for volume in several
        ][: 2 * COLUMNS]
        with atomic_path(self.path.parent / PREVIEWS / f"step-{step:08d}.png") as temporary:
            temporary.write_bytes(montage(panels, window=(0.0, 1.0)))
        tensorboard = getattr(self.monitor, "tb_monitor", None)  # the other monitors take numbers alone
        if tensorboard is not None:
            slices = np.concatenate([cut(panel.volume, panel.spacing, "axial").pixels for panel in panels], axis=1)
            tensorboard.summary_writer.add_image("Preview", slices.clip(0, 1), step, dataformats="HW")
            tensorboard.flush()

    def _write_events(self, group: str, step: int, values: dict[str, Any]) -> None:
        """Write the numbers among the values to DeepSpeed's monitor, over the step."""
        numbers = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        self.monitor.write_events([(f"{group}/{name}", value, step) for name, value in numbers.items()])

    def log(self, progress: Progress) -> None:
        """Write one step to metrics.jsonl and TensorBoard, with rates since the step that was logged or measured before."""
        step, then = self.last
        self.last = now = (progress.step, time.perf_counter())
        seconds = (now[1] - then) / (progress.step - step)
        rate = self.global_batch / seconds
        speed = {
            "seconds_per_step": round(seconds, 4),
            "samples_per_second": round(rate, 3),
            "tflops": self.flops / seconds / 1e12,
        }
        if self.peak is not None:
            speed["mfu"] = self.flops / seconds / self.peak
        memory = peak_memory()
        line = {**progress._asdict(), **speed, **memory}
        gpu = self.gpu.read()._asdict() if self.gpu else {}
        line |= {f"gpu_{name}": value for name, value in gpu.items()}
        append_metrics(self.path, line)
        self._write_events("Train", progress.step, {name: line[name] for name in _SCALARS})
        self._write_events("Speed", progress.step, {**speed, **memory})
        self._write_events("GPU", progress.step, gpu)
        self.bar.set_postfix(
            loss=f"{progress.loss:.4f}", lr=f"{progress.lr:.2e}", samples_s=f"{rate:.2f}", refresh=False
        )


def print_collectives() -> None:
    """Print what DeepSpeed's `comms_logger` has measured on this process, if it is enabled."""
    from deepspeed.comm.comm import comms_logger  # `deepspeed.comm.log_summary` would wait for the other processes

    if comms_logger.enabled:
        comms_logger.log_all()


def _open_gpu(device: Any) -> Gpu | None:
    """The GPU to monitor; None on a CPU, or when NVML is not available, which is logged."""
    if device.type != "cuda":
        return None
    found = open_gpu(device.index or 0)
    if isinstance(found, Gpu):
        return found
    logger.info("GPU telemetry is not available: %s", found)
    return None
