"""Linear layers that are trained in fp32 on a CPU against float64, and where they are used."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ccella_fast.models import linear as module
from ccella_fast.models.linear import Linear, linear
from kernel_fixtures import draw

OUTPUTS, INPUTS = 256, 256


@pytest.fixture(autouse=True)
def onednn(monkeypatch):
    """As on a CPU for which oneDNN is faster."""
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this PyTorch has no oneDNN")
    monkeypatch.setattr(module, "_onednn_is_faster", lambda: True)


@pytest.fixture
def taken(monkeypatch):
    """The shapes of the inputs that oneDNN multiplies in the forward pass."""
    shapes, apply = [], module._Linear.apply
    monkeypatch.setattr(module._Linear, "apply", lambda *args: shapes.append(tuple(args[0].shape)) or apply(*args))
    return shapes


def case(dtype):
    tensors = draw(2, 9, INPUTS, seed=0), draw(OUTPUTS, INPUTS, seed=1), draw(OUTPUTS, seed=2)
    return [tensor.to(dtype).requires_grad_() for tensor in tensors], draw(2, 9, OUTPUTS, seed=3).to(dtype)


def test_errors_are_those_of_pytorch(taken):
    """Each is at most twice as large, up to a rounding."""
    low, dy = case(torch.float32)
    exact = [tensor.detach().double().requires_grad_() for tensor in low]
    truth = F.linear(*exact), *torch.autograd.grad(F.linear(*exact), exact, dy.double())
    ours = linear(*low), *torch.autograd.grad(linear(*low), low, dy)
    plain = F.linear(*low), *torch.autograd.grad(F.linear(*low), low, dy)
    assert len(taken) == 2
    for found, theirs, true in zip(ours, plain, truth, strict=True):
        assert (found - true).norm() <= 2 * (theirs - true).norm() + 1e-7 * true.norm()
        assert (found - true.roll(1, -1)).norm() > 0.1 * true.norm()


def test_gradients_that_are_not_needed_are_not_computed(taken):
    (x, weight, bias), dy = case(torch.float32)
    linear(x.detach(), weight, bias.detach()).backward(dy)
    assert taken and weight.grad is not None and x.grad is None and bias.grad is None


def test_the_gradient_is_computed_in_the_given_memory():
    layer, given = Linear(INPUTS, OUTPUTS), torch.full((OUTPUTS, INPUTS), torch.nan)
    x = draw(20, INPUTS, dtype=torch.float32)
    layer(x).square().sum().backward()
    expected = layer.weight.grad
    layer.weight.grad, layer.weight.gradient_memory = None, lambda: given
    layer(x).square().sum().backward()
    assert layer.weight.grad.data_ptr() == given.data_ptr()
    assert torch.equal(given, expected)


def test_only_large_products_with_gradients_in_fp32_take_that_path(taken):
    layer, narrow = Linear(INPUTS, OUTPUTS), Linear(INPUTS, OUTPUTS - 1)
    rows = torch.ones(16, INPUTS)
    layer(rows), layer(rows[:15]), narrow(rows)
    with torch.no_grad():
        layer(rows)
    with torch.autocast("cpu", torch.bfloat16):
        layer(rows)
    Linear(INPUTS, OUTPUTS).double()(rows.double())
    Linear(INPUTS, OUTPUTS).bfloat16()(rows.bfloat16())
    assert taken == [(16, INPUTS)]


def test_the_vendor_decides(monkeypatch):
    monkeypatch.undo()
    for vendor, faster in (("GenuineIntel", False), ("AuthenticAMD", True)):
        module._onednn_is_faster.cache_clear()
        monkeypatch.setattr(module, "cpu_vendor", lambda vendor=vendor: vendor)
        assert module._onednn_is_faster() == faster
    module._onednn_is_faster.cache_clear()
