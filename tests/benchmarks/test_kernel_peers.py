"""The implementations that the kernels are compared with: the written-out baseline, and how other libraries are called."""

from __future__ import annotations

import gc
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import cases.kernels
from benchmark_fixtures import TINY, prepared_case, run_case
from ccella_fast.config import make_config
from fixtures import Workbench

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@pytest.fixture
def bench():
    sizes = {f"model.{key}": value for key, value in (TINY | {"latent_channels": [4]}).items()}
    bench = Workbench(torch.device("cpu"), make_config({**sizes, "data.dim": [64, 64, 32]}))
    bench.machine = {"matmul_flops": {"fp32": 1e11, "bf16": 1e12}, "copy_bytes_per_second": 1e10}
    return bench


# The plain Triton design


def group_norm_silu(x, groups, weight, bias, eps, shift):
    """The definition, by one (sample, group) at a time."""
    x = x + shift.reshape(*shift.shape, *[1] * (x.ndim - 2))
    y = torch.empty_like(x)
    width = x.shape[1] // groups
    for sample in range(x.shape[0]):
        for first in range(0, x.shape[1], width):
            part = x[sample, first : first + width]
            scale = (part.square().mean() - part.mean().square() + eps).rsqrt()
            affine = [p[first : first + width].reshape(-1, *[1] * (x.ndim - 2)) for p in (weight, bias)]
            z = (part - part.mean()) * scale * affine[0] + affine[1]
            y[sample, first : first + width] = z / (1 + (-z).exp())
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 8, 3, 5, 7), 4), ((1, 6, 4, 4, 4), 3), ((2, 4, 9001), 4), ((1, 4, 1, 1, 1), 1)], ids=str
)
def test_the_plain_design_is_as_accurate_as_pytorch(shape, groups, dtype):
    from plain_group_norm_silu import plain_group_norm_silu

    generator = torch.Generator().manual_seed(1)
    draw = lambda *size: torch.randn(size, generator=generator).to(DTYPES[dtype])  # noqa: E731
    x, weight, bias, shift = draw(*shape), 1 + 0.1 * draw(shape[1]), draw(shape[1]), draw(*shape[:2])
    found = plain_group_norm_silu(x, groups, weight, bias, 1e-6, shift=shift)
    doubles = [tensor.double() for tensor in (x, weight, bias, shift)]
    truth = group_norm_silu(doubles[0], groups, *doubles[1:3], 1e-6, doubles[3])
    shifted = x + shift.reshape(*shift.shape, *[1] * (x.ndim - 2))
    eager = F.silu(F.group_norm(shifted, groups, weight, bias, 1e-6))
    allowed = 2 * (eager.double() - truth).abs().max() + 8 * torch.finfo(torch.float32).eps
    assert found.dtype == x.dtype and (found.double() - truth).abs().max() <= allowed
    other = plain_group_norm_silu(x, groups, weight, torch.zeros_like(bias), 1e-6, shift=shift)
    assert (other.double() - truth).abs().max() > 4 * allowed  # the comparison can tell


def test_the_plain_design_refuses_another_layout():
    from plain_group_norm_silu import plain_group_norm_silu

    x = torch.ones(1, 4, 2, 2, 2).to(memory_format=torch.channels_last_3d)
    with pytest.raises(AssertionError, match="contiguous"):
        plain_group_norm_silu(x, 2, torch.ones(4), torch.ones(4), 1e-6, shift=torch.ones(1, 4))


# Other libraries


class GroupNorm(torch.autograd.Function):
    """Stands for Liger's, which needs a GPU: same arguments, contiguous tensors, no SiLU. `factor` makes it wrong."""

    factor = 1.0
    layouts: list[bool] = []

    @staticmethod
    def forward(ctx, x, weight, bias, channels, groups, eps):
        assert channels == x.shape[1]
        GroupNorm.layouts.append(x.is_contiguous())
        ctx.save_for_backward(x, weight, bias)
        ctx.settings = groups, eps
        return GroupNorm.factor * F.group_norm(x, groups, weight, bias, eps)

    @staticmethod
    def backward(ctx, dy):
        leaves = [tensor.detach().requires_grad_() for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            y = F.group_norm(leaves[0], ctx.settings[0], *leaves[1:], ctx.settings[1])
        return *torch.autograd.grad(y, leaves, dy), None, None, None


@pytest.fixture
def liger(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(ops=None))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", SimpleNamespace(LigerGroupNormFunction=GroupNorm))
    monkeypatch.setattr(cases.kernels, "_require", lambda package, bench: None)
    monkeypatch.setattr(GroupNorm, "factor", 1.0)
    monkeypatch.setattr(GroupNorm, "layouts", [])
    return GroupNorm


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_peers_compute_what_the_kernel_computes(bench, liger, backward):
    """In Triton's interpreter. Every implementation is compared with the truth; the plain design has no backward pass."""
    row = run_case(cases.kernels.group_norm_silu_case(bench, backward=backward))
    assert row["status"] == "ok" and row["notes"] == []
    assert {"eager", "Liger", "ours"} | (set() if backward else {"plain Triton"}) == set(row["sides"])
    assert set(row["speedups"]) == set(row["sides"]) - {"eager"}
    assert ("its backward pass is not written out" in row["missing"].get("plain Triton", "")) == backward


def test_peers_without_channels_last_get_contiguous_inputs(bench, liger, monkeypatch):
    """Other implementations get the tensors as the model has them on a GPU."""
    seen = []
    channels_last = lambda *size, seed: torch.ones(*size).to(  # noqa: E731
        memory_format=torch.channels_last_3d if len(size) == 5 else torch.contiguous_format
    )
    monkeypatch.setattr(bench, "random", channels_last)
    monkeypatch.setattr(cases.kernels, "group_norm_silu", lambda x, *_, **__: seen.append(x.is_contiguous()) or x)
    prepared = cases.kernels.group_norm_silu_case(bench)
    for name in ("Liger", "plain Triton", "ours"):
        prepared.implementations[name].run(None)
        prepared.implementations[name].output()
    assert liger.layouts == [True, True] and seen == [False, False]


@pytest.mark.parametrize("name", ["Liger", "ours"])
def test_a_wrong_peer_alone_loses_its_speedup(bench, liger, monkeypatch, name):
    """Negative control: a wrong result of ours leaves no speedup at all."""
    if name == "Liger":
        liger.factor = 1.01
    else:
        wrong = lambda x, *arguments, **_: 1.01 * cases.kernels.F.silu(x)  # noqa: E731
        monkeypatch.setattr(cases.kernels, "group_norm_silu", wrong)
    row = run_case(cases.kernels.group_norm_silu_case(bench))
    assert row["sides"][name]["passed"] is False
    if name == "Liger":
        assert row["status"] == "ok" and set(row["speedups"]) == {"plain Triton", "ours"}
        assert row["notes"] == [f"Liger differs from the truth by {row['sides']['Liger']['error']:.2g}"]
    else:
        assert row["status"] == "wrong" and row["speedups"] == {} and row["why"].startswith("ours differs")


def test_tables_call_a_wrong_peer_wrong():
    import results

    prepared = prepared_case(1e-7)
    prepared.implementations["peer"] = prepared.implementations["ours"].__class__(
        "fp32", prepared.implementations["ours"].run, lambda: torch.zeros(3), peer=True
    )
    row = run_case(prepared)
    cells = {line.split(" | ")[1]: line.split(" | ")[4] for line in results.table_rows(row)}
    assert cells["peer"] == "wrong" and cells["ours"].endswith("x") and cells["reference"] == ""


@pytest.mark.parametrize("absent", ["apex", "liger_kernel", "xformers", "flash_attn"])
def test_an_absent_library_is_listed_with_the_reason(bench, monkeypatch, absent):
    find = cases.kernels.importlib.util.find_spec
    monkeypatch.setattr(cases.kernels.importlib.util, "find_spec", lambda name: None if name == absent else find(name))
    monkeypatch.setattr("ccella_fast.kernels.backend.XFORMERS", False)
    names = {"apex": "apex", "liger_kernel": "Liger", "xformers": "xformers", "flash_attn": "flash-attn"}
    case = cases.kernels.attention_case if absent in ("xformers", "flash_attn") else cases.kernels.group_norm_silu_case
    assert "not installed" in case(bench).missing[names[absent]]


# On a GPU


class Nothing:
    """Stands for CUDA's streams, graphs and contexts. A replay computes nothing, so that calls of the body are captures."""

    def __init__(self, *_, **__):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    synchronize = wait_stream = replay = lambda self, *_: None


@pytest.fixture
def cuda(monkeypatch):
    """A workbench with a GPU, as far as the set-up of a timed call sees it; its tensors are on the CPU."""
    names = ("stream", "Stream", "CUDAGraph", "graph", "current_stream")
    monkeypatch.setattr(cases.kernels.torch, "cuda", SimpleNamespace(**dict.fromkeys(names, Nothing)))
    return SimpleNamespace(device=torch.device("cuda"))


def test_a_captured_call_keeps_the_tensors_that_it_reads(cuda):
    """A CUDA graph holds addresses, not tensors: memory freed after the capture would be read, or belong to another case."""
    tensor = torch.ones(3)
    body = lambda tensor=tensor: tensor.sum()  # noqa: E731
    run, alive = cases.kernels._captured(body, Nothing()), weakref.ref(tensor)
    del body, tensor
    gc.collect()
    assert alive() is not None
    run(None)
    del run
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize("timed_pass", ["_forward", "_backward"])
def test_passes_are_captured_on_a_gpu(cuda, timed_pass):
    """Python's launches are longer than the backward pass of a small kernel. On a CPU every run computes."""
    computed = []

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            computed.append("_forward")
            return 2 * x

        @staticmethod
        def backward(ctx, dy):
            computed.append("_backward")
            return 2 * dy

    for bench, times in ((cuda, 0), (SimpleNamespace(device=torch.device("cpu")), 1)):
        run, calls = getattr(cases.kernels, timed_pass)(bench, Twice.apply, [[torch.ones(3)]], 1)
        computed.clear()
        run(None)
        assert computed == [timed_pass] * times and calls == (1 if times else cases.kernels._CALLS)


def test_small_inputs_are_noted():
    enough, notes = cases.kernels._rotation(17 << 20)
    assert enough == 16 and notes == []
    assert cases.kernels._rotation(400 << 20) == (1, [])
    copies, notes = cases.kernels._rotation(1 << 20)
    assert copies == 16 and notes == ["the inputs of all calls, 16 MiB, may stay in the L2 cache of the GPU"]


def test_the_triton_kernel_is_timed_where_it_is_not_the_default(cuda, bench):
    calls = []
    kernel = lambda x, backend=None: calls.append(backend)  # noqa: E731
    on_gpu, on_cpu = cases.kernels._by_backend(cuda, kernel), cases.kernels._by_backend(bench, kernel)
    assert list(on_gpu) == ["ours", "ours, Triton"] and list(on_cpu) == ["ours"]
    for call in on_gpu.values():
        call(None)
    assert calls == [None, "triton"]


def test_cudnn_searches_for_the_compiled_baseline_only(monkeypatch):
    """Otherwise every later case, ours too, would run with a setting that it does not have in use."""
    import torch._inductor.config as inductor

    import compiled_baseline

    monkeypatch.setattr(
        inductor, "force_layout_optimization", inductor.force_layout_optimization
    )  # restored afterwards
    seen = []

    class Network(torch.nn.Module):
        def forward(self, x):
            seen.append(torch.backends.cudnn.benchmark)
            return x

    network = Network()
    monkeypatch.setattr(network, "parameters", lambda: iter([SimpleNamespace(device=torch.device("cuda"))]))
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    call = compiled_baseline.compiled(network)
    call(torch.ones(1))
    assert seen == [True] and not torch.backends.cudnn.benchmark
