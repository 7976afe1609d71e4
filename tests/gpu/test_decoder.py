"""The default decoder on a GPU, whole and in slabs: every kernel in Triton, and PyTorch's own layers, compared with float64."""

from __future__ import annotations

import copy

import pytest
import torch

from ccella_fast.config import AutoencoderConfig
from ccella_fast.kernels.backend import ENVIRONMENT
from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.models.autoencoder import tiling as executing
from kernel_fixtures import dtype_params

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("decoder")]  # one process computes the truth, once
GRID = (32, 16, 16)
SLABS = 2**26  # bytes of transient tensors with which most convolutions are computed in slabs


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    vae = Autoencoder(AutoencoderConfig()).eval().requires_grad_(False)
    for name, parameter in vae.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.add_(0.3 * torch.randn_like(parameter))  # so that each bias counts
    return vae.bfloat16().cuda()


def decode(vae, dtype, backend, slab_bytes=2**32):
    """The image of a latent that is the same in every dtype, in float64."""
    z = torch.randn(1, 4, *GRID, generator=torch.Generator().manual_seed(1)).bfloat16().to("cuda", dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, backend)
        patch.setattr(executing, "GPU_SLAB_BYTES", slab_bytes)
        vae = copy.deepcopy(vae).to(dtype)
        assert (vae.decoder.plan(tuple(z.shape[1:]), z.device).slabs > 0) == (slab_bytes == SLABS)
        return vae.decode(z).double()


@pytest.fixture(scope="module")
def truth(vae):
    return decode(vae, torch.float64, "reference")


def error(image, truth):
    return (image - truth).square().mean().sqrt()


@pytest.mark.parametrize("dtype", dtype_params(torch.bfloat16, torch.float32))
@pytest.mark.parametrize("slab_bytes", [2**32, SLABS], ids=["whole", "slabs"])
def test_error_is_at_most_twice_that_of_plain_pytorch(slab_bytes, dtype, vae, truth):
    allowed = 2 * error(decode(vae, dtype, "reference"), truth)
    image = decode(vae, dtype, "triton", slab_bytes)
    assert 0 < error(image, truth) <= allowed
    assert error(image.roll(8, 4), truth) > 2 * allowed
