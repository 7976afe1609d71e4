"""Values and bf16 gradients of the convolutions of the networks on grids of few voxels, compared with float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from ccella_fast.models.blocks import BiaslessConv3d, ResidualConv3d, conv3d
from ccella_fast.models.thin_grids import on_three_voxels
from kernel_fixtures import without_zeros

KINDS = {
    "plain": lambda: conv3d(16, 16, 3),
    "1x1x1": lambda: conv3d(16, 16, 1),
    "biasless": lambda: BiaslessConv3d(16, 16, 3, padding=1),
    "residual": lambda: ResidualConv3d(16, 16, 3, padding=1),
    "strided": lambda: conv3d(16, 16, 3, stride=2),
}


def fill_freed_memory_with_nan(dtype: torch.dtype = torch.float32) -> None:
    freed = [torch.full((2**k,), torch.nan, dtype=dtype) for k in range(6, 20) for _ in range(3)]
    del freed


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients_equal_float64(kind):
    """The appended zeros must not change any value, and they must be cropped again."""
    torch.manual_seed(0)
    module = KINDS[kind]().bfloat16()
    (conv,) = (child for child in module.modules() if isinstance(child, torch.nn.Conv3d))
    for shape in itertools.product((1, 2, 3, 4), repeat=3):
        x = torch.randn(2, 16, *shape).bfloat16().requires_grad_()
        residual = torch.randn(2, 16, *shape).bfloat16()
        fill_freed_memory_with_nan()
        y = module(x, residual) if kind == "residual" else module(x)
        g = torch.randn(y.shape).bfloat16()
        fill_freed_memory_with_nan()
        gradients = torch.autograd.grad(y, (x, conv.weight), g)
        exact = [t.detach().double().requires_grad_() for t in (x, conv.weight)]
        bias = None if kind == "biasless" else conv.bias.detach().double()
        expected = F.conv3d(*exact, bias, stride=conv.stride, padding=conv.padding)
        expected = expected + (residual.double() if kind == "residual" else 0)
        assert y.shape == expected.shape
        truth = [expected, *torch.autograd.grad(expected, exact, g.double())]
        for ours, theirs in zip([y.detach(), *gradients], truth, strict=True):
            assert (ours.double() - theirs).abs().max() < 2e-2 * theirs.abs().max(), shape


@pytest.mark.parametrize("grid", [(8, 8, 4), (4, 4, 4), (8, 4, 8)], ids=lambda grid: "x".join(map(str, grid)))
def test_every_gradient_of_a_network_on_a_thin_grid_is_close_to_float64(grid):
    """The coarsest of the three grids has one or two voxels per axis. The error of a wrong gradient is as large as itself."""
    from ccella_fast.models import build_model

    torch.manual_seed(0)
    widths = {"num_channels": [16, 16, 32], "attention_levels": [False, False, True], "num_head_channels": [0, 0, 16]}
    model = without_zeros(build_model("MAISI", norm_num_groups=8, **widths), std=0.1).bfloat16()
    x, g = torch.randn(2, 4, *grid).bfloat16(), torch.randn(2, 4, *grid).bfloat16()

    def gradients(dtype: torch.dtype) -> dict[str, torch.Tensor]:
        network = model.to(dtype)
        inputs = {"spacing": torch.full((2, 3), 50.0, dtype=dtype)}
        fill_freed_memory_with_nan()
        noise = network(x.to(dtype), torch.tensor([100, 700]), **inputs).noise
        found = torch.autograd.grad(noise, list(network.parameters()), g.to(dtype), allow_unused=True)
        names = [name for name, _ in network.named_parameters()]
        return {name: each.double() for name, each in zip(names, found, strict=True) if each is not None}

    bf16, exact = gradients(torch.bfloat16), gradients(torch.float64)
    convolutions = [name for name, gradient in exact.items() if gradient.ndim == 5]
    assert len(convolutions) > 20
    for name in convolutions:
        assert (bf16[name] - exact[name]).norm() < 0.2 * exact[name].norm(), name


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
def test_only_thin_grids_in_bf16_are_padded(scale):
    def grid_seen(*shape: int, dtype: torch.dtype) -> list[int]:
        seen = []

        def convolve(x: torch.Tensor) -> torch.Tensor:
            seen.extend(x.shape[2:])
            return F.interpolate(x.float(), size=[math.ceil(size * scale) for size in x.shape[2:]]).to(dtype)

        y = on_three_voxels(convolve, torch.ones(1, 1, *shape, dtype=dtype), scale)
        assert list(y.shape[2:]) == [math.ceil(size * scale) for size in shape]
        return seen

    assert grid_seen(1, 2, 5, dtype=torch.bfloat16) == [3, 3, 5]
    assert grid_seen(3, 4, 5, dtype=torch.bfloat16) == [3, 4, 5]
    assert grid_seen(1, 2, 5, dtype=torch.float32) == [1, 2, 5]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("last", [2, 4], ids=["Z2", "Z4"])
def test_a_strided_convolution_does_not_read_uninitialized_memory(dtype, last):
    """In bf16 with AMX, the convolution of oneDNN returns NaN from freed memory if its output is one voxel wide."""
    conv, x = conv3d(32, 64, 3, stride=2).requires_grad_(False), torch.randn(1, 32, 6, 6, last)
    truth = F.conv3d(x.double(), *(p.double() for p in conv.parameters()), stride=2, padding=1)
    conv, x = conv.to(dtype), x.to(dtype)
    for _ in range(3):
        fill_freed_memory_with_nan(dtype)
        got = conv(x)
        assert got.shape == truth.shape
        assert (got.double() - truth).norm() / truth.norm() < (1e-6 if dtype == torch.float32 else 1e-2)
    assert (got.double() - truth.roll(1, 1)).norm() / truth.norm() > 0.5
