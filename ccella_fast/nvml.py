"""Utilization, clocks, power, temperature and memory of a GPU, from NVIDIA's management library (NVML).

It is read through nvidia-ml-py, whose module is called pynvml. Without the driver, `open_gpu` returns the reason.
"""

from __future__ import annotations

import threading
from typing import Any, NamedTuple

# NVML's "clocks event reasons" that lower the clocks, without those for idle GPUs and application settings.
REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
}


class Reading(NamedTuple):
    """One reading of a GPU."""

    utilisation: float  # percent of the last sampling interval in which a kernel ran
    sm_clock: float  # MHz
    memory_clock: float  # MHz
    power: float  # W
    memory: float  # MiB in use, by all processes
    temperature: float  # Celsius
    held_back_by: list[str]  # of REASONS


class Gpu:
    """One GPU. Reading costs a fraction of a millisecond and does not wait for kernels."""

    def __init__(self, handle: Any):
        self._handle = handle

    def read(self) -> Reading:
        """Read all values once."""
        import pynvml as nvml

        mask = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)
        return Reading(
            utilisation=float(nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu),
            sm_clock=float(nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_SM)),
            memory_clock=float(nvml.nvmlDeviceGetClockInfo(self._handle, nvml.NVML_CLOCK_MEM)),
            power=nvml.nvmlDeviceGetPowerUsage(self._handle) / 1e3,
            memory=nvml.nvmlDeviceGetMemoryInfo(self._handle).used / 2**20,
            temperature=float(nvml.nvmlDeviceGetTemperature(self._handle, nvml.NVML_TEMPERATURE_GPU)),
            held_back_by=[name for bit, name in REASONS.items() if mask & bit],
        )

    def energy(self) -> float:
        """Energy in joules since the driver was loaded; the difference of two readings is that of the work in between."""
        import pynvml as nvml

        return nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3


def open_gpu(index: int = 0) -> Gpu | str:
    """Torch's CUDA device `index`, or a sentence that says why it cannot be read."""
    try:
        import pynvml as nvml
    except ImportError:
        return "nvidia-ml-py is not installed"
    import torch

    try:
        nvml.nvmlInit()
        if not torch.cuda.is_available():
            return "torch sees no CUDA device"
        uuid = f"GPU-{torch.cuda.get_device_properties(index).uuid}"  # does not depend on CUDA_VISIBLE_DEVICES
        gpu = Gpu(nvml.nvmlDeviceGetHandleByUUID(uuid))
        gpu.read()
    except nvml.NVMLError as error:
        return f"NVML: {error}"
    return gpu


class Monitor:
    """Reads a GPU in a thread during a block: `with Monitor(gpu) as monitor: ...`, then `monitor.summary()`."""

    def __init__(self, gpu: Gpu, interval: float = 0.1):
        self._gpu, self._interval = gpu, interval
        self._stop, self._readings = threading.Event(), [gpu.read()]
        self._thread = threading.Thread(target=self._run, name="nvml", daemon=True)

    def __enter__(self) -> Monitor:
        self._energy = self._gpu.energy()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()
        self._readings.append(self._gpu.read())
        self._energy = self._gpu.energy() - self._energy

    def _run(self) -> None:
        while not self._stop.wait(self._interval):
            self._readings.append(self._gpu.read())

    def summary(self) -> dict[str, Any]:
        """Means over the block, peak memory, energy in joules, and the reasons for lowered clocks."""
        rows, count = self._readings, len(self._readings)
        means = {
            name: round(sum(getattr(row, name) for row in rows) / count, 1)
            for name in ("utilisation", "sm_clock", "memory_clock", "power", "temperature")
        }
        peak = round(max(row.memory for row in rows))
        reasons = sorted({reason for row in rows for reason in row.held_back_by})
        return {**means, "memory": peak, "energy": round(self._energy, 1), "held_back_by": reasons, "readings": count}
