"""Logs of a run: progress bar, metrics.jsonl, TensorBoard through DeepSpeed's monitor.

On a GPU, the state of rank 0's device (utilization, clock, memory) is logged too, from NVIDIA's management library (NVML); in
TensorBoard under Train/GPU/.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ccella_fast.nvml import Gpu, open_gpu
from ccella_fast.training.metrics_log import append_metrics, discard_metrics_after

logger = logging.getLogger("ccella_fast")


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
    """

    def __init__(self, run: Path, engine: Any, first: int, total: int, global_batch: int):
        self.path, self.monitor, self.global_batch = run / "metrics.jsonl", engine.monitor, global_batch
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

    def log(self, progress: Progress) -> None:
        """Write one step to metrics.jsonl and TensorBoard, with rates since the step that was logged before."""
        step, then = self.last
        self.last = now = (progress.step, time.perf_counter())
        seconds = (now[1] - then) / (progress.step - step)
        rate = self.global_batch / seconds
        line = {**progress._asdict(), "seconds_per_step": round(seconds, 4), "samples_per_second": round(rate, 3)}
        gpu = self.gpu.read()._asdict() if self.gpu else {}
        line |= {f"gpu_{name}": value for name, value in gpu.items()}
        append_metrics(self.path, line)
        samples = progress.step * self.global_batch
        names = {"train_loss": "loss"} | {key: key for key in ("loss_l1", "loss_class", "lr", "grad_norm")}
        known = {name: line[key] for name, key in names.items() if line[key] is not None}
        self.monitor.write_events([(f"Train/Samples/{name}", value, samples) for name, value in known.items()])
        numbers = [(name, value) for name, value in gpu.items() if isinstance(value, float)]
        self.monitor.write_events([(f"Train/GPU/{name}", value, samples) for name, value in numbers])
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
