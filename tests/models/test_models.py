"""The networks: names and shapes compared with the tables of the reference, values and gradients with the U-Net of MONAI.

Also the properties that training, compilation and sampling rely on. The values of all nine variants are in test_golden.py.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from monai.apps.generation.maisi.networks.diffusion_model_unet_maisi import DiffusionModelUNetMaisi
from torch.utils.checkpoint import checkpoint

from ccella_fast.config import ModelConfig, make_config
from ccella_fast.errors import ConfigError
from ccella_fast.models import build_model, unet3d
from ccella_fast.models.adapter import PerceiverBlock
from ccella_fast.models.blocks import ResidualBlock, SpatialSelfAttention, SpatialTransformer
from ccella_fast.models.unet3d import ResolutionLevel
from ccella_fast.variants import VARIANTS

TINY = {
    "num_channels": [32, 32, 64],
    "attention_levels": [False, True, True],
    "num_head_channels": [0, 16, 32],
    "num_res_blocks": 1,
    "cross_attention_dim": 48,
    "input_dim": 24,
    "num_latents": 4,
    "adapter_blocks": 2,
    "adapter_heads": 4,
    "adapter_time_dim": 16,
    "class_head_dim": 8,
}
# Two levels, since tracing takes seconds per block.
SMALLEST = {
    "num_channels": [32, 64],
    "attention_levels": [False, True],
    "num_head_channels": [0, 32],
    "adapter_blocks": 2,
}
# Numbers of parameters and of tensors: docs/explanation/method.md, section 7.
SIZES = {
    "CCELLA": (575_506_474, 663),
    "FIRST": (323_844_358, 641),
    "LAST": (323_844_358, 641),
    "SHARED": (323_844_384, 643),
    "L1ONLY": (575_506_474, 663),
    "DECOUPLED": (273_511_940, 637),
    "ELLAMAISI": (271_954_436, 633),
    "RADMAISI": (167_812_356, 368),
    "MAISI": (166_254_852, 364),
}
BLOCKS = (ResidualBlock, SpatialTransformer, SpatialSelfAttention, PerceiverBlock)


def randomized(module, seed=0):
    """Draw all parameters, since the initial zeros would hide mistakes in the layers before them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        scale = 0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
        parameter.data = (parameter.ndim == 1) * 0.5 + scale * torch.randn(parameter.shape, generator=generator)
    return module


def tiny(name="CCELLA", **overrides):
    return randomized(build_model(name, **TINY | overrides))


def inputs(model, batch=2, grid=(8, 4, 12), dtype=torch.float32):
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=dtype)
    row, config = model.variant, model.config
    conditions = {
        "spacing": 100 * torch.tensor([[0.5, 0.5, 0.5625], [0.5, 0.6, 0.75]])[:batch],
        "text": draw(batch, 5, config.input_dim) if row.text else None,
        "pirads": torch.tensor([[100.0, 0.0], [0.0, 100.0]])[:batch] if row.class_input == "given" else None,
    }
    return draw(batch, sum(config.latent_channels), *grid), torch.tensor([7, 903])[:batch], conditions


def gradients(module, loss):
    names, parameters = zip(*module.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True))


# Names, shapes, order


def full_size(name, **overrides):
    with torch.device("meta"):
        return build_model(name, **overrides)


def table_of(name, state_dict_table):
    """The table of the reference for any variant, derived from the two that are recorded."""
    row = VARIANTS[name]
    table = state_dict_table("ccella" if row.text else "radmaisi")
    if row.class_input == "none":
        table = [entry for entry in table if "pirads_layer" not in entry[0]]
        table = [(key, shape.replace(",768", ",512") if "time_emb_proj" in key else shape) for key, shape in table]
    if row.head == "cascade" or not row.text:
        return table
    head = [(key, shape) for key, shape in table if "cascade_blocks.0." in key]
    body = [entry for entry in table if "cascade_blocks" not in entry[0] and not entry[0].startswith("classifier")]
    prefix = {"first": "ella.connector.classifier.", "shared": "ella.connector.classifier.", "last": "classifier."}
    if row.head in prefix:
        body += [(key.replace("ella.connector.cascade_blocks.0.", prefix[row.head]), shape) for key, shape in head]
    if row.head == "shared":
        body += [entry for entry in table if entry[0].startswith("classifier")]
    return body


@pytest.mark.parametrize("name", VARIANTS)
def test_names_shapes_and_order_equal_the_reference(name, state_dict_table):
    model = full_size(name)
    found = [(key, ",".join(map(str, tensor.shape))) for key, tensor in model.state_dict().items()]
    assert found == table_of(name, state_dict_table)
    # The optimizer state of the reference is indexed by the order of the parameters.
    assert [key for key, _ in model.named_parameters()] == [key for key, _ in found]
    assert (sum(parameter.numel() for parameter in model.parameters()), len(found)) == SIZES[name]


def test_ccella_plus_plus_has_twelve_channels():
    model = full_size("CCELLA", latent_channels=[4, 4, 4])
    assert sum(parameter.numel() for parameter in model.parameters()) == 575_534_130
    assert model.unet.conv_in.conv.in_channels == model.unet.out[1].conv.out_channels == 12


# Values, compared with MONAI


@pytest.mark.parametrize("wrong", [False, True], ids=["equal", "swapped-weights"])
@pytest.mark.parametrize("name", ["MAISI", "ELLAMAISI"])
def test_unet_equals_monai(name, wrong):
    """Outputs and all gradients. Negative control: if two weights of equal shape are swapped, neither agrees."""
    text = VARIANTS[name].text
    config = TINY | {"num_res_blocks": 2}
    ours = tiny(name, num_res_blocks=2)
    keys = ("num_channels", "attention_levels", "num_head_channels", "num_res_blocks")
    conditioned = {"with_conditioning": True, "cross_attention_dim": 48} if text else {}
    theirs = DiffusionModelUNetMaisi(
        3, 4, 4, norm_num_groups=32, include_spacing_input=True, **{key: config[key] for key in keys}, **conditioned
    )
    ours, theirs = ours.double(), theirs.double()  # so that rounding does not matter
    unet = ours.unet if text else ours
    theirs.load_state_dict(unet.state_dict())
    if wrong:
        query = next(key for key in unet.state_dict() if key.endswith("to_q.weight"))
        state = unet.state_dict()
        state[query], state[query.replace("to_q", "to_k")] = state[query.replace("to_q", "to_k")], state[query].clone()
        unet.load_state_dict(state)

    x, timesteps, conditions = inputs(ours, dtype=torch.float64)
    conditioning = ours.condition(timesteps, **conditions)
    actual = ours.denoise(x, conditioning)
    extra = {"context": ours.ella(conditions["text"].double(), timesteps)[0].detach()} if text else {}
    expected = theirs(x, timesteps, spacing_tensor=conditions["spacing"].double(), **extra)
    target = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    mine, other = (gradients(net, (out * target).sum()) for net, out in ((unet, actual), (theirs, expected)))
    agree = [torch.allclose(mine[key], other[key], rtol=1e-6, atol=1e-6) for key in other]
    assert torch.allclose(actual, expected, rtol=1e-6, atol=1e-6) != wrong
    assert all(agree) != wrong


# Initialization


def test_initial_model_predicts_zero_and_only_its_last_layer_has_gradients():
    model = build_model("CCELLA", **TINY)
    x, timesteps, conditions = inputs(model)
    noise = model(x, timesteps, **conditions).noise
    assert torch.equal(noise, torch.zeros_like(noise))
    found = gradients(model, (noise - 1).square().sum())
    reached = {name for name, gradient in found.items() if gradient is not None and gradient.any()}
    assert reached == {"unet.out.2.conv.weight", "unet.out.2.conv.bias"}


def test_the_same_parameters_as_in_the_reference_are_initially_zero():
    model = build_model("CCELLA", **TINY)
    zero = {name for name, parameter in model.named_parameters() if not parameter.any()}
    parts = (".conv2.conv.", ".proj_out.conv.", "unet.out.2.", ".ln_1.", ".ln_2.", ".ln_ff.")
    expected = {name for name, _ in model.named_parameters() if any(part in name for part in parts)}
    defaults = {
        name for name in zero if ("norm" in name or "unet.out.0" in name or ".attn." in name) and "bias" in name
    }
    assert zero - defaults == expected
    latents = build_model("CCELLA", **TINY | {"num_latents": 512}).ella.connector.latents.detach()
    assert float(latents.std()) == pytest.approx(48**-0.5, rel=0.05) and abs(float(latents.mean())) < 0.01


# Properties that training, compilation and sampling rely on


@pytest.mark.parametrize("name", VARIANTS)
def test_condition_and_denoise_equal_forward(name):
    model = tiny(name)
    x, timesteps, conditions = inputs(model)
    conditioning = model.condition(timesteps, **conditions)
    output = model(x, timesteps, **conditions)
    assert torch.equal(output.noise, model.denoise(x, conditioning))
    assert not torch.equal(output.noise, model.denoise(x, model.condition(timesteps.flip(0), **conditions)))
    if VARIANTS[name].class_input == "predicted":
        assert torch.equal(output.class_logits, conditioning.class_logits) and output.class_logits.shape == (2, 2)
    else:
        assert output.class_logits is None


class ResidualRegisteredEarlier(unet3d.MiddleBlock):
    def __init__(self, config):
        super().__init__(config)
        self._modules["resnet_1"] = self._modules.pop("resnet_1")  # after resnet_2


class AttentionRegisteredEarlier(unet3d.UpBlock):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        if self.attentions:
            self.attentions._modules["0"] = self.attentions._modules.pop("0")


class ResidualLeftOut(unet3d.UpBlock):
    def forward(self, h, skips, cursor):
        return super().forward(h, skips[1:] if self.upsampler is None else skips, cursor)


@pytest.mark.parametrize(
    ("name", "wrong", "match"),
    [
        ("CCELLA", ResidualRegisteredEarlier, "a ResidualBlock is called, but"),
        ("MAISI", ResidualRegisteredEarlier, "a ResidualBlock is called, but"),
        ("CCELLA", AttentionRegisteredEarlier, "a SpatialTransformer is called, but"),
        ("MAISI", ResidualLeftOut, "every residual block"),
    ],
)
def test_blocks_in_another_order_than_their_conditioning_are_errors(monkeypatch, name, wrong, match):
    """The error is not found by shapes: those of the confused blocks are equal."""
    (base,) = wrong.__bases__
    monkeypatch.setattr(unet3d, base.__name__, wrong)
    model = tiny(name)
    x, timesteps, conditions = inputs(model)
    conditioning = model.condition(timesteps, **conditions)
    with pytest.raises(RuntimeError, match=match):
        model.denoise(x, conditioning)
    monkeypatch.undo()
    right = tiny(name)
    right.denoise(x, right.condition(timesteps, **conditions))
    with pytest.raises(ValueError):  # one shift is missing
        right.denoise(x, conditioning._replace(shifts=conditioning.shifts[:-1]))


@pytest.mark.parametrize("name", VARIANTS)
def test_forward_does_not_synchronize_with_the_host(name):
    """On the meta device tensors do not have values, so any `.item()` or `if tensor` raises."""
    model = tiny(name).to("meta")
    x, timesteps, conditions = inputs(model)
    meta = {key: None if value is None else value.to("meta") for key, value in conditions.items()}
    assert model(x.to("meta"), timesteps.to("meta"), **meta).noise.shape == x.shape
    with pytest.raises((RuntimeError, NotImplementedError)):
        x.to("meta").sum().item()


@pytest.mark.parametrize("name", ["CCELLA", "RADMAISI"])
def test_forward_compiles_without_graph_breaks(name):
    model = tiny(name, **SMALLEST)
    x, timesteps, conditions = inputs(model)
    torch._dynamo.reset()
    actual = torch.compile(model, backend="eager", fullgraph=True)(x, timesteps, **conditions)
    expected = model(x, timesteps, **conditions)
    torch.testing.assert_close(actual.noise, expected.noise, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["FIRST", "LAST", "SHARED", "DECOUPLED"])
def test_condition_compiles_without_graph_breaks(name):
    model = tiny(name, **SMALLEST)
    _, timesteps, conditions = inputs(model)
    torch._dynamo.reset()
    actual = torch.compile(model.condition, backend="eager", fullgraph=True)(timesteps, **conditions)
    expected = model.condition(timesteps, **conditions)
    torch.testing.assert_close(actual.shifts, expected.shifts, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["CCELLA", "MAISI"])
def test_single_blocks_can_be_compiled(name):
    model = tiny(name, **SMALLEST)
    x, timesteps, conditions = inputs(model)
    expected = randomized(model)(x, timesteps, **conditions)
    torch._dynamo.reset()
    for level in [module for module in model.modules() if isinstance(module, ResolutionLevel)]:
        for blocks in (level.resnets, level.attentions):
            for index, block in enumerate(blocks):
                blocks[index] = torch.compile(block, backend="eager")
    torch.testing.assert_close(model(x, timesteps, **conditions).noise, expected.noise, rtol=1e-3, atol=1e-4)


def test_a_graph_break_is_detected():
    """Negative control."""
    model = tiny("RADMAISI", **SMALLEST)
    model.set_activation_checkpointing(lambda module, *tensors: torch._dynamo.graph_break() or module(*tensors))
    x, timesteps, conditions = inputs(model)
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(model, backend="eager", fullgraph=True)(x, timesteps, **conditions)


def test_model_can_be_exported():
    model = tiny(**SMALLEST)
    x, timesteps, conditions = inputs(model)
    exported = torch.export.export(model, (x, timesteps), conditions).module()
    actual, expected = exported(x, timesteps, **conditions), model(x, timesteps, **conditions)
    torch.testing.assert_close(actual.noise, expected.noise, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["CCELLA", "RADMAISI"])
def test_memory_format_does_not_change_values(name):
    model, last = tiny(name).double(), tiny(name).double().to(memory_format=torch.channels_last_3d)
    x, timesteps, conditions = inputs(model, dtype=torch.float64)
    strided = x.to(memory_format=torch.channels_last_3d)
    assert strided.stride() != x.stride()
    expected, actual = model(x, timesteps, **conditions).noise, last(strided, timesteps, **conditions).noise
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    mine, other = (gradients(net, out.square().mean()) for net, out in ((last, actual), (model, expected)))
    for key, gradient in other.items():
        torch.testing.assert_close(mine[key], gradient, rtol=1e-5, atol=1e-6, msg=key)


def test_samples_do_not_depend_on_the_rest_of_the_batch():
    model = tiny()
    x, timesteps, conditions = inputs(model)
    both = model(x, timesteps, **conditions)
    for i in range(2):
        alone = {key: None if value is None else value[i : i + 1] for key, value in conditions.items()}
        one = model(x[i : i + 1], timesteps[i : i + 1], **alone)
        torch.testing.assert_close(one.noise, both.noise[i : i + 1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.class_logits, both.class_logits[i : i + 1], rtol=1e-4, atol=1e-4)


def test_timesteps_may_be_integers_or_floats():
    model = tiny()
    x, timesteps, conditions = inputs(model)
    expected = model(x, timesteps, **conditions).noise
    assert torch.equal(model(x, timesteps.float(), **conditions).noise, expected)
    assert not torch.equal(model(x, timesteps.float() + 0.5, **conditions).noise, expected)


def test_diffusion_loss_trains_the_class_heads():
    """That is, the predicted class vector is not detached."""
    model = tiny()
    model.classifier.weight.data *= 0.01  # away from a saturated softmax
    x, timesteps, conditions = inputs(model)
    found = gradients(model, model(x, timesteps, **conditions).noise.square().mean())
    heads = {
        key: gradient for key, gradient in found.items() if "cascade_blocks" in key or key.startswith("classifier")
    }
    assert len(heads) == 2 * 4 + 2 and all(gradient.any() for gradient in heads.values())


def test_bfloat16_weights_and_autocast_are_close_to_float32():
    model = tiny()
    x, timesteps, conditions = inputs(model)
    expected = model(x, timesteps, **conditions).noise
    with torch.autocast("cpu", torch.bfloat16):
        autocast = model(x, timesteps, **conditions).noise
    converted = copy.deepcopy(model).bfloat16()(x, timesteps, **conditions).noise
    expected = expected.detach()
    for actual in (autocast, converted):
        assert actual.dtype == torch.bfloat16
        assert 0 < float((actual.detach().float() - expected).abs().mean()) < 0.1 * float(expected.abs().mean())


# Activation checkpointing


@pytest.mark.parametrize("name", ["CCELLA", "RADMAISI"])
def test_activation_checkpointing_recomputes_blocks_and_keeps_gradients(name):
    model = tiny(name)
    x, timesteps, conditions = inputs(model)
    calls, kept = [], []
    for module in model.modules():
        if isinstance(module, BLOCKS):
            module.register_forward_pre_hook(lambda module, args: calls.append(module))

    def run():
        calls.clear(), kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
            output = model(x, timesteps, **conditions)
        forward = len(calls)
        return gradients(model, output.noise.square().mean()), forward, len(calls), sum(kept)

    plain, forward, total, plain_bytes = run()
    blocks = sum(isinstance(module, BLOCKS) for module in model.modules())
    assert forward == total == blocks
    model.set_activation_checkpointing(functools.partial(checkpoint, use_reentrant=False))
    again, forward, total, fewer_bytes = run()
    assert (forward, total) == (blocks, 2 * blocks)
    assert fewer_bytes < 0.6 * plain_bytes
    assert all(torch.equal(again[key], plain[key]) for key in plain if plain[key] is not None)
    model.set_activation_checkpointing(None)
    assert run()[1:] == (blocks, blocks, plain_bytes)


def test_a_deepcopy_keeps_activation_checkpointing():
    model = tiny()
    model.set_activation_checkpointing(functools.partial(checkpoint, use_reentrant=False))
    x, timesteps, conditions = inputs(model)
    assert torch.equal(copy.deepcopy(model)(x, timesteps, **conditions).noise, model(x, timesteps, **conditions).noise)


# Errors


@pytest.mark.parametrize("name", VARIANTS)
def test_missing_inputs_are_named_and_unused_inputs_are_ignored(name):
    model, row = tiny(name), VARIANTS[name]
    x, timesteps, conditions = inputs(model)
    plain = model(x, timesteps, **conditions).noise
    for field, used, value in (
        ("text", row.text, torch.randn(2, 5, 24)),
        ("pirads", row.class_input == "given", 100 * torch.eye(2)),
    ):
        if used:
            with pytest.raises(ValueError, match=f"{field} is missing: {name}"):
                model(x, timesteps, **conditions | {field: None})
        else:
            assert torch.equal(model(x, timesteps, **conditions | {field: value}).noise, plain)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        pytest.param(
            {"x": torch.zeros(2, 4, 8, 6, 8)}, r"latent grid.*multiple of 4 .*got \(8, 6, 8\)", id="indivisible-grid"
        ),
        pytest.param(
            {"x": torch.zeros(2, 3, 8, 8, 8)},
            r"x has shape \(2, 3, 8, 8, 8\), \(B, 4, X, Y, Z\) is expected",
            id="channels",
        ),
        pytest.param({"text": torch.zeros(2, 5, 25)}, r"text has shape \(2, 5, 25\).*24", id="text-width"),
        pytest.param({"spacing": torch.zeros(3)}, "spacing has shape", id="spacing-without-batch"),
    ],
)
def test_wrong_shapes_are_named(change, match):
    model = tiny()
    x, timesteps, conditions = inputs(model)
    conditions |= change
    with pytest.raises(ValueError, match=match):
        model(conditions.pop("x", x), timesteps, **conditions)


def test_traits_follow_the_variant_of_a_copy():
    config = ModelConfig(variant="CCELLA")
    assert config.traits is VARIANTS["CCELLA"]
    assert config.model_copy(update={"variant": "MAISI"}).traits is VARIANTS["MAISI"]


def test_build_model_takes_names_and_configurations():
    config = make_config({"model": {"variant": "SHARED", **TINY}})
    for source in (config, config.model):
        assert build_model(source).config == config.model
        assert build_model(source, input_dim=8).config == config.model.model_copy(update={"input_dim": 8})
    assert full_size("LAST").config == ModelConfig(variant="LAST")
    with pytest.raises(ConfigError, match="no variant 'CELLA'"):
        build_model("CELLA")
    with pytest.raises(ConfigError, match="'num_channel'") as caught:
        build_model("CCELLA", num_channel=[64])
    assert caught.value.fix == "did you mean 'num_channels'?"
    with pytest.raises(ConfigError, match="one entry per level"):
        build_model("CCELLA", num_channels=[64, 128])
    with pytest.raises(ConfigError, match="cannot be built from a dict"):
        build_model({"variant": "CCELLA"})  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        build_model("ccella")
    assert caught.value.fix == "did you mean 'CCELLA'?"


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_class_head_of_the_default_size_in_bf16_on_a_cpu(rows):
    """With AMX, the matrix product of oneDNN terminates the process for 8 rows of 196,608 features."""
    from ccella_fast.models.adapter import ClassHead

    with torch.device("meta"):
        head = ClassHead(build_model("CCELLA").config)
    head = head.to_empty(device="cpu").requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in head.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    latents = torch.randn(rows, 256, 768, generator=generator)
    truth = head.double()(latents.double())
    got = head.bfloat16()(latents.bfloat16())
    assert got.dtype == torch.bfloat16
    assert (got.double() - truth).norm() / truth.norm() < 0.02
    assert (got.double() - truth.roll(1, 1)).norm() / truth.norm() > 0.2
