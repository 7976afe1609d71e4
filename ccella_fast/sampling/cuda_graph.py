"""Steps of the denoising loop as CUDA graphs: one launch in place of hundreds."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import cache

import torch

Step = Callable[[], None]


class StepGraphs:
    """Executes steps, recorded ones where `capture` is given.

    capture(step) -> replay records a step; None: every step is executed. The first step of a kind is always executed, which
    readies libraries and tuners, the second is captured without being executed, and from then on it is replayed."""

    def __init__(self, capture: Callable[[Step], Step] | None = None):
        self._capture = capture
        self._executed: set[Hashable] = set()
        self._replays: dict[Hashable, Step] = {}

    def run(self, kind: Hashable, step: Step) -> None:
        """step: the same kernels over tensors at the same addresses whenever `kind` is the same."""
        if self._capture is None or kind not in self._executed:
            step()
            self._executed.add(kind)
            return
        if kind not in self._replays:
            self._replays[kind] = self._capture(step)
        self._replays[kind]()


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One per device, because cuBLAS keeps a workspace for each stream. PyTorch's own belongs to whichever GPU came first."""
    return torch.cuda.Stream(device)


class CudaGraphCapture:
    """Records a step on `device` in a CUDA graph. The graphs of one loop are replayed one after the other and share their
    memory."""

    def __init__(self, device: torch.device) -> None:
        self._stream = _capture_stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Step) -> Step:
        graph = torch.cuda.CUDAGraph()
        # thread_local: the decoder's stream may be busy meanwhile.
        recorded = torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local")
        with torch.cuda.device(self._stream.device), recorded:
            step()
        return graph.replay
