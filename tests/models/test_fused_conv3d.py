"""The residual block with the convolutions of the Triton kernel, which runs in the interpreter, compared with float64."""

from __future__ import annotations

import copy

import pytest
import torch

from ccella_fast.kernels.backend import ENVIRONMENT
from ccella_fast.models import blocks
from ccella_fast.models.blocks import ResidualBlock
from kernel_fixtures import draw, repair_interpreter

repair_interpreter()
X, SHIFT = (2, 16, 2, 3, 4), (2, 24)


@pytest.fixture
def block():
    torch.manual_seed(0)
    block = ResidualBlock(16, 24, 8, groups=4, eps=1e-6)
    torch.nn.init.normal_(block.conv2.get_parameter("conv.weight"), std=0.05)
    torch.nn.init.normal_(block.conv2.get_parameter("conv.bias"))
    return block


@pytest.fixture
def launches(monkeypatch):
    """The convolutions that the kernel computed, as (has a bias, has a residual)."""
    found = []
    kernel = blocks.fused_conv3d.conv3d

    def conv3d(x, weight, bias, **options):
        found.append((bias is not None, options["residual"] is not None))
        return kernel(x, weight, bias, **options)

    monkeypatch.setattr(blocks.fused_conv3d, "conv3d", conv3d)
    return found


def output_and_gradients(block, dtype):
    block = copy.deepcopy(block).to(dtype)
    x, shift = draw(*X, seed=1).to(dtype).requires_grad_(), draw(*SHIFT, seed=2).to(dtype)
    y = block(x, shift)
    weights = [parameter for name, parameter in block.named_parameters() if "time_emb_proj" not in name]
    weights = [parameter for parameter in weights if parameter is not block.conv1.get_parameter("conv.bias")]
    return [y.detach().double(), *(g.double() for g in torch.autograd.grad(y.square().sum(), [x, *weights]))]


def test_gradients(block, launches, monkeypatch):
    expected = output_and_gradients(block, torch.float64)
    plain = output_and_gradients(block, torch.float32)
    assert launches == []
    monkeypatch.setenv(ENVIRONMENT, "conv3d=triton")
    fused = output_and_gradients(block, torch.float32)
    assert launches == [(False, False), (True, True)]
    for name, (truth, ours, theirs) in enumerate(zip(expected, fused, plain, strict=True)):
        rms = lambda error: error.square().mean().sqrt()  # noqa: E731
        assert rms(ours - truth) <= 2 * rms(theirs - truth) + 1e-7 * rms(truth), name


def test_the_kept_weight_follows_the_parameter(block, monkeypatch):
    block.eval()
    x, shift = draw(*X, seed=1).float(), draw(*SHIFT, seed=2).float()
    with torch.no_grad():
        before = block(x, shift)
        monkeypatch.setenv(ENVIRONMENT, "conv3d=triton")
        torch.testing.assert_close(block(x, shift), before)
        block.conv1.get_parameter("conv.weight").mul_(-2)  # in place, so that its version counts
        changed = block(x, shift)
        block.conv1.get_parameter("conv.weight").data.mul_(-0.5)  # not seen, but for `eval`
        stale = block(x, shift)
        block.eval()
        torch.testing.assert_close(block(x, shift), before)
    assert torch.equal(stale, changed) and not torch.allclose(changed, before, atol=0.1)


def test_few_channels_are_left_to_pytorch(launches, monkeypatch):
    monkeypatch.setenv(ENVIRONMENT, "conv3d=triton")
    blocks.Conv3d(4, 64, 3, padding=1)(draw(1, 4, 2, 2, 2).float())
    blocks.Conv3d(64, 64, 1)(draw(1, 64, 2, 2, 2).float())
    assert launches == []
