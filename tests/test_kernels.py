"""The operations behind `kernels/`, against float64 arithmetic written out by hand."""

from __future__ import annotations

import pytest
import torch

from ccella_fast.kernels.attention import attention


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("keys", [6, 11])
def test_attention(keys):
    q, k, v = draw(2, 3, 6, 4), draw(2, 3, keys, 4, seed=1), draw(2, 3, keys, 4, seed=2)
    scores = torch.einsum("bmnk,bmlk->bmnl", q, k) / 2.0  # sqrt(K) = 2
    expected = torch.einsum("bmnl,bmlk->bmnk", scores.exp() / scores.exp().sum(dim=3, keepdim=True), v)
    torch.testing.assert_close(attention(q, k, v), expected)
    assert not torch.allclose(attention(2 * q, k, v), expected)
    tensors = [tensor.requires_grad_() for tensor in (q, k, v)]
    assert torch.autograd.gradcheck(attention, tensors)
