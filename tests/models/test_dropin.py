"""`speed_up` keeps outputs, gradients and names of the networks of other projects, and can be undone."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from monai.apps.generation.maisi.networks import autoencoderkl_maisi as maisi_vae
from monai.apps.generation.maisi.networks import diffusion_model_unet_maisi as maisi_unet
from monai.data.meta_tensor import MetaTensor
from monai.networks import nets
from torch import nn

import ccella_fast
from ccella_fast.dropin import fusion
from ccella_fast.dropin.matching import KINDS, speed_up
from ccella_fast.dropin.rules import torch_layers
from ccella_fast.errors import ConfigError


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomized(module):
    """Draw all parameters, since zero weights and identity norms would hide mistakes."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = (parameter.ndim == 1) * 0.5 + scale * torch.randn(parameter.shape, generator=generator)
    return module.eval()


UNET = {
    "spatial_dims": 3, "in_channels": 2, "out_channels": 2, "num_res_blocks": 1, "attention_levels": [False, True],
    "num_head_channels": [0, 8], "norm_num_groups": 4,
}  # fmt: skip


def unet(**overrides):
    settings = UNET | {"channels": [8, 16], "with_conditioning": True, "cross_attention_dim": 6} | overrides
    return nets.DiffusionModelUNet(**settings), (draw(2, 2, 8, 4, 6), torch.tensor([3, 700]), draw(2, 5, 6, seed=1))


def plain_unet():
    """Only self-attention, one linear layer for q, k and v, and residual blocks that resample."""
    settings = {"with_conditioning": False, "cross_attention_dim": None, "resblock_updown": True}
    net, inputs = unet(**settings, use_combined_linear=True, include_fc=False)
    return net, inputs[:2]


class Adapter(nn.Module):
    """A simple text adapter, as in a report-conditioned model around the U-Net of MAISI."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(draw(1, 3, 6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)

    def forward(self, text):
        query = self.query.expand(len(text), -1, -1)
        return self.norm(query + self.attention(query, text, text)[0])


class ForeignModel(nn.Module):
    """A module of another project that contains a U-Net of MONAI."""

    def __init__(self):
        super().__init__()
        self.adapter = Adapter()
        settings = {"num_channels": [8, 16], "with_conditioning": True, "cross_attention_dim": 6}
        self.unet = maisi_unet.DiffusionModelUNetMaisi(**UNET, **settings, include_spacing_input=True)

    def forward(self, x, timesteps, text, spacing):
        return self.unet(x, timesteps, context=self.adapter(text), spacing_tensor=spacing)


def foreign():
    return ForeignModel(), (draw(2, 2, 8, 4, 6), torch.tensor([3, 700]), draw(2, 5, 6, seed=1), draw(2, 3, seed=2))


def autoencoder():
    net = nets.AutoencoderKL(
        3, 1, 1, num_res_blocks=(1, 1), channels=(8, 16), attention_levels=(False, True), latent_channels=3,
        norm_num_groups=4,
    )  # fmt: skip
    return net, (draw(2, 1, 8, 4, 6),)


def maisi_autoencoder(splits=2):
    net = maisi_vae.AutoencoderKlMaisi(
        3, 1, 1, [1, 2], [8, 16], [False, False], latent_channels=3, norm_num_groups=4, num_splits=splits, dim_split=1,
        norm_float16=False, save_mem=True,
    )  # fmt: skip
    return net, (draw(2, 1, 4, 16, 6),)


def call(net, inputs):
    if isinstance(net, nets.AutoencoderKL):  # forward draws noise
        mean, sigma = net.encode(*inputs)
        return net.decode(mean + 0.5 * sigma)
    return net(*inputs)


NOT_KNOWN = {"monai.networks.nets.diffusion_model_unet.WrappedUpsample", f"{__name__}.Adapter"}
MODELS = {
    "unet": (unet, {"group_norm_silu": 9, "group_norm": 4, "attention": 12, "upsample_conv3d": 1}),
    "plain unet": (plain_unet, {"group_norm_silu": 11, "group_norm": 4, "attention": 4}),
    "foreign": (foreign, {"group_norm_silu": 9, "group_norm": 4, "attention": 12, "upsample_conv3d": 1}),
    "autoencoder": (autoencoder, {"group_norm_silu": 8, "group_norm": 6, "attention": 4, "upsample_conv3d": 1}),
    "maisi autoencoder": (maisi_autoencoder, {"unsplit": 31}),
}


@pytest.fixture(params=MODELS)
def case(request):
    build, counts = MODELS[request.param]
    torch.manual_seed(0)
    net, inputs = build()
    return randomized(net), inputs, counts


@pytest.fixture
def everywhere(monkeypatch):
    """Replacements compute wherever they may, as on a GPU."""
    monkeypatch.setattr(fusion, "norm_and_silu_pay", lambda x: x.ndim > 2)
    monkeypatch.setattr(fusion, "attention_pays", lambda x, scores: True)
    monkeypatch.setattr(fusion, "upsampling_pays", lambda x: True)
    monkeypatch.setattr(torch_layers.FusedGroupNorm, "suits", lambda self, input: input.ndim > 2)


# Values


@pytest.mark.usefixtures("everywhere")
def test_outputs_and_gradients_are_equal_and_undo_restores_the_classes(case):
    net, inputs, _ = case
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    classes = [(module, type(module)) for module in net.modules()]
    expected = call(net, inputs)
    target = draw(*expected.shape, seed=5)
    parameters = list(net.parameters())
    gradients = torch.autograd.grad((expected * target).sum(), parameters, allow_unused=True)

    report = speed_up(net)
    actual = call(net, inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad((actual * target).sum(), parameters, allow_unused=True)
    for mine, theirs in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(call(net, inputs), expected, rtol=1e-4, atol=1e-5)
    assert list(net.state_dict()) == list(state)
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in state.items())
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))

    report.undo()
    assert [(module, type(module)) for module in net.modules()] == classes
    assert torch.equal(call(net, inputs), expected)


def test_the_report_lists_the_replacements(case):
    net, _, counts = case
    report = speed_up(net)
    assert {kind: len(names) for kind, names in report.swapped.items()} == counts | {"metatensor": 1}
    assert not report.refused
    assert report.unknown.keys() <= NOT_KNOWN
    modules = dict(net.named_modules())
    for kind, names in report.swapped.items():
        if kind != "metatensor":
            assert kind in str(report) and all(name in modules for name in names)
    again = speed_up(net)
    assert not again.swapped and not again.refused
    assert str(again).startswith("this model contains no more modules than were replaced before")


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("name", ["unet", "foreign", "autoencoder"])  # the others run only in fp32 in PyTorch and MONAI
def test_the_error_in_bf16_is_at_most_twice_that_of_the_original(name):
    net, inputs = MODELS[name][0]()
    exact = copy.deepcopy(randomized(net)).double()
    errors = []
    with torch.no_grad():
        expected = call(exact, cast(inputs, torch.float64))
        net.to(torch.bfloat16)
        for _ in range(2):
            errors.append((call(net, cast(inputs, torch.bfloat16)).double() - expected).square().mean().sqrt())
            speed_up(net)
    assert 0 < errors[1] <= 2 * errors[0]


def cast(inputs, dtype):
    return [tensor.to(dtype) if tensor.is_floating_point() else tensor for tensor in inputs]


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize("mistake", ["no SiLU", "no shift", "none"])
def test_comparison_detects_a_wrong_replacement(mistake, monkeypatch):
    """Negative control."""
    net, inputs = unet()
    expected = call(randomized(net), inputs)
    norm = fusion.norm
    if mistake == "no SiLU":
        monkeypatch.setattr(fusion, "norm", lambda layer, x, silu, **others: norm(layer, x, silu=False, **others))
    if mistake == "no shift":
        monkeypatch.setattr(fusion, "norm", lambda layer, x, silu, shift=None: norm(layer, x, silu=silu))
    speed_up(net)
    assert torch.allclose(call(net, inputs), expected, rtol=1e-4, atol=1e-5) == (mistake == "none")


@pytest.mark.usefixtures("everywhere")
def test_outputs_are_equal_in_channels_last(case):
    net, inputs, _ = case
    with torch.no_grad():
        expected = call(net, inputs)
        speed_up(net.to(memory_format=torch.channels_last_3d))
        inputs = [tensor.to(memory_format=torch.channels_last_3d) if tensor.ndim == 5 else tensor for tensor in inputs]
        torch.testing.assert_close(call(net, inputs), expected, rtol=1e-4, atol=1e-4)


def test_maisi_autoencoder_has_no_splits_and_no_cache_flushes(monkeypatch):
    """With 3 splits of 16 planes, the convolution of MONAI loses a plane; the result must equal the network without splits."""
    net, inputs = maisi_autoencoder(splits=3)
    whole, _ = maisi_autoencoder(splits=1)
    randomized(net), whole.load_state_dict(net.state_dict())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: pytest.fail("empty_cache was called"))
    speed_up(net)
    actual = call(net, inputs)
    with torch.no_grad():
        tiled = call(net, inputs)
    monkeypatch.undo()
    expected = call(whole.eval(), inputs)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(tiled, expected, rtol=1e-4, atol=1e-5)


# Compatibility


@pytest.mark.usefixtures("everywhere")
def test_deepcopy_pickle_conversion_and_compilation_work():
    net, inputs = unet()
    expected = call(randomized(net), inputs)
    speed_up(net)
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301
        assert [type(a) for a in other.modules()] == [type(a) for a in net.modules()]
        torch.testing.assert_close(call(other, inputs), expected, rtol=1e-4, atol=1e-5)
        assert isinstance(other, nets.DiffusionModelUNet)
    double = copy.deepcopy(net).double()
    assert (
        double(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in inputs)).dtype == torch.float64
    )
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(*inputs), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="already compiled"):
        speed_up(compiled)


def test_hooks_are_called():
    net, inputs = unet()
    randomized(net)
    speed_up(net)
    seen = []
    net.down_blocks[0].resnets[0].norm1.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    call(net, inputs)
    assert seen == [torch.Size([2, 8, 8, 4, 6])]


def test_metatensors_are_unwrapped_at_the_input():
    net, (x, *rest) = unet()
    randomized(net)
    seen = []
    net.conv_in.register_forward_hook(lambda module, args, output: seen.append(type(args[0])))
    expected = net(x, *rest)
    net(MetaTensor(x), *rest)
    report = speed_up(net)
    actual = net(MetaTensor(x), *rest)
    assert seen == [torch.Tensor, MetaTensor, torch.Tensor] and type(actual) is torch.Tensor
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    vae, (image,) = autoencoder()
    speed_up(randomized(vae))
    mean, _ = vae.encode(MetaTensor(image))
    assert type(mean) is torch.Tensor and type(vae.decode(MetaTensor(mean))) is torch.Tensor
    timesteps, context = rest
    for volume in (MetaTensor(x), x):
        named = net(x=volume, timesteps=timesteps, context=MetaTensor(context))  # as the inferers of MONAI call it
        assert seen[-1] is torch.Tensor and type(named) is torch.Tensor and torch.equal(named, actual)
    report.undo()
    speed_up(net, without=["metatensor"])
    net(MetaTensor(x), *rest)
    assert seen[-1] is MetaTensor


@pytest.mark.usefixtures("everywhere")
def test_weights_trained_before_undo_are_kept():
    net, inputs = unet()
    randomized(net).train()
    report = speed_up(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    before = call(net, inputs)
    before.square().mean().backward()
    optimizer.step()
    after = call(net, inputs)
    assert not torch.allclose(before, after)
    report.undo()
    torch.testing.assert_close(call(net, inputs), after, rtol=1e-4, atol=1e-5)


# Modules that are not replaced


def refusals(net):
    return speed_up(net).refused


def test_the_report_gives_the_reason_for_each_module_that_is_not_replaced():
    from monai.networks.blocks import CrossAttentionBlock, SABlock

    assert "save_attn" in refusals(SABlock(8, 2, save_attn=True))["SABlock"]
    assert "causal" in refusals(SABlock(8, 2, causal=True, sequence_length=4))["SABlock"]
    assert "flash" in refusals(SABlock(8, 2, dropout_rate=0.1, use_flash_attention=True))["SABlock"]
    relative = {"rel_pos_embedding": "decomposed", "input_size": (2, 2, 2)}
    assert "relative position" in refusals(CrossAttentionBlock(8, 2, **relative))["CrossAttentionBlock"]
    assert "weight and bias" in refusals(nn.GroupNorm(2, 4, affine=False))["GroupNorm"]
    flat = nets.DiffusionModelUNet(**UNET | {"spatial_dims": 2}, channels=[8, 16])
    assert refusals(flat) == {"up_blocks.0.upsampler": "it is two-dimensional"}
    odd = nn.Sequential(nn.Upsample(scale_factor=3), nn.Conv3d(2, 2, 3, padding=1))
    assert "not by 2" in refusals(odd)["Sequential"]
    strided = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv3d(2, 2, 3, padding=1, stride=2))
    assert "dense 3x3x3" in refusals(strided)["Sequential"]
    for changes in ({"dilation": 2, "padding": 2}, {"groups": 2}, {"kernel_size": 5, "padding": 2}):
        other = nn.Conv3d(2, 2, **{"kernel_size": 3, "padding": 1} | changes)
        assert "dense 3x3x3" in refusals(nn.Sequential(nn.Upsample(scale_factor=2), other))["Sequential"]
    unpadded = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv3d(2, 2, 3))
    assert "pad" in refusals(unpadded)["Sequential"]
    sized = nn.Sequential(nn.Upsample(size=8), nn.Conv3d(2, 2, 3, padding=1))
    assert "not by 2" in refusals(sized)["Sequential"]
    smooth = nn.Sequential(nn.Upsample(scale_factor=2, mode="trilinear"), nn.Conv3d(2, 2, 3, padding=1))
    assert not speed_up(smooth).swapped
    circular = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv3d(2, 2, 3, padding=1, padding_mode="circular"))
    assert "pad" in refusals(circular)["Sequential"]


def test_hooked_and_overridden_modules_are_not_replaced():
    hooked = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    hooked[0].register_forward_hook(lambda *args: None)
    assert "hook" in speed_up(hooked).refused["Sequential"]
    hooked = nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())
    hooked[1].register_forward_pre_hook(lambda *args: None)
    assert "hook" in speed_up(hooked).refused["Sequential"]

    replaced, _ = unet()
    replaced.middle_block.resnet_1.forward = replaced.middle_block.resnet_1.forward
    assert "replaced" in speed_up(replaced).refused["middle_block.resnet_1"]

    class Overridden(nn.GroupNorm):
        def forward(self, x):
            return super().forward(x) + 1

    class Inherited(nn.GroupNorm):
        pass

    assert not speed_up(Overridden(2, 4)).swapped
    assert speed_up(Inherited(2, 4)).swapped["group_norm"] == ["Inherited"]


def test_self_attention_with_dropout_or_a_mask_is_that_of_monai():
    from monai.networks.blocks import SABlock

    block = randomized(SABlock(8, 2, dropout_rate=0.5))
    x, mask = draw(2, 5, 8), torch.tensor([[1, 1, 1, 0, 0]] * 2)
    block.train()
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(block(x))
        block.eval()
        results += [block(x), block(x, attn_mask=mask)]
        block.train()
        speed_up(block)
    for before, after in zip(results[:3], results[3:], strict=True):
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(results[0], results[1]) and not torch.allclose(results[1], results[2])


def test_cross_attention_with_dropout_is_that_of_monai():
    from monai.networks.blocks import CrossAttentionBlock

    block = randomized(CrossAttentionBlock(8, 2, dropout_rate=0.5)).train()
    x, context = draw(2, 5, 8), draw(2, 3, 8, seed=1)
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(block(x, context))
        speed_up(block)
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(results[0], block.eval()(x, context))


def test_kinds_can_be_left_out():
    net, inputs = unet()
    expected = call(randomized(net), inputs)
    for kind in KINDS:
        report = speed_up(net, without=[kind])
        assert kind not in report.swapped and len(report.swapped) >= 3
        torch.testing.assert_close(call(net, inputs), expected, rtol=1e-4, atol=1e-5)
        report.undo()
    with pytest.raises(ConfigError, match="did you mean 'attention'"):
        speed_up(net, without=["atention"])


def test_monai_is_not_imported_for_other_models():
    code = (
        "import sys, torch, ccella_fast; from torch import nn;"
        "print(ccella_fast.speed_up(nn.Sequential(nn.GroupNorm(2, 4), nn.SiLU())).swapped, 'monai' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "{'group_norm_silu': ['Sequential']} False"
    assert ccella_fast.speed_up is speed_up
