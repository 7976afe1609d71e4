"""The time of one call by kind of work, and traces for Perfetto."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# An op belongs to the first kind with a word that is part of its name; our fused ops belong to the kind of work they replace.
KINDS = {
    "convolution": ["conv"],
    "attention": ["attention", "softmax", "attn"],
    "norm, SiLU": ["norm", "silu"],
    "linear": ["addmm", "aten::mm", "bmm", "linear", "matmul"],
    "copies, casts": ["copy", "_to", "cat", "clone", "contiguous", "pad", "upsample", "interpolate"],
    "optimizer": ["adam", "foreach"],
}
OTHER = "other"


def kind(name: str) -> str:
    """The kind of work of an op, by its name."""
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), OTHER)


def profiled(run: Callable[[], Any], device: torch.device, trace: Path | None = None) -> dict[str, Any]:
    """Profile one call with torch.profiler.

    Args:
        run: The call.
        device: Where it runs.
        trace: A file to write for https://ui.perfetto.dev.

    Returns:
        `seconds_by_kind`, the ten most expensive `top_ops`, and on a GPU the number of `kernel_launches`. Seconds are spent on
        the device by the op itself, without the ops that it calls.
    """
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(trace))
    averages = found.key_averages()
    rows = [(row.key, _self_time(row, cuda) / 1e6, row.count) for row in averages if _self_time(row, cuda) > 0]
    by_kind: dict[str, float] = {}
    for name, seconds, _ in rows:
        by_kind[kind(name)] = by_kind.get(kind(name), 0.0) + seconds
    top = sorted(rows, key=lambda row: -row[1])[:10]
    facts: dict[str, Any] = {
        "seconds_by_kind": dict(sorted(by_kind.items(), key=lambda item: -item[1])),
        "top_ops": [{"name": name[:100], "seconds": seconds, "calls": calls} for name, seconds, calls in top],
    }
    if cuda:
        launched = [event for event in found.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        facts["kernel_launches"] = len(launched)
    return facts


def _self_time(row: Any, cuda: bool) -> float:
    """Microseconds spent in the op itself."""
    if not cuda:
        return row.self_cpu_time_total
    on_device = (
        row.device_type == torch.autograd.DeviceType.CUDA
    )  # the rows of the GPU kernels, each of which counts once
    return row.self_device_time_total if on_device else 0.0
