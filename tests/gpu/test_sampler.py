"""The sampler on a GPU: steps from a CUDA graph equal eager ones, and both are near a chain in float32."""

from __future__ import annotations

import pytest
import torch

from ccella_fast import FastSampler
from ccella_fast.config import Config
from ccella_fast.models import build_model
from ccella_fast.models.autoencoder import Autoencoder
from ccella_fast.sampling import Optimizations
from kernel_fixtures import without_zeros
from sampling_fixtures import FakeEncoder, write_checkpoint

pytestmark = pytest.mark.gpu


def error(got: torch.Tensor, truth: torch.Tensor) -> float:
    return float((got.double() - truth.double()).norm() / truth.double().norm())


def test_a_replayed_step_equals_an_eager_one_without_synchronization(tmp_path):
    checkpoint = write_checkpoint(tmp_path / "step")
    request = {
        "reports": ["abc", "d"], "num_inference_steps": 12, "solver": "ddpm", "guidance_scale": 2.0, "progress": False,
    }  # fmt: skip

    def make(**options):
        return FastSampler.from_checkpoint(
            checkpoint, device="cuda", dtype="float32", text_encoder=FakeEncoder(), **options
        )

    eager = make(optimizations=Optimizations(cuda_graph=False, overlap_decode=False))(**request)
    sampler = make()
    captured = sampler(**request)
    assert error(captured.latents, eager.latents) < 1e-4 > error(captured.volumes, eager.volumes)
    (loop,) = sampler._loops.values()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            loop._trajectory.index.zero_()
            for i in range(12):
                loop._trajectory.draw_noise(i)
                loop._step(i)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_default_model_at_its_full_size():
    config = Config()
    torch.manual_seed(0)
    with torch.device("cuda"):
        model, autoencoder = build_model(config), Autoencoder(config.autoencoder)
    for network in (model, autoencoder):
        without_zeros(network, std=0.02)
    features = torch.randn(
        2, config.text.max_length, config.model.input_dim, generator=torch.Generator().manual_seed(2)
    )
    request = {
        "text": features, "spacing": [config.data.spacing] * 2, "seeds": [3, 4], "num_inference_steps": 5, "solver": "ddim",
        "progress": False, "batch_size": 1,
    }  # fmt: skip

    def sample(**options):
        return FastSampler(model, autoencoder, config=config, **options)(**request)

    single = sample(dtype="float32", optimizations=Optimizations.off())
    plain = sample(dtype="bfloat16", optimizations=Optimizations.off())
    eager = sample(optimizations=Optimizations(cuda_graph=False, overlap_decode=False))
    captured = sample()
    found = {
        name: (error(result.latents, single.latents), error(result.volumes, single.volumes))
        for name, result in {"plain": plain, "eager": eager, "captured": captured}.items()
    }
    print(found, "captured against eager", error(captured.latents, eager.latents))
    assert captured.volumes.shape[-3:] == (256, 256, 128)
    for ours in (found["eager"], found["captured"]):
        assert all(a <= 2 * b for a, b in zip(ours, found["plain"], strict=True))
    assert error(captured.latents, eager.latents) <= found["plain"][0]
