"""The operations behind `kernels/`, against float64 arithmetic written out by hand."""

from __future__ import annotations

import pytest
import torch

from ccella_fast.kernels.attention import attention
from ccella_fast.kernels.group_norm_silu import group_norm_silu


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected_norm(x, groups, weight, bias, eps, silu, shift):
    h = x if shift is None else x + shift[:, :, None, None, None]
    grouped = h.reshape(x.shape[0], groups, -1)
    centred = grouped - grouped.mean(dim=2, keepdim=True)
    h = (centred / (centred.square().mean(dim=2, keepdim=True) + eps).sqrt()).reshape(x.shape)
    h = h * weight[:, None, None, None] + bias[:, None, None, None]
    return h / (1 + (-h).exp()) if silu else h


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_silu(dtype, silu, shifted):
    x, weight, bias = (tensor.to(dtype) for tensor in (3 + draw(2, 8, 3, 5, 4), draw(8, seed=1), draw(8, seed=2)))
    shift = draw(2, 8, seed=3).to(dtype) if shifted else None
    wide = [None if tensor is None else tensor.double() for tensor in (x, weight, bias, shift)]
    expected = expected_norm(wide[0], 4, wide[1], wide[2], 1e-3, silu, wide[3])
    actual = group_norm_silu(x, 4, weight, bias, 1e-3, silu=silu, shift=shift)
    assert actual.dtype == dtype
    # bf16: the result is rounded once, from fp32.
    tolerance = {"rtol": 2**-8, "atol": 1e-6} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(actual.double(), expected, **tolerance)
    wrong = expected_norm(wide[0], 2, wide[1], wide[2], 1e-3, silu, wide[3])
    assert not torch.allclose(actual.double(), wrong, **tolerance)


def test_group_norm_silu_in_any_memory_format():
    x, weight, bias, shift = (
        draw(2, 8, 3, 5, 4).float(),
        draw(8, seed=1).float(),
        draw(8, seed=2).float(),
        draw(2, 8).float(),
    )
    expected = group_norm_silu(x, 4, weight, bias, shift=shift)
    last = x.to(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(group_norm_silu(last, 4, weight, bias, shift=shift), expected)
    torch.testing.assert_close(group_norm_silu(x.flip(2).flip(2)[:, :, ::1], 4, weight, bias, shift=shift), expected)


def test_group_norm_silu_has_correct_gradients():
    x, weight, bias, shift = draw(2, 4, 2, 3, 2), draw(4, seed=1), draw(4, seed=2), draw(2, 4, seed=3)
    tensors = [tensor.requires_grad_() for tensor in (x, weight, bias, shift)]
    assert torch.autograd.gradcheck(lambda x, w, b, s: group_norm_silu(x, 2, w, b, shift=s), tensors)


@pytest.mark.parametrize("keys", [6, 11])
def test_attention(keys):
    q, k, v = draw(2, 3, 6, 4), draw(2, 3, keys, 4, seed=1), draw(2, 3, keys, 4, seed=2)
    scores = torch.einsum("bmnk,bmlk->bmnl", q, k) / 2.0  # sqrt(K) = 2
    expected = torch.einsum("bmnl,bmlk->bmnk", scores.exp() / scores.exp().sum(dim=3, keepdim=True), v)
    torch.testing.assert_close(attention(q, k, v), expected)
    assert not torch.allclose(attention(2 * q, k, v), expected)
    tensors = [tensor.requires_grad_() for tensor in (q, k, v)]
    assert torch.autograd.gradcheck(attention, tensors)
