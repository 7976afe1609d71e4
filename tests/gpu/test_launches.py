"""Kernels that are launched before the previous one has ended (programmatic dependent launch) still see what it wrote."""

from __future__ import annotations

import pytest
import torch

from ccella_fast.kernels.conv3d import conv3d
from ccella_fast.kernels.geglu import geglu
from ccella_fast.kernels.group_norm_silu import group_norm_silu
from ccella_fast.kernels.residual_shift import residual_shift

pytestmark = pytest.mark.gpu


def chain(x: torch.Tensor, weights: list[torch.Tensor], *, wait: bool) -> torch.Tensor:
    """40 rounds of small kernels, each of which reads what the one before it has written into reused memory."""

    def done(y: torch.Tensor) -> torch.Tensor:
        if wait:
            torch.cuda.synchronize()
        return y

    norm, bias, taps = weights
    for _ in range(40):
        h = done(group_norm_silu(x, 8, norm, bias, 1e-5))
        h = done(conv3d(h, taps, backend="triton"))
        x = done(residual_shift(x, h, bias.expand(len(x), -1)))
        tokens = x.flatten(2).transpose(1, 2)
        x = x + done(geglu(torch.cat([tokens, tokens], 2))).transpose(1, 2).reshape(x.shape)
        x = x / x.float().std().to(x.dtype)
    return x


@pytest.mark.parametrize("channels", [16, 64])
def test_a_chain_of_kernels_gives_the_bits_of_one_kernel_at_a_time(channels):
    torch.manual_seed(0)
    draw = lambda *size: torch.randn(*size, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    x = draw(2, channels, 8, 8, 16).contiguous(memory_format=torch.channels_last_3d)
    weights = [draw(channels), draw(channels), draw(channels, channels, 3, 3, 3) / 40]
    with torch.no_grad():
        expected = chain(x, weights, wait=True)
        assert torch.equal(chain(x, weights, wait=False), expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = chain(x, weights, wait=False)
        for _ in range(20):
            replayed.zero_()
            graph.replay()
            assert torch.equal(replayed, expected)
        changed = chain(x + 1, weights, wait=True)  # negative control: the chain depends on its input
    assert not torch.equal(changed, expected)
