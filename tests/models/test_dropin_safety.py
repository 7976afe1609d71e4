"""`speed_up` changes no value: whoever calls the layers, whatever is hooked or wrapped later, and for every derivative."""

from __future__ import annotations

import copy

import pytest
import torch
from monai.data.meta_tensor import MetaTensor
from monai.networks import nets
from monai.networks.blocks import SABlock
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from ccella_fast.dropin import fusion
from ccella_fast.dropin.comparison import in_float64
from ccella_fast.dropin.matching import speed_up
from ccella_fast.dropin.rules import torch_layers
from ccella_fast.errors import ConfigError
from kernel_fixtures import record_calls


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def everywhere(request, monkeypatch):
    """Replacements compute wherever they may, as on a GPU; not in tests marked with `as_on_a_cpu`."""
    # Trainings at ZeRO stage 3 in this process leave DeepSpeed's own, which has neither second nor forward derivatives.
    monkeypatch.setattr(nn.functional, "linear", torch._C._nn.linear)
    if "as_on_a_cpu" not in request.fixturenames:
        monkeypatch.setattr(fusion, "norm_and_silu_pay", lambda x: x.ndim > 2)
        monkeypatch.setattr(fusion, "attention_pays", lambda x, scores: True)
        monkeypatch.setattr(fusion, "upsampling_pays", lambda x: True)
        monkeypatch.setattr(torch_layers.FusedGroupNorm, "suits", lambda self, input: input.ndim > 2)


@pytest.fixture
def as_on_a_cpu():
    """Replacements compute where they pay."""


@pytest.fixture
def fused(monkeypatch):
    """The names of the fused operations that are computed, in order."""
    return record_calls(monkeypatch, fusion, "norm", "upsampled_convolution", "multi_head_attention")


def unet():
    torch.manual_seed(0)
    net = nets.DiffusionModelUNet(
        3, 1, 1, num_res_blocks=1, channels=(8, 16), attention_levels=(False, True), norm_num_groups=4, num_head_channels=8
    )  # fmt: skip
    for parameter in net.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape)
    return net.eval(), draw(1, 1, 8, 8, 8), torch.tensor([5])


def norm_silu_conv():
    return nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU(), nn.Conv3d(16, 16, 3, padding=1))


class Modulated(nn.Module):
    """The residual block of ADM: a scale and a shift between the norm and the rest of one nn.Sequential."""

    def __init__(self):
        super().__init__()
        self.layers = norm_silu_conv()

    def forward(self, x):
        norm, rest = self.layers[0], self.layers[1:]
        return rest(norm(x) * 1.5 + 0.3)


class Features(nn.Module):
    """The output of every layer of an nn.Sequential."""

    def __init__(self):
        super().__init__()
        self.layers = norm_silu_conv()

    def forward(self, x):
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x.flatten())
        return torch.cat(features)


class Halves(nn.Module):
    """Two slices, each of which is called as a whole, and an upsampling that is also called alone."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*norm_silu_conv(), nn.Upsample(scale_factor=2), nn.Conv3d(16, 4, 3, padding=1))

    def forward(self, x):
        h = self.layers[:3](x)
        return self.layers[3:](h) + self.layers[3](h).mean()


class Shared(nn.Module):
    """One SiLU after two norms, and alone."""

    def __init__(self):
        super().__init__()
        silu = nn.SiLU()
        self.layers = nn.ModuleList(nn.Sequential(nn.GroupNorm(4, 16), silu) for _ in range(2))
        self.silu = silu

    def forward(self, x):
        return self.silu(self.layers[1](self.layers[0](x)))


@pytest.mark.parametrize(
    ("kind", "computed"),
    [(Modulated, []), (Features, []), (Halves, ["norm", "upsampled_convolution"]), (Shared, ["norm", "norm"])],
)
def test_layers_of_a_container_that_others_call_compute_what_they_did(kind, computed, fused):
    torch.manual_seed(0)
    net, x = kind(), draw(2, 16, 4, 4, 4)
    expected = net(x)
    report = speed_up(net)
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)
    assert "group_norm_silu" in report.swapped and fused == computed


def test_the_silu_after_a_norm_of_features_is_not_lost():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(8, 8), nn.GroupNorm(2, 8), nn.SiLU()), draw(4, 8)
    expected = net(x)
    assert speed_up(net).swapped and torch.equal(net(x), expected)


def derivatives(net, x, t):
    """The derivative in a direction, the gradient of a squared gradient, by torch.func, and of two backward passes."""

    def penalty(v):
        (gradient,) = torch.autograd.grad(net(v, t).square().sum(), v, create_graph=True)
        return gradient.square().sum()

    v, direction = x.clone().requires_grad_(), draw(*x.shape, seed=3)
    parameters = dict(net.named_parameters())
    names = ["conv_in.conv.weight", "middle_block.resnet_1.norm2.weight", "middle_block.attention.attn.to_k.weight"]
    first = net(v, t).square().sum()
    twice = [torch.autograd.grad(first, v, retain_graph=True)[0] for _ in range(2)]
    return {
        "jvp": torch.func.jvp(lambda v: net(v, t), (x,), (direction,))[1],
        "penalty": torch.cat(
            [g.flatten() for g in torch.autograd.grad(penalty(v), [parameters[name] for name in names])]
        ),
        "func": torch.func.grad(lambda v: net(v, t).square().sum())(x),
        "vmap": torch.func.vmap(lambda v: net(v, t))(x[None]),
        "first": twice[0],
        "again": twice[1],
    }


def test_every_derivative_is_that_of_the_original(fused):
    net, x, t = unet()
    expected = derivatives(net, x, t)
    assert not fused
    speed_up(net)
    found = derivatives(net, x, t)
    assert set(fused) == {"norm", "multi_head_attention", "upsampled_convolution"}
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()), msg=name)
    assert torch.equal(found["first"], found["again"])


def test_a_second_derivative_of_another_operation_would_be_noticed(monkeypatch):
    """Negative control."""
    net, x, t = unet()
    expected = derivatives(net, x, t)["penalty"]
    monkeypatch.setattr(fusion, "attention_reference", lambda q, k, v: q + 0 * k.sum() + v)
    speed_up(net)
    assert not torch.allclose(derivatives(net, x, t)["penalty"], expected, rtol=1e-2, atol=1e-3)


def test_activation_checkpointing_of_replaced_modules(fused):
    from torch.utils.checkpoint import checkpoint

    net, x, t = unet()
    speed_up(net)
    gradients = []
    for run in (lambda v: net(v, t), *(lambda v, r=r: checkpoint(net, v, t, use_reentrant=r) for r in (False, True))):
        v = x.clone().requires_grad_()
        run(v).square().sum().backward()
        gradients.append((v.grad, net.conv_in.conv.weight.grad))
        net.zero_grad()
    assert fused
    for found in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found, gradients[0], strict=True))


def test_a_traced_network_is_the_original():
    net, x, t = unet()
    expected = net(x, t)
    speed_up(net)
    torch.testing.assert_close(torch.jit.trace(net, (x, t))(x, t), expected)


def test_a_scripted_network_is_the_original():
    net = nets.SegResNet(3, 8, 1, 1, blocks_down=(1, 1), blocks_up=(1,)).eval()
    x = draw(1, 1, 8, 8, 8)
    expected, classes = net(x), [type(module) for module in net.modules()]
    replaced = speed_up(net).swapped
    assert replaced["group_norm"]
    with pytest.warns(UserWarning, match="call speed_up again"):
        scripted = torch.jit.script(net)
    assert torch.equal(scripted(x), expected)
    assert not any("Faster" in module.original_name for module in scripted.modules())
    assert [type(module) for module in net.modules()][1:] == classes[1:]  # the network itself still unwraps MetaTensors
    assert torch.equal(net(x), expected)
    again = speed_up(net).swapped
    assert again == {kind: names for kind, names in replaced.items() if kind != "metatensor"}
    torch.testing.assert_close(net(x), expected)


# What happens after speed_up


class Lora(nn.Module):
    """A layer with an additional product of low rank, here its input's mean."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) + x.mean()


def hook(module):
    module.register_forward_hook(lambda module, args, output: 2 * output)


def weight_norm(module):
    parametrizations.weight_norm(module)


def other_class(module):
    """As FSDP2's `fully_shard` does."""
    module.__class__ = type(f"FSDP{type(module).__name__}", (type(module),), {})


def pair(*layers):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(4, 4, 1), *layers)


PAIRS = {
    "norm": lambda: pair(nn.GroupNorm(2, 4), nn.SiLU()),
    "upsampling": lambda: pair(nn.Upsample(scale_factor=2), nn.Conv3d(4, 4, 3, padding=1)),
}


@pytest.mark.parametrize(
    ("name", "index", "change"),
    [
        *((name, index, change) for name in PAIRS for index in (1, 2) for change in (hook, other_class)),
        ("norm", 1, weight_norm), ("upsampling", 2, weight_norm),
    ],
)  # fmt: skip
def test_a_layer_that_is_changed_later_acts_as_in_the_original_and_survives_undo(name, index, change):
    net, original, x = PAIRS[name](), PAIRS[name](), draw(1, 4, 3, 3, 3)
    report = speed_up(net)
    for each in (net, original):
        change(each[index])
    expected = original(x)
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)
    report.undo()
    assert type(net) is nn.Sequential and torch.equal(net(x), expected)


@pytest.mark.parametrize("change", [hook, other_class])
def test_a_container_that_is_changed_later_keeps_the_change_after_undo(change, fused):
    net, original, x = PAIRS["norm"](), PAIRS["norm"](), draw(1, 4, 3, 3, 3)
    report = speed_up(net)
    change(net), change(original)
    torch.testing.assert_close(net(x), original(x), rtol=1e-5, atol=1e-5)
    assert fused.pop() == "norm"
    kind = type(net)
    report.undo()
    assert torch.equal(net(x), original(x)) and not fused
    assert type(net) is (kind if change is other_class else nn.Sequential)


def test_a_wrapped_layer_is_called():
    net, original, x = PAIRS["upsampling"](), PAIRS["upsampling"](), draw(1, 4, 3, 3, 3)
    speed_up(net)
    net[2], original[2] = Lora(net[2]), Lora(original[2])
    torch.testing.assert_close(net(x), original(x), rtol=1e-5, atol=1e-5)


def test_hooks_on_layers_of_a_residual_block_see_and_change_what_they_did(fused):
    nets_, seen = [unet()[0] for _ in range(2)], [[], []]
    _, x, t = unet()
    speed_up(nets_[1])
    for net, values in zip(nets_, seen, strict=True):
        for layer in (net.middle_block.resnet_1.norm1, net.middle_block.resnet_1.nonlinearity):
            layer.register_forward_hook(lambda module, args, output, values=values: values.append(output) or 2 * output)
    expected, found = (net(x, t) for net in nets_)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert len(seen[0]) == len(seen[1]) > 1 and "norm" in fused
    for ours, theirs in zip(*seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_hooks_on_the_attention_matrix_are_called(fused):
    block = SABlock(8, 2).eval()
    speed_up(block)
    block(draw(2, 5, 8))
    shapes = []
    block.drop_weights.register_forward_hook(lambda module, args, output: shapes.append(output.shape))
    block(draw(2, 5, 8))
    assert shapes == [torch.Size([2, 2, 5, 5])] and fused == ["multi_head_attention"]


def test_a_copy_stays_fast_and_a_second_call_says_that_nothing_is_left():
    net, x, t = unet()
    expected = net(x, t)
    speed_up(net)
    twin = copy.deepcopy(net)
    report = speed_up(twin)
    assert not report.swapped and "no more modules than were replaced before" in str(report).splitlines()[0]
    report.undo()
    torch.testing.assert_close(twin(x, t), expected, rtol=1e-4, atol=1e-4)


def test_metatensors_in_a_dictionary_are_unwrapped():
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = norm_silu_conv()

        def forward(self, x, condition):
            return self.layers(x) + condition["shift"]

    net = Conditioned()
    speed_up(net)
    out = net(draw(1, 16, 4, 4, 4), {"shift": MetaTensor(draw(1, 16, 4, 4, 4))})
    assert type(out) is torch.Tensor


# Where the original is faster


@pytest.mark.usefixtures("as_on_a_cpu")
@pytest.mark.parametrize(
    ("change", "pays"),
    [
        (lambda x: x, True), (lambda x: x.bfloat16(), False), (lambda x: x[:, :, :8], False),
        (lambda x: x.to(memory_format=torch.channels_last_3d), False), (lambda x: x.requires_grad_(), False),
    ],
    ids=["large", "bf16", "small", "channels-last", "gradient"],
)  # fmt: skip
def test_on_a_cpu_a_norm_is_fused_only_where_that_pays(change, pays, fused):
    net, x = nn.Sequential(nn.GroupNorm(4, 16), nn.SiLU()), change(draw(1, 16, 32, 16, 16))
    net.to(x.dtype)
    expected = net(x)
    speed_up(net)
    torch.testing.assert_close(net(x), expected, rtol=1e-5, atol=1e-5)
    assert fused == ["norm"] * pays


# A check with an example


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_example_is_compared_before_and_after(dtype):
    net, x, t = unet()
    net.to(dtype)
    x = x.to(dtype)
    state = torch.random.get_rng_state()
    report = speed_up(net, example=((x, t), {}), gradients=dtype == torch.float32)
    assert torch.equal(torch.random.get_rng_state(), state)
    first = str(report).splitlines()[0]
    assert first.startswith("with the example, outputs differ by") and first.endswith("from those of the original")
    assert ("gradients" in first) == (dtype == torch.float32) and ("in comparison with float64" in first) == (
        dtype != torch.float32
    )
    assert report.swapped and not report.plain
    named = speed_up(unet()[0], example=((), {"x": unet()[1], "timesteps": t}))
    assert named.check.startswith("with the example, outputs differ by")


@pytest.mark.parametrize(
    ("operation", "wrong", "gradients"),
    [
        ("norm", lambda norm: lambda layer, x, silu, **others: norm(layer, x, silu=False, **others), False),
        ("multi_head_attention", lambda attend: lambda q, k, v, *rest: attend(q, k, 1.001 * v, *rest), False),
        ("multi_head_attention", lambda attend: lambda q, k, v, *rest: attend(q, k.detach(), v, *rest), True),
    ],
)  # fmt: skip
def test_a_replacement_that_computes_something_else_is_undone(operation, wrong, gradients, monkeypatch):
    net, x, t = unet()
    classes, expected = [type(module) for module in net.modules()], net(x, t)
    monkeypatch.setattr(fusion, operation, wrong(getattr(fusion, operation)))
    report = speed_up(net, example=((x, t), {}), gradients=gradients)
    assert str(report).startswith("nothing was replaced: with the example,") and not report.swapped
    assert [type(module) for module in net.modules()] == classes and torch.equal(net(x, t), expected)


def test_random_numbers_and_buffers_of_an_example():
    """Dropout draws the same numbers before and after, and running statistics stay."""
    net = nn.Sequential(norm_silu_conv(), nn.Dropout(0.5), nn.BatchNorm3d(16)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    report = speed_up(net, example=((draw(2, 16, 4, 4, 4),), {}), gradients=True)
    assert report.swapped and all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_float64_is_the_truth_also_of_casts_and_noise():
    """By hand: a cast to fp32 is one to float64, and noise is that of bf16, which is another than that of float64."""

    class Noisy(nn.Linear):
        def forward(self, x):
            wide = x.float() + torch.arange(4, dtype=torch.float32)
            return super().forward(wide.to(x.dtype)) + torch.randn_like(x)

    net, x = Noisy(4, 4).to(torch.bfloat16), draw(8, 4).to(torch.bfloat16)
    (found,) = in_float64(net, ((x,), {}), gradients=False).outputs
    with torch.random.fork_rng():
        torch.manual_seed(0)
        noise = torch.randn(8, 4, dtype=torch.bfloat16)
    assert torch.equal(found, (x.double() + torch.arange(4)) @ net.weight.double().T + net.bias.double() + noise)


@pytest.mark.usefixtures("as_on_a_cpu")
def test_the_report_names_what_computes_as_before_with_an_example():
    report = speed_up(norm_silu_conv(), example=((draw(1, 16, 4, 4, 4),), {}))
    assert report.plain == ["Sequential"] and "    1  of these compute as the original with the example" in str(report)


def test_an_example_of_another_form_is_refused():
    with pytest.raises(ConfigError, match="a pair"):
        speed_up(norm_silu_conv(), example=draw(1, 16, 4, 4, 4))


# The report


class Foreign(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.conv = nn.LayerNorm(4), nn.Conv3d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(self.norm(x))


class WithNorm(Foreign):
    def __init__(self):
        super().__init__()
        self.norm = nn.GroupNorm(2, 4)


def test_the_report_names_what_it_does_not_know():
    lines = str(speed_up(nn.Sequential(Foreign(), Foreign(), nn.Linear(2, 2)))).splitlines()
    assert lines[0] == "this model contains no known modules; nothing was replaced"
    assert lines[-2:] == ["classes of which not every module was recognized:", f"    0 of 2  {__name__}.Foreign"]
    lines = str(speed_up(WithNorm())).splitlines()
    assert lines[0] == "no block of this model is known; only single norms were replaced" and "group_norm" in lines[1]
    assert lines[-1] == f"    0 of 1  {__name__}.Foreign"
    known = speed_up(nn.Sequential(norm_silu_conv(), Foreign()))
    assert known.unknown == {f"{__name__}.Foreign": 1} and str(known).splitlines()[0].endswith("one kernel")
    assert not speed_up(norm_silu_conv()).unknown


class Attention(WithNorm):
    def forward(self, x):
        tokens = self.norm(x).flatten(2)
        return F.scaled_dot_product_attention(tokens, tokens, tokens).view_as(x)


class Upsampling(Foreign):
    def forward(self, x):
        return F.interpolate(self.conv(x), scale_factor=2)


def test_a_known_block_does_not_hide_the_others():
    known = nn.Sequential(norm_silu_conv(), WithNorm(), Attention(), Upsampling())
    report = speed_up(known)
    assert report.swapped["group_norm_silu"] and len(report.swapped["group_norm"]) == 2
    assert report.unknown == {f"{__name__}.{name}": 1 for name in ("Foreign", "Attention", "Upsampling")}


@pytest.mark.parametrize(
    ("model", "without", "words"),
    [({}, (), "a torch.nn.Module is needed, got dict"), (nn.SiLU(), "attention", r"give \['attention'\]")],
)
def test_mistakes_are_named(model, without, words):
    with pytest.raises(ConfigError, match=words):
        speed_up(model, without=without)
