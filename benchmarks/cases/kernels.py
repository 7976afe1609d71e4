"""Each kernel by itself, forward and backward: eager PyTorch, torch.compile, other installed libraries, and ours.

Shapes are those of the model: the width and the grid of one of its levels. On a GPU the inputs are rotated through more memory
than the L2 cache holds, unless they are small: such a case has a note. Passes are replayed from a CUDA graph, so that no
implementation is charged for launches from Python. Outputs and gradients are compared with float64: ours may have twice the
error of the eager path of the same dtype.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmark_case import BenchmarkCase, Implementation, PreparedCase, Roofline
from ccella_fast.kernels.attention import attention, attention_reference
from ccella_fast.kernels.backend import triton_unsupported_reason, xformers_unsupported_reason
from ccella_fast.kernels.conv3d import conv3d, conv3d_reference, kernel_layout
from ccella_fast.kernels.cross_attention import cross_attention, cross_attention_reference
from ccella_fast.kernels.group_norm_silu import group_norm_silu
from ccella_fast.kernels.upsample_conv3d import upsample_conv3d, upsample_conv3d_reference
from fixtures import Workbench
from timer import Stopwatch

Function = Callable[..., Tensor]  # a kernel as a function of the case's inputs

_ROTATION = 256 << 20  # bytes of all rotated inputs together: several times the L2 cache of any GPU
_CALLS = 16  # calls in one CUDA graph
_NOT_COMPILED = "gains nothing on a CPU and takes minutes to compile: measured on GPUs only"


def group_norm_silu_case(
    bench: Workbench, *, backward: bool = False, level: int = 0, batch: int = 1, shape: list[int] | None = None
) -> PreparedCase:
    """GroupNorm and SiLU with the additive shift of a residual block, at one level's size or at `shape` (B, C, X, Y, Z)."""
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
    if backward:
        roofline = Roofline(0, 3 * size, _precision(dtype), "x and dy read once, dx written once")
    else:
        roofline = Roofline(0, 2 * size, _precision(dtype), "x read once, y written once")
    others: dict[str, Callable[[], Function]] = {
        "apex": lambda: _unsuitable("apex", "its GroupNorm takes 4-D tensors of 128 and more channels only"),
        "Liger": lambda: _liger_group_norm_silu(bench, groups, eps),
        "plain Triton": lambda: _plain_group_norm_silu(bench, groups, eps, backward),
    }
    return _prepare(
        bench, make, backward=backward, gradients=4, eager=eager, ours={"ours": ours}, truth=eager, roofline=roofline,
        others=others, channels_first=("Liger", "plain Triton"),
    )  # fmt: skip


def attention_case(bench: Workbench, *, backward: bool = False, batch: int = 1, deeper: int = 0) -> PreparedCase:
    """Self-attention of the first level that has it, or of a level `deeper`."""
    config, dtype = bench.config.model, _dtype(bench)
    level = config.attention_levels.index(True) + deeper
    width, head = config.num_channels[level], config.num_head_channels[level]
    tokens = math.prod(_grid(bench, level))
    shape = (batch, width // head, tokens, head)
    scores = batch * (width // head) * tokens**2
    size = 4 * math.prod(shape) * dtype.itemsize
    if backward:
        why = "five N x N x K products per head; q, k, v, o and their gradients once"
        roofline = Roofline(10 * scores * head, 2 * size, _precision(dtype), why)
    else:
        roofline = Roofline(
            4 * scores * head, size, _precision(dtype), "two N x N x K products per head; q, k, v, o once"
        )

    def make(index: int) -> list[Tensor]:
        return [bench.random(*shape, seed=3 * index + part).to(dtype) for part in range(3)]

    others: dict[str, Callable[[], Function]] = {
        "xformers": lambda: _xformers_attention(bench), "flash-attn": lambda: _flash_attention(bench),
    }  # fmt: skip
    return _prepare(
        bench, make, backward=backward, gradients=3, eager=_best_sdpa, ours=_by_backend(bench, attention),
        truth=attention_reference, roofline=roofline, others=others,
    )  # fmt: skip


def cross_attention_case(bench: Workbench, *, backward: bool = False, batch: int = 1) -> PreparedCase:
    """Cross-attention block of the first level that attends: sum, LayerNorm, queries, attention, projection, residual."""
    config, dtype = bench.config.model, _dtype(bench)
    level = config.attention_levels.index(True)
    width, head = config.num_channels[level], config.num_head_channels[level]
    heads, tokens, keys = width // head, math.prod(_grid(bench, level)), config.num_latents

    def make(index: int) -> list[Tensor]:
        sizes = [
            (batch, tokens, width),
            *[(batch, heads, keys, head)] * 2,
            *[(width,)] * 2,
            *[(width, width)] * 2,
            (width,),
            (batch, tokens, width),
        ]
        parts = [bench.random(*size, seed=10 * index + part) for part, size in enumerate(sizes)]
        scale = [1, 1, 1, 1, 1, width**-0.5, width**-0.5, 1, 1]
        return [(tensor * factor).to(dtype) for tensor, factor in zip(parts, scale, strict=True)]

    def call(function: Function, **settings: Any) -> Function:
        def run(
            x: Tensor,
            k: Tensor,
            v: Tensor,
            ln_w: Tensor,
            ln_b: Tensor,
            w_q: Tensor,
            w_o: Tensor,
            b_o: Tensor,
            added: Tensor,
        ) -> Tensor:
            return function(
                x, k, v, ln_weight=ln_w, ln_bias=ln_b, w_q=w_q, w_out=w_o, b_out=b_o, num_heads=heads, added=added,
                **settings,
            )  # fmt: skip

        return run

    rows = batch * tokens
    flops = 4 * rows * width**2 + 4 * rows * keys * width
    size = (3 * rows * width + 2 * batch * keys * width + 2 * width**2) * dtype.itemsize
    if backward:
        why = "2.5 times the products of the forward pass; everything and its gradient once"
        roofline = Roofline(5 * flops / 2, 2 * size, _precision(dtype), why)
    else:
        why = "two projections, attention to the text latents; x and what is added in, y out, keys, values, weights"
        roofline = Roofline(flops, size, _precision(dtype), why)
    return _prepare(
        bench, make, backward=backward, gradients=9, eager=call(cross_attention_reference, attend=_best_sdpa),
        ours={"ours": call(cross_attention)}, truth=call(cross_attention_reference), roofline=roofline,
        others={"xformers": lambda: call(cross_attention_reference, attend=_xformers_attention(bench))},
    )  # fmt: skip


def upsample_conv3d_case(bench: Workbench, *, backward: bool = False, level: int = 1, batch: int = 1) -> PreparedCase:
    """Nearest-neighbor upsampling and 3x3x3 convolution, from `level` to the next finer one."""
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
    if backward:
        why = "twice the products of the forward pass; x and dy in, dx out"
        roofline = Roofline(2 * flops, 2 * size, _precision(dtype), why)
    else:
        why = "eight phases of 2x2x2 taps on the small grid; x in, y out"
        roofline = Roofline(flops, size, _precision(dtype), why)
    return _prepare(
        bench, make, backward=backward, gradients=3, eager=upsample_conv3d_reference, ours=_by_backend(bench, upsample_conv3d),
        truth=upsample_conv3d_reference, roofline=roofline,
    )  # fmt: skip


def conv3d_case(bench: Workbench, *, backward: bool = False, level: int = 0, batch: int = 1) -> PreparedCase:
    """The 3x3x3 convolution at the end of a residual block of `level`, with bias and residual."""
    dtype = _dtype(bench)
    width, grid = bench.config.model.num_channels[level], _grid(bench, level)

    def make(index: int) -> list[Tensor]:
        x, residual = (bench.random(batch, width, *grid, seed=index + seed).to(dtype) for seed in (0, 20))
        weight = (bench.random(width, width, 3, 3, 3, seed=index + 50) * (27 * width) ** -0.5).to(dtype)
        if bench.device.type == "cuda":
            x, residual, weight = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, residual, weight))
        return [x, weight, bench.random(width, seed=index + 90).to(dtype), residual, kernel_layout(weight)]

    def eager(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, laid_out: Tensor) -> Tensor:
        return conv3d_reference(x, weight, bias, residual=residual)

    def ours(
        x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor, laid_out: Tensor, backend: str | None = None
    ) -> Tensor:
        weight = laid_out if backend == "triton" and not backward else weight  # in training it changes with each step
        return conv3d(x, weight, bias, residual=residual, backend=backend)

    voxels = batch * math.prod(grid)
    flops, size = 2 * 27 * voxels * width**2, (3 * voxels * width + 27 * width**2) * dtype.itemsize
    why = "27 taps; x, residual and weight in, y out"
    if backward:
        flops, why = 2 * flops, "twice the products of the forward pass; x, dy and weight in, dx and dweight out"
        size += 27 * width**2 * dtype.itemsize
    return _prepare(
        bench, make, backward=backward, gradients=4, eager=eager, ours=_by_backend(bench, ours), truth=eager,
        roofline=Roofline(flops, size, _precision(dtype), why),
    )  # fmt: skip


def _prepare(
    bench: Workbench,
    make: Callable[[int], list[Tensor]],
    *,
    backward: bool,
    gradients: int,
    eager: Function,
    ours: Mapping[str, Function],
    truth: Function,
    roofline: Roofline,
    others: Mapping[str, Callable[[], Function]] | None = None,
    channels_first: Collection[str] = (),
) -> PreparedCase:
    """One kernel at one size.

    Args:
        bench: The workbench.
        make: Makes the inputs with this index, the differentiable ones first. All functions take exactly these.
        backward: Time the backward pass instead of the forward pass.
        gradients: The number of inputs that require a gradient.
        eager: The baseline.
        ours: The kernel as "ours"; further backends of it under other names.
        truth: Computes the truth from float64 inputs.
        roofline: Of the pass that is timed.
        others: Functions that load the implementations of other libraries, by name; ImportError says why one cannot run here.
        channels_first: Those of them that take contiguous tensors only: they get such inputs, and are not charged for copies.
    """
    first = make(0)
    moved = sum(tensor.numel() * tensor.element_size() for tensor in first)
    copies, notes = _rotation(moved) if bench.device.type == "cuda" else (1, [])
    inputs = [first, *(make(index) for index in range(1, copies))]
    shapes = {"inputs": [list(tensor.shape) for tensor in first]}
    prepared = PreparedCase(shapes=shapes, notes=notes, twice_baseline_error=True)
    functions = {"eager": eager}
    if bench.device.type == "cuda":
        functions["torch.compile"] = torch.compile(eager, mode="max-autotune-no-cudagraphs", dynamic=False)
    else:
        prepared.missing["torch.compile"] = _NOT_COMPILED
    for name, load in (others or {}).items():
        try:
            functions[name] = load()
        except ImportError as why:
            prepared.missing[name] = str(why)
    functions |= ours
    timed_pass = _backward if backward else _forward
    for name, call in functions.items():
        given = [[t.contiguous() for t in tensors] for tensors in inputs] if name in channels_first else inputs
        run, calls = timed_pass(bench, call, given, gradients)
        output = functools.partial(_result, call, given[0], gradients, backward)
        peer = name in (others or {})
        prepared.implementations[name] = Implementation(_precision(first[0].dtype), run, output, calls, peer=peer)
        prepared.rooflines[name] = roofline
    doubles = [tensor.double() for tensor in first]
    prepared.truth = functools.partial(_result, truth, doubles, gradients, backward)
    return prepared


def _rotation(moved: int) -> tuple[int, list[str]]:
    """How many inputs of `moved` bytes the calls of a CUDA graph take in turn, and a note where those are too small."""
    copies = min(_CALLS, max(1, math.ceil(_ROTATION / moved)))
    if copies * moved >= _ROTATION:
        return copies, []
    return copies, [f"the inputs of all calls, {copies * moved / 2**20:.0f} MiB, may stay in the L2 cache of the GPU"]


def _by_backend(bench: Workbench, kernel: Function) -> dict[str, Function]:
    """A kernel whose default on a GPU is PyTorch's implementation: the default as "ours", and on a GPU the Triton kernel."""
    triton = {"ours, Triton": functools.partial(kernel, backend="triton")} if bench.device.type == "cuda" else {}
    return {"ours": kernel, **triton}


def _result(call: Function, inputs: list[Tensor], gradients: int, backward: bool) -> Tensor:
    """The output, or all gradients in one vector, scaled by the root of their sizes so that errors of small ones count too."""
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
    bench: Workbench, call: Function, inputs: list[list[Tensor]], gradients: int
) -> tuple[Callable[[Stopwatch], Any], int]:
    """The timed call of the forward pass, and the number of passes in it."""
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
    stream.wait_stream(torch.cuda.current_stream())
    return _captured(body, stream), _CALLS


def _backward(
    bench: Workbench, call: Function, inputs: list[list[Tensor]], gradients: int
) -> tuple[Callable[[Stopwatch], Any], int]:
    """The timed call of the backward pass alone, over recorded graphs, and the number of passes in it."""
    cuda = bench.device.type == "cuda"
    # The backward pass of an op runs on the stream of its forward pass, which must be that of the capture.
    stream = torch.cuda.Stream() if cuda else None
    if stream is not None:
        stream.wait_stream(torch.cuda.current_stream())
    ready = []
    with torch.cuda.stream(stream):
        for tensors in inputs:
            leaves = [tensor.detach().requires_grad_(index < gradients) for index, tensor in enumerate(tensors)]
            out = call(*leaves)
            ready.append((out, leaves[:gradients], torch.randn_like(out)))
    calls = _CALLS if cuda else 1

    def body() -> None:
        for _, (out, leaves, seed) in zip(range(calls), itertools.cycle(ready), strict=False):
            torch.autograd.grad(out, leaves, seed, retain_graph=True)

    return (lambda stopwatch: body()) if stream is None else _captured(body, stream), calls


def _captured(body: Callable[[], None], stream: torch.cuda.Stream) -> Callable[[Stopwatch], Any]:
    """A replay of `body` from a CUDA graph, so that launches from Python take no time."""
    with torch.cuda.stream(stream):  # compilation and allocations must precede the capture
        body()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        body()
    torch.cuda.current_stream().wait_stream(stream)
    return lambda stopwatch, kept=body: graph.replay()  # type: ignore[misc]  # the graph reads the body's tensors


def _best_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """PyTorch's attention; on a GPU with cuDNN preferred, which PyTorch does not choose by itself at every shape."""
    if not q.is_cuda or q.dtype == torch.float64:
        return F.scaled_dot_product_attention(q, k, v)
    from torch.nn.attention import SDPBackend, sdpa_kernel

    order = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(order, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v)


def _xformers_attention(bench: Workbench) -> Function:
    reason = xformers_unsupported_reason(bench.device, _dtype(bench))
    if reason is not None:
        raise ImportError(reason)
    return functools.partial(attention, backend="xformers")


def _flash_attention(bench: Workbench) -> Function:
    _require("flash_attn", bench)
    from flash_attn import flash_attn_func

    return lambda q, k, v: flash_attn_func(*(part.transpose(1, 2) for part in (q, k, v))).transpose(1, 2)


def _liger_group_norm_silu(bench: Workbench, groups: int, eps: float) -> Function:
    """Liger's GroupNorm, which has neither shift nor SiLU: PyTorch computes these before and after it."""
    _require("liger_kernel", bench)
    from liger_kernel.ops import LigerGroupNormFunction

    def run(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> Tensor:
        shifted = x + shift[:, :, None, None, None]
        return F.silu(LigerGroupNormFunction.apply(shifted, weight, bias, x.shape[1], groups, eps))

    return run


def _plain_group_norm_silu(bench: Workbench, groups: int, eps: float, backward: bool) -> Function:
    reason = triton_unsupported_reason(bench.device, _dtype(bench))
    if backward or reason is not None:
        raise ImportError(reason or "its backward pass is not written out")
    from plain_group_norm_silu import plain_group_norm_silu

    return lambda x, weight, bias, shift: plain_group_norm_silu(x, groups, weight, bias, eps, shift=shift)


def _require(package: str, bench: Workbench) -> None:
    if importlib.util.find_spec(package) is None:
        raise ImportError("not installed")
    if bench.device.type != "cuda":
        raise ImportError("installed, but runs on a GPU only")


def _unsuitable(package: str, limitation: str) -> Function:
    installed = importlib.util.find_spec(package) is not None
    raise ImportError(limitation if installed else f"not installed ({limitation})")


def _dtype(bench: Workbench) -> torch.dtype:
    return torch.bfloat16 if bench.device.type == "cuda" else torch.float32


def _precision(dtype: torch.dtype) -> str:
    return "fp32" if dtype is torch.float32 else "bf16"


def _grid(bench: Workbench, level: int) -> list[int]:
    return [axis // 2**level for axis in bench.latent_grid]


# The tensor for which the fastest public GroupNorm-SiLU was reported (sgl-project/sglang#23938: 259.7 us on an H200). It is
# not a size of our model.
_PUBLIC = [1, 128, 20, 256, 256]


def _cases() -> list[BenchmarkCase]:
    quick = ("cpu", "cuda")
    rows: list[tuple[str, str, Callable[..., PreparedCase], dict[str, Any], tuple[str, ...]]] = [
        ("group_norm_silu", "GroupNorm + SiLU of level 0", group_norm_silu_case, {}, quick),
        ("attention", "self-attention of the first level that attends", attention_case, {}, quick),
        ("cross_attention", "the cross-attention block of that level", cross_attention_case, {}, quick),
        ("upsample_conv3d", "nearest x2 and 3x3x3 convolution, level 1 to 0", upsample_conv3d_case, {}, quick),
    ]
    rows += [
        (f"group_norm_silu_level_{level}", f"GroupNorm + SiLU of level {level}", group_norm_silu_case, {"level": level}, ())
        for level in (1, 2, 3)
    ]  # fmt: skip
    rows += [
        ("group_norm_silu_batch_8", "GroupNorm + SiLU of level 0, batch 8", group_norm_silu_case, {"batch": 8}, ()),
        ("attention_deep", "self-attention of the deepest level", attention_case, {"deeper": 1}, ()),
        ("upsample_conv3d_level_2", "nearest x2 and convolution, level 2 to 1", upsample_conv3d_case, {"level": 2}, ()),
        ("conv3d", "3x3x3 convolution of level 0", conv3d_case, {}, ()),
        ("conv3d_batch_8", "3x3x3 convolution of level 0, batch 8", conv3d_case, {"batch": 8}, ()),
    ]
    rows += [
        (f"conv3d_level_{level}", f"3x3x3 convolution of level {level}", conv3d_case, {"level": level}, ())
        for level in (1, 2, 3)
    ]
    cases = []
    for name, about, build, settings, devices in rows:
        for backward in (False, True):
            suffix, direction = ("_backward", ", backward") if backward else ("", ", forward")
            cases.append(
                BenchmarkCase(
                    name + suffix, "kernels", about + direction,
                    functools.partial(build, backward=backward, **settings),
                    quick=devices, budget=2.5, set_up={"cpu": 3, "cuda": 15},
                )
            )  # fmt: skip
    public = functools.partial(group_norm_silu_case, shape=_PUBLIC)
    about = "GroupNorm + SiLU at the size of the fastest public record"
    cases.append(
        BenchmarkCase("group_norm_silu_public", "kernels", about, public, budget=2.5, set_up={"cpu": 60, "cuda": 15})
    )
    return cases


CASES = _cases()
