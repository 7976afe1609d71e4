"""FLOPs of a training step against those of its layers, and the rates of data sheets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from ccella_fast.models import build_model
from ccella_fast.training.model_flops import peak_flops, step_flops
from training_fixtures import TOKENS, settings


def layer_flops(config) -> int:
    """Twice the multiplications of every convolution and linear layer in a forward pass, from the shapes that they see."""
    total = 0

    def count(layer, inputs, output):
        nonlocal total
        total += 2 * output.numel() * layer.weight[0].numel()

    with torch.device("meta"):
        model = build_model(config)
        for layer in model.modules():
            if isinstance(layer, (nn.Conv3d, nn.Linear)):
                layer.register_forward_hook(count)
        x = torch.empty(config.training.batch_size, 4, *config.check_grid())
        inputs = {"spacing": torch.empty(len(x), 3), "text": torch.empty(len(x), TOKENS, config.model.input_dim)}
        model(x, torch.zeros(len(x), dtype=torch.long), **inputs)
    return total


def test_a_step_has_three_times_the_flops_of_its_forward_pass():
    """The backward pass of a layer has two products. Attention, a few percent here, and layers whose input needs no gradient
    are what remains."""
    config = settings(training__batch_size=2, training__gradient_accumulation_steps=1)
    flops, layers = step_flops(config, tokens=TOKENS), layer_flops(config)
    assert 2.9 * layers < flops < 3.3 * layers
    assert step_flops(settings(training__batch_size=4), tokens=TOKENS) == 2 * flops
    assert (
        step_flops(settings(training__batch_size=2, training__gradient_accumulation_steps=3), tokens=TOKENS)
        == 3 * flops
    )


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.5), ("NVIDIA H100 PCIe", 756.5), ("NVIDIA GH200 480GB", 989.5), ("NVIDIA L40S", 362.0),
        ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA RTX A4000", None), ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
    ],
)  # fmt: skip
def test_the_rate_is_that_of_the_device(monkeypatch, name, teraflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    device = SimpleNamespace(type="cuda")
    assert peak_flops(device, "bf16") == (None if teraflops is None else 1e12 * teraflops)
    assert peak_flops(device, "fp32") is None and peak_flops(torch.device("cpu"), "bf16") is None
