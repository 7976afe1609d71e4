"""Attention: every backend against float64, the Triton kernels in the interpreter or, on a GPU, compiled."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from ccella_fast.kernels.attention import attention, attention_op, attention_reference, backend_support, rows_contiguous
from ccella_fast.kernels.backend import BackendError, explain_choice, interpreted
from kernel_fixtures import (
    DTYPES,
    ROUNDINGS,
    check_fused,
    draw,
    dtype_params,
    guarded,
    labeled,
    on_gpu,
    outputs_and_gradients,
    repair_interpreter,
)

NAMES = ["o", "dq", "dk", "dv"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def repaired_interpreter(require):
    require("triton")
    if interpreted():
        repair_interpreter()


def heads(batch, number, queries, keys, width, dtype):
    return [draw(batch, number, n, width, seed=seed).to(dtype) for seed, n in enumerate((queries, keys, keys))]


def plain(q, k, v):
    """Eager attention, in the dtype of its arguments throughout: the baseline of the criterion."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v


def scores(q, k, _):
    return q.double() @ k.double().mT * q.shape[-1] ** -0.5


def fused(q, k, v):
    return attention(q, k, v, backend="triton")


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
@pytest.mark.parametrize("keys", [6, 11], ids=labeled("L"))
def test_plain_backends_equal_explicit_arithmetic(keys, backend):
    q, k, v = heads(2, 3, 6, keys, 4, torch.float64)
    scores = torch.einsum("bmnk,bmlk->bmnl", q, k) / 2.0  # sqrt(K) = 2
    expected = torch.einsum("bmnl,bmlk->bmnk", scores.exp() / scores.exp().sum(dim=3, keepdim=True), v)
    torch.testing.assert_close(attention(q, k, v, backend=backend), expected)
    assert not torch.allclose(attention(2 * q, k, v, backend=backend), expected)
    tensors = [tensor.requires_grad_() for tensor in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *t: attention(*t, backend=backend), tensors)


@pytest.mark.parametrize("dtype", dtype_params(torch.bfloat16, torch.float16))
def test_reference_rounds_once(dtype):
    tensors = heads(1, 2, 9, 7, 32, dtype)
    expected = plain(*(t.double() for t in tensors))
    epsilon = torch.finfo(dtype).eps
    torch.testing.assert_close(attention_reference(*tensors).double(), expected, rtol=epsilon, atol=epsilon / 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 64, 96, 128], ids=labeled("K"))
def test_head_widths(width, dtype):
    check_fused(fused, plain, heads(1, 2, 139, 77, width, dtype), names=NAMES)


# Odd lengths, a single query, exact multiples of the blocks, more keys than queries; the 8 and 16 heads of the model.
SIZES = [(2, 3, 1, 2), (1, 2, 1, 300), (1, 1, 259, 3), (1, 2, 128, 128), (2, 8, 65, 33), (1, 16, 64, 64)]


@pytest.mark.parametrize("batch, number, queries, keys", SIZES, ids=["B{}-M{}-N{}-L{}".format(*size) for size in SIZES])
def test_lengths(batch, number, queries, keys):
    check_fused(fused, plain, heads(batch, number, queries, keys, 32, torch.bfloat16), names=NAMES)


def test_one_key():
    """Its weight is 1 for every query: o = v, and the gradients of q and k are zero."""
    tensors = heads(1, 2, 33, 1, 32, torch.float32)
    o, dq, dk, dv = outputs_and_gradients(fused, tensors, torch.ones(1, 2, 33, 32))
    torch.testing.assert_close(o, tensors[2].expand_as(o))
    torch.testing.assert_close(dv, torch.full_like(dv, 33.0))
    assert max(dq.abs().max(), dk.abs().max()) < 1e-4


def test_padded_head_width():
    check_fused(fused, plain, heads(1, 2, 40, 24, 20, torch.float32), names=NAMES)


def packed(batch, tokens, number, width, dtype):
    """q, k and v as views of one projection, whose strides along the tokens differ from the head width."""
    together = draw(batch, tokens, 3, number, width).to(dtype)
    return list(together.permute(2, 0, 3, 1, 4).unbind())


def test_views_need_no_copy(monkeypatch):
    tensors = packed(2, 37, 3, 32, torch.bfloat16)
    assert not any(t.is_contiguous() for t in tensors)
    with monkeypatch.context() as context:
        context.setattr(torch.Tensor, "contiguous", lambda *_: pytest.fail("copied"))
        o = fused(*tensors)
    assert o.transpose(1, 2).is_contiguous()  # so that joining the heads is a view
    check_fused(fused, plain, tensors, names=NAMES)


def test_layouts_that_need_a_copy():
    last = [t.mT.contiguous().mT for t in heads(1, 2, 37, 21, 32, torch.float32)]
    assert all(t.stride(-1) != 1 for t in last)
    check_fused(fused, plain, last, names=NAMES)


def test_rows_too_far_apart_for_int32_are_copied():
    far = torch.empty(1, device="meta").as_strided((1, 1, 70, 32), (0, 0, 2**25, 1))
    assert rows_contiguous(far).stride(2) == 32
    near = torch.empty(1, device="meta").as_strided((1, 1, 70, 32), (0, 0, 2**20, 1))
    assert rows_contiguous(near) is near


@pytest.mark.parametrize("backend", ["triton", "sdpa", "reference"])
def test_mismatched_shapes_raise(backend):
    q, k, v = heads(2, 3, 6, 11, 32, torch.float32)
    for wrong in ((q, k[:1], v[:1]), (q, k[:, :1], v[:, :1]), (q, k, v[:, :, :9]), (q, k[..., :16], v[..., :16])):
        with pytest.raises(ValueError, match="equal except for the tokens of q"):
            attention(*wrong, backend=backend)
    with pytest.raises(ValueError, match="head width"):
        attention(q[0], k[0], v[0], backend=backend)


def test_expanded_tensors():
    """One set of keys for all samples; an output gradient whose strides are all 0."""
    q, k, v = (t.requires_grad_() for t in heads(2, 2, 19, 23, 32, torch.float32))
    k_one, v_one = k[:1].detach().requires_grad_(), v[:1].detach().requires_grad_()
    fused(q, k_one.expand(2, -1, -1, -1), v_one.expand(2, -1, -1, -1)).sum().backward()
    wide = [t.detach().double().requires_grad_() for t in (q, k_one, v_one)]
    plain(*wide).sum().backward()
    for actual, truth in zip((q, k_one, v_one), wide, strict=True):
        torch.testing.assert_close(actual.grad.double(), truth.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", dtype_params(torch.float32, torch.bfloat16))
def test_large_scores(dtype):
    """Scores of several hundred, of either sign: their exp overflows, and so does exp2(-lse) at keys beyond L.

    One fp32 rounding of a score s changes p by a relative |s| eps. Eager attention saves p for the backward pass, so the
    rounding is the same in p as in the sum by which p was divided, and largely cancels. The fused backward pass recomputes p
    from lse, which is as large as s and rounded, and from k q^T, whose bits may differ from those of q k^T, depending on the
    matrix product.
    """
    q, k, v = heads(1, 2, 70, 70, 32, dtype)
    high, low = [9 * q, 9 * k, v], [8 + 0.1 * q, -8 + 0.1 * k, v]
    assert scores(*high).max() > 300 and scores(*low).max() < -300
    for tensors in (high, low):
        relative = scores(*tensors).abs().max().item() * torch.finfo(torch.float32).eps
        roundings = max(1.0, relative / torch.finfo(dtype).eps)
        check_fused(fused, plain, tensors, names=NAMES, roundings=roundings)
        if dtype == torch.float32:
            with pytest.raises(AssertionError, match="error"):
                check_fused(
                    lambda q, k, v: fused(q * (1 + 1e-4), k, v), plain, tensors, names=NAMES, roundings=roundings
                )


def test_criterion_rejects_wrong_results():
    """The criterion rejects a scale that is off by 1 % and two exchanged gradients."""
    tensors = heads(1, 2, 33, 33, 32, torch.float32)
    with pytest.raises(AssertionError, match="o: error"):
        check_fused(lambda q, k, v: fused(1.01 * q, k, v), plain, tensors, names=NAMES)

    class Exchanged(torch.autograd.Function):
        @staticmethod
        def forward(ctx, k, v):
            return k.view_as(k), v.view_as(v)

        @staticmethod
        def backward(ctx, dk, dv):
            return dv, dk

    with pytest.raises(AssertionError, match="dk: error"):
        check_fused(lambda q, k, v: fused(q, *Exchanged.apply(k, v)), plain, tensors, names=NAMES)


def test_same_bits_every_time():
    tensors = heads(1, 2, 100, 90, 32, torch.bfloat16)
    dy = draw(1, 2, 100, 32, seed=9)
    with guarded():
        first, second = (outputs_and_gradients(fused, tensors, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_autocast():
    tensors = [t.requires_grad_() for t in heads(1, 2, 9, 7, 32, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        o, expected = fused(*tensors), attention(*tensors, backend="sdpa")
    assert o.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(o, expected, rtol=2**-6, atol=2**-7)
    o.sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in tensors)


def test_library_op():
    tensors = [t.requires_grad_() for t in heads(1, 2, 9, 7, 32, torch.float32)]
    torch.library.opcheck(attention_op, tensors)


def test_compile_sees_one_node():
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def keep(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    tensors = heads(1, 2, 9, 7, 32, torch.float32)
    compiled = torch.compile(fused, fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    torch.testing.assert_close(compiled(*tensors), fused(*tensors))
    assert [name for name in seen[0] if "getitem" not in name] == ["ccella_fast.attention.default"]


def test_backend_choice_and_unsupported_backends(monkeypatch):
    tensors = heads(1, 2, 5, 5, 32, torch.float32)
    assert explain_choice("attention", backend_support(CPU, torch.float32)).backend == "sdpa"
    with pytest.raises(BackendError, match="xformers.*(on cpu, not on a GPU|not installed)"):
        attention(*tensors, backend="xformers")
    assert "up to 32 in float32, got 96" in str(
        backend_support(torch.device("cuda"), torch.float32, head_width=96)["triton"]
    )
    with pytest.raises(BackendError, match="up to 128 in bfloat16, got 160"):
        attention(*heads(1, 1, 5, 5, 160, torch.bfloat16), backend="triton")
    with pytest.raises(BackendError, match="float64 is not one of"):
        attention(*heads(1, 1, 5, 5, 32, torch.float64), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(BackendError, match="on cpu, not on a GPU"):
        attention(*tensors, backend="triton")
    on_gpu = backend_support(torch.device("cuda"), torch.bfloat16)
    assert list(on_gpu) == ["sdpa", "triton", "xformers", "reference"] and on_gpu["triton"] is None


def test_environment_variable_overrides_the_choice(monkeypatch):
    called = []
    monkeypatch.setattr("ccella_fast.kernels.attention.attention_op", lambda *t: called.append(t) or attention_op(*t))
    tensors = heads(1, 1, 5, 5, 32, torch.float32)
    attention(*tensors)
    assert not called
    monkeypatch.setenv("CCELLA_FAST_BACKEND", "attention=triton")
    attention(*tensors)
    assert len(called) == 1


def test_xformers_layout(monkeypatch):
    """The (B, N, M, K) layout of xformers, checked with a substitute, since xformers does not run on a CPU."""

    def memory_efficient_attention(q, k, v):
        scores = torch.einsum("bnmk,blmk->bmnl", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bmnl,blmk->bnmk", scores.softmax(-1), v)

    ops = SimpleNamespace(memory_efficient_attention=memory_efficient_attention)
    monkeypatch.setitem(sys.modules, "xformers", SimpleNamespace(ops=ops))
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr("ccella_fast.kernels.attention.xformers_unsupported_reason", lambda *_: None)
    tensors = heads(2, 3, 6, 11, 32, torch.float64)
    torch.testing.assert_close(attention(*tensors, backend="xformers"), plain(*tensors))


def test_xformers_does_not_support_a_cpu(require):
    require("xformers")
    from ccella_fast.kernels.attention import xformers_attention

    with pytest.raises(NotImplementedError, match="No operator found"):
        xformers_attention(*heads(1, 2, 8, 8, 32, torch.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [32, 64, 96, 128], ids=labeled("K"))
def test_compiled(width, dtype):
    tensors = heads(2, 4, 1031, 777, width, dtype)
    support = backend_support(torch.device("cuda"), dtype, head_width=width)
    for backend in (name for name, reason in support.items() if reason is None):
        ours = on_gpu(lambda *t, b=backend: attention(*t, backend=b))
        check_fused(ours, on_gpu(plain), tensors, names=NAMES, roundings=ROUNDINGS[dtype])


@pytest.mark.gpu
def test_compiled_beyond_int32():
    """Rows 2^25 elements apart, the last of which starts beyond 2^31."""
    spread = [
        torch.zeros(70 * 2**25, dtype=torch.bfloat16, device="cuda").view(1, 1, 70, 2**25)[..., :32] for _ in range(2)
    ]
    tensors = [t.cuda() for t in heads(1, 1, 70, 70, 32, torch.bfloat16)]
    q, k = (far.copy_(near) for far, near in zip(spread, tensors, strict=False))
    torch.testing.assert_close(fused(q, k, tensors[2]), fused(*tensors))


@pytest.mark.gpu
def test_compiled_in_a_graph():
    q, k, v = (t.cuda() for t in heads(1, 8, 2048, 2048, 32, torch.bfloat16))
    fused(q, k, v)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = fused(q, k, v)
    q.copy_(q.flip(2))
    graph.replay()
    assert torch.equal(o, fused(q, k, v))
