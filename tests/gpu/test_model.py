"""The default model on a GPU: every kernel in Triton, and PyTorch's own layers, both compared with float64."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from ccella_fast.config import Config
from ccella_fast.kernels.backend import ENVIRONMENT
from ccella_fast.models import build_model
from kernel_fixtures import without_zeros

pytestmark = [pytest.mark.gpu, pytest.mark.xdist_group("model")]  # one process computes the truth, once
GRID = (32, 32, 16)  # half of the default latent in each direction, because of the truth in float64


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    with torch.device("cuda"):
        return without_zeros(build_model(Config()), std=0.02)


def noise_and_gradients(model, dtype):
    """The predicted noise and the gradients of the U-Net and of the adapter, each as one vector in float64."""
    model = copy.deepcopy(model).to(dtype)
    config, random = Config(), torch.Generator("cuda").manual_seed(1)
    draw = functools.partial(torch.randn, generator=random, device="cuda")
    x, text = draw(2, 4, *GRID), draw(2, config.text.max_length, config.model.input_dim)
    times, spacing = torch.tensor([300.0, 700.0], device="cuda"), torch.full((2, 3), 50.0, device="cuda")
    x, text, spacing = (tensor.bfloat16().to(dtype) for tensor in (x, text, spacing))  # equal in every dtype
    noise, logits = model(x, times.to(dtype), spacing=spacing, text=text)[:2]
    (noise.double().square().mean() + logits.double().square().mean()).backward()
    unet = [p.grad.double().flatten() for name, p in model.named_parameters() if name.startswith("unet.")]
    rest = [p.grad.double().flatten() for name, p in model.named_parameters() if not name.startswith("unet.")]
    return [noise.detach().double().flatten(), torch.cat(unet), torch.cat(rest)]


@pytest.fixture(scope="module")
def truth(model):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, "reference")
        return noise_and_gradients(model, torch.float64)


@pytest.fixture(scope="module")
def errors_of_pytorch(model, truth):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, "reference")
        return errors(noise_and_gradients(model, torch.bfloat16), truth)


def errors(found, truth):
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]


@pytest.mark.parametrize("backends", ["triton", ""], ids=["triton", "default"])
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["kept", "recomputed", "recomputed-reentrant"])
def test_gradients(model, truth, errors_of_pytorch, monkeypatch, backends, reentrant):
    monkeypatch.setenv(ENVIRONMENT, backends)
    if reentrant is not None:
        model.set_activation_checkpointing(functools.partial(checkpoint, use_reentrant=reentrant))
    try:
        found = errors(noise_and_gradients(model, torch.bfloat16), truth)
    finally:
        model.set_activation_checkpointing(None)
    print(f"errors {found}, PyTorch's {errors_of_pytorch}")
    assert all(ours <= 2 * plain for ours, plain in zip(found, errors_of_pytorch, strict=True))
