"""Each kernel by itself, forward and backward: eager, torch.compile, other libraries where installed, and ours.

Shapes are the model's own: a level's width and grid. On a GPU inputs are rotated beyond the L2 cache and forward passes are
replayed from a CUDA graph, so that launches from Python are in nobody's time. Judged against float64 beside the eager path of
the same dtype: ours may err twice as much.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark_case import BenchmarkCase, Implementation, Roofline, PreparedCase
from ccella_fast.kernels.attention import attention, attention_reference
from ccella_fast.kernels.cross_attention import cross_attention, cross_attention_reference
from ccella_fast.kernels.group_norm_silu import group_norm_silu
from ccella_fast.kernels.upsample_conv3d import upsample_conv3d, upsample_conv3d_reference
from fixtures import Workbench
from timer import Stopwatch

_ROTATION = 256 << 20  # bytes that the rotated inputs take together: several times the L2 cache of any GPU
_CALLS = 16  # in one CUDA graph
_REASON = "gains nothing on a CPU and takes minutes to compile: a side on GPUs only"


@dataclass
class KernelProblem:
    """One kernel at one size. `make(i)`: fresh inputs, the differentiable ones first; functions take exactly these."""

    make: Callable[[int], list[Tensor]]
    gradients: int  # how many of the inputs get one
    eager: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    truth: Callable[..., Tensor]
    roofline: Roofline
    backward_roofline: Roofline
    others: dict[str, Callable[[], Callable[..., Tensor]]]  # name -> a function that makes it, or raises ImportError


def kernel(bench: Workbench, problem: Callable[[Workbench], KernelProblem], *, backward: bool) -> PreparedCase:
    given = problem(bench)
    first = given.make(0)
    moved = sum(tensor.numel() * tensor.element_size() for tensor in first)
    copies = min(_CALLS, max(1, math.ceil(_ROTATION / moved))) if bench.device.type == "cuda" else 1
    inputs = [first, *(given.make(index) for index in range(1, copies))]
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[first[0].dtype]
    prepared = PreparedCase(shapes={"inputs": [list(tensor.shape) for tensor in first]}, twice_baseline_error=True)
    sides = {"eager": given.eager}
    if bench.device.type == "cuda":
        sides["torch.compile"] = torch.compile(given.eager, mode="max-autotune-no-cudagraphs", dynamic=False)
    else:
        prepared.missing["torch.compile"] = _REASON
    for other, build in given.others.items():
        try:
            sides[other] = build()
        except ImportError as why:
            prepared.missing[other] = str(why)
    sides["ours"] = given.ours
    prepare = _backward if backward else _forward
    for side, call in sides.items():
        run, calls = prepare(bench, call, inputs, given.gradients)
        prepared.implementations[side] = Implementation(
            name, run, functools.partial(_result, call, first, given.gradients, backward), calls
        )
        prepared.rooflines[side] = given.backward_roofline if backward else given.roofline
    doubles = [tensor.double() for tensor in first]
    prepared.truth = functools.partial(_result, given.truth, doubles, given.gradients, backward)
    return prepared


def _result(call: Callable[..., Tensor], inputs: list[Tensor], gradients: int, backward: bool) -> Tensor:
    """The output, or all gradients, each scaled by the root of its size so that none hides behind another."""
    if not backward:
        with torch.no_grad():
            return call(*inputs)
    leaves = [tensor.detach().requires_grad_(index < gradients) for index, tensor in enumerate(inputs)]
    out = call(*leaves)
    generator = torch.Generator().manual_seed(3)
    seed = torch.randn(out.shape, generator=generator).to(out)
    found = torch.autograd.grad(out, leaves[:gradients], seed)
    return torch.cat([g.double().flatten() / math.sqrt(out.numel() / g.numel()) for g in found])


def _forward(
    bench: Workbench, call: Callable[..., Tensor], inputs: list[list[Tensor]], gradients: int
) -> tuple[Callable[[Stopwatch], Any], int]:
    if bench.device.type != "cuda":

        @torch.no_grad()
        def run(stopwatch: Stopwatch) -> None:
            call(*inputs[0])

        return run, 1

    @torch.no_grad()
    def body() -> None:
        for _, tensors in zip(range(_CALLS), itertools.cycle(inputs), strict=False):
            call(*tensors)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compilation and allocations happen before the capture
        body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        body()
    return lambda stopwatch: graph.replay(), _CALLS


def _backward(
    bench: Workbench, call: Callable[..., Tensor], inputs: list[list[Tensor]], gradients: int
) -> tuple[Callable[[Stopwatch], Any], int]:
    """The backward pass alone, over graphs that forward passes have left."""
    ready = []
    for tensors in inputs:
        leaves = [tensor.detach().requires_grad_(index < gradients) for index, tensor in enumerate(tensors)]
        out = call(*leaves)
        ready.append((out, leaves[:gradients], torch.randn_like(out)))
    calls = _CALLS if bench.device.type == "cuda" else 1

    def run(stopwatch: Stopwatch) -> None:
        for _, (out, leaves, seed) in zip(range(calls), itertools.cycle(ready), strict=False):
            torch.autograd.grad(out, leaves, seed, retain_graph=True)

    return run, calls


def norm_problem(bench: Workbench, *, level: int = 0, batch: int = 1, shape: list[int] | None = None) -> KernelProblem:
    """GroupNorm-SiLU with the shift of a residual block. Bytes: x in, y out; backward x and dy in, dx out."""
    config, dtype = bench.config.model, _dtype(bench)
    shape = shape or [batch, config.num_channels[level], *_grid(bench, level)]
    channels, groups, eps = shape[1], config.norm_num_groups, config.norm_eps

    def make(index: int) -> list[Tensor]:
        x = bench.random(*shape, seed=index).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last_3d) if bench.device.type == "cuda" else x
        weight, bias, shift = (bench.random(*size, seed=index + 50) for size in ((channels,), (channels,), shape[:2]))
        return [x, (1 + 0.1 * weight).to(dtype), bias.to(dtype), shift.to(dtype)]

    def eager(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        return F.silu(F.group_norm(x + shift[:, :, None, None, None], groups, weight, bias, eps))

    def ours(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        return group_norm_silu(x, groups, weight, bias, eps, shift=shift)

    size = math.prod(shape) * dtype.itemsize
    precision = _precision(dtype)
    return KernelProblem(
        make, 4, eager, ours, eager,
        Roofline(0, 2 * size, precision, "x read once, y written once"),
        Roofline(0, 3 * size, precision, "x and dy read once, dx written once"),
        {"apex": lambda: _missing("apex", "its GroupNorm takes 4-D tensors from 128 channels only"),
         "Liger": lambda: _missing("liger_kernel", "its GroupNorm has no SiLU and no channels-last")},
    )  # fmt: skip


def attention_problem(bench: Workbench, *, batch: int = 1, shrink: int = 0) -> KernelProblem:
    """Self-attention of the first level that attends (shrink 1: of the level below)."""
    config, dtype = bench.config.model, _dtype(bench)
    level = config.attention_levels.index(True) + shrink
    width, head = config.num_channels[level], config.num_head_channels[level]
    tokens = math.prod(_grid(bench, level))
    shape = (batch, width // head, tokens, head)
    scores = batch * (width // head) * tokens**2
    size = 4 * math.prod(shape) * dtype.itemsize
    precision = _precision(dtype)
    return KernelProblem(
        lambda index: [bench.random(*shape, seed=3 * index + part).to(dtype) for part in range(3)],
        3, _best_sdpa, attention, attention_reference,
        Roofline(4 * scores * head, size, precision, "two products of N x N x K a head; q, k, v, o once"),
        Roofline(10 * scores * head, 2 * size, precision, "five products of N x N x K a head; q, k, v, o and their gradients"),
        {"xformers": lambda: _backend(bench, attention, "xformers", "xformers"),
         "flash-attn": lambda: _flash_attn(bench)},
    )  # fmt: skip


def cross_problem(bench: Workbench, *, batch: int = 1) -> KernelProblem:
    """The cross-attention block of the first level that attends: LayerNorm, queries, attention, output, residual."""
    config, dtype = bench.config.model, _dtype(bench)
    level = config.attention_levels.index(True)
    width, head = config.num_channels[level], config.num_head_channels[level]
    heads, tokens, keys = width // head, math.prod(_grid(bench, level)), config.num_latents

    def make(index: int) -> list[Tensor]:
        sizes = [
            (batch, tokens, width),
            *[(batch, heads, keys, head)] * 2,
            (width,),
            (width,),
            *[(width, width)] * 2,
            (width,),
        ]
        parts = [bench.random(*size, seed=10 * index + part) for part, size in enumerate(sizes)]
        scale = [1, 1, 1, 1, 1, width**-0.5, width**-0.5, 1]
        return [(tensor * factor).to(dtype) for tensor, factor in zip(parts, scale, strict=True)]

    def call(function: Callable[..., Tensor], **settings: Any) -> Callable[..., Tensor]:
        def run(
            x: Tensor, k: Tensor, v: Tensor, ln_w: Tensor, ln_b: Tensor, w_q: Tensor, w_o: Tensor, b_o: Tensor
        ) -> Tensor:
            return function(
                x, k, v, ln_weight=ln_w, ln_bias=ln_b, w_q=w_q, w_out=w_o, b_out=b_o, num_heads=heads, **settings
            )  # fmt: skip

        return run

    rows = batch * tokens
    flops = 4 * rows * width**2 + 4 * rows * keys * width
    size = (2 * rows * width + 2 * batch * keys * width + 2 * width**2) * dtype.itemsize
    precision = _precision(dtype)
    return KernelProblem(
        make, 8, call(cross_attention_reference, attend=_best_sdpa), call(cross_attention), call(cross_attention_reference),
        Roofline(flops, size, precision, "two projections, attention on the text latents; x in, y out, keys, values, weights"),
        Roofline(5 * flops / 2, 2 * size, precision, "2.5 times the forward pass's products; everything and its gradient once"),
        {"xformers": lambda: _backend(bench, call(cross_attention_reference, attend=_xformers(bench)), None, "xformers")},
    )  # fmt: skip


def upsample_problem(bench: Workbench, *, level: int = 1, batch: int = 1) -> KernelProblem:
    """The upsampler from `level` to the one above."""
    dtype = _dtype(bench)
    width, grid = bench.config.model.num_channels[level], _grid(bench, level)

    def make(index: int) -> list[Tensor]:
        x = bench.random(batch, width, *grid, seed=index).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last_3d) if bench.device.type == "cuda" else x
        weight = bench.random(width, width, 3, 3, 3, seed=index + 50) * (27 * width) ** -0.5
        return [x, weight.to(dtype), bench.random(width, seed=index + 90).to(dtype)]

    voxels = batch * math.prod(grid)
    flops = 8 * voxels * 2 * 8 * width**2
    size = 9 * voxels * width * dtype.itemsize
    precision = _precision(dtype)
    return KernelProblem(
        make, 3, upsample_conv3d_reference, upsample_conv3d, upsample_conv3d_reference,
        Roofline(flops, size, precision, "eight phases of 2x2x2 taps on the small grid; x in, y out"),
        Roofline(2 * flops, 2 * size, precision, "twice the forward pass's products; x, dy in, dx out"), {},
    )  # fmt: skip


def _best_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention; on a GPU cuDNN's goes first, which it would not choose by itself at every shape."""
    if not q.is_cuda or q.dtype == torch.float64:
        return F.scaled_dot_product_attention(q, k, v)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(order, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)


def _backend(bench: Workbench, call: Callable[..., Tensor], backend: str | None, package: str) -> Callable[..., Tensor]:
    _missing_unless(package, bench)
    return functools.partial(call, backend=backend) if backend else call


def _xformers(bench: Workbench) -> Callable[..., Tensor]:
    _missing_unless("xformers", bench)
    return functools.partial(attention, backend="xformers")


def _flash_attn(bench: Workbench) -> Callable[..., Tensor]:
    _missing_unless("flash_attn", bench)
    from flash_attn import flash_attn_func

    return lambda q, k, v: flash_attn_func(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)


def _missing_unless(package: str, bench: Workbench) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError("not installed")
    if bench.device.type != "cuda":
        raise ImportError("installed, and runs on a GPU only")


def _missing(package: str, limit: str) -> Callable[..., Tensor]:
    raise ImportError(f"not installed ({limit})" if importlib.util.find_spec(package) is None else limit)


def _dtype(bench: Workbench) -> torch.dtype:
    return torch.bfloat16 if bench.device.type == "cuda" else torch.float32


def _precision(dtype: torch.dtype) -> str:
    return "fp32" if dtype is torch.float32 else "bf16"


def _grid(bench: Workbench, level: int) -> list[int]:
    return [axis // 2**level for axis in bench.latent_grid]


# The tensor of the fastest public GroupNorm-SiLU (sgl-project/sglang#23938: 259.7 us on an H200); not one of ours.
_PUBLIC = [1, 128, 20, 256, 256]


def _cases() -> list[BenchmarkCase]:
    both = ("cpu", "cuda")
    rows: list[tuple[str, str, Callable[[Workbench], KernelProblem], tuple[str, ...]]] = [
        ("group_norm_silu", "GroupNorm + SiLU of level 0", norm_problem, both),
        ("attention", "self-attention of the first level that attends", attention_problem, both),
        ("cross_attention", "the cross-attention block of that level", cross_problem, both),
        ("upsample_conv3d", "nearest x2 and 3x3x3 convolution, level 1 to 0", upsample_problem, both),
    ]
    rows += [
        (
            f"group_norm_silu_level_{level}",
            f"GroupNorm + SiLU of level {level}",
            functools.partial(norm_problem, level=level),
            (),
        )
        for level in (1, 2, 3)
    ]
    rows += [
        (
            "group_norm_silu_batch_8",
            "GroupNorm + SiLU of level 0, batch 8",
            functools.partial(norm_problem, batch=8),
            (),
        ),
        ("attention_deep", "self-attention of the deepest level", functools.partial(attention_problem, shrink=1), ()),
        (
            "upsample_conv3d_level_2",
            "nearest x2 and convolution, level 2 to 1",
            functools.partial(upsample_problem, level=2),
            (),
        ),
    ]
    cases = []
    for name, about, problem, quick in rows:
        for backward in (False, True):
            case = functools.partial(kernel, problem=problem, backward=backward)
            suffix, what = ("_backward", ", backward") if backward else ("", ", forward")
            cases.append(
                BenchmarkCase(
                    name + suffix, "kernels", about + what, case, quick=quick, budget=2.5, set_up={"cpu": 3, "cuda": 15}
                )
            )
    public = functools.partial(kernel, problem=functools.partial(norm_problem, shape=_PUBLIC), backward=False)
    about = "GroupNorm + SiLU at the size of the fastest public record"
    cases.append(
        BenchmarkCase("group_norm_silu_public", "kernels", about, public, budget=2.5, set_up={"cpu": 60, "cuda": 15})
    )
    return cases


CASES = _cases()
