"""What the U-Net does on a GPU only: computed here on a CPU, and followed on meta tensors with the layouts of cuDNN."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import launch_model
import op_counter
from benchmark_fixtures import TINY
from ccella_fast.config import Config
from ccella_fast.kernels.layout import is_channels_last
from ccella_fast.models import blocks, build_model, few_channels, unet3d
from ccella_fast.models import channels_last as layout
from kernel_fixtures import channels_last, check_fused, draw, dtype_params, without_zeros

LAST = torch.channels_last_3d


@pytest.fixture
def as_on_gpu(monkeypatch):
    """CPU tensors take the path of a GPU."""
    for module in (layout, blocks, unet3d):
        monkeypatch.setattr(module, "on_gpu", lambda tensor: True)


class Convolutions(TorchDispatchMode):
    """Records whether the volumes that each convolution and its backward pass read are channels-last."""

    def __init__(self):
        super().__init__()
        self.layouts = {"convolution": [], "convolution_backward": []}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in self.layouts:
            volumes = args[:1] if name == "convolution" else args[:2]
            self.layouts[name].append(all(is_channels_last(volume) for volume in volumes))
        return launch_model.in_layout_of_cudnn(name, args, func(*args, **(kwargs or {})))


def layouts_of_a_training_step(variant, **attributes):
    """Of every convolution of the default model; its weights are contiguous, as those that DeepSpeed flattens are."""
    config = Config.model_validate({"model": {"variant": variant}})
    with torch.device("meta"):
        model = build_model(config).bfloat16()
        x = torch.empty(2, 4, 32, 32, 16, dtype=torch.bfloat16)
        inputs = {"spacing": torch.zeros(2, 3), "text": torch.empty(2, 8, config.model.input_dim, dtype=torch.bfloat16)}
        inputs["pirads"] = torch.zeros(2, config.model.num_classes)
        times = torch.zeros(2)
    for name, value in attributes.items():
        setattr(getattr(model, "unet", model), name, value)
    with op_counter.backend("triton,conv3d=reference"), op_counter.FlashAttention(), Convolutions() as seen:
        model(x, times, **inputs).noise.float().square().mean().backward()
    return seen.layouts


@pytest.mark.parametrize("variant", ["CCELLA", "RADMAISI"])
def test_every_convolution_of_a_training_step_reads_channels_last(variant):
    found = layouts_of_a_training_step(variant)
    assert all(found["convolution"]) and len(found["convolution"]) >= 49
    assert len(found["convolution_backward"]) >= 49
    control = layouts_of_a_training_step(variant, channels_last=False)
    assert not control["convolution"][0] and not all(control["convolution"])


def tiny(variant):
    config = Config.model_validate({"model": {**TINY, "variant": variant}})
    torch.manual_seed(0)
    return config, without_zeros(build_model(config).double(), std=0.1)


def noise_and_gradients(model, config):
    x, text = draw(2, 4, 8, 8, 8), draw(2, 5, config.model.input_dim, seed=1)
    conditions = {"spacing": draw(2, 3, seed=2), "text": text, "pirads": draw(2, config.model.num_classes, seed=3)}
    noise = model(x, torch.tensor([300.0, 700.0]), **conditions).noise
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [noise.detach(), *torch.autograd.grad(noise.square().sum(), parameters, allow_unused=True)]


@pytest.mark.parametrize("variant", ["CCELLA", "RADMAISI"])
def test_the_whole_model_and_its_gradients_are_those_of_a_cpu(variant, request):
    config, model = tiny(variant)
    expected = noise_and_gradients(copy.deepcopy(model), config)
    names = sorted(model.state_dict())
    request.getfixturevalue("as_on_gpu")
    for module in model.modules():
        if isinstance(module, torch.nn.Conv3d):  # in float64 on a CPU they return NCDHW
            module.register_forward_hook(lambda module, args, y: y.contiguous(memory_format=LAST))
    found = noise_and_gradients(model, config)
    assert is_channels_last(found[0])
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)
    with torch.no_grad():  # with weights that are stacked once
        for _ in range(2):
            torch.testing.assert_close(noise_only(model, config), expected[0], rtol=1e-9, atol=1e-9)
    assert sorted(model.state_dict()) == names


def noise_only(model, config):
    return model(
        draw(2, 4, 8, 8, 8), torch.tensor([300.0, 700.0]), spacing=draw(2, 3, seed=2),
        text=draw(2, 5, config.model.input_dim, seed=1), pirads=draw(2, config.model.num_classes, seed=3),
    ).noise  # fmt: skip


@pytest.mark.parametrize("dtype", dtype_params(torch.float32, torch.bfloat16))
def test_pointwise_convolution(dtype):
    x = channels_last(draw(2, 6, 3, 4, 5, dtype=dtype))
    weight, bias = draw(7, 6, 1, 1, 1, seed=1, dtype=dtype), draw(7, seed=2, dtype=dtype)
    names = ["y", "dx", "dweight", "dbias"]
    check_fused(layout.pointwise_conv3d, F.conv3d, [x, weight, bias], names=names)
    y = layout.pointwise_conv3d(x, weight, None)
    assert is_channels_last(y) and layout.to_tokens(y).is_contiguous()


def test_joined_channels_have_the_same_bits_and_stay_channels_last(as_on_gpu):
    first, second = channels_last(draw(2, 3, 4, 5, 6)), channels_last(draw(2, 2, 4, 5, 6, seed=1))
    joined = layout.join_channels(first, second)
    assert torch.equal(joined, torch.cat([first, second], dim=1)) and is_channels_last(joined)
    mixed = layout.join_channels(first, second.contiguous())
    assert torch.equal(mixed, joined)
    assert op_counter.count(lambda: layout.join_channels(first, second)).launches == 1
    assert op_counter.count(lambda: torch.cat([first, second], dim=1)).launches == 2


@pytest.mark.parametrize("dtype", dtype_params(torch.float32, torch.bfloat16))
@pytest.mark.parametrize(("inputs", "outputs"), [(4, 12), (12, 4), (1, 3), (3, 1), (5, 5)])
def test_weight_gradient_of_few_channels(inputs, outputs, dtype):
    """The truth is PyTorch's convolution in float64; the error may be twice that of PyTorch's in `dtype`."""
    x, dy = draw(2, inputs, 5, 3, 4), draw(2, outputs, 5, 3, 4, seed=1)
    x, dy = x.to(dtype).double(), dy.to(dtype).double()
    truth = torch.nn.grad.conv3d_weight(x, (outputs, inputs, 3, 3, 3), dy, padding=1)
    low, low_dy = channels_last(x.to(dtype)), channels_last(dy.to(dtype))
    # PyTorch's gradient in fp32, rounded: oneDNN's in bf16 is wrong on small grids.
    plain = torch.nn.grad.conv3d_weight(low.float(), truth.shape, low_dy.float(), padding=1).to(dtype)
    found = few_channels.weight_gradient(low, low_dy)
    assert found.dtype == dtype and found.is_contiguous()
    scale = float(truth.abs().max())
    assert float((found - truth).abs().max()) <= 2 * float((plain - truth).abs().max()) + torch.finfo(dtype).eps * scale
    mirrored = found.flip(2)  # the control: the taps in the wrong order
    assert float((mirrored - truth).abs().max()) > 0.1 * scale


@pytest.mark.parametrize(("inputs", "outputs"), [(2, 3), (3, 2)])
def test_gradients_of_a_convolution_with_few_channels(inputs, outputs):
    tensors = [draw(1, inputs, 3, 2, 3), draw(outputs, inputs, 3, 3, 3, seed=1), draw(outputs, seed=2)]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    assert torch.equal(few_channels.conv3d_few_channels(*tensors), F.conv3d(*tensors, padding=1))
    torch.autograd.gradcheck(few_channels.conv3d_few_channels, tensors)


def test_only_convolutions_with_few_channels_on_a_gpu_take_that_path(monkeypatch):
    taken = []
    convolve = few_channels.conv3d_few_channels
    monkeypatch.setattr(blocks, "conv3d_few_channels", lambda *args: taken.append(args[1].shape[:2]) or convolve(*args))
    layers = [blocks.Conv3d(*channels, 3, padding=1) for channels in ((4, 16), (16, 16), (16, 4))]
    x = torch.randn(1, 4, 3, 3, 3)
    torch.nn.Sequential(*layers)(x)
    assert not taken
    monkeypatch.setattr(blocks, "on_gpu", lambda tensor: True)
    torch.nn.Sequential(*layers)(x)
    assert taken == [(16, 4), (4, 16)]
    with torch.no_grad():
        torch.nn.Sequential(*layers)(x)
    assert len(taken) == 2


@pytest.mark.parametrize("bias", [False, True])
def test_queries_keys_and_values_are_one_product(bias, as_on_gpu, monkeypatch):
    module, tokens = blocks.SelfAttention(8, 4, bias=bias).double(), draw(2, 5, 8)
    stacks = []
    monkeypatch.setattr(torch, "cat", lambda tensors, plain=torch.cat, **kw: stacks.append(1) or plain(tensors, **kw))

    def separately():
        q, k, v = (blocks.to_heads(linear(tokens), 4) for linear in (module.to_q, module.to_k, module.to_v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    module.eval()
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(module(tokens), separately())
        assert len(stacks) == 1 + bias
        module.to_k.weight.mul_(2)  # the stacked weight is out of date
        torch.testing.assert_close(module(tokens), separately())
        assert len(stacks) == 2 + bias
        module.to_v.weight.data.mul_(2)  # cannot be noticed ...
        assert not torch.allclose(module(tokens), separately())
        module.eval()  # ... but this clears it
        torch.testing.assert_close(module(tokens), separately())
    weights = [module.to_q.weight, module.to_k.weight, module.to_v.weight]
    found, expected = (torch.autograd.grad(y().square().sum(), weights) for y in (lambda: module(tokens), separately))
    torch.testing.assert_close(found, expected)


class LowRankLinear(torch.nn.Linear):
    """A linear layer with an addition of rank 1, as LoRA's."""

    def forward(self, tokens):
        return super().forward(tokens) + tokens.mean(-1, keepdim=True)


def test_a_layer_that_is_more_than_its_weight_is_called(as_on_gpu):
    module, tokens = blocks.SelfAttention(8, 4).double().eval(), draw(2, 5, 8)
    with torch.no_grad():
        plain = module(tokens)
        module.to_v = LowRankLinear(8, 8, bias=False).double()
        module.to_v.weight.zero_()
        q, k = (blocks.to_heads(linear(tokens), 4) for linear in (module.to_q, module.to_k))
        weights = (q @ k.mT / 2).softmax(-1)
        # all values of a token are equal
        expected = (weights @ tokens.mean(-1, keepdim=True)[:, None]).expand(2, 2, 5, 4).transpose(1, 2).flatten(2)
        torch.testing.assert_close(module(tokens), expected)
        assert not torch.allclose(plain, expected)
