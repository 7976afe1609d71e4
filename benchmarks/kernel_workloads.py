"""The calls of our kernels in one step of the default model, as the tuner times them.

A step of the sampler is a forward pass at batch 1, a step of training a forward and a backward pass at batch 8. The sizes are
written out, so that the tuner runs where only torch and Triton are installed; a test compares them with `ModelConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ccella_fast.kernels.attention import attention
from ccella_fast.kernels.conv3d import conv3d, kernel_layout
from ccella_fast.kernels.cross_attention import cross_attention
from ccella_fast.kernels.geglu import geglu
from ccella_fast.kernels.group_norm_silu import group_norm_silu
from ccella_fast.kernels.residual_shift import residual_shift
from ccella_fast.kernels.upsample_conv3d import phase_weights, upsample_conv3d

GRID = (64, 64, 32)  # the default model's latent grid, docs/explanation/method.md, section 1
CHANNELS = (64, 128, 256, 512)
GROUPS, HEAD_WIDTH, CONTEXT = 32, 32, 256
BLOCKS = (5, 5, 5, 7)  # residual blocks on each level: two on the way down, three on the way up, two in the middle
TRANSFORMERS = (0, 0, 5, 6)
BATCHES = {"sampling": 1, "training": 8}

Call = Callable[[], list[Tensor]]  # the forward pass, or the backward pass alone; returns the output or the gradients


class Workload(NamedTuple):
    """One call of a kernel at the size of one level.

    Attributes:
        kernel: The kernel that it launches.
        step: Of sampling or training, a key of `BATCHES`.
        times: How often a step makes this call.
        prepare: Allocates the inputs and returns the call.
    """

    kernel: str
    step: str
    times: int
    prepare: Callable[[], Call]


def workloads(device: torch.device, grid: Sequence[int] = GRID) -> dict[str, Workload]:
    """The workloads by name.

    Args:
        device: Where they run.
        grid: The latent grid, smaller in a rehearsal; each axis is divisible by 8.
    """
    found = {}
    for step, batch in BATCHES.items():
        for level, channels in enumerate(CHANNELS):
            shape = (batch, channels, *(size >> level for size in grid))
            rows = [("group_norm_silu", 2 * BLOCKS[level], _norm), ("residual_shift", BLOCKS[level], _residual)]
            rows.append(("conv3d", 2 * BLOCKS[level], _conv))
            if level:  # from this level to the next finer one
                rows.append(("upsample_conv3d", 1, _upsample))
            if TRANSFORMERS[level]:
                rows += [(name, TRANSFORMERS[level], make) for name, make in _TRANSFORMER.items()]
            for kernel, times, make in rows:
                for backward in (False, True) if step == "training" and make in _WITH_BACKWARD else (False,):
                    name = f"{kernel} level {level} {step}{' backward' * backward}"
                    launched = "attention" if make is _cross_attention and backward else kernel
                    found[name] = Workload(launched, step, times, _prepare(make, device, shape, backward))
    return found


# Makes the inputs of a call, those whose gradient is computed first, and the call itself.
_Maker = Callable[[torch.device, Sequence[int]], tuple[list[Tensor], Callable[..., Tensor]]]


def _norm(device: torch.device, shape: Sequence[int]) -> tuple[list[Tensor], Callable[..., Tensor]]:
    inputs = [_volume(device, shape), *(_draw(device, *size) for size in (shape[1:2], shape[1:2], shape[:2]))]
    return inputs, lambda x, weight, bias, shift: group_norm_silu(
        x, GROUPS, weight, bias, shift=shift, backend="triton"
    )


def _residual(device: torch.device, shape: Sequence[int]) -> tuple[list[Tensor], Callable[..., Tensor]]:
    inputs = [_volume(device, shape), _volume(device, shape), _draw(device, shape[1])]
    return inputs, lambda h, residual, shift: residual_shift(h, residual, shift, backend="triton")


def _conv(device: torch.device, shape: Sequence[int]) -> tuple[list[Tensor], Callable[..., Tensor]]:
    weight = kernel_layout(_draw(device, shape[1], shape[1], 3, 3, 3) * (27 * shape[1]) ** -0.5)
    inputs = [_volume(device, shape), _draw(device, shape[1]), _volume(device, shape)]
    return inputs, lambda x, bias, residual: conv3d(x, weight, bias, residual=residual, backend="triton")


def _upsample(device: torch.device, shape: Sequence[int]) -> tuple[list[Tensor], Callable[..., Tensor]]:
    weight = _draw(device, shape[1], shape[1], 3, 3, 3) * (27 * shape[1]) ** -0.5
    phases = phase_weights(weight)
    inputs = [_volume(device, shape), _draw(device, shape[1])]
    return inputs, lambda x, bias: upsample_conv3d(x, weight, bias, phases=phases, backend="triton")


def _attention(device: torch.device, shape: Sequence[int]) -> tuple[list[Tensor], Callable[..., Tensor]]:
    heads = (shape[0], shape[1] // HEAD_WIDTH, math.prod(shape[2:]), HEAD_WIDTH)
    return [_draw(device, *heads) for _ in range(3)], lambda q, k, v: attention(q, k, v, backend="triton")


def _cross_attention(device: torch.device, shape: Sequence[int]) -> tuple[list[Tensor], Callable[..., Tensor]]:
    channels = shape[1]
    heads = channels // HEAD_WIDTH
    inputs = [_draw(device, shape[0], math.prod(shape[2:]), channels)]
    inputs += [_draw(device, shape[0], heads, CONTEXT, HEAD_WIDTH) for _ in range(2)]
    added = torch.zeros_like(inputs[0])
    w_q, w_out = (_draw(device, channels, channels) * channels**-0.5 for _ in range(2))
    ln_weight, ln_bias, b_out = (_draw(device, channels) for _ in range(3))
    return inputs, lambda x, k, v: cross_attention(
        x, k, v, ln_weight=ln_weight, ln_bias=ln_bias, w_q=w_q, w_out=w_out, b_out=b_out, num_heads=heads,
        added=added, backend="triton",
    )  # fmt: skip


def _geglu(device: torch.device, shape: Sequence[int]) -> tuple[list[Tensor], Callable[..., Tensor]]:
    return [_draw(device, shape[0], math.prod(shape[2:]), 8 * shape[1])], lambda h: geglu(h, backend="triton")


_TRANSFORMER: dict[str, _Maker] = {"attention": _attention, "cross_attention": _cross_attention, "geglu": _geglu}
_WITH_BACKWARD = (_norm, _attention, _cross_attention, _geglu)  # the others' backward passes are PyTorch's


def _prepare(make: _Maker, device: torch.device, shape: Sequence[int], backward: bool) -> Callable[[], Call]:
    def prepare() -> Call:
        inputs, function = make(device, shape)
        return _backward_call(function, inputs) if backward else _forward_call(function, inputs)

    return prepare


def _forward_call(function: Callable[..., Tensor], inputs: list[Tensor]) -> Call:
    @torch.no_grad()
    def call() -> list[Tensor]:
        return [function(*inputs)]

    return call


def _backward_call(function: Callable[..., Tensor], inputs: list[Tensor]) -> Call:
    for tensor in inputs:
        tensor.requires_grad_()
    with torch.enable_grad():
        y = function(*inputs)
    dy = torch.randn_like(y)
    return lambda: list(torch.autograd.grad(y, inputs, dy, retain_graph=True))


def _draw(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(torch.bfloat16)


def _volume(device: torch.device, shape: Sequence[int]) -> Tensor:
    return _draw(device, *shape).to(memory_format=torch.channels_last_3d)
