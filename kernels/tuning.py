"""Launch configurations: the shipped ones, and what was measured on a chip.

A kernel's launcher asks `config(kernel, key, device)`; key says which of its shipped configurations the sizes need, such as
"d32". What `benchmarks/tune_kernels.py` measured on a chip lies in `kernels/tuned/<chip>.json` and goes before the shipped one.
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
    """constants: the kernel's block sizes by parameter name. num_warps, num_stages: Triton's."""

    constants: dict[str, int]
    num_warps: int = 4
    num_stages: int = 2

    def launch(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages}


# kernel -> key -> configuration. Chosen by arithmetic and by what ptxas reports (kernels/aot.json), not yet by time.
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
    # TILE: elements of x that a program holds at a time, so that two programs fit a multiprocessor's registers: `statistics`
    # keeps two fp32 values an element, `sums` two or three, the passes that only apply none.
    "group_norm_silu": {
        "statistics last": LaunchConfig({"TILE": 8192}, num_warps=16),
        "statistics first": LaunchConfig({"TILE": 4096}, num_warps=8),
        "apply last": LaunchConfig({"TILE": 8192}, num_warps=16),
        "apply first": LaunchConfig({"TILE": 8192}, num_warps=16),
        "whole 2048": LaunchConfig({}, num_warps=4),  # the tile is in the key: a smaller one would not hold the group
        "whole 8192": LaunchConfig({}, num_warps=8),
        "whole 16384": LaunchConfig({}, num_warps=16),
        "sums last": LaunchConfig({"TILE": 4096}, num_warps=8),
        "sums first": LaunchConfig({"TILE": 4096}, num_warps=8),
        "input gradient last": LaunchConfig({"TILE": 4096}, num_warps=8),
        "input gradient first": LaunchConfig({"TILE": 8192}, num_warps=16),
        "parameter gradients": LaunchConfig({"BLOCK_C": 32}, num_warps=8),
    },
    "geglu": {
        "forward": LaunchConfig({"BLOCK_R": 4, "BLOCK_C": 512}, num_warps=4),
        "backward": LaunchConfig({"BLOCK_R": 4, "BLOCK_C": 512}, num_warps=8),
    },
    "residual_shift": {
        "sum last": LaunchConfig({"TILE": 8192}, num_warps=16),
        "sum first": LaunchConfig({"TILE": 8192}, num_warps=16),
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
}


def launch_config(kernel: str, key: str, device: torch.device) -> LaunchConfig:
    """The configuration of `kernel` for `key` on `device`."""
    if (kernel, key) in _OVERRIDES:
        return _OVERRIDES[kernel, key]
    chip = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    measured = _measured(chip).get(kernel, {}).get(key) if chip else None
    return LaunchConfig(**measured) if measured else DEFAULT_LAUNCH_CONFIGS[kernel][key]


def tuned_file(chip: str) -> Path:
    """Where the configurations measured on `chip`, named as CUDA names it, lie."""
    return Path(__file__).parent / "tuned" / f"{chip.replace(' ', '_')}.json"


@contextlib.contextmanager
def override_launch_config(kernel: str, key: str, candidate: LaunchConfig) -> Iterator[None]:
    """Within: `candidate` goes before what is shipped or measured. For the tuner."""
    _OVERRIDES[kernel, key] = candidate
    try:
        yield
    finally:
        del _OVERRIDES[kernel, key]


_OVERRIDES: dict[tuple[str, str], LaunchConfig] = {}


@functools.cache
def _measured(chip: str) -> dict[str, dict[str, dict[str, Any]]]:
    file = tuned_file(chip)
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
