"""Convolutions of few voxels on a CPU against float64, and where they are used."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from ccella_fast.models import blocks
from ccella_fast.models.blocks import Conv3d
from ccella_fast.models.few_voxels import FEW, conv3d_few_voxels
from ccella_fast.models.thin_grids import on_three_voxels
from kernel_fixtures import draw


@pytest.mark.parametrize(
    "shape", [(1, 3, 4, 4, 2), (2, 2, 1, 3, 2), (3, 2, 1, 1, 1)], ids=lambda shape: "x".join(map(str, shape))
)
def test_gradients(shape):
    tensors = [
        draw(*shape, seed=0).requires_grad_(),
        draw(2, shape[1], 3, 3, 3, seed=1).requires_grad_(),
        draw(2, seed=2).requires_grad_(),
    ]
    assert torch.equal(conv3d_few_voxels(*tensors), F.conv3d(*tensors, padding=1))
    torch.autograd.gradcheck(conv3d_few_voxels, tensors)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("grid", [(3, 3, 3), (4, 4, 2), (1, 2, 5)], ids=lambda grid: "x".join(map(str, grid)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_pytorch(dtype, grid, has_bias):
    """Each is at most twice as large as on a grid that is padded where oneDNN is wrong without (see thin_grids)."""
    shapes = [(2, 16, *grid), (8, 16, 3, 3, 3), *[(8,)] * has_bias]
    low = [draw(*shape, seed=seed).to(dtype).requires_grad_() for seed, shape in enumerate(shapes)]
    dy = draw(2, 8, *grid, seed=3).to(dtype)
    exact = [t.detach().double().requires_grad_() for t in low]

    def computed(tensors, convolve):
        y = convolve(*tensors, *[None] * (not has_bias))
        return [y, *torch.autograd.grad(y, tensors, dy.to(y.dtype))]

    def plain(x, weight, bias):
        return on_three_voxels(lambda x: F.conv3d(x, weight, bias, padding=1), x)

    truth = computed(exact, lambda x, weight, bias: F.conv3d(x, weight, bias, padding=1))
    for found, theirs, true in zip(computed(low, conv3d_few_voxels), computed(low, plain), truth, strict=True):
        assert found.dtype == dtype
        assert (found - true).norm() <= 2 * (theirs - true).norm() + 1e-7 * true.norm()
        assert (found - true.roll(1, 0)).norm() > 0.1 * true.norm()


def test_fake_tensors_leave_nothing_behind():
    """A dry run counts the memory of a step with them, before or after real steps of the same sizes."""

    def gradients(dtype=torch.bfloat16):
        x, weight = (
            torch.ones(*shape, dtype=dtype, requires_grad=True) for shape in ((1, 2, 2, 2, 2), (3, 2, 3, 3, 3))
        )
        return torch.autograd.grad(conv3d_few_voxels(x, weight, None).sum(), (x, weight))

    expected = gradients()
    with FakeTensorMode():
        assert [fake.shape for fake in gradients()] == [real.shape for real in expected]
    for found, real, exact in zip(gradients(), expected, gradients(torch.float64), strict=True):
        assert type(found) is Tensor
        assert torch.equal(found, real)
        assert torch.equal(found.double(), exact)  # sums of at most 8 ones


def test_the_gradient_is_computed_in_the_given_memory():
    x, given = draw(1, 2, 2, 2, 2, dtype=torch.float32), torch.full((3, 2, 3, 3, 3), torch.nan)
    conv = Conv3d(2, 3, 3, padding=1)
    conv(x).sum().backward()
    expected = conv.weight.grad
    conv.weight.grad, conv.weight.gradient_memory = None, lambda: given
    conv(x).sum().backward()
    assert conv.weight.grad.data_ptr() == given.data_ptr()
    assert torch.equal(given, expected)


def test_only_few_voxels_with_gradients_take_that_path(monkeypatch):
    taken = []
    monkeypatch.setattr(
        blocks, "conv3d_few_voxels", lambda *args: taken.append(args[0].shape[2:].numel()) or F.conv3d(*args, padding=1)
    )
    conv, pointwise = Conv3d(2, 2, 3, padding=1), Conv3d(2, 2, 1)
    few, many = torch.ones(1, 2, 4, 4, FEW // 16), torch.ones(1, 2, 4, 4, FEW // 16 + 1)
    for x in (few, many):
        conv(x), pointwise(x)
    with torch.no_grad():
        conv(few)
    with torch.autocast("cpu", torch.bfloat16):
        conv(few)
    conv.to(memory_format=torch.channels_last_3d)(few)
    assert taken == [FEW]
