"""Launch configurations: the defaults, and those measured on a particular GPU.

A kernel's launcher calls `launch_config(kernel, key, device)`; the key, such as "forward d32", selects the configuration for
the sizes at hand. Configurations measured by `benchmarks/tune_kernels.py` are stored in `kernels/tuned/<chip>.json` and take
precedence over the defaults.
"""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch


class LaunchConfig(NamedTuple):
    """Compile-time parameters of one kernel launch.

    Attributes:
        constants: The kernel's block sizes by parameter name.
        num_warps: Warps per program.
        num_stages: Software-pipelining stages of the loops.
    """

    constants: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2

    def launch(self) -> dict[str, int]:
        """The configuration as keyword arguments of a launch."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}


# kernel -> key -> configuration. Chosen by arithmetic and from the report of ptxas (kernels/aot.csv), not by timing.
DEFAULT_LAUNCH_CONFIGS: dict[str, dict[str, LaunchConfig]] = {
    "attention": {
        "forward d32": LaunchConfig({"BLOCK_N": 128, "BLOCK_L": 64}, num_warps=8, num_stages=3),
        "forward d64": LaunchConfig({"BLOCK_N": 128, "BLOCK_L": 64}, num_warps=8, num_stages=3),
        "forward d128": LaunchConfig({"BLOCK_N": 128, "BLOCK_L": 32}, num_warps=8, num_stages=3),
        "forward fp32": LaunchConfig({"BLOCK_N": 64, "BLOCK_L": 16}, num_warps=8, num_stages=1),
        "dq d32": LaunchConfig({"BLOCK_N": 64, "BLOCK_L": 64}, num_warps=4, num_stages=3),
        "dq d64": LaunchConfig({"BLOCK_N": 64, "BLOCK_L": 32}, num_warps=4, num_stages=2),
        "dq d128": LaunchConfig({"BLOCK_N": 64, "BLOCK_L": 32}, num_warps=8, num_stages=2),
        "dq fp32": LaunchConfig({"BLOCK_N": 64, "BLOCK_L": 16}, num_warps=8, num_stages=1),
        "dkdv d32": LaunchConfig({"BLOCK_N": 32, "BLOCK_L": 64}, num_warps=4, num_stages=3),
        "dkdv d64": LaunchConfig({"BLOCK_N": 32, "BLOCK_L": 64}, num_warps=4, num_stages=2),
        "dkdv d128": LaunchConfig({"BLOCK_N": 32, "BLOCK_L": 64}, num_warps=8, num_stages=2),
        "dkdv fp32": LaunchConfig({"BLOCK_N": 16, "BLOCK_L": 32}, num_warps=8, num_stages=1),
    },
    # TILE is the number of elements of x that a program holds at a time, chosen so that two programs fit in the registers of a
    # multiprocessor: `statistics` keeps two fp32 values per element, `sums` two or three, the element-wise passes none. STAGES
    # is the number of tiles of each input that are on their way from memory.
    "group_norm_silu": {
        "statistics last": LaunchConfig({"TILE": 4096, "STAGES": 4}, num_warps=8),
        "statistics first": LaunchConfig({"TILE": 4096, "STAGES": 3}, num_warps=8),
        "apply last": LaunchConfig({"TILE": 4096, "STAGES": 3}, num_warps=8),
        "apply first": LaunchConfig({"TILE": 8192, "STAGES": 3}, num_warps=16),
        "whole 2048": LaunchConfig({}, num_warps=4),  # the key fixes the tile: it must hold the group
        "whole 8192": LaunchConfig({}, num_warps=8),
        "whole 16384": LaunchConfig({}, num_warps=16),
        "whole 32768": LaunchConfig({}, num_warps=16),
        "sums last": LaunchConfig({"TILE": 4096, "STAGES": 3}, num_warps=8),
        "sums first": LaunchConfig({"TILE": 4096, "STAGES": 3}, num_warps=8),
        "input gradient last": LaunchConfig({"TILE": 4096, "STAGES": 3}, num_warps=8),
        "input gradient first": LaunchConfig({"TILE": 4096, "STAGES": 3}, num_warps=8),
        "parameter gradients": LaunchConfig({"BLOCK_C": 16}, num_warps=16),
    },
    "geglu": {
        "forward": LaunchConfig({"BLOCK_R": 4, "BLOCK_C": 512}, num_warps=4),
        "backward": LaunchConfig({"BLOCK_R": 4, "BLOCK_C": 512}, num_warps=8),
    },
    "residual_shift": {
        "sum last": LaunchConfig({"TILE": 4096, "STAGES": 3}, num_warps=8),
        "sum first": LaunchConfig({"TILE": 8192, "STAGES": 3}, num_warps=16),
    },
    # TILE: elements of a program, with channels last eight channels of a voxel in each thread.
    "upsample_trilinear": {
        "forward last": LaunchConfig({"TILE": 1024}, num_warps=4),
        "forward first": LaunchConfig({"TILE": 256}, num_warps=4),
        "backward last": LaunchConfig({"TILE": 1024}, num_warps=4),
        "backward first": LaunchConfig({"TILE": 256}, num_warps=4),
    },
    "cross_attention": {
        "heads d32 c256": LaunchConfig({"BLOCK_N": 64, "BLOCK_C": 128, "BLOCK_L": 64}, num_warps=4, num_stages=2),
        "heads d32 c512": LaunchConfig({"BLOCK_N": 64, "BLOCK_C": 128, "BLOCK_L": 64}, num_warps=8, num_stages=2),
        "heads d64 c512": LaunchConfig({"BLOCK_N": 64, "BLOCK_C": 64, "BLOCK_L": 32}, num_warps=8, num_stages=2),
        "heads d128 c512": LaunchConfig({"BLOCK_N": 32, "BLOCK_C": 64, "BLOCK_L": 32}, num_warps=4, num_stages=2),
        "heads fp32": LaunchConfig({"BLOCK_N": 16, "BLOCK_C": 64, "BLOCK_L": 32}, num_warps=4, num_stages=1),
        "output": LaunchConfig({"BLOCK_N": 64, "BLOCK_O": 64, "BLOCK_C": 64}, num_warps=4, num_stages=3),
        "output fp32": LaunchConfig({"BLOCK_N": 32, "BLOCK_O": 32, "BLOCK_C": 32}, num_warps=4, num_stages=2),
    },
    "upsample_conv3d": {
        "16bit": LaunchConfig({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 32}, num_warps=8, num_stages=3),
        "narrow": LaunchConfig({"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=3),
        "fp32": LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16}, num_warps=4, num_stages=2),
    },
    # Those with descriptors were the fastest of their kind on an NVIDIA H200 at the sizes of the default model; the others were
    # not measured, and need at most 64 KiB of shared memory, so that they run on every GPU.
    "conv3d": {
        "descriptors narrow": LaunchConfig(
            {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 64, "TRANSPOSED": 0}, num_warps=8, num_stages=2
        ),
        "descriptors wide": LaunchConfig(
            {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "TRANSPOSED": 0}, num_warps=8, num_stages=3
        ),
        "descriptors small": LaunchConfig(
            {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "TRANSPOSED": 0}, num_warps=4, num_stages=3
        ),
        "pointers 16bit": LaunchConfig({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32}, num_warps=4, num_stages=4),
        "pointers fp32": LaunchConfig({"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_K": 16}, num_warps=4, num_stages=2),
        "sum": LaunchConfig({"BLOCK": 1024}, num_warps=4),
    },
    # Each thread updates four weights at a time, of which it reads 20 bytes each.
    "adamw": {
        "dense": LaunchConfig({"BLOCK": 1024}, num_warps=4),
        "factors 16bit": LaunchConfig({"BLOCK_M": 16, "BLOCK_K": 128, "BLOCK_R": 16}, num_warps=4),
        "factors fp32": LaunchConfig({"BLOCK_M": 16, "BLOCK_K": 128, "BLOCK_R": 16}, num_warps=4),
    },
}


_OVERRIDES: dict[tuple[str, str], LaunchConfig] = {}  # set by `override_launch_config`


def launch_config(kernel: str, key: str, device: torch.device) -> LaunchConfig:
    """The configuration of `kernel` for `key` on `device`: overridden, measured or default, in this order."""
    if (kernel, key) in _OVERRIDES:
        return _OVERRIDES[kernel, key]
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return launch_config_of_chip(kernel, key, chip)


def launch_config_of_chip(kernel: str, key: str, chip: str | None) -> LaunchConfig:
    """The configuration measured on `chip`, the device name that CUDA reports; else, or where `chip` is None, the default."""
    measured = _measured(chip).get(kernel, {}).get(key) if chip else None
    return LaunchConfig(**measured) if measured else DEFAULT_LAUNCH_CONFIGS[kernel][key]


def tuned_file(chip: str) -> Path:
    """The file of the configurations measured on `chip`, the device name that CUDA reports."""
    return Path(__file__).parent / "tuned" / f"{chip.replace(' ', '_')}.json"


@contextlib.contextmanager
def override_launch_config(kernel: str, key: str, candidate: LaunchConfig) -> Iterator[None]:
    """Context manager in which `candidate` replaces the default or measured configuration. For the tuner."""
    _OVERRIDES[kernel, key] = candidate
    try:
        yield
    finally:
        del _OVERRIDES[kernel, key]


@functools.cache
def _measured(chip: str) -> dict[str, dict[str, dict[str, Any]]]:
    file = tuned_file(chip)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
