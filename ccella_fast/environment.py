"""Versions and hardware of this machine, and its known problems: for `ccella-fast env` and for run records."""

from __future__ import annotations

import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import ccella_fast
from ccella_fast import hardware
from ccella_fast.optional import install
from ccella_fast.storage import sha256

PACKAGES = [
    "torch", "deepspeed", "triton", "xformers", "monai", "transformers", "nvidia-dali-cuda130", "numpy", "nvidia-ml-py",
    "safetensors", "nibabel", "SimpleITK", "pydantic", "pynvml",
]  # fmt: skip
_SETTINGS = [
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "TRITON_INTERPRET", "CCELLA_FAST_BACKEND",
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA",
]  # fmt: skip
# Known defects, each with the public report.
_CUDNN_WRONG = range(90800, 91100)
_TRAPS = {
    "slow": "PyTorch 2.9 runs 3D convolutions in half precision 4 to 20 times slower and in 3 times the memory "
    "(pytorch#166122, #166643, #174051): use 2.10 or later",
    "wrong": "cuDNN {} gives wrong values in bf16 3D convolutions (pytorch#163539): use 9.15 or later",
    "fp16": "PyTorch 2.14.0 multiplies fp16 matrices up to a thousand times slower on a CPU with AMX (pytorch#193951): use "
    "another release, bf16 or fp32",
    "old": "cuDNN {} lacks fast half-precision 3D convolutions (fixed in 9.15, pytorch#166122): use a newer PyTorch build",
}


def code_digest() -> str:
    """The SHA-256 of the names and contents of the package's files of Python code."""
    digest, root = hashlib.sha256(), Path(ccella_fast.__file__).parent
    files = {
        *root.rglob("*.py"),
        *(root / "kernels").rglob("*.py"),
    }  # a link in a checkout, which the first does not follow
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in files):
        digest.update(f"{name} {sha256(path)}\n".encode())
    return digest.hexdigest()


def describe_environment() -> dict[str, Any]:
    """Describe this machine in plain values, without host name, user name or paths."""
    import torch

    return {
        "ccella_fast": ccella_fast.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": {
            "name": hardware.cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "quota": hardware.cpu_quota(),
            "torch_threads": torch.get_num_threads(),
            "instructions": hardware.cpu_instructions(),
            "multiplies_bf16": hardware.cpu_multiplies_bf16(),
            "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        },
        "gpu": _gpus(torch),
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "driver": _driver(),
        "kernels": _kernels(),
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }


def environment_warnings(facts: dict[str, Any]) -> list[str]:
    """Known problems of a machine, as sentences. facts: from `describe_environment`."""
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
        found.append(f"{hardware.BF16_EMULATED}; float32 is faster, and what `auto` takes for sampling and training")
    if facts["gpu"] and packages["triton"] is None:
        found.append(
            f"there is a GPU but Triton is not installed, so our kernels cannot run on it: {install('triton')}"
        )
    if settings.get("TRITON_INTERPRET", "0") not in ("0", ""):
        found.append(
            "TRITON_INTERPRET is set, so kernels run in Triton's interpreter, thousands of times slower: unset it"
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
    """Format the result of `describe_environment`, and its warnings, as lines of text."""
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


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The version of NVIDIA's driver, or None if it is not installed."""
    try:
        import pynvml as nvml

        nvml.nvmlInit()
        return nvml.nvmlSystemGetDriverVersion()
    except ImportError:
        return None
    except nvml.NVMLError:
        return None


def _kernels() -> dict[str, dict[str, str]]:
    """The backend that each kernel uses here, with the reason."""
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
