"""CPU instructions, memory and quotas of this machine or its container."""

from __future__ import annotations

import logging
import os
import platform
import re
import resource
from functools import cache
from pathlib import Path
from typing import Any

logger = logging.getLogger("ccella_fast")
_ISA = ["avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_fp16"]
# Values of ONEDNN_MAX_CPU_ISA that exclude the instructions for bf16 products.
_ISA_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
BF16_EMULATED = "bf16 is emulated on this CPU (no AVX512-BF16 or AMX, or ONEDNN_MAX_CPU_ISA excludes them)"


def cpu_name() -> str:
    """The model name of the CPU."""
    return _cpuinfo().get("model name", platform.machine())


def cpu_vendor() -> str:
    """The vendor of the CPU as it names itself, such as GenuineIntel or AuthenticAMD; empty where Linux does not say."""
    return _cpuinfo().get("vendor_id", "")


def cpu_instructions() -> list[str]:
    """The vector and matrix instructions of this CPU, among those for which torch has kernels."""
    flags = _cpuinfo().get("flags", "").split()
    return [flag for flag in _ISA if flag in flags]


def cpu_multiplies_bf16() -> bool:
    """Whether this process multiplies bf16 with instructions for it (AVX512-BF16, AMX). Without them, bf16 is slower than fp32.

    Convolutions and matrix products in bf16 are computed by oneDNN, so its limit ONEDNN_MAX_CPU_ISA (formerly DNNL_MAX_CPU_ISA)
    matters; ATEN_CPU_CAPABILITY restricts only PyTorch's own kernels. torch's `_is_mkldnn_bf16_supported` answers another
    question: it is also true where oneDNN emulates bf16 with AVX-512.
    """
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))
    present = not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_instructions())
    return present and limit.upper() not in _ISA_WITHOUT_BF16


@cache
def warn_of_emulated_bf16(remedy: str) -> None:
    """Warn that float32 is faster if bf16 is emulated: once per process and `remedy`, and only on rank 0."""
    if not cpu_multiplies_bf16() and os.environ.get("RANK", "0") == "0":
        logger.warning("%s; float32 is faster: %s", BF16_EMULATED, remedy)


def free_memory(device: Any = None) -> int:
    """The bytes that can still be allocated on a torch device.

    For the CPU (None) they are those of the machine or, if less, of its container.
    """
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


def peak_memory() -> dict[str, int]:
    """Peak memory in MiB since the process started: of the largest process, and of the GPU if this process has used it."""
    import torch

    children, own = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF))
    peak = {"peak_memory_mib": round(max(children, own) / 1024)}
    if torch.cuda.is_initialized():
        peak["peak_gpu_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return peak


def cpu_quota() -> float | None:
    """The number of CPUs that the container may use on average, or None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _cpuinfo() -> dict[str, str]:
    """The entry of the first processor in /proc/cpuinfo."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}
