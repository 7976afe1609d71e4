"""The blocks of NV-Generate-CTMR's rectified flow, `resblock_updown` and `include_fc`, wherever blocks are called singly."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from ccella_fast.models import build_model
from ccella_fast.models.feature_reuse import denoise_keeping, denoise_reusing
from ccella_fast.reference_checkpoint import read_reference, write_reference
from maisi_weights import SIZES, maisi_unet

ADAPTER = {"cross_attention_dim": 32, "input_dim": 24, "num_latents": 4, "adapter_blocks": 2, "adapter_heads": 2}
FLOW = {**SIZES, **ADAPTER, "adapter_time_dim": 16, "class_head_dim": 8, "resblock_updown": True, "include_fc": True}


def random_model(variant: str) -> nn.Module:
    """With weights that are all random, also those that training starts from zero."""
    torch.manual_seed(0)
    model = build_model(variant, **FLOW).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=(parameter[0].numel() if parameter.ndim > 1 else 4) ** -0.5)
    return model


def example():
    source = torch.Generator().manual_seed(1)
    x, context = torch.randn(2, 4, 8, 16, 8, generator=source), torch.randn(2, 5, 32, generator=source)
    return x, context, torch.tensor([3, 700]), torch.tensor([[50.0, 50.0, 56.25], [60.0, 70.0, 300.0]])


@torch.no_grad()
def test_a_unet_with_a_context_computes_what_monai_computes():
    theirs = maisi_unet("v2", with_conditioning=True, cross_attention_dim=32, num_class_embeds=None)
    ours = build_model("ELLAMAISI", **FLOW).unet
    ours.load_state_dict(theirs.state_dict())
    x, context, timesteps, spacing = example()
    expected = theirs(x, timesteps, context=context, spacing_tensor=spacing)
    found = ours.denoise(x, ours.project(ours.embed(timesteps, spacing, None), context, None))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    other = theirs(x, timesteps, context=-context, spacing_tensor=spacing)
    assert float((other - expected).std()) > 1e-2 * float(expected.std())  # negative control


@torch.no_grad()
@pytest.mark.parametrize("variant", ["MAISI", "ELLAMAISI"])
def test_a_reused_feature_of_the_same_timestep_changes_nothing(variant):
    """At every depth: the upsamplers in the reused part have a conditioning of their own."""
    model = random_model(variant)
    unet = getattr(model, "unet", model)
    x, context, timesteps, spacing = example()
    conditioning = unet.project(unet.embed(timesteps, spacing, None), context if variant == "ELLAMAISI" else None, None)
    expected = unet.denoise(x, conditioning)
    for depth in range(1, 6):
        output, feature = denoise_keeping(unet, x, conditioning, depth)
        assert torch.equal(output, expected)
        assert torch.equal(denoise_reusing(unet, x, conditioning, depth, feature), expected), depth
        assert not torch.equal(denoise_reusing(unet, x, conditioning, depth, 0 * feature), expected)


def test_the_architecture_is_found_in_a_file_of_the_reference(tmp_path):
    wide = {"num_channels": [32, 64, 64], "num_head_channels": [0, 32, 32], "norm_num_groups": 32, "adapter_heads": 8}
    for changed in ({}, {"resblock_updown": False}, {"include_fc": False}):
        model = build_model("CCELLA", **{**FLOW, **wide, **changed})
        write_reference(tmp_path / "model.pt", model.state_dict(), [1.0])
        assert read_reference(tmp_path / "model.pt").config == model.config


def test_activation_checkpointing_has_the_same_gradients():
    model = random_model("MAISI").train()
    x, _, timesteps, spacing = example()
    runner = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    gradients = []
    for function in (None, runner):
        model.set_activation_checkpointing(function)
        model.zero_grad()
        model(x, timesteps, spacing=spacing).noise.square().mean().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        assert one.any()
