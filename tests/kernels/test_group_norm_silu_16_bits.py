"""GroupNorm-SiLU of 16-bit tensors on a CPU against float64: it makes no copies in fp32."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ccella_fast.kernels.group_norm_silu import group_norm_silu
from kernel_fixtures import LAYOUTS, channels_last, draw, dtype_params, flag_params

NAMES = ["y", "dx", "dweight", "dbias", "dshift"]


class WideTensors(TorchDispatchMode):
    """Counts the fp32 tensors that operations return with at least `elements` elements."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple) else (result,):
            if isinstance(each, torch.Tensor) and each.dtype == torch.float32:
                self.count += each.numel() >= self.elements
        return result


@pytest.mark.parametrize("shifted", flag_params("no_shift", "shift"))
@pytest.mark.parametrize("last", LAYOUTS)
@pytest.mark.parametrize("dtype", dtype_params(torch.bfloat16, torch.float16))
def test_16_bits_on_a_cpu_need_no_copy_in_fp32(dtype, last, shifted):
    x = draw(2, 8, 6, 5, 4, dtype=dtype, mean=0.5)
    x = channels_last(x) if last else x
    weight, bias = draw(8, seed=1, dtype=dtype), draw(8, seed=2, dtype=dtype)
    shift = draw(2, 8, seed=3, dtype=dtype) if shifted else None
    names = NAMES[: 4 + shifted]
    wide = [None if tensor is None else tensor.double() for tensor in (x, weight, bias, shift)]
    dy = draw(*x.shape, seed=9, dtype=dtype)

    def run(tensors, dy, **how):
        leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
        y = group_norm_silu(leaves[0], 4, *leaves[1:3], shift=leaves[3], **how)
        return y, *torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy)

    found = {}
    for how in ({}, {"backend": "reference"}):
        with WideTensors(x.numel()) as tensors:
            found[bool(how)] = run((x, weight, bias, shift), dy, **how)
        assert bool(tensors.count) == bool(how)
    assert found[False][0].stride() == x.stride()
    truth = run(wide, dy.double(), backend="reference")
    eps = torch.finfo(dtype).eps
    for name, expected, native, reference in zip(names, truth, found[False], found[True], strict=True):
        assert native.dtype == dtype, name
        # The shift, the sum, the norm and the SiLU are rounded, and the gradient of each; a sum over voxels averages errors.
        bound = 4 * eps * expected.abs().max()
        assert (native - expected).abs().max() <= bound, name
        assert (reference - expected).abs().max() <= bound, name
    assert (run((x, bias, weight, shift), dy)[0] - truth[0]).abs().max() > 4 * eps * truth[0].abs().max()
