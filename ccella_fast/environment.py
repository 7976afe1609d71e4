"""What this machine is: versions, CPU, memory, GPU. Printed by `ccella-fast env`, stored beside every result."""

from __future__ import annotations

import os
import platform
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from ccella_fast.storage import write_json

PACKAGES = [
    "torch", "deepspeed", "triton", "xformers", "monai", "transformers", "nvidia-dali-cuda130", "numpy", "nvidia-ml-py",
    "safetensors", "nibabel", "SimpleITK", "pydantic",
]  # fmt: skip
_ISA = ["avx2", "avx512f", "avx512_bf16", "amx_bf16"]


def describe() -> dict[str, Any]:
    """Plain values; no host name, no user name, no path."""
    import torch

    return {
        "ccella_fast": _version("ccella-fast"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "cores": len(os.sched_getaffinity(0)),
            "torch_threads": torch.get_num_threads(),
            "instructions": [flag for flag in _ISA if flag in _cpu_flags()],
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        },
        "gpu": _gpus(torch),
    }


@contextmanager
def recorded(folder: str | Path, command: str, **facts: Any) -> Iterator[dict[str, Any]]:
    """Time a command; on success write `folder/run_record.json`. The yielded dictionary takes further facts."""
    start = time.perf_counter()
    yield facts
    record = {
        "command": command,
        "seconds": round(time.perf_counter() - start, 2),
        **peak_memory(),
        **facts,
        "environment": describe(),
    }
    write_json(Path(folder) / "run_record.json", record)


def peak_memory() -> dict[str, int]:
    """MiB since this process began: of the largest process, and of the GPU if this process has used it."""
    import torch

    children, own = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF))
    peak = {"peak_memory_mib": round(max(children, own) / 1024)}
    if torch.cuda.is_initialized():
        peak["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return peak


def free_memory(device: Any = None) -> int:
    """Bytes that can still be allocated on this torch device; for the CPU (None) what its machine has, or its container if
    less."""
    if device is not None and device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
        cached = re.search(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)
        used = int((group / "memory.current").read_text()) - (int(cached[1]) if cached else 0)
        free = min(free, int(limit) - used)
    return free


def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has instructions that multiply bf16 (AVX512-BF16, AMX); without them bf16 is slower than fp32."""
    return bool(_cpu_flags() & {"avx512_bf16", "amx_bf16"})


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), []))


def _gpus(torch: Any) -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in found]
