"""What this machine can do at most, measured in the same run: copy bandwidth, matmul rate, convolution rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from timer import Watch, measure

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rates(device: torch.device, *, widths: list[int], grid: list[int], tick: Callable[[str], None]) -> dict[str, Any]:
    """copy_bytes_per_second, matmul_flops and conv3d_flops per precision (best round of each).

    widths, grid: channels per level and latent grid of the model, so that the convolutions are its own."""
    tick("copy bandwidth")
    size = (1 << 30) if device.type == "cuda" else (1 << 28)  # bytes, far beyond the caches
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    seconds = _best(lambda: target.copy_(source), device)
    found: dict[str, Any] = {"copy_bytes_per_second": 2 * size / seconds, "matmul_flops": {}, "conv3d_flops": {}}
    side = 8192 if device.type == "cuda" else 2048
    for name, dtype in PRECISIONS.items():
        tick(f"matmul {name}")
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        found["matmul_flops"][name] = 2 * side**3 / _best(lambda: a @ b, device)  # noqa: B023
        tick(f"conv3d {name}")
        by_level = {}
        for level, width in enumerate(widths):
            space = [axis // 2**level for axis in grid]
            x = torch.randn(1, width, *space, device=device).to(dtype, memory_format=torch.channels_last_3d)
            w = torch.randn(width, width, 3, 3, 3, device=device).to(dtype)
            if device.type == "cuda":
                w = w.to(memory_format=torch.channels_last_3d)
            flops = 2 * 27 * width * width * x[0, 0].numel()
            by_level[str(width)] = flops / _best(lambda: F.conv3d(x, w, padding=1), device)  # noqa: B023
        found["conv3d_flops"][name] = by_level
    # The ceiling is the best rate that anything reached: on CPUs a large convolution can beat torch's matmul.
    for name in PRECISIONS:
        best = max(found["matmul_flops"][name], *found["conv3d_flops"][name].values())
        found["matmul_flops"][name] = best
    return found


@torch.no_grad()
def _best(run: Callable[[], Any], device: torch.device) -> float:
    def timed(watch: Watch) -> None:
        run()

    return min(measure({"": timed}, device, budget=0.4)[""].rounds)


def describe(found: dict[str, Any]) -> str:
    """One line."""
    rate = ", ".join(f"{name} {value / 1e9:,.0f} GFLOP/s" for name, value in found["matmul_flops"].items())
    return f"copy {found['copy_bytes_per_second'] / 1e9:,.1f} GB/s, {rate}"
