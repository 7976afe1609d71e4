"""The limits of this machine, measured in the same run: copy bandwidth, matmul rate and convolution rate."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

import timer
from ccella_fast import hardware

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Of the square matrices; the largest that the time allows is used.
_SIZES = {"cpu": [256, 512, 1024, 2048], "cuda": [8192]}
_CALLS = 8  # the most that measuring the rate of a long call takes: two attempts, the first calls, three rounds
_ROUNDS_SECONDS = 0.4


def rates(
    device: torch.device, *, widths: list[int], grid: list[int], budget: float, on_progress: Callable[[str], None]
) -> dict[str, Any]:
    """Measure copy_bytes_per_second, and matmul_flops and conv3d_flops by precision; of each the best round.

    A CPU that emulates bf16 can be hundreds of times slower than others. Matrices therefore start small and grow as long as the
    predicted time fits the budget, and a convolution whose predicted time does not fit is not measured.

    Args:
        device: The device to measure.
        widths: Channels per level of the model, so that its own convolutions are measured.
        grid: The model's latent grid.
        budget: Seconds for everything.
        on_progress: Called with the name of what is measured next.

    Returns:
        The rates, with `emulated` (precisions that the CPU emulates) and `reduced` (sentences on what was measured at less
        than its usual size).
    """
    deadline = time.perf_counter() + budget
    parts = 1 + len(PRECISIONS) * (1 + len(widths))  # measurements that share the rest of the budget

    def share() -> float:
        nonlocal parts
        parts -= 1
        return max(0.0, deadline - time.perf_counter()) / (parts + 1)

    on_progress("copy bandwidth")
    found: dict[str, Any] = {
        "copy_bytes_per_second": _copy_rate(device, share()), "matmul_flops": {}, "conv3d_flops": {}, "reduced": [],
    }  # fmt: skip
    emulated = {"bf16"} if device.type == "cpu" and not hardware.cpu_multiplies_bf16() else set()
    found["emulated"] = sorted(emulated)
    for name, dtype in PRECISIONS.items():
        on_progress(f"matmul {name}")
        sizes = _SIZES[device.type]
        rate, size = _matmul_rate(dtype, sizes, device, share())
        found["matmul_flops"][name] = rate
        if size < sizes[-1]:
            found["reduced"].append(f"limits: {name} matmul measured at {size} x {size}, {rate / 1e9:,.1f} GFLOP/s")
        by_level, slow = {}, []
        for level, width in enumerate(widths):
            on_progress(f"conv3d {name}, {width} channels")
            space, seconds = [axis // 2**level for axis in grid], share()
            flops = 2 * 27 * width * width * space[0] * space[1] * space[2]
            if _CALLS * flops / rate > seconds:
                slow.append(str(width))
            else:
                by_level[str(width)] = flops / _convolution_seconds(width, space, dtype, device, seconds)
        if slow:
            found["reduced"].append(f"limits: {name} convolutions of {', '.join(slow)} channels would take too long")
        found["conv3d_flops"][name] = by_level
    # The limit is the best rate reached by either: on CPUs a large convolution can beat torch's matmul.
    for name in PRECISIONS:
        found["matmul_flops"][name] = max(found["matmul_flops"][name], *found["conv3d_flops"][name].values(), 0.0)
    return found


def _copy_rate(device: torch.device, budget: float) -> float:
    """Bytes read and written per second."""
    size = (1 << 30) if device.type == "cuda" else (1 << 28)  # bytes, much more than the caches hold
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device, budget)


def _matmul_rate(dtype: torch.dtype, sizes: list[int], device: torch.device, budget: float) -> tuple[float, int]:
    """FLOP/s, and the size of the matrices: the largest whose calls fit into the budget, or the smallest of all."""
    for size, larger in zip(sizes, [*sizes[1:], None], strict=True):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        run = lambda: torch.mm(a, b)  # noqa: E731, B023
        if larger is None:
            break
        begin = time.perf_counter()
        seconds = min(_once(run), _once(run))
        budget -= time.perf_counter() - begin
        if _CALLS * seconds * (larger / size) ** 3 > budget:
            break
    return 2 * size**3 / _best(run, device, budget), size


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
    found = timer.measure({"": lambda stopwatch: run()}, device, budget=_ROUNDS_SECONDS, most=most)
    return min(found[""].rounds)


def describe(found: dict[str, Any]) -> str:
    """The limits in one line."""
    rate = ", ".join(
        f"{name} {value / 1e9:,.0f} GFLOP/s{' (emulated)' if name in found['emulated'] else ''}"
        for name, value in found["matmul_flops"].items()
    )
    return f"copy {found['copy_bytes_per_second'] / 1e9:,.1f} GB/s, {rate}"
