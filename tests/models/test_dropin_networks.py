"""`speed_up` knows the blocks of other projects by what they compute, keeps their values, and leaves a changed copy alone."""

from __future__ import annotations

import copy
import functools
import importlib.util
import re
from pathlib import Path

import pytest
import torch
from diffusers.models import resnet
from diffusers.models.autoencoders import autoencoder_kl_cogvideox as cogvideox
from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as hunyuan
from torch import nn

import foreign_networks as foreign
from ccella_fast.dropin import fusion, layers
from ccella_fast.dropin.comparison import in_float64
from ccella_fast.dropin.matching import speed_up
from ccella_fast.dropin.program import fingerprint
from ccella_fast.dropin.rules import adm, physicsnemo, rule_of, torch_layers
from ccella_fast.errors import ConfigError
from ccella_fast.kernels import group_norm_silu as norm_kernel
from kernel_fixtures import check_fused, record_calls, repair_interpreter

repair_interpreter()


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def volume(batch=2, channels=8):
    return draw(batch, channels, 4, 4, 6)


TIME = draw(2, 8, seed=1)
UPSAMPLING_PAYS, ATTENTION_PAYS = fusion.upsampling_pays, fusion.attention_pays


def frames(block):
    """Only the first result of a block that also returns what it keeps of a video."""
    block.register_forward_hook(lambda module, args, output: output[0])
    return block


# What is built, its inputs, and the fused operations that it computes
NETWORKS = {
    "generative": (lambda: foreign.GenerativeResnetBlock(8, 12), (volume(), TIME), ["norm", "norm"]),
    "generative up": (lambda: foreign.GenerativeResnetBlock(8, 12, up=True), (volume(), TIME), ["norm", "norm"]),
    "generative autoencoder": (lambda: foreign.GenerativeResBlock(8, 12), (volume(),), ["norm", "norm"]),
    "interpolate": (lambda: foreign.Upsample(4), (draw(1, 4, 8, 8, 10),), ["upsampled_convolution"]),
    "norm in fp32": (
        lambda: nn.Sequential(foreign.GroupNorm32(4, 8), nn.SiLU(), nn.Conv3d(8, 4, 3)), (volume(),), ["norm"]
    ),
    "adm": (lambda: foreign.AdmResBlock(8, 12), (volume(), TIME), ["norm", "modulated_norm"]),
    "adm up": (lambda: foreign.AdmResBlock(8, 12, up=True), (volume(), TIME), ["norm", "modulated_norm"]),
    "adm shift": (lambda: foreign.AdmResBlock(8, 12, adaptive=False, dropout=0.3), (volume(), TIME), ["norm", "norm"]),
    "wdm": (lambda: frames(foreign.WdmResBlock(8, 12)), (volume(), TIME), ["norm", "modulated_norm"]),
    "wdm up": (
        lambda: frames(foreign.WdmResBlock(8, 8, up=True)), ((volume(), draw(2, 8, 8, 8, 12)), TIME), ["norm", "modulated_norm"]
    ),
    "wdm down": (lambda: frames(foreign.WdmResBlock(8, 12, adaptive=False, down=True)), (volume(), TIME), ["norm", "norm"]),
    "attention": (lambda: foreign.QKVAttentionLegacy(2), (draw(2, 24, 15),), ["attention_of_heads"]),
    "attention, other order": (lambda: foreign.QKVAttention(2), (draw(2, 24, 15),), ["attention_of_heads"]),
    "latent diffusion": (lambda: foreign.LdmResnetBlock(8, 12), (draw(2, 8, 5, 6), TIME), ["norm", "norm"]),
    "latent diffusion without time": (lambda: foreign.LdmResnetBlock(8, 12), (draw(2, 8, 5, 6), None), ["norm", "norm"]),
    "vq-gan": (lambda: foreign.VqganResBlock(8), (volume(),), ["norm", "norm"]),
    "lucidrains": (lambda: foreign.LucidrainsPair(8, 12), (volume(), TIME), ["modulated_norm", "norm"]),
    "nemo": (lambda: foreign.NemoBlock(8, 12, attention=True), (volume(), TIME), ["norm", "modulated_norm"]),
    "nemo shift": (lambda: foreign.NemoBlock(8, 8, adaptive=False), (volume(), TIME), ["norm", "norm"]),
    "nemo norm": (lambda: foreign.NemoGroupNorm(4, 8), (volume(),), ["norm"]),
    "diffusers": (
        lambda: resnet.ResnetBlock2D(in_channels=8, out_channels=12, temb_channels=8, groups=4),
        (draw(2, 8, 5, 6), TIME), ["norm", "norm"],
    ),
    "diffusers scale and shift": (
        lambda: resnet.ResnetBlock2D(
            in_channels=8, temb_channels=8, groups=4, up=True, time_embedding_norm="scale_shift", output_scale_factor=1.5
        ),
        (draw(2, 8, 5, 6), TIME), ["norm", "modulated_norm"],
    ),
    "diffusers without time": (
        lambda: resnet.ResnetBlock2D(in_channels=8, temb_channels=None, groups=4, down=True),
        (draw(2, 8, 4, 6), None), ["norm", "norm"],
    ),
    "diffusers video": (lambda: resnet.TemporalConvLayer(8, norm_num_groups=4), (draw(3, 8, 5, 6), 3), ["norm"] * 4),
    "stable video diffusion": (
        lambda: resnet.TemporalResnetBlock(32, 64, temb_channels=8), (draw(1, 32, 3, 4, 4), draw(1, 3, 8, seed=1)),
        ["norm", "norm"],
    ),
    "hunyuan": (lambda: hunyuan.HunyuanVideoResnetBlockCausal3D(8, 12, groups=4), (volume(),), ["norm", "norm"]),
    "cogvideox": (
        lambda: frames(cogvideox.CogVideoXResnetBlock3D(8, 12, temb_channels=8, groups=4)), (volume(), TIME),
        ["norm", "norm"],
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def everywhere(monkeypatch):
    """Replacements compute wherever they may, as on a GPU."""
    # Trainings at ZeRO stage 3 in this process leave DeepSpeed's own, which has neither second nor forward derivatives.
    monkeypatch.setattr(nn.functional, "linear", torch._C._nn.linear)
    monkeypatch.setattr(fusion, "norm_and_silu_pay", lambda x: x.ndim > 2)
    monkeypatch.setattr(fusion, "attention_pays", lambda x, scores: True)
    monkeypatch.setattr(fusion, "upsampling_pays", lambda x: True)
    monkeypatch.setattr(torch_layers.FusedGroupNorm, "suits", lambda self, input: input.ndim > 2)
    monkeypatch.setattr(physicsnemo.VolumeNorm, "suits", lambda self, x: x.ndim == 5)
    monkeypatch.setattr(adm.QKVAttention, "suits", lambda self, qkv: True)


@pytest.fixture
def fused(monkeypatch):
    """The names of the fused operations that are computed, in order."""
    return record_calls(monkeypatch, fusion, "norm", "modulated_norm", "upsampled_convolution", "attention_of_heads")


def built(name):
    """The block with random parameters: zero weights and identity norms would hide mistakes."""
    build, inputs, operations = NETWORKS[name]
    torch.manual_seed(0)
    net = build()
    for index, parameter in enumerate(net.parameters()):
        scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = (parameter.ndim == 1) * 0.5 + scale * draw(*parameter.shape, seed=index)
    return net, inputs, operations


def converted(value, dtype):
    if isinstance(value, tuple):
        return tuple(converted(each, dtype) for each in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) else value


def results(net, inputs):
    """The output and the gradients of a random weighting with respect to inputs and parameters; and in evaluation."""
    tensors = [each.requires_grad_() for each in (inputs[0] if isinstance(inputs[0], tuple) else inputs[:1])]
    net.train()
    torch.manual_seed(0)
    y = net(*inputs)
    total = (y * draw(*y.shape, seed=5).to(y)).sum()
    gradients = torch.autograd.grad(total, [*tensors, *net.parameters()], allow_unused=True)
    with torch.no_grad():
        return [y.detach(), net.eval()(*inputs)], [each for each in gradients if each is not None]


@pytest.mark.parametrize("name", NETWORKS)
def test_values_and_gradients_are_those_of_the_block(name, fused):
    net, inputs, operations = built(name)
    expected = results(net, inputs)
    assert not fused
    classes = [type(each) for each in net.modules()]
    report = speed_up(net)
    found = results(net, inputs)
    assert report.swapped and fused[: len(operations)] == operations and fused[len(operations) :] == operations
    for ours, theirs in zip(found[0], expected[0], strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.std())
    largest = max(float(each.abs().max()) for each in expected[1])
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert float((ours - theirs).abs().max()) <= 1e-4 * max(float(theirs.abs().max()), 1e-3 * largest)
    report.undo()
    assert [type(each) for each in net.modules()] == classes and torch.equal(net(*inputs), expected[0][1])


@pytest.mark.parametrize("name", NETWORKS)
def test_the_error_in_bf16_is_at_most_twice_that_of_the_block(name, fused):
    net, inputs, _ = built(name)
    net.eval()
    with torch.no_grad():
        (exact,) = in_float64(net, (inputs, {}), gradients=False).outputs
        net.to(torch.bfloat16)
        for each in net.modules():
            if isinstance(each, foreign.GroupNorm32):
                each.float()  # as that project does
        narrow = converted(inputs, torch.bfloat16)
        errors = [(net(*narrow).double() - exact).square().mean().sqrt()]
        speed_up(net)
        errors.append((net(*narrow).double() - exact).square().mean().sqrt())
    assert fused and 0 < errors[1] <= 2 * errors[0]


@pytest.mark.parametrize("name", ["adm", "wdm", "lucidrains", "nemo", "diffusers scale and shift"])
def test_scale_and_shift_in_channels_last(name, fused):
    """Where the samples cannot become groups of channels, the block computes them as before."""
    net, inputs, _ = built(name)
    net.eval()
    with torch.no_grad():
        expected = net(*inputs)
        layout = torch.channels_last_3d if inputs[0].ndim == 5 else torch.channels_last
        speed_up(net.to(memory_format=layout))
        inputs = (inputs[0].to(memory_format=layout), *inputs[1:])
        torch.testing.assert_close(net(*inputs), expected, rtol=1e-4, atol=1e-5)
        assert "modulated_norm" not in fused
        one = net(*(each[:1] for each in inputs))
        torch.testing.assert_close(one, expected[:1], rtol=1e-4, atol=1e-5)
        assert "modulated_norm" in fused


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("batch", [1, 3])
def test_scale_and_shift_with_the_kernel(batch, layout, monkeypatch):
    """In Triton's interpreter, forward and backward against float64."""
    monkeypatch.setattr(
        fusion,
        "group_norm_silu",
        lambda *args, **kwargs: norm_kernel.group_norm_silu(*args, **kwargs, backend="triton"),
    )
    norm = foreign.GroupNorm32(2, 8, eps=1e-3)
    layer = lambda weight, bias: foreign_layer(norm, weight, bias)  # noqa: E731

    def ours(x, weight, bias, scale, offset):
        return fusion.modulated_norm(layer(weight, bias), x, scale, offset)

    def plain(x, weight, bias, scale, offset):
        y = nn.functional.group_norm(x, 2, weight, bias, 1e-3)
        factor, shift = (each[:, :, None, None, None] for each in (scale, offset))
        return nn.functional.silu(y * (1 + factor) + shift)

    x = draw(batch, 8, 3, 5, 4).to(memory_format=layout)
    tensors = (x, draw(8, seed=1), draw(8, seed=2), draw(batch, 8, seed=3), draw(batch, 8, seed=4))
    check_fused(ours, plain, tensors, names=["y", "dx", "dweight", "dbias", "dscale", "doffset"], roundings=4.0)


def foreign_layer(norm, weight, bias):
    """The norm with these tensors as its parameters."""
    other = copy.copy(norm)
    other._parameters = {"weight": weight, "bias": bias}
    return other


# A changed copy

CHANGES = [
    (
        "y = self.conv2(self.nonlinearity(self.norm2(y + added)))",
        "y = self.conv2(self.norm2(self.nonlinearity(y + added)))",
    ),
    ("        y = self.conv1(F.silu(self.norm1(voxels)))", "        y = self.conv1(F.gelu(self.norm1(voxels)))"),
    (
        "            voxels = self.nin_shortcut(voxels)\n        return voxels + y",
        "            pass\n        return voxels + y",
    ),
    ("scale_factor=2.0", "scale_factor=3.0"),
    ('mode="nearest")', 'mode="trilinear")'),
    ("        return self.conv(larger)", "        return self.conv(larger) * 2"),
    ("wide = super().forward(values.float())", "wide = super().forward(values.float()) + 1"),
    ("wide = super().forward(values.float())", "wide = super().forward(values.half())"),
    ("y = self.h_upd(start(voxels))", "y = start(self.h_upd(voxels))"),
    ("y = others(norm(y) * (1 + factor) + offset)", "y = others(norm(y) * factor + offset)"),
    ("factor, offset = torch.chunk(added, 2, dim=1)", "offset, factor = torch.chunk(added, 2, dim=1)"),
    (
        "        return self.skip_connection(voxels) + y, details",
        "        return self.skip_connection(voxels) - y, details",
    ),
    ("root = 1 / math.sqrt(math.sqrt(width))", "root = 1 / math.sqrt(width)"),
    ("return values * torch.sigmoid(values)", "return values * torch.sigmoid(1.702 * values)"),
    ("            y = y * (factor + 1) + offset", "            y = y * (factor + 1)\n            y += offset"),
    ("variance = parts.var(dim=[2, 3, 4, 5], keepdim=True)", "variance = parts.var(dim=[3, 4, 5], keepdim=True)"),
    ("voxels = self.conv0(self.act(self.norm0(voxels)))", "voxels = self.conv0(self.act(self.norm1(voxels)))"),
    ("        voxels = voxels * self.skip_scale\n        if", "        if"),
]
BLOCKS = [
    each for each in vars(foreign).values()
    if isinstance(each, type) and each.__module__ == "foreign_networks" and not hasattr(each, "is_helper")
]  # fmt: skip


def written(tmp_path, source, index=0):
    """The classes of a module with this source."""
    path = tmp_path / f"changed_{index}.py"
    path.write_text(source)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {each.__name__: getattr(module, each.__name__) for each in BLOCKS}


def programs(classes):
    return {name: (fingerprint(cls), fingerprint(cls, "_forward")) for name, cls in classes.items()}


SOURCE = Path(foreign.__file__).read_text()


def test_a_copy_in_other_words_is_known_and_a_changed_one_is_not(tmp_path):
    known = programs({each.__name__: each for each in BLOCKS})
    other_words = (
        SOURCE.replace("voxels", "x").replace("added", "emb_out").replace("import torch\n", "import torch\n\n")
    )
    other_words = re.sub(r"\bself\b", "block", other_words)
    assert "block.norm" in other_words and programs(written(tmp_path, other_words)) == known
    for index, (line, change) in enumerate(CHANGES, start=1):
        assert line in SOURCE, line
        changed = programs(written(tmp_path, SOURCE.replace(line, change), index))
        different = {name for name in known if changed[name] != known[name]}
        assert different, change
        for name in different:
            assert all(new != old for new, old in zip(changed[name], known[name], strict=True) if old), (name, change)


@pytest.mark.parametrize("line_change", [CHANGES[7], CHANGES[9]], ids=["norm", "block"])
def test_a_changed_copy_is_not_fused(line_change, tmp_path, fused):
    changed = written(tmp_path, SOURCE.replace(*line_change))
    net = changed["AdmResBlock"](8, 12)
    for parameter in net.parameters():
        parameter.data = 0.5 + draw(*parameter.shape)
    x, time = volume(), TIME
    expected = net(x, time)
    report = speed_up(net)
    assert torch.equal(net(x, time), expected) and "modulated_norm" not in fused
    assert "AdmResBlock" not in report.swapped.get("group_norm_silu", [])


class Plain(foreign.GenerativeResnetBlock):
    pass


class Overridden(foreign.AdmResBlock):
    def _forward(self, voxels, time):
        return super()._forward(voxels, time) + 1


def test_a_subclass_is_what_its_forward_is():
    assert rule_of(Plain(8, 8)) is rule_of(foreign.GenerativeResnetBlock(8, 8)) is not None
    assert rule_of(Overridden(8, 8)) is None


def test_a_patched_forward_is_not_replaced(monkeypatch):
    """Neither where the class has another one, nor where a wrapper pretends to be it."""
    original = foreign.GenerativeResBlock.forward
    block = foreign.GenerativeResBlock(8, 8)
    assert rule_of(block) is not None

    @functools.wraps(original)
    def twice(self, voxels):
        return 2 * original(self, voxels)

    monkeypatch.setattr(foreign.GenerativeResBlock, "forward", twice)
    assert rule_of(block) is None
    norm = foreign.GroupNorm32(4, 8)
    assert layers.is_norm(norm)
    monkeypatch.setattr(foreign.GroupNorm32, "forward", functools.wraps(nn.GroupNorm.forward)(lambda self, x: x))
    assert not layers.is_norm(norm)


def test_a_file_that_has_changed_since_its_import_is_not_believed(tmp_path):
    block = written(tmp_path, SOURCE)["GenerativeResBlock"]
    assert fingerprint(block) == fingerprint(foreign.GenerativeResBlock)
    (tmp_path / "changed_0.py").write_text(SOURCE.replace("F.silu", "F.relu"))
    assert fingerprint(block) is None


@pytest.mark.parametrize("name", ["adm", "lucidrains", "hunyuan", "nemo", "generative"])
def test_hooks_and_other_derivatives(name, fused):
    net, inputs, _ = built(name)
    x, others = inputs[0].detach(), inputs[1:]
    net.eval()

    def derivatives():
        v = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(net(v, *others).square().sum(), v, create_graph=True)
        penalty = torch.autograd.grad(gradient.square().sum(), v)[0]
        direction = torch.func.jvp(lambda v: net(v, *others), (x,), (draw(*x.shape, seed=3),))[1]
        return penalty, direction

    expected = derivatives()
    speed_up(net)
    for ours, theirs in zip(derivatives(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))
    assert fused
    norm = next(each for each in net.modules() if isinstance(each, (nn.GroupNorm, foreign.NemoGroupNorm)))
    plain = NETWORKS[name][0]().eval()
    plain.load_state_dict(net.state_dict())
    twin = dict(zip(net.modules(), plain.modules(), strict=True))[norm]
    for each in (norm, twin):
        each.register_forward_hook(lambda module, args, output: 2 * output)
    torch.testing.assert_close(net(*inputs), plain(*inputs), rtol=1e-4, atol=1e-5)


def test_an_argument_may_have_another_name_than_in_the_original():
    block = foreign.AdmResBlock(8, 12).eval()
    expected = block(voxels=volume(), time=TIME)
    speed_up(block)
    torch.testing.assert_close(block(voxels=volume(), time=TIME), expected, rtol=1e-4, atol=1e-5)


# A check with an example


def test_an_example_of_a_norm_that_casts_is_judged_in_float64():
    net, inputs, _ = built("adm")
    net.eval().to(torch.bfloat16)
    for each in net.modules():
        if isinstance(each, foreign.GroupNorm32):
            each.float()
    report = speed_up(net, example=(converted(inputs, torch.bfloat16), {}))
    assert report.swapped and "in comparison with float64" in report.check


def test_an_example_that_cannot_be_judged_is_undone():
    class OnlyNarrow(foreign.AdmResBlock):
        def forward(self, voxels, time):
            if voxels.dtype == torch.float64:
                raise RuntimeError("no float64 here")
            return super().forward(voxels, time)

    net = OnlyNarrow(8, 12).eval().to(torch.bfloat16)
    for each in net.modules():
        if isinstance(each, foreign.GroupNorm32):
            each.float()
    report = speed_up(net, example=((volume().bfloat16(), TIME.bfloat16()), {}))
    assert str(report).startswith("nothing was replaced") and "(no float64 here)" in report.check
    assert type(net) is OnlyNarrow


def test_an_example_without_floating_point_outputs_is_refused():
    class Labels(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential(nn.GroupNorm(2, 8), nn.SiLU())

        def forward(self, x):
            return {"labels": self.layers(x).argmax(dim=1)}

    with pytest.raises(ConfigError, match="returns no tensor of floating-point numbers"):
        speed_up(Labels(), example=((volume(),), {}))


# Where the original is faster on a CPU


@pytest.mark.parametrize(
    ("dtype", "channels", "size", "pays"),
    [
        (torch.float32, 8, 8, True), (torch.float32, 64, 4, False),
        (torch.bfloat16, 64, 8, True), (torch.bfloat16, 32, 8, False),
    ],
)  # fmt: skip
def test_on_a_cpu_an_upsampling_is_fused_only_where_that_pays(dtype, channels, size, pays, fused, monkeypatch):
    monkeypatch.setattr(fusion, "upsampling_pays", UPSAMPLING_PAYS)
    net, x = foreign.Upsample(channels).to(dtype), draw(1, channels, size, size, size).to(dtype)
    expected = net(x).float()
    speed_up(net)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(net(x).float(), expected, **tolerance)
    assert fused == ["upsampled_convolution"] * pays


@pytest.mark.parametrize(
    ("dtype", "queries", "keys", "pays"),
    [
        (torch.float32, 512, 512, True), (torch.float32, 2048, 100, False),
        (torch.bfloat16, 2048, 2048, True), (torch.bfloat16, 512, 512, False),
    ],
)  # fmt: skip
def test_on_a_cpu_attention_is_fused_only_where_that_pays(dtype, queries, keys, pays):
    x = torch.empty(1, queries, 8, dtype=dtype)
    assert ATTENTION_PAYS(x, queries * keys) == pays
    assert ATTENTION_PAYS(x.to("meta"), 1)


# Odd uses


@pytest.mark.parametrize("name", ["generative", "adm", "adm shift", "diffusers", "lucidrains", "nemo"])
@pytest.mark.parametrize("few", [0, 1])
def test_one_time_for_several_samples_or_one_sample_for_several_times(name, few, fused):
    net, inputs, _ = built(name)
    inputs = [each[:1] if index == few else each for index, each in enumerate(inputs)]
    expected = net.eval()(*inputs)
    speed_up(net)
    torch.testing.assert_close(net(*inputs), expected, rtol=1e-4, atol=1e-5)
    assert fused


def test_a_block_without_its_layers_is_refused_with_the_reason():
    block = foreign.AdmResBlock(8, 8)
    block.out_layers = nn.Identity()
    (reason,) = speed_up(block).refused.values()
    assert reason.startswith("it computes as a known block, but does not have its layers")


@pytest.mark.parametrize(
    ("cls", "method"), [(foreign.AdmResBlock, "_forward"), (foreign.GenerativeResBlock, "forward")]
)
def test_a_class_that_is_patched_later_computes_the_patch(cls, method, monkeypatch):
    block = cls(8, 8)
    speed_up(block)
    monkeypatch.setattr(cls, method, lambda self, *inputs: "patched")
    assert block(volume(), *[TIME] * (method == "_forward")) == "patched"
