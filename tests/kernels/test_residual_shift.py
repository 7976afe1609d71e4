"""Residual sum with a per-channel shift: every backend against float64."""

from __future__ import annotations

import pytest
import torch

from ccella_fast.kernels import layout
from ccella_fast.kernels import residual_shift as module
from ccella_fast.kernels.backend import BackendError, choose
from ccella_fast.kernels.residual_shift import (
    backend_support,
    residual_shift,
    residual_shift_,
    residual_shift_reference,
)
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS
from kernel_fixtures import DTYPES, LAYOUTS, channels_last, check_fused, draw, repair_interpreter, shape_id

repair_interpreter()
NAMES = ["y", "dh", "dresidual", "dshift"]


def fused(h, residual, shift):
    return residual_shift(h, residual, shift, backend="triton")


def check(h, residual, shift):
    names = NAMES if shift is not None else NAMES[:3]
    roundings = 4.0 if h.dtype == torch.float32 else 1.0
    check_fused(fused, residual_shift_reference, (h, residual, shift), names=names, roundings=roundings)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Small tiles, and a GPU so small that a program processes several of them."""
    monkeypatch.setattr(layout, "multiprocessor_count", lambda _: 2)
    for key, config in DEFAULT_LAUNCH_CONFIGS["residual_shift"].items():
        monkeypatch.setitem(
            DEFAULT_LAUNCH_CONFIGS["residual_shift"], key, config._replace(constants={"TILE": 256, "STAGES": 2})
        )


def test_reference_equals_explicit_arithmetic():
    h, residual, shift = draw(2, 3, 4, 5), draw(2, 3, 4, 5, seed=1), draw(2, 3, seed=2)
    torch.testing.assert_close(residual_shift(h, residual, shift), h + residual + shift[:, :, None, None])
    torch.testing.assert_close(residual_shift(h, residual, shift[0]), h + residual + shift[0, :, None, None])
    assert not torch.allclose(residual_shift(h, residual, shift), residual_shift(h, residual, shift.flip(0)))
    tensors = [tensor.requires_grad_() for tensor in (h, residual, shift)]
    assert torch.autograd.gradcheck(residual_shift, tensors)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 8, 3, 5, 7), (1, 37, 11, 3), (2, 6, 91), (1, 192, 5, 3, 2)], ids=shape_id)
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, last, shape):
    h, residual = draw(*shape, dtype=dtype), draw(*shape, seed=1, dtype=dtype)
    h = channels_last(h) if last else h
    check(h, residual, draw(*shape[:2], seed=2, dtype=dtype))
    check(h, channels_last(residual), draw(shape[1], seed=2, dtype=torch.float32))
    check(h, residual, None)


def test_criterion_rejects_a_wrong_kernel():
    tensors = draw(2, 8, 15, dtype=torch.bfloat16), draw(2, 8, 15, seed=1, dtype=torch.bfloat16), draw(2, 8, seed=2)
    with pytest.raises(AssertionError, match="y: error"):
        check_fused(lambda h, r, s: fused(h, r, s.flip(1)), residual_shift_reference, tensors, names=NAMES)


def test_output_has_the_layout_of_h():
    h, residual, shift = draw(2, 8, 3, 4, 5), draw(2, 8, 3, 4, 5, seed=1), draw(8, seed=2)
    h, residual, shift = h.float(), residual.float(), shift.float()
    assert fused(channels_last(h), residual, shift).stride() == channels_last(h).stride()
    torch.testing.assert_close(fused(h.transpose(2, 4), residual.transpose(2, 4), shift).transpose(2, 4),
                               residual_shift_reference(h, residual, shift))  # fmt: skip


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("last", LAYOUTS)
def test_in_place_equals_out_of_place(last, backend):
    """Also for a slab of the residual, which is dense with channels last only, and next to it nothing changes."""
    h, volume, shift = draw(1, 8, 3, 2, 5).float(), draw(1, 8, 7, 2, 5, seed=1).float(), draw(8, seed=2).float()
    h, volume = (channels_last(each) if last else each for each in (h, volume))
    before = volume.clone()
    residual_shift_(h, volume[:, :, 2:5], shift, backend=backend)
    torch.testing.assert_close(volume[:, :, 2:5], residual_shift_reference(h, before[:, :, 2:5], shift))
    assert torch.equal(volume[:, :, :2], before[:, :, :2]) and torch.equal(volume[:, :, 5:], before[:, :, 5:])
    residual_shift_(volume.contiguous(), before, backend=backend)
    assert not torch.equal(before, volume)
    with pytest.raises(ValueError, match="must have the same shape"):
        residual_shift_(h, volume, shift, backend=backend)


def test_library_op_in_place():
    h, residual = draw(1, 4, 3, 2).float(), channels_last(draw(1, 4, 3, 2, seed=1).float())
    torch.library.opcheck(module._residual_shift_in_place_op, (h, residual, draw(4).float()))


@pytest.mark.parametrize("shift", ["no_shift", "per_sample", "shared"])
def test_library_op(shift):
    h, residual = draw(2, 4, 3, 2).float(), channels_last(draw(2, 4, 3, 2, seed=1).float())
    given = {"no_shift": None, "per_sample": draw(2, 4).float(), "shared": draw(4).float()}[shift]
    leaves = [None if tensor is None else tensor.requires_grad_() for tensor in (h, residual, given)]
    torch.library.opcheck(module._residual_shift_op, tuple(leaves))
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*leaves), residual_shift_reference(*leaves))


def test_backend_choice_and_errors():
    cuda = torch.device("cuda")
    assert choose("residual_shift", backend_support(cuda, torch.bfloat16)) == "triton"
    assert choose("residual_shift", backend_support(cuda, torch.bfloat16, shifted=False)) == "reference"
    assert choose("residual_shift", backend_support(torch.device("cpu"), torch.float32)) == "reference"
    h = draw(2, 3, 4)
    with pytest.raises(ValueError, match="must have the same shape"):
        residual_shift(h, h[:, :, :3])
    with pytest.raises(ValueError, match=r"must have shape \(C,\) or \(B, C\)"):
        residual_shift(h, h, torch.zeros(2))
    with pytest.raises(BackendError, match="float64"):
        residual_shift(h, h, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("last", LAYOUTS)
def test_compiled(dtype, last):
    h, residual = draw(2, 192, 17, 16, 15, dtype=dtype), draw(2, 192, 17, 16, 15, seed=1, dtype=dtype)
    h = channels_last(h) if last else h
    check(h.cuda(), residual.cuda(), draw(192, seed=2, dtype=dtype).cuda())
