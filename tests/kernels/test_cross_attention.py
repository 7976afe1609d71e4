"""The cross-attention block: every backend against float64, the Triton kernels in the interpreter or, on a GPU, compiled."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ccella_fast.kernels import cross_attention as module
from ccella_fast.kernels.backend import BackendError, explain_choice, interpreted
from ccella_fast.kernels.cross_attention import (
    backend_support,
    cross_attention,
    cross_attention_backward_op,
    cross_attention_op,
    cross_attention_reference,
)
from kernel_fixtures import DTYPES, ROUNDINGS, check_fused, draw, labeled, on_gpu, repair_interpreter

NAMES = ["y", "dx", "dk", "dv", "dln_weight", "dln_bias", "dw_q", "dw_out", "db_out"]


@pytest.fixture(scope="module", autouse=True)
def repaired_interpreter(require):
    require("triton")
    if interpreted():
        repair_interpreter()


def block(batch, tokens, heads, keys, width, dtype, shared=False):
    """[x, context_k, context_v, ln_weight, ln_bias, w_q, w_out, b_out]."""
    channels = heads * width
    context = (1 if shared else batch, heads, keys, width)
    x, k, v = 0.5 + draw(batch, tokens, channels), draw(*context, seed=1), draw(*context, seed=2)
    norm = [1 + 0.2 * draw(channels, seed=3), 0.2 * draw(channels, seed=4)]
    matrices = [draw(channels, channels, seed=seed) * channels**-0.5 for seed in (5, 6)]
    return [tensor.to(dtype) for tensor in (x, k, v, *norm, *matrices, draw(channels, seed=7))]


def parameters(ln_weight, ln_bias, w_q, w_out, b_out):
    return {"ln_weight": ln_weight, "ln_bias": ln_bias, "w_q": w_q, "w_out": w_out, "b_out": b_out}


def fused(heads, backend="triton"):
    return lambda x, k, v, *rest, added=None: cross_attention(
        x, k, v, **parameters(*rest), num_heads=heads, added=added, backend=backend
    )


def plain(heads):
    """The eager block, in the dtype of its arguments throughout: the baseline of the criterion."""

    def attend(q, k, v):
        return (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1) @ v

    return lambda x, k, v, *rest, added=None: cross_attention_reference(
        x, k, v, **parameters(*rest), num_heads=heads, added=added, attend=attend
    )


def explicit_arithmetic(heads, x, k, v, ln_weight, ln_bias, w_q, w_out, b_out):
    centered = x - x.mean(2, keepdim=True)
    h = centered / (centered.square().mean(2, keepdim=True) + 1e-5).sqrt() * ln_weight + ln_bias
    q = torch.einsum("bnc,dc->bnd", h, w_q).reshape(*x.shape[:2], heads, -1)
    scores = torch.einsum("bnmk,bmlk->bmnl", q, k) / q.shape[3] ** 0.5
    o = torch.einsum("bmnl,bmlk->bnmk", scores.exp() / scores.exp().sum(3, keepdim=True), v).reshape(x.shape)
    return x + torch.einsum("bnc,dc->bnd", o, w_out) + b_out


@pytest.mark.parametrize("backend", [None, "sdpa", "reference"], ids=["default", "sdpa", "reference"])
def test_plain_backends_equal_explicit_arithmetic(backend):
    tensors = block(2, 5, 3, 7, 4, torch.float64)
    expected = explicit_arithmetic(3, *tensors)
    torch.testing.assert_close(fused(3, backend)(*tensors), expected)
    tensors[5] = tensors[5] * 1.01
    assert not torch.allclose(fused(3, backend)(*tensors), expected)


def test_default_on_a_cpu_equals_the_chain_of_modules():
    """Bitwise, since it replaces them in existing models."""
    x, k, v, ln_weight, ln_bias, w_q, w_out, b_out = tensors = block(2, 9, 3, 7, 32, torch.float32)
    q = F.linear(F.layer_norm(x, (96,), ln_weight, ln_bias), w_q).unflatten(-1, (-1, 32)).transpose(1, 2)
    o = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    assert torch.equal(fused(3, None)(*tensors), x + F.linear(o, w_out, b_out))


# The 8 and 16 heads of the model on its 256 keys; odd numbers of tokens and keys; one token; wider heads.
SIZES = [(1, 33, 8, 256, 32), (1, 18, 16, 70, 32), (2, 67, 3, 33, 32), (1, 1, 2, 5, 32)]
WIDE = [(1, 33, 2, 35, 64), (1, 33, 2, 35, 96), (1, 33, 1, 35, 128)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "batch, tokens, heads, keys, width",
    SIZES + WIDE,
    ids=["B{}-N{}-M{}-L{}-K{}".format(*size) for size in SIZES + WIDE],
)
def test_sizes(batch, tokens, heads, keys, width, dtype):
    check_fused(fused(heads), plain(heads), block(batch, tokens, heads, keys, width, dtype), names=NAMES)


def test_one_context_for_all_samples():
    tensors = block(3, 20, 2, 19, 32, torch.bfloat16, shared=True)
    check_fused(fused(2), plain(2), tensors, names=NAMES)


def test_layouts():
    """Tokens of a channels-first volume (copied), keys and values as views of one projection (not copied)."""
    tensors = block(2, 21, 2, 19, 32, torch.float32)
    tensors[0] = tensors[0].mT.contiguous().mT
    tensors[1:3] = draw(2, 19, 2, 2, 32, seed=8).float().permute(2, 0, 3, 1, 4).unbind()
    assert not any(t.is_contiguous() for t in tensors[:3])
    check_fused(fused(2), plain(2), tensors, names=NAMES)
    sliced = block(2, 42, 2, 19, 32, torch.float32)
    sliced[0] = sliced[0][:, ::2]
    check_fused(fused(2), plain(2), sliced, names=NAMES)


def with_added(function):
    """A block whose last argument is added to the first: as its `added`, or before it."""
    return lambda *tensors: function(*tensors[:-1], added=tensors[-1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_added(dtype):
    """The sum before the block is part of its launches, with the gradient of both terms."""
    added = draw(2, 37, 96, seed=8, dtype=dtype)
    tensors = [*block(2, 37, 3, 19, 32, dtype), added.mT.contiguous().mT]
    check_fused(
        with_added(fused(3)), with_added(plain(3)), tensors, names=[*NAMES, "dadded"], roundings=ROUNDINGS[dtype]
    )
    sliced = [*tensors[:-1], draw(2, 37, 192, seed=8, dtype=dtype)[..., 96:]]
    expected = fused(3)(sliced[0] + sliced[-1], *sliced[1:-1])
    torch.testing.assert_close(with_added(fused(3))(*sliced), expected, rtol=0.02, atol=0.02)
    with pytest.raises(AssertionError, match="y: error"):  # negative control
        check_fused(lambda *t: fused(3)(*t[:-1]) + 0 * t[-1], with_added(plain(3)), tensors, names=[*NAMES, "dadded"])


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_added_to_the_plain_block(backend):
    *tensors, added = [*block(2, 5, 3, 7, 4, torch.float64), draw(2, 5, 12, seed=8)]
    found = with_added(fused(3, backend))(*tensors, added)
    torch.testing.assert_close(found, explicit_arithmetic(3, tensors[0] + added, *tensors[1:]))
    with pytest.raises(ValueError, match=r"added must have the shape of x, \(2, 5, 12\), got \(2, 4, 12\)"):
        with_added(fused(3, backend))(*tensors, added[:, :4])


def test_added_of_a_wider_dtype_keeps_its_precision():
    *tensors, added = [*block(1, 9, 2, 7, 32, torch.bfloat16), draw(1, 9, 64, seed=8, dtype=torch.float32)]
    found = with_added(fused(2))(*tensors, added)
    assert found.dtype == torch.float32
    assert torch.equal(found, fused(2)(tensors[0] + added, *tensors[1:]))


def test_statistics_far_from_zero():
    """Mean 1000, standard deviation 1: in fp32, E[x^2] - E[x]^2 would be noise."""
    tensors = block(1, 20, 4, 19, 32, torch.float32)
    tensors[0] = tensors[0] + 1000
    check_fused(fused(4), plain(4), tensors, names=NAMES)


@pytest.mark.parametrize("heads_per_program", [1, 2], ids=labeled("heads_per_program"))
def test_dividing_the_heads_among_programs_changes_nothing(monkeypatch, heads_per_program):
    tensors = block(1, 37, 3, 19, 32, torch.bfloat16)
    together = fused(3)(*tensors)
    monkeypatch.setattr(module, "_heads_per_program", lambda *_: heads_per_program)
    assert torch.equal(fused(3)(*tensors), together)


def test_heads_per_program(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: type("P", (), {"multi_processor_count": 100}))
    gpu = torch.device("cuda")
    assert [module._heads_per_program(8, blocks, gpu) for blocks in (1, 25, 50, 120, 200, 5000)] == [1, 1, 2, 4, 8, 8]
    # Seven heads would leave one for another program, which repeats the normalization for it alone.
    assert [module._heads_per_program(8, blocks, gpu) for blocks in (75, 175)] == [2, 4]
    assert module._heads_per_program(6, 180, gpu) == 3


def test_only_arguments_are_saved():
    tensors = [t.requires_grad_() for t in block(1, 20, 2, 19, 32, torch.bfloat16)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        fused(2)(*tensors)
    assert saved and set(saved) <= {t.data_ptr() for t in tensors}


def test_gradient_of_x_alone():
    tensors = block(1, 20, 2, 19, 32, torch.float32)
    x = tensors[0].requires_grad_()
    fused(2)(*tensors).square().sum().backward()
    actual, x.grad = x.grad, None
    plain(2)(*tensors).square().sum().backward()
    torch.testing.assert_close(actual, x.grad, rtol=1e-4, atol=1e-4)


def test_criterion_rejects_wrong_results():
    """The criterion rejects a wrong epsilon of the layer norm and an omitted bias."""
    tensors = block(1, 20, 2, 19, 32, torch.float32)
    with pytest.raises(AssertionError, match="y: error"):
        check_fused(
            lambda x, k, v, *rest: cross_attention(
                x, k, v, **parameters(*rest), num_heads=2, eps=1e-3, backend="triton"
            ),
            plain(2),
            tensors,
            names=NAMES,
        )
    with pytest.raises(AssertionError, match="y: error"):
        check_fused(lambda *t: fused(2)(*t[:-1], 0 * t[-1]), plain(2), tensors, names=NAMES)


def test_autocast():
    """Products in bf16, the residual stream in fp32, gradients in the dtypes of the tensors."""
    tensors = [t.requires_grad_() for t in block(1, 20, 2, 19, 32, torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        actual, eager = fused(2)(*tensors), fused(2, "sdpa")(*tensors)
    assert actual.dtype == eager.dtype == torch.float32
    truth = plain(2)(*(t.detach().double() for t in tensors))
    assert (actual - truth).abs().max() <= 2 * (eager - truth).abs().max()
    actual.sum().backward()
    assert all(t.grad.dtype == torch.float32 and t.grad.isfinite().all() for t in tensors)


def test_library_ops():
    tensors = [t.requires_grad_() for t in block(1, 9, 2, 7, 32, torch.float32)]
    added = draw(1, 9, 64, seed=8, dtype=torch.float32).requires_grad_()
    for more in (None, added):
        torch.library.opcheck(cross_attention_op, (*tensors, 2, 1e-5, more))
    tensors = [t.detach() for t in tensors]
    tensors[5] = tensors[5].T  # gradients and parameters may have other layouts than the results
    dy = tensors[0].mT.contiguous().mT
    for more in (None, added.detach()):
        torch.library.opcheck(cross_attention_backward_op, (dy, *tensors, 2, 1e-5, more))


def test_compile_sees_one_node():
    from torch._dynamo.backends.common import aot_autograd

    seen = []

    def keep(graph, _):
        seen.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    tensors = block(2, 9, 2, 7, 32, torch.float32)
    compiled = torch.compile(fused(2), fullgraph=True, backend=aot_autograd(fw_compiler=keep))
    torch.testing.assert_close(compiled(*tensors), fused(2)(*tensors))
    assert [name for name in seen[0] if "expand" not in name] == ["ccella_fast.cross_attention.default"]


def test_mismatched_shapes_raise():
    x, k, v, *rest = block(2, 9, 4, 7, 32, torch.float32)
    with pytest.raises(ValueError, match=r"must have shape \(batch, 2, keys, 64\)"):
        cross_attention(x, k, v, **parameters(*rest), num_heads=2)
    with pytest.raises(ValueError, match="context_k and context_v must have shape"):
        cross_attention(x, k, v[:, :, :3], **parameters(*rest), num_heads=4)
    with pytest.raises(ValueError, match=r"must be 1 or that of x \(2\), got 3"):
        cross_attention(x, *(torch.cat([t, t[:1]]) for t in (k, v)), **parameters(*rest), num_heads=4)
    with pytest.raises(ValueError, match="divisible by 3 heads"):
        cross_attention(x, k, v, **parameters(*rest), num_heads=3)
    for name, tensor in parameters(*rest).items():
        with pytest.raises(ValueError, match=f"{name} must have shape .* for 128 channels"):
            cross_attention(x, k, v, **{**parameters(*rest), name: tensor[:64]}, num_heads=4, backend="triton")


def test_backend_choice_and_unsupported_backends():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert explain_choice("cross_attention", backend_support(cpu, torch.float32)).backend == "sdpa"
    assert explain_choice("cross_attention", backend_support(gpu, torch.bfloat16)).backend == "triton"
    chosen = explain_choice("cross_attention", backend_support(gpu, torch.float32, head_width=64))
    assert chosen.backend == "sdpa" and "up to 32 in float32, got 64" in chosen.reason
    chosen = explain_choice("cross_attention", backend_support(gpu, torch.bfloat16, channels=640, head_width=64))
    assert chosen.backend == "sdpa" and "up to 512 channels, got 640" in chosen.reason
    tensors = block(1, 9, 2, 7, 32, torch.float32)
    with pytest.raises(BackendError, match="xformers.*(on cpu, not on a GPU|not installed)"):
        fused(2, "xformers")(*tensors)


HEADS = [(8, 32), (16, 32), (4, 64), (8, 64), (2, 96), (4, 128)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads, width", HEADS, ids=labeled(""))
def test_compiled(heads, width, dtype):
    tensors = block(2, 1031, heads, 256, width, dtype)
    support = backend_support(torch.device("cuda"), dtype, channels=heads * width, head_width=width)
    for backend in (name for name, reason in support.items() if reason is None):
        check_fused(
            on_gpu(fused(heads, backend)), on_gpu(plain(heads)), tensors, names=NAMES, roundings=ROUNDINGS[dtype]
        )


@pytest.mark.gpu
def test_compiled_in_a_graph():
    tensors = [t.cuda() for t in block(1, 2048, 8, 256, 32, torch.bfloat16)]
    fused(8)(*tensors)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = fused(8)(*tensors)
    tensors[0].copy_(tensors[0].flip(1))
    graph.replay()
    assert torch.equal(y, fused(8)(*tensors))
