"""Where the time of one call goes, by kind of work; and traces to look at in Perfetto."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

# The first kind with a word that is part of an op's name takes it. Fused ops of ours belong to the work that they replace.
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
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), OTHER)


def profiled(run: Callable[[], Any], device: torch.device, trace: Path | None = None) -> dict[str, Any]:
    """One call under torch.profiler: seconds by kind, the ten most expensive ops, and how many GPU kernels were launched.

    Seconds are those of the device, an op's own, without the ops that it calls. trace: a file for https://ui.perfetto.dev."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities) as found:
        run()
        if cuda:
            torch.cuda.synchronize(device)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(trace))
    rows = [(row.key, _own(row, cuda) / 1e6, row.count) for row in found.key_averages() if _own(row, cuda) > 0]
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


def _own(row: Any, cuda: bool) -> float:
    """Microseconds."""
    if not cuda:
        return row.self_cpu_time_total
    on_device = row.device_type == torch.autograd.DeviceType.CUDA  # the kernels' own rows, each once
    return row.self_device_time_total if on_device else 0.0
