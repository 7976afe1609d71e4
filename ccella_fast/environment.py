"""What this machine is: versions, CPU, memory, GPU. Printed by `ccella-fast env`, stored beside every result."""

from __future__ import annotations

import os
import platform
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
            "instructions": cpu_instructions(),
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


def cpu_instructions() -> list[str]:
    """Which of the vector and matrix instructions that torch's kernels are written for this CPU has."""
    flags = _cpu_flags()
    return [flag for flag in _ISA if flag in flags]


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
