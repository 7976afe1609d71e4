"""bf16 gradients of the network's convolutions on grids of one and two planes, against float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from ccella_fast.models.blocks import ResidualConv3d, ShiftedConv3d, conv3d

KINDS = {
    "plain": lambda: conv3d(16, 16, 3),
    "1x1x1": lambda: conv3d(16, 16, 1),
    "shifted": lambda: ShiftedConv3d(16, 16, 3, padding=1),
    "residual": lambda: ResidualConv3d(16, 16, 3, padding=1),
}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_thin_grids_equal_float64(kind):
    """A third plane of zeros on one axis, cut off again, must be neither seen nor forgotten."""
    torch.manual_seed(0)
    module = KINDS[kind]().bfloat16()
    (leaf,) = (child for child in module.modules() if isinstance(child, torch.nn.Conv3d))
    for shape in itertools.product((1, 2, 3), (2, 4), (1, 2, 4)):
        x = torch.randn(2, 16, *shape).bfloat16().requires_grad_()
        residual = torch.randn(2, 16, *shape).bfloat16()
        answer = module(x, residual) if kind == "residual" else module(x)
        g = torch.randn(answer.shape).bfloat16()
        found = torch.autograd.grad(answer, (x, leaf.weight), g)
        exact = [t.detach().double().requires_grad_() for t in (x, leaf.weight)]
        bias = None if kind == "shifted" else leaf.bias.detach().double()
        expected = F.conv3d(*exact, bias, padding=leaf.padding) + (residual.double() if kind == "residual" else 0)
        assert answer.shape == expected.shape
        pairs = zip(
            [answer.detach(), *found], [expected, *torch.autograd.grad(expected, exact, g.double())], strict=True
        )
        for ours, theirs in pairs:
            assert (ours.double() - theirs).abs().max() < 2e-2 * theirs.abs().max(), shape
