"""What this machine is, and what of it is known to be slow or wrong: for `ccella-fast env`, and beside every result."""

from __future__ import annotations

import logging
import os
import platform
import re
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from ccella_fast.storage import write_json

logger = logging.getLogger("ccella_fast")
PACKAGES = [
    "torch", "deepspeed", "triton", "xformers", "monai", "transformers", "nvidia-dali-cuda130", "numpy", "nvidia-ml-py",
    "safetensors", "nibabel", "SimpleITK", "pydantic", "pynvml",
]  # fmt: skip
_ISA = ["avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_fp16"]
_SETTINGS = [
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TRITON_INTERPRET", "CCELLA_FAST_BACKEND",
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA",
]  # fmt: skip
# Values of ONEDNN_MAX_CPU_ISA that exclude the instructions for bf16 products.
_ISA_WITHOUT_BF16 = {"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI"}
_BF16_EMULATED = "bf16 is emulated on this CPU (no AVX512-BF16 or AMX, or ONEDNN_MAX_CPU_ISA excludes them)"


# Public reports about 3D convolutions in half precision, each with where to read more.
_CUDNN_WRONG = range(90800, 91100)
_TRAPS = {
    "slow": "PyTorch 2.9 runs 3D convolutions in half precision 4 to 20 times slower and in 3 times the memory "
    "(pytorch#166122, #166643, #174051): use 2.10 or later",
    "wrong": "cuDNN {} gives wrong values in bf16 3D convolutions (pytorch#163539): use 9.15 or later",
    "fp16": "PyTorch 2.14.0 multiplies fp16 matrices up to a thousand times slower on a CPU with AMX (pytorch#193951): use "
    "another release, bf16 or fp32",
    "old": "cuDNN {} lacks fast half-precision 3D convolutions (fixed in 9.15, pytorch#166122): use a newer PyTorch build",
}


def describe_environment() -> dict[str, Any]:
    """Plain values; no host name, no user name, no path."""
    import torch

    return {
        "ccella_fast": _version("ccella-fast"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "name": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "quota": _cpu_quota(),
            "torch_threads": torch.get_num_threads(),
            "instructions": cpu_instructions(),
            "multiplies_bf16": cpu_multiplies_bf16(),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        },
        "gpu": _gpus(torch),
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "driver": _driver(),
        "kernels": _kernels(),
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }


def environment_warnings(facts: dict[str, Any]) -> list[str]:
    """What is known to be slow or wrong about a machine that `describe` has described, one sentence each."""
    found, cpu, packages, settings = [], facts["cpu"], facts["packages"], facts["settings"]
    cudnn = facts["cudnn"]
    if cudnn is not None:
        version = f"{cudnn // 10000}.{cudnn // 100 % 100}"
        if (packages["torch"] or "").startswith("2.9."):
            found.append(_TRAPS["slow"])
        if cudnn in _CUDNN_WRONG:
            found.append(_TRAPS["wrong"].format(version))
        elif cudnn < 91500:
            found.append(_TRAPS["old"].format(version))
    if not facts["gpu"] and "amx_fp16" in cpu["instructions"] and (packages["torch"] or "").startswith("2.14.0"):
        found.append(_TRAPS["fp16"])
    if not facts["gpu"] and not cpu["multiplies_bf16"]:
        found.append(f"{_BF16_EMULATED}; float32 is faster, and what `auto` takes for sampling and training")
    if facts["gpu"] and packages["triton"] is None:
        found.append("there is a GPU but no Triton: none of our kernels can run on it; pip install triton")
    if settings.get("TRITON_INTERPRET", "0") not in ("0", ""):
        found.append(
            "TRITON_INTERPRET is set: kernels run in Triton's interpreter, thousands of times slower; unset it"
        )
    if cpu["quota"] is not None and cpu["torch_threads"] > cpu["quota"]:
        found.append(
            f"{cpu['torch_threads']} threads on a quota of {cpu['quota']:g} CPUs: set OMP_NUM_THREADS to at most that"
        )
    if cpu["torch_threads"] > cpu["cores"]:
        found.append(f"{cpu['torch_threads']} threads on {cpu['cores']} cores: set OMP_NUM_THREADS={cpu['cores']}")
    if settings.get("OMP_WAIT_POLICY", "").lower() == "passive" or "GOMP_SPINCOUNT" in settings:
        found.append(
            "OMP_WAIT_POLICY or GOMP_SPINCOUNT puts threads to sleep after every operation: steps take 2 to 3 times longer"
        )
    if packages.get("pynvml"):
        found.append("the package pynvml is deprecated and shadows nvidia-ml-py: pip uninstall pynvml")
    return found


def format_environment(facts: dict[str, Any]) -> str:
    """`describe`'s result and its `warnings` as lines of text."""
    cpu, packages = facts["cpu"], facts["packages"]
    quota = "" if cpu["quota"] is None else f", a quota of {cpu['quota']:g}"
    installed = [f"{name} {version}" for name, version in packages.items() if version]
    absent = [name for name, version in packages.items() if not version and name != "pynvml"]
    gpus = [
        f"{gpu['name']}, {gpu['memory_gib']} GiB, {gpu['processors']} SMs, sm_{gpu['capability'].replace('.', '')}"
        for gpu in facts["gpu"]
    ]
    lines = [
        f"ccella_fast {facts['ccella_fast']}, Python {facts['python']}, {facts['system']}",
        f"packages    {', '.join(installed)}",
        *([f"absent      {', '.join(absent)}"] if absent else []),
        f"CPU         {cpu['name']}, {cpu['cores']} cores{quota}, {cpu['torch_threads']} torch threads, "
        f"{cpu['memory_gib']} GiB, {' '.join(cpu['instructions'])}",
        f"GPU         {'; '.join(gpus) or 'none'}",
        *([f"driver      {facts['driver']}, cuDNN {facts['cudnn']}"] if facts["gpu"] else []),
        *(f"{kernel:19} {entry['backend']}: {entry['why']}" for kernel, entry in facts["kernels"].items()),
        *(f"set         {name}={value}" for name, value in facts["settings"].items()),
    ]
    found = environment_warnings(facts)
    return "\n".join(
        [*lines, *(f"WARNING     {line}" for line in found), *([] if found else ["nothing known is slow here"])]
    )


@contextmanager
def write_run_record(folder: str | Path, command: str, **facts: Any) -> Iterator[dict[str, Any]]:
    """Time a command; on success write `folder/run_record.json`. The yielded dictionary takes further facts."""
    start = time.perf_counter()
    yield facts
    record = {
        "command": command,
        "seconds": round(time.perf_counter() - start, 2),
        **peak_memory(),
        **facts,
        "environment": describe_environment(),
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
    flags = _cpuinfo().get("flags", "").split()
    return [flag for flag in _ISA if flag in flags]


def cpu_name() -> str:
    return _cpuinfo().get("model name", platform.machine())


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
    """Whether products of bf16 use instructions for them in this process (AVX512-BF16, AMX); without, bf16 is slower than fp32.

    Convolutions and matrix products in bf16 are oneDNN's, so its limit ONEDNN_MAX_CPU_ISA (or DNNL_MAX_CPU_ISA, the older name)
    counts; ATEN_CPU_CAPABILITY narrows only PyTorch's own kernels. `_is_mkldnn_bf16_supported` of torch is another question: it
    is also true where oneDNN emulates bf16 with AVX-512."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", ""))
    present = not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_instructions())
    return present and limit.upper() not in _ISA_WITHOUT_BF16


@cache
def warn_of_emulated_bf16(remedy: str) -> None:
    """Warn, if bf16 is emulated, that float32 is faster: once a process for each `remedy`, and on the first rank alone."""
    if not cpu_multiplies_bf16() and os.environ.get("RANK", "0") == "0":
        logger.warning("%s; float32 is faster: %s", _BF16_EMULATED, remedy)


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry."""
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in first.splitlines())}


def _cpu_quota() -> float | None:
    """CPUs that the container may use on average; None without a limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else int(quota) / int(period)


def _driver() -> str | None:
    """Version of NVIDIA's driver; None where there is none."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        return nvml.nvmlSystemGetDriverVersion()
    except ImportError:
        return None
    except nvml.NVMLError:
        return None


def _kernels() -> dict[str, dict[str, str]]:
    """Which backend each kernel takes here, and why."""
    from ccella_fast.kernels.backend import explain

    return {choice.kernel: {"backend": choice.backend, "why": choice.reason} for choice in explain()}


def _gpus(torch: Any) -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {
            "name": gpu.name,
            "memory_gib": round(gpu.total_memory / 2**30, 1),
            "capability": f"{gpu.major}.{gpu.minor}",
            "processors": gpu.multi_processor_count,
        }
        for gpu in found
    ]
