"""GEGLU: the plain implementation against explicit arithmetic, the Triton kernels against float64."""

from __future__ import annotations

import functools

import pytest
import torch

import kernel_fixtures
from ccella_fast.kernels import geglu as module
from ccella_fast.kernels.backend import BackendError, choose
from ccella_fast.kernels.geglu import backend_support, geglu, geglu_reference
from ccella_fast.kernels.tuning import DEFAULT_LAUNCH_CONFIGS
from kernel_fixtures import DTYPES, check_fused, repair_interpreter

repair_interpreter()
draw = functools.partial(kernel_fixtures.draw, scale=2.0)  # wide enough to reach the tails of the GELU


def fused(h):
    return geglu(h, backend="triton")


@pytest.fixture
def small_tiles(monkeypatch):
    for key, config in DEFAULT_LAUNCH_CONFIGS["geglu"].items():
        monkeypatch.setitem(
            DEFAULT_LAUNCH_CONFIGS["geglu"], key, config._replace(constants={"BLOCK_R": 4, "BLOCK_C": 16})
        )


def test_reference_equals_explicit_arithmetic():
    h = draw(2, 5, 14)
    value, gate = h[..., :7], h[..., 7:]
    expected = value * gate * torch.special.ndtr(gate)
    torch.testing.assert_close(geglu(h), expected)
    assert not torch.allclose(geglu(h.roll(7, -1)), expected)
    assert torch.autograd.gradcheck(geglu, h.requires_grad_())


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_is_at_most_twice_that_of_plain_pytorch(dtype, small_tiles):
    for h in (draw(2, 7, 74), draw(1, 32), draw(3, 2, 5, 6), draw(9, 34).t()[:12].t(), draw(4, 64)[:, ::2]):
        check_fused(fused, geglu_reference, [h.to(dtype)], names=["y", "dh"], roundings=2)
    with pytest.raises(AssertionError, match="y: error"):
        check_fused(lambda h: fused(h.flip(-1)), geglu_reference, [draw(4, 32, dtype=dtype)], names=["y", "dh"])


def test_width_of_the_model_with_default_tiles():
    check_fused(fused, geglu_reference, [draw(1, 9, 2048, dtype=torch.bfloat16)], names=["y", "dh"])


def test_library_op():
    h = draw(2, 3, 8, dtype=torch.float32)
    torch.library.opcheck(module._geglu_op, (h.requires_grad_(),))
    torch.library.opcheck(module._geglu_backward_op, (draw(2, 3, 4, dtype=torch.float32), h.detach()))
    compiled = torch.compile(lambda h: 2 * fused(h), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(h), 2 * fused(h))
    torch.testing.assert_close(torch.compile(geglu, backend="eager", fullgraph=True)(h), geglu_reference(h))
    y = geglu(torch.empty(3, 5, 16, device="meta"), backend="triton")
    assert y.shape == (3, 5, 8) and y.is_meta


def test_backend_choice_and_errors():
    assert choose("geglu", backend_support(torch.device("cuda"), torch.bfloat16)) == "triton"
    assert choose("geglu", backend_support(torch.device("cpu"), torch.float32)) == "reference"
    with pytest.raises(ValueError, match="must have even size"):
        geglu(draw(2, 5))
    with pytest.raises(BackendError, match="float64"):
        geglu(draw(2, 4), backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(dtype):
    for shape in ((2, 2048, 2048), (1, 257, 4096), (3, 74)):
        check_fused(fused, geglu_reference, [draw(*shape, dtype=dtype).cuda()], names=["y", "dh"], roundings=2)
