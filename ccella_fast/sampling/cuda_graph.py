"""Denoising steps as CUDA graphs: one launch per step instead of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache

import torch

Step = Callable[[], None]


class StepGraphs:
    """Runs steps, eagerly or by replaying captured ones.

    The first step of each kind runs eagerly, which initializes libraries and autotuners; the second is captured, and that one
    and all later ones are replayed.

    Args:
        capture: `capture(step)` captures a step without running it and returns its replay; None: every step runs eagerly.
    """

    def __init__(self, capture: Callable[[Step], Step] | None = None):
        self._capture = capture
        self._executed: set[Hashable] = set()
        self._replays: dict[Hashable, Step] = {}

    def run(self, kind: Hashable, step: Step) -> None:
        """Run `step`, which must launch the same kernels on the same addresses for every call with an equal `kind`."""
        if self._capture is None or kind not in self._executed:
            step()
            self._executed.add(kind)
            return
        if kind not in self._replays:
            self._replays[kind] = self._capture(step)
        self._replays[kind]()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device, because cuBLAS keeps a workspace per stream.

    PyTorch's default capture stream belongs to the device that was current when it was created.
    """
    return torch.cuda.Stream(device)


class CudaGraphCapture:
    """Captures steps on `device` in CUDA graphs. They share a memory pool, because they are replayed one after the other."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _capture_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        """Capture `step` without running it; returns the replay."""
        graph = torch.cuda.CUDAGraph()
        # thread_local: the decoder's stream may be in use during the capture.
        capture = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        with torch.cuda.device(self._stream.device), capture:
            step()
        return graph.replay
