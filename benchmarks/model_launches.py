"""The launches of our Triton kernels in the default model, recorded on meta tensors: without a GPU, in seconds.

The steps of `op_counts.py` run with every kernel on Triton. A library op on meta tensors only computes the shapes of its
results. Here its launcher is called as well, on the same meta tensors, and what it would launch is recorded.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import op_counts
from ccella_fast.config import Config
from ccella_fast.kernels.backend import LAUNCHERS
from ccella_fast.kernels.tuning import launch_config_of_chip
from ccella_fast.models import build_model
from kernel_launches import Launch, recording
from op_counter import Counts, FlashAttention, backend, counting, in_layout_of_cudnn

TRAINING_BATCH = 8


class OpCall(NamedTuple):
    """A call of one of our library ops.

    Attributes:
        op: Its name, without the namespace.
        arguments: All arguments, on the meta device.
        counts: Bytes and FLOPs, as `op_counter` counts them.
        launches: The Triton kernels that it launches.
    """

    op: str
    arguments: tuple[Any, ...]
    counts: Counts
    launches: list[Launch]


class _Recorder(TorchDispatchMode):
    def __init__(self, launches: list[Launch]) -> None:
        super().__init__()
        self.launches, self.calls, self.inside = launches, [], False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name, kwargs or {}
        if name not in LAUNCHERS:
            return in_layout_of_cudnn(name.removeprefix("aten::"), args, func(*args, **kwargs))
        if self.inside:  # an op inside the launcher of another one
            with self:
                LAUNCHERS[name](*args, **kwargs)
            return func(*args, **kwargs)
        with counting() as counts:
            out = func(*args, **kwargs)
        before, self.inside = len(self.launches), True
        with self:
            LAUNCHERS[name](*args, **kwargs)
        self.inside = False
        self.calls.append(OpCall(name.removeprefix("ccella_fast::"), args, counts, self.launches[before:]))
        return out


def calls_of(run: Callable[[], Any], chip: str | None = None) -> list[OpCall]:
    """The calls of our ops in a call on meta tensors, with the configurations of `chip`; None for the defaults."""
    choose = lambda kernel, key, device: launch_config_of_chip(kernel, key, chip)  # noqa: E731
    with recording(choose, launching=False) as launches, _Recorder(launches) as recorder:
        run()
    return recorder.calls


@functools.cache
def model_calls(chip: str | None = None) -> dict[str, list[OpCall]]:
    """The calls of our ops in the steps of the default model, in bf16 with every kernel on Triton."""
    config, mode = Config(), FlashAttention()
    with torch.device("meta"):
        model = build_model(config).bfloat16()
    with backend("triton"):
        steps: dict[str, Callable[[], Any]] = {
            "denoising step": op_counts.denoising_step(config, model, mode, torch.bfloat16),
            "training step, batch 8": op_counts.training_step(config, model, mode, torch.bfloat16, TRAINING_BATCH)[1],
            "decode": op_counts.decode(config),
        }
        calls = {name: calls_of(step, chip) for name, step in steps.items()}
        single = calls_of(op_counts.training_step(config, model, mode, torch.bfloat16)[1], chip)
    # The benchmark cases of single kernels are at batch 1, in the backward pass too.
    return calls | {"backward pass, batch 1": [call for call in single if call.op.endswith("_backward")]}
