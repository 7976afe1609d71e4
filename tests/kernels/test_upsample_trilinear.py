"""Trilinear upsampling: every backend against explicit arithmetic and float64."""

from __future__ import annotations

import pytest
import torch

from ccella_fast.kernels import upsample_trilinear as module
from ccella_fast.kernels.backend import BackendError, choose
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS
from ccella_fast.kernels.upsample_trilinear import backend_support, upsample_trilinear, upsample_trilinear_reference
from kernel_fixtures import DTYPES, LAYOUTS, channels_last, check_fused, draw, repair_interpreter, shape_id

repair_interpreter()
NAMES = ["y", "dx"]


def fused(planes=None):
    return lambda x: upsample_trilinear(x, planes, backend="triton")


def plain(planes=None):
    return lambda x: upsample_trilinear_reference(x, planes)


def explicit(x):
    """A matrix per axis, from the formula of the module."""
    for axis in (2, 3, 4):
        size = x.shape[axis]
        matrix = torch.zeros(2 * size, size, dtype=x.dtype)
        for i in range(size):
            matrix[2 * i, max(i - 1, 0)] += 0.25
            matrix[2 * i, i] += 0.75
            matrix[2 * i + 1, i] += 0.75
            matrix[2 * i + 1, min(i + 1, size - 1)] += 0.25
        x = torch.tensordot(x, matrix, ([axis], [1])).movedim(-1, axis)
    return x


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles in each sample, the last one partial."""
    for key, config in DEFAULT_LAUNCH_CONFIGS["upsample_trilinear"].items():
        monkeypatch.setitem(DEFAULT_LAUNCH_CONFIGS["upsample_trilinear"], key, config._replace(constants={"TILE": 128}))


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("shape", [(2, 3, 4, 5, 2), (1, 2, 1, 1, 3), (1, 1, 3, 1, 1)], ids=shape_id)
def test_equals_explicit_arithmetic(backend, shape):
    x = draw(*shape).float().requires_grad_()
    y = upsample_trilinear(x, backend=backend)
    torch.testing.assert_close(y, explicit(x), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(upsample_trilinear(x.flip(2, 4), backend=backend), explicit(x), atol=1e-2)
    dy = draw(*y.shape, seed=1).float()
    found, expected = (torch.autograd.grad(result, x, dy)[0] for result in (y, explicit(x)))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", LAYOUTS)
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, last):
    x = draw(2, 3, 3, 5, 4, dtype=dtype)
    check_fused(fused(), plain(), [channels_last(x) if last else x], names=NAMES)


@pytest.mark.parametrize("shape", [(2, 37, 2, 1, 3), (1, 136, 1, 2, 2)], ids=shape_id)
def test_idle_lanes_and_several_blocks_of_channels(shape, monkeypatch):
    monkeypatch.undo()  # the shipped tiles
    check_fused(fused(), plain(), [channels_last(draw(*shape, dtype=torch.float32))], names=NAMES)


@pytest.mark.parametrize("last", LAYOUTS)
@pytest.mark.parametrize("planes", [(0, 1), (3, 6), (2, 7), (5, 10)], ids="planes{0[0]}to{0[1]}".format)
def test_planes_of_the_result(planes, last):
    x = draw(1, 3, 5, 3, 2, dtype=torch.float32)
    x = channels_last(x) if last else x
    check_fused(fused(planes), plain(planes), [x], names=NAMES)
    torch.testing.assert_close(fused(planes)(x), explicit(x)[:, :, slice(*planes)], rtol=1e-6, atol=1e-6)


def test_criterion_rejects_a_wrong_kernel():
    x = draw(1, 2, 3, 4, 5, dtype=torch.bfloat16)
    with pytest.raises(AssertionError, match="y: error"):
        check_fused(lambda x: fused()(x).roll(1, 2), plain(), [x], names=NAMES)
    with pytest.raises(AssertionError, match="dx: error"):
        check_fused(lambda x: fused()(1.01 * x - 0.01 * x.detach()), plain(), [x.float()], names=NAMES)


def test_output_has_the_layout_of_x():
    x = draw(2, 3, 3, 4, 5).float()
    expected = upsample_trilinear_reference(x)
    assert fused()(x).is_contiguous()
    assert fused()(channels_last(x)).is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(fused()(x.transpose(2, 4)).transpose(2, 4), expected)
    slab = channels_last(x[:1])[:, :, 1:]  # a view of a part of the planes, as a slab is read
    torch.testing.assert_close(fused()(slab), upsample_trilinear_reference(slab))


@pytest.mark.parametrize("last", LAYOUTS)
def test_library_op(last):
    x = draw(2, 4, 3, 2, 2).float()
    x = (channels_last(x) if last else x).requires_grad_()
    torch.library.opcheck(module._upsample_trilinear_op, (x, 1, 5))
    compiled = torch.compile(fused((1, 5)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), upsample_trilinear_reference(x, (1, 5)))


def test_backend_choice_and_errors():
    assert choose("upsample_trilinear", backend_support(torch.device("cuda"), torch.bfloat16)) == "triton"
    assert choose("upsample_trilinear", backend_support(torch.device("cpu"), torch.float32)) == "reference"
    x = draw(1, 2, 3, 2, 2)
    with pytest.raises(ValueError, match="must have shape"):
        upsample_trilinear(x[0])
    for planes in ((-1, 2), (2, 2), (0, 7)):
        with pytest.raises(ValueError, match="range of the 6 planes"):
            upsample_trilinear(x, planes)
    with pytest.raises(BackendError, match="float64"):
        upsample_trilinear(x, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", LAYOUTS)
def test_compiled(dtype, last, monkeypatch):
    monkeypatch.undo()  # the shipped tiles
    x = draw(2, 128, 9, 16, 15, dtype=dtype)
    x = (channels_last(x) if last else x).cuda()
    check_fused(fused(), plain(), [x], names=NAMES)
    check_fused(fused((3, 16)), plain((3, 16)), [x], names=NAMES)
    assert torch.equal(fused()(x), fused()(x))
