"""What others do to a network after `speed_up`: settings, dropout, wrappers, hooks on all modules, classes of their own."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.networks.blocks import CrossAttentionBlock, SABlock
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from ccella_fast.dropin import fusion, speed_up
from ccella_fast.dropin.rules import generative
from ccella_fast.dropin.rules.physicsnemo import VolumeNorm
from foreign_networks import NemoGroupNorm
from kernel_fixtures import record_calls

X = torch.randn(2, 12, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fused(monkeypatch):
    return record_calls(monkeypatch, fusion, "norm", "upsampled_convolution", "multi_head_attention")


def attention(kind):
    torch.manual_seed(0)
    return kind(8, 2, sequence_length=12).eval()


def upsampling():
    torch.manual_seed(0)
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv3d(4, 4, 3, padding=1))


def causal(block):
    block.causal, block.causal_mask = True, torch.tril(torch.ones(1, 1, 12, 12))


def dropout_alone_in_training(block):
    """As for Monte Carlo dropout: the rest of the network stays in evaluation."""
    for layer in (block.drop_weights, block.drop_output):
        layer.p = 0.5
        layer.train()


def another_dropout(block):
    block.drop_output = nn.Sequential(nn.ReLU())


@pytest.mark.parametrize("kind", [SABlock, CrossAttentionBlock])
@pytest.mark.parametrize(
    ("change", "is_fused"),
    [
        (lambda block: None, True),
        (lambda block: setattr(block, "scale", 0.05), True),
        (lambda block: setattr(block, "scale", torch.tensor(0.05)), True),
        (lambda block: setattr(block, "use_flash_attention", True), False),
        (causal, False), (dropout_alone_in_training, False), (another_dropout, False),
    ],
    ids=["nothing", "scale", "tensor", "flash", "causal", "dropout", "another"],
)  # fmt: skip
def test_attention_follows_settings_that_change_later(kind, change, is_fused, fused):
    original, fast = attention(kind), attention(kind)
    before = original(X)
    assert speed_up(fast).swapped
    for block in (original, fast):
        change(block)
    with torch.no_grad():
        torch.manual_seed(1)
        expected = original(X)
        torch.manual_seed(1)
        torch.testing.assert_close(fast(X), expected, rtol=1e-5, atol=1e-6)
    assert bool(fused) is is_fused
    changes_values = change.__name__ != "<lambda>" or block.scale == 0.05
    assert changes_values is not torch.allclose(expected, before, atol=1e-3)


def test_the_attention_matrix_is_stored_once_it_is_asked_for():
    block = attention(SABlock)
    speed_up(block)
    block.save_attn = True
    with torch.no_grad():
        block(X)
    torch.testing.assert_close(block.att_mat.sum(-1), torch.ones(2, 2, 12))


def test_a_learned_scale_has_its_gradient(monkeypatch):
    monkeypatch.setattr(fusion, "attention_pays", lambda x, scores: True)
    original, fast = attention(SABlock), attention(SABlock)
    speed_up(fast)
    for block in (original, fast):
        block.scale = nn.Parameter(torch.tensor(block.scale))  # its value is the usual one
        block(X).square().sum().backward()
    assert original.scale.grad.abs() > 1e-4
    torch.testing.assert_close(fast.scale.grad, original.scale.grad, rtol=1e-4, atol=1e-7)


def test_a_wrapper_needs_no_attributes_of_the_linear_layer_in_it():
    class Wrapper(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return self.layer(x) + x

    class Block(generative.ContextAttention):
        def __init__(self):
            super().__init__()
            self.num_heads, self.scale, self.use_flash_attention = 2, 0.5, False
            self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8) for _ in range(4))

    block = Block()
    block.to_q = Wrapper(block.to_q)
    q, k, v = (layer(X).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (block.to_q, block.to_k, block.to_v))
    expected = block.to_out(((0.5 * q @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))
    assert block.suits(X) is False  # on a CPU
    torch.testing.assert_close(block(X), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [upsampling, lambda: attention(SABlock)])
def test_hooks_on_all_modules_see_and_change_every_layer(make, fused):
    x = torch.randn(1, 4, 8, 8, 8) if make is upsampling else X
    original, fast = make(), make()
    speed_up(fast)
    with torch.no_grad():
        plain, seen = fast(x), []
        assert len(fused) == 1
        handle = register_module_forward_hook(lambda module, args, y: seen.append(type(module).__name__) or 1.5 * y)
        try:
            expected, count = original(x), len(seen)
            torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=1e-5)
        finally:
            handle.remove()
        assert len(seen) == 2 * count > 2 and len(fused) == 1
        assert torch.equal(fast(x), plain) and len(fused) == 2 and not torch.allclose(plain, expected, atol=1e-2)


def test_a_class_that_others_make_of_a_replacement_is_copied_undone_and_sped_up_again(fused):
    net, x = nn.Sequential(upsampling()), torch.randn(1, 4, 8, 8, 8)
    expected = net(x)
    report = speed_up(net)
    net[0].__class__ = type("Theirs", (type(net[0]),), {})  # as FSDP2 and parametrizations do
    twin = copy.deepcopy(net)
    assert type(twin[0]).__name__ == "Theirs"
    torch.testing.assert_close(twin(x), expected)
    assert len(fused) == 1
    report.undo()
    assert torch.equal(net(x), expected) and len(fused) == 1
    again = speed_up(net)
    assert again.swapped["upsample_conv3d"] == ["0"]
    torch.testing.assert_close(net(x), expected)
    assert len(fused) == 2 and not speed_up(net).swapped
    again.undo()
    assert torch.equal(net(x), expected) and len(fused) == 2 and type(net[0]).__name__ == "Theirs"


@pytest.mark.filterwarnings("ignore:var()")
def test_the_norm_of_physicsnemo_of_an_empty_batch():
    net = nn.Sequential(NemoGroupNorm(4, 8)).eval()
    expected = net(torch.zeros(0, 8, 4, 4, 4))
    speed_up(net)
    assert isinstance(net[0], VolumeNorm)
    with torch.no_grad():
        assert net(torch.zeros(0, 8, 4, 4, 4)).shape == expected.shape
