"""Activation checkpointing recomputes every kernel in the backward pass, and unpacks each saved tensor a single time."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ccella_fast.kernels.attention import attention
from ccella_fast.kernels.conv3d import conv3d
from ccella_fast.kernels.cross_attention import cross_attention
from ccella_fast.kernels.geglu import geglu
from ccella_fast.kernels.group_norm_silu import group_norm_silu
from ccella_fast.kernels.residual_shift import residual_shift
from ccella_fast.kernels.upsample_conv3d import upsample_conv3d
from ccella_fast.kernels.upsample_trilinear import upsample_trilinear
from kernel_fixtures import draw, flag_params, repair_interpreter

repair_interpreter()


def _cross_attention(x, k, v, ln_weight, ln_bias, w_q, w_out, b_out, added=None):
    parameters = {"ln_weight": ln_weight, "ln_bias": ln_bias, "w_q": w_q, "w_out": w_out, "b_out": b_out}
    return cross_attention(x, k, v, **parameters, num_heads=2, added=added, backend="triton")


# The kernel as a function of tensors, and their shapes.
KERNELS = {
    "group_norm_silu": (
        lambda x, w, b, shift: group_norm_silu(x, 4, w, b, shift=shift, backend="triton"),
        [(2, 8, 4, 3, 2), (8,), (8,), (2, 8)],
    ),
    "group_norm_silu without shift": (
        lambda x, w, b: group_norm_silu(x, 4, w, b, backend="triton"),
        [(2, 8, 4, 3, 2), (8,), (8,)],
    ),
    "attention": (lambda q, k, v: attention(q, k, v, backend="triton"), [(1, 2, 20, 16)] * 3),
    "cross_attention": (
        _cross_attention,
        [(1, 20, 32), (1, 2, 8, 16), (1, 2, 8, 16), (32,), (32,), (32, 32), (32, 32), (32,)],
    ),
    "cross_attention with added": (
        _cross_attention,
        [(1, 20, 32), (1, 2, 8, 16), (1, 2, 8, 16), (32,), (32,), (32, 32), (32, 32), (32,), (1, 20, 32)],
    ),
    "geglu": (lambda h: geglu(h, backend="triton"), [(3, 32)]),
    "residual_shift": (
        lambda h, residual, shift: residual_shift(h, residual, shift, backend="triton"),
        [(2, 8, 4, 3, 2), (2, 8, 4, 3, 2), (8,)],
    ),
    "upsample_conv3d": (
        lambda x, w, b: upsample_conv3d(x, w, b, backend="triton"),
        [(1, 16, 2, 3, 2), (16, 16, 3, 3, 3), (16,)],
    ),
    "conv3d": (
        lambda x, w, b, shift, residual: conv3d(x, w, b, shift=shift, residual=residual, backend="triton"),
        [(2, 8, 2, 3, 2), (8, 8, 3, 3, 3), (8,), (2, 8), (2, 8, 2, 3, 2)],
    ),
    "upsample_trilinear": (lambda x: upsample_trilinear(x, backend="triton"), [(1, 8, 2, 3, 2)]),
}


@pytest.mark.parametrize("reentrant", flag_params("not_reentrant", "reentrant"))
@pytest.mark.parametrize("name", KERNELS)
def test_gradients_are_those_without_checkpointing(name, reentrant):
    function, shapes = KERNELS[name]
    tensors = [draw(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes)]

    def gradients(run):
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        y = run(*leaves)
        return torch.autograd.grad(y, leaves, torch.ones_like(y) + y.detach())

    plain = gradients(function)
    if reentrant:  # it accumulates into .grad only
        leaves = [tensor.clone().requires_grad_() for tensor in tensors]
        y = checkpoint(function, *leaves, use_reentrant=True)
        y.backward(torch.ones_like(y) + y.detach())
        again = [leaf.grad for leaf in leaves]
    else:
        again = gradients(lambda *leaves: checkpoint(function, *leaves, use_reentrant=False))
    assert all(torch.equal(a, b) and a.any() for a, b in zip(again, plain, strict=True))
