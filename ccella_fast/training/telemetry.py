"""What a run tells: a bar on rank 0, metrics.jsonl, TensorBoard through DeepSpeed's monitor, run_status.json.

On a GPU also how busy, fast and full it is, from NVIDIA's management library: of rank 0's, as Train/GPU/... in TensorBoard.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from ccella_fast.nvml import Gpu, open_gpu
from ccella_fast.storage import write_json
from ccella_fast.training.metrics_log import append_metrics, discard_metrics_after

logger = logging.getLogger("ccella_fast")


class Progress(NamedTuple):
    """One logged step; `step` counts finished optimizer steps."""

    step: int
    epoch: int
    loss: float
    loss_l1: float
    loss_class: float
    lr: float
    grad_norm: float


class Telemetry:
    """Used as a context on rank 0; `None` stands for it elsewhere."""

    def __init__(self, run: Path, engine: Any, first: int, total: int, global_batch: int):
        self.path, self.monitor, self.global_batch = run / "metrics.jsonl", engine.monitor, global_batch
        # The engine would read the loss back from the GPU at every micro-step for its own events; ours carry the same names.
        self.monitor.enabled = False
        self.last = (first, time.perf_counter())
        self.gpu = _gpu(engine.device)
        discard_metrics_after(self.path, first)
        self.bar = tqdm(total=total, initial=first, desc="train", unit="step", mininterval=1, smoothing=0.05)

    def __enter__(self) -> Telemetry:
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.close()

    def log(self, progress: Progress) -> None:
        step, then = self.last
        self.last = now = (progress.step, time.perf_counter())
        seconds = (now[1] - then) / (progress.step - step)
        rate = self.global_batch / seconds
        line = {**progress._asdict(), "seconds_per_step": round(seconds, 4), "samples_per_second": round(rate, 3)}
        gpu = self.gpu.read()._asdict() if self.gpu else {}
        line |= {f"gpu_{name}": value for name, value in gpu.items()}
        append_metrics(self.path, line)
        samples = progress.step * self.global_batch
        names = {
            "train_loss": "loss",
            "loss_l1": "loss_l1",
            "loss_class": "loss_class",
            "lr": "lr",
            "grad_norm": "grad_norm",
        }
        self.monitor.write_events([(f"Train/Samples/{name}", line[key], samples) for name, key in names.items()])
        numbers = [(name, value) for name, value in gpu.items() if isinstance(value, float)]
        self.monitor.write_events([(f"Train/GPU/{name}", value, samples) for name, value in numbers])
        self.bar.set_postfix(
            loss=f"{progress.loss:.4f}", lr=f"{progress.lr:.2e}", samples_s=f"{rate:.2f}", refresh=False
        )


def _gpu(device: Any) -> Gpu | None:
    """The GPU to read beside the steps; None on a CPU, and where NVML cannot be asked, which is said once."""
    if device.type != "cuda":
        return None
    found = open_gpu(device.index or 0)
    if isinstance(found, Gpu):
        return found
    logger.info("no GPU telemetry: %s", found)
    return None


def write_status(
    run: Path, state: str, *, step: int, total_steps: int, exit_code: int | None = None, why: str | None = None
) -> None:
    """run_status.json: running, finished, terminated or failed. Launchers hide exit codes; this file does not."""
    status = {"state": state, "step": step, "total_steps": total_steps, "exit_code": exit_code, "why": why}
    write_json(run / "run_status.json", status)
