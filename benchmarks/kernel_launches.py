"""Records the launches of Triton kernels in a call and times each by itself.

A custom op with its Python code takes longer on the CPU than most of our kernels on the GPU, and a backward pass has several
launches. So the launches are recorded while the call runs, with their arguments, and repeated without the code around them.
Our kernels only write tensors that they do not read, so a repeated launch does the same work.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from ccella_fast.kernels import tuning
from ccella_fast.kernels.backend import load_triton
from ccella_fast.kernels.tuning import LaunchConfig
from kernel_workloads import Call

MERGED_LATER = ("statistics", "sums")  # steps whose partial results the later launches of the same call merge
_SECONDS = 1e-3  # approximate length of a timed CUDA graph
_CALLS = range(4, 51)  # how often it may contain the launches
_REPLAYS = 15


class Launch(NamedTuple):
    """A launch of a Triton kernel, with the configuration that it was made with.

    Attributes:
        kernel: Name of the kernel in the tables of configurations.
        key: Of the configuration.
        config: The configuration.
        function: The Triton function.
        grid: Its programs along each axis.
        arguments: All arguments by name.
        repeat: Launches it again.
    """

    kernel: str
    key: str
    config: LaunchConfig
    function: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    repeat: Callable[[], Any]


@contextmanager
def recording(choose: Callable[..., LaunchConfig] | None = None, *, launching: bool = True) -> Iterator[list[Launch]]:
    """The launches of our kernels in a `with` block.

    Args:
        choose: Used in place of `tuning.launch_config`.
        launching: Whether the kernels also run; they cannot on meta tensors.
    """
    from triton.runtime.jit import KernelInterface

    load_triton()
    launches: list[Launch] = []
    asked: list[tuple[str, str, LaunchConfig]] = []  # every launcher asks for a configuration just before it launches
    plain, configure = KernelInterface.__getitem__, choose or tuning.launch_config

    def launch_config(kernel: str, key: str, device: torch.device) -> LaunchConfig:
        asked.append((kernel, key, configure(kernel, key, device)))
        return asked[-1][-1]

    def record(function: Any, grid: Any) -> Callable[..., Any]:
        def launch(*args: Any, **kwargs: Any) -> Any:
            arguments = dict(zip(function.arg_names, args, strict=False)) | kwargs
            repeat = functools.partial(plain(function, grid), *args, **kwargs)
            launches.append(Launch(*asked[-1], function, tuple(grid), arguments, repeat))
            return repeat() if launching else None

        return launch

    with _replaced_launch_config(launch_config):
        KernelInterface.__getitem__ = record
        try:
            yield launches
        finally:
            KernelInterface.__getitem__ = plain


def record_launches(call: Call) -> list[Launch]:
    """The launches of our kernels in a call, which is run once."""
    with recording() as launches:
        call()
    return launches


def launches_of(kernel: str, key: str, call: Call) -> list[Callable[[], Any]]:
    """The launch of a call that the configuration belongs to, with those that merge its partial results, if there are any."""
    launches = record_launches(call)
    first = next(i for i, launch in enumerate(launches) if (launch.kernel, launch.key) == (kernel, key))
    end = None if key.split()[0] in MERGED_LATER else first + 1
    return [launch.repeat for launch in launches[first:end]]


def time_in_graph(launches: Sequence[Callable[[], Any]]) -> float:
    """The seconds of some launches on the GPU: the median over replays of a CUDA graph that repeats them.

    The inputs stay the same: in a step they have just been written, so they are in the L2 cache as well if they fit in it.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for launch in launches:  # loads the compiled kernels, which must not happen in a capture
        launch()
    begin.record()
    for launch in launches:
        launch()
    end.record()
    torch.cuda.synchronize()
    calls = max(_CALLS[0], min(_CALLS[-1], round(_SECONDS * 1e3 / max(1e-6, begin.elapsed_time(end)))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            for launch in launches:
                launch()
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(_REPLAYS + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3 / calls


@contextmanager
def _replaced_launch_config(new: Callable[..., LaunchConfig]) -> Iterator[None]:
    """Replace `tuning.launch_config` in every module that has imported it."""
    old = tuning.launch_config
    _swap_launch_config(old, new)
    try:
        yield
    finally:
        _swap_launch_config(new, old)


def _swap_launch_config(old: Callable[..., LaunchConfig], new: Callable[..., LaunchConfig]) -> None:
    for name, module in list(sys.modules.items()):
        if name.startswith("ccella_fast.kernels") and getattr(module, "launch_config", None) is old:
            module.launch_config = new  # type: ignore[attr-defined]
