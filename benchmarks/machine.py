"""What this machine can do at most, measured in the same run: copy bandwidth, matmul rate, convolution rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

import timer
from ccella_fast import hardware

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
_SIDES = {"cpu": [256, 512, 1024, 2048], "cuda": [8192]}  # of the square matrices: the largest that the time allows
_CALLS = 8  # at most, to measure a rate of long calls: two to try, the first ones, three rounds
_ROUNDS_SECONDS = 0.4


def rates(
    device: torch.device, *, widths: list[int], grid: list[int], budget: float, tick: Callable[[str], None]
) -> dict[str, Any]:
    """copy_bytes_per_second, matmul_flops and conv3d_flops per precision (best round of each).

    widths, grid: channels per level and latent grid of the model, so that the convolutions are its own.
    budget: seconds for all. A CPU that emulates bf16 is hundreds of times slower than another, so a matmul starts small and
    grows while its time, as predicted from the smaller one, allows; a convolution whose time, as predicted from the matmul's
    rate, does not fit is not measured. `reduced` says what of this happened."""
    deadline = time.perf_counter() + budget
    parts = 1 + len(PRECISIONS) * (1 + len(widths))  # that share what is left of the budget

    def share() -> float:
        nonlocal parts
        parts -= 1
        return max(0.0, deadline - time.perf_counter()) / (parts + 1)

    tick("copy bandwidth")
    found: dict[str, Any] = {
        "copy_bytes_per_second": _copy_rate(device, share()), "matmul_flops": {}, "conv3d_flops": {}, "reduced": [],
    }  # fmt: skip
    emulated = {"bf16"} if device.type == "cpu" and not hardware.cpu_multiplies_bf16() else set()
    found["emulated"] = sorted(emulated)
    for name, dtype in PRECISIONS.items():
        tick(f"matmul {name}")
        sides = _SIDES[device.type]
        rate, side = _matmul_rate(dtype, sides, device, share())
        found["matmul_flops"][name] = rate
        if side < sides[-1]:
            found["reduced"].append(f"limits: {name} matmul measured at {side} x {side}, {rate / 1e9:,.1f} GFLOP/s")
        by_level, slow = {}, []
        for level, width in enumerate(widths):
            tick(f"conv3d {name}, {width} channels")
            space, seconds = [axis // 2**level for axis in grid], share()
            flops = 2 * 27 * width * width * space[0] * space[1] * space[2]
            if _CALLS * flops / rate > seconds:
                slow.append(str(width))
            else:
                by_level[str(width)] = flops / _convolution_seconds(width, space, dtype, device, seconds)
        if slow:
            found["reduced"].append(f"limits: {name} convolutions of {', '.join(slow)} channels would take too long")
        found["conv3d_flops"][name] = by_level
    # The ceiling is the best rate that anything reached: on CPUs a large convolution can beat torch's matmul.
    for name in PRECISIONS:
        found["matmul_flops"][name] = max(found["matmul_flops"][name], *found["conv3d_flops"][name].values(), 0.0)
    return found


def _copy_rate(device: torch.device, budget: float) -> float:
    """Bytes read and written a second."""
    size = (1 << 30) if device.type == "cuda" else (1 << 28)  # bytes, far beyond the caches
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device, budget)


def _matmul_rate(dtype: torch.dtype, sides: list[int], device: torch.device, budget: float) -> tuple[float, int]:
    """FLOP/s, and the side of the matrices: the largest whose calls fit into the budget, or the smallest of all."""
    for side, larger in zip(sides, [*sides[1:], None], strict=True):
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        run = lambda: torch.mm(a, b)  # noqa: E731, B023
        if larger is None:
            break
        begin = time.perf_counter()
        seconds = min(_once(run), _once(run))
        budget -= time.perf_counter() - begin
        if _CALLS * seconds * (larger / side) ** 3 > budget:
            break
    return 2 * side**3 / _best(run, device, budget), side


def _convolution_seconds(
    width: int, space: list[int], dtype: torch.dtype, device: torch.device, budget: float
) -> float:
    x = torch.randn(1, width, *space, device=device).to(dtype, memory_format=torch.channels_last_3d)
    w = torch.randn(width, width, 3, 3, 3, device=device).to(dtype)
    if device.type == "cuda":
        w = w.to(memory_format=torch.channels_last_3d)
    return _best(lambda: F.conv3d(x, w, padding=1), device, budget)


def _once(run: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


@torch.no_grad()
def _best(run: Callable[[], Any], device: torch.device, most: float) -> float:
    found = timer.measure({"": lambda watch: run()}, device, budget=_ROUNDS_SECONDS, most=most)
    return min(found[""].rounds)


def describe(found: dict[str, Any]) -> str:
    """One line."""
    rate = ", ".join(
        f"{name} {value / 1e9:,.0f} GFLOP/s{' (emulated)' if name in found['emulated'] else ''}"
        for name, value in found["matmul_flops"].items()
    )
    return f"copy {found['copy_bytes_per_second'] / 1e9:,.1f} GB/s, {rate}"
