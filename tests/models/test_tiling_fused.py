"""Decoding and encoding with the Triton kernels: biases deferred to what follows, statistics of slabs by the kernel."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from ccella_fast.config import AutoencoderConfig
from ccella_fast.kernels.backend import ENVIRONMENT
from ccella_fast.models.autoencoder import Autoencoder, tiling
from ccella_fast.models.autoencoder import tiling_plan as planning
from ccella_fast.models.autoencoder.tiling import GroupNormStatistics
from ccella_fast.models.blocks import GroupNormSiLU
from kernel_fixtures import channels_last, draw, dtype_params, repair_interpreter

repair_interpreter()
CONFIG = AutoencoderConfig(num_channels=[8, 16], num_res_blocks=[2, 1], norm_num_groups=4, latent_channels=3)


@pytest.fixture
def vae():
    torch.manual_seed(0)
    vae = Autoencoder(CONFIG).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.add_(0.5 * torch.randn_like(parameter))  # so that each bias counts
    return vae


def truth(vae, z, x):
    wide = Autoencoder(CONFIG).double().requires_grad_(False)
    wide.load_state_dict(vae.state_dict())
    with torch.enable_grad():  # module by module, without slabs
        z.requires_grad_(), x.requires_grad_()
        return wide.decode(z).detach(), wide.encode(x)[0].detach()


def errors(vae, z, x, expected):
    dtype = next(vae.parameters()).dtype
    found = vae.decode(channels_last(z.detach().to(dtype))), vae.encode(channels_last(x.detach().to(dtype)))[0]
    return [(a.double() - b).square().mean().sqrt().item() for a, b in zip(found, expected, strict=True)]


@pytest.mark.parametrize("slab_bytes", [2**29, 6000], ids=["whole", "slabs"])
@pytest.mark.parametrize("dtype", dtype_params(torch.float32, torch.bfloat16))
def test_error_is_at_most_twice_that_of_plain_pytorch(slab_bytes, dtype, vae, monkeypatch):
    vae.to(dtype)
    z, x = draw(1, 3, 9, 2, 2).to(dtype).double(), draw(1, 1, 18, 4, 4).to(dtype).double()
    expected = truth(vae, z, x)
    monkeypatch.setattr(planning, "SLAB_BYTES", slab_bytes)
    assert (vae.decoder.plan(tuple(z.shape[1:]), z.device).slabs > 0) == (slab_bytes == 6000)
    plain = errors(vae, z, x, expected)
    monkeypatch.setenv(ENVIRONMENT, "triton")
    fused = errors(vae, z, x, expected)
    assert all(0 < error <= 2 * allowed for error, allowed in zip(fused, plain, strict=True)), (fused, plain)


def test_comparison_detects_a_bias_that_is_lost(vae, monkeypatch):
    z, x = draw(1, 3, 3, 2, 2), draw(1, 1, 6, 4, 4)
    expected = truth(vae, z, x)
    plain = errors(vae, z, x, expected)
    monkeypatch.setenv(ENVIRONMENT, "triton")
    monkeypatch.setattr(tiling, "_shortcut_shift", lambda shortcut, shift: shortcut.bias)
    assert errors(vae, z, x, expected)[0] > 100 * plain[0]


def test_no_convolution_adds_a_bias_that_can_be_deferred(vae, monkeypatch):
    """Only the last one adds its bias."""
    biases = []
    plain = F.conv3d
    monkeypatch.setattr(F, "conv3d", lambda x, w, b=None, *rest: biases.append(b is not None) or plain(x, w, b, *rest))
    z = channels_last(draw(1, 3, 3, 2, 2).float())
    vae.decoder(z)
    assert all(biases)
    biases.clear()
    monkeypatch.setenv(ENVIRONMENT, "triton")
    vae.decoder(z)
    assert biases == [False] * (len(biases) - 1) + [True]


@pytest.mark.parametrize("mean", [0.0, 1000.0], ids=["centered", "far"])
def test_statistics_of_slabs(mean, monkeypatch):
    norm, shift = GroupNormSiLU(4, 8, 1e-6), draw(8, seed=1)
    volume = channels_last(draw(1, 8, 12, 6, 6, mean=mean).float())
    monkeypatch.setenv(ENVIRONMENT, "triton")
    statistics = GroupNormStatistics(norm)
    for part in volume.split([1, 7, 4], dim=2):
        statistics.add(part, shift.float())
    found = statistics.merge()
    grouped = (volume.double() + shift[:, None, None, None]).reshape(1, 4, -1)
    torch.testing.assert_close(found[0].double(), grouped.mean(2), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[1].double(), (grouped.var(2, correction=0) + 1e-6).rsqrt(), rtol=1e-5, atol=0)
