"""Low-rank adapters: W + alpha / r B A in every layer, its gradients, its merging, and peft's for layers of PyTorch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call

from ccella_fast.models import build_model
from ccella_fast.models.blocks import SelfAttention
from ccella_fast.models.low_rank import LowRankUpdate, add_factors, merge_factors, plain_name
from ccella_fast.models.parts import select_trained
from ccella_fast.models.wide_linear import WideLinear
from ccella_fast.variants import VARIANTS
from kernel_fixtures import ROUNDINGS, dtype_params
from training_fixtures import settings

RANK, ALPHA = 3, 6.0
ON = {"training__low_rank__rank": RANK, "training__low_rank__alpha": ALPHA}


def random_model(config, dtype=torch.float32):
    """A model of which no weight is zero."""
    torch.manual_seed(0)
    model = build_model(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.to(dtype)


def adapted(config, dtype=torch.float32):
    """As `random_model`, with factors that are not zero."""
    model = random_model(config, dtype)
    select_trained(model, config)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    return model


def inputs(config, dtype=torch.float32):
    source = torch.Generator().manual_seed(1)
    x = torch.randn(2, 4, 8, 8, 4, generator=source).to(dtype)
    text = torch.randn(2, 5, config.model.input_dim, generator=source).to(dtype)
    conditions = {"spacing": torch.tensor([[50.0, 50.0, 56.25], [60.0, 70.0, 300.0]]), "pirads": torch.eye(2)}
    if config.model.traits.text:
        conditions["text"] = text
    return (x, torch.tensor([3, 700])), conditions


def output(model, config, dtype=torch.float32):
    args, conditions = inputs(config, dtype)
    noise, logits = model(*args, **conditions)
    return noise if logits is None else torch.cat([noise.flatten(), logits.flatten()])


def written_out(model) -> dict[str, torch.Tensor]:
    """The weights by plain name in float64: W[o, ...] + alpha / r sum over r of B[o, r] A[r, ...]."""
    state = {name: tensor.detach().double().numpy() for name, tensor in model.named_parameters()}
    found = {plain_name(name): value for name, value in state.items() if ".0.lora_" not in name}
    for name, a in state.items():
        if name.endswith(".0.lora_A"):
            b = state[name.replace("lora_A", "lora_B")]
            weight = name.replace(".parametrizations", "").removesuffix(".0.lora_A")
            sums = np.einsum("or,ri->oi", b, a).reshape(found[weight].shape)
            found[weight] = found[weight] + ALPHA / RANK * sums
    return {name: torch.from_numpy(value) for name, value in found.items()}


@pytest.mark.parametrize("variant", ["CCELLA", "RADMAISI"])
def test_the_network_computes_with_the_sum_and_so_does_the_merged_one(variant):
    config = settings(model__variant=variant, **ON)
    model = adapted(config)
    true = written_out(model)
    plain = build_model(config).double()
    plain.load_state_dict(true)
    with torch.no_grad():
        expected = output(plain, config, torch.float64)
        torch.testing.assert_close(output(model, config).double(), expected, rtol=1e-4, atol=1e-5)
        state = dict(model.named_parameters())
        frozen = {plain_name(name): value for name, value in state.items() if not value.requires_grad}
        merged = merge_factors(frozen, {name: p for name, p in state.items() if p.requires_grad}, ALPHA / RANK)
        assert merged.keys() == true.keys()
        for name, tensor in merged.items():
            assert tensor.dtype == torch.float32
            torch.testing.assert_close(tensor.double(), true[name], rtol=1e-6, atol=1e-7)
        plain.load_state_dict(frozen)  # negative control: the factors matter
        assert float((output(plain, config, torch.float64) - expected).std()) > 1e-2 * float(expected.std())


@pytest.mark.parametrize("dtype", dtype_params(torch.float32, torch.bfloat16))
def test_the_merged_network_has_at_most_twice_the_error_of_the_sum_in_the_same_dtype(dtype):
    """W + B A in fp32, rounded once to the dtype, against the factors and W in the dtype; both judged in float64."""
    config = settings(**ON)
    model = adapted(config)
    with torch.no_grad():
        model.to(torch.bfloat16).float()  # weights that 16 bits can represent
        true = written_out(model)
        exact = build_model(config).double()
        exact.load_state_dict(true)
        expected = output(exact, config, torch.float64)
        state = dict(model.named_parameters())
        frozen = {plain_name(name): p.clone() for name, p in state.items() if not p.requires_grad}
        trained = {name: p.clone() for name, p in state.items() if p.requires_grad}
        merged = build_model(config)
        merged.load_state_dict(merge_factors(frozen, trained, ALPHA / RANK))
        errors = [
            float((output(each.to(dtype), config, dtype).double() - expected).abs().max()) for each in (merged, model)
        ]
    rounding = ROUNDINGS[dtype] * torch.finfo(dtype).eps * float(expected.abs().max())
    assert errors[0] <= 2 * errors[1] + rounding, errors


def test_a_new_adapter_changes_nothing():
    """B is zero: every bit of the output stays, also in 16 bits."""
    for dtype in (torch.float32, torch.bfloat16):
        config = settings(**ON)
        model = random_model(config, dtype)
        expected = output(model, config, dtype)
        select_trained(model, config)
        assert torch.equal(output(model, config, dtype), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_linear_layer_and_convolution_has_factors_that_act(variant):
    """Fused modules read weights where others call a layer: a factor that is not read would get no gradient."""
    config = settings(model__variant=variant, model__include_fc=True, **ON)
    plain = build_model(config)
    layers = {
        f"{name}.{'in_proj_weight' if isinstance(module, nn.MultiheadAttention) else 'weight'}"
        for name, module in plain.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv3d, nn.MultiheadAttention)) and "classifier" not in name
        if not isinstance(module, WideLinear) and "cascade_blocks" not in name
    }
    model = adapted(config)
    output(model, config).square().sum().backward()
    gradients = {
        name.replace(".parametrizations", "").removesuffix(".0.lora_B"): parameter.grad
        for name, parameter in model.named_parameters()
        if name.endswith("lora_B")
    }
    assert gradients.keys() == layers
    silent = [name for name, grad in gradients.items() if grad is None or float(grad.norm()) == 0]
    assert not silent
    assert not [name for name, p in model.named_parameters() if p.requires_grad != (".lora_" in name)]


def test_gradients_are_those_of_the_formula():
    """Autograd in float64 through W + alpha / r B A, with the weights given to a network without factors."""
    config = settings(**ON)
    model = adapted(config, torch.float64)
    output(model, config, torch.float64).square().sum().backward()
    state = {name: nn.Parameter(p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    weights = {plain_name(name): p for name, p in state.items() if ".0.lora_" not in name}
    for name, a in state.items():
        if name.endswith(".0.lora_A"):
            weight = name.replace(".parametrizations", "").removesuffix(".0.lora_A")
            sums = torch.einsum("or,ri->oi", state[name.replace("lora_A", "lora_B")], a)
            weights[weight] = weights[weight] + ALPHA / RANK * sums.reshape(weights[weight].shape)
    args, conditions = inputs(config, torch.float64)
    noise, logits = functional_call(build_model(config).double(), weights, args, conditions)
    torch.cat([noise.flatten(), logits.flatten()]).square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if ".0.lora_" in name}
    largest = max(float(state[name].grad.norm()) for name in found)
    for name, gradient in found.items():
        true = state[name].grad
        assert float((gradient - true).norm()) <= 1e-6 * float(true.norm()) + 1e-12 * largest, name


@pytest.mark.parametrize("layer", [nn.Linear(24, 12), nn.Conv3d(6, 12, 3, padding=1), nn.Conv3d(6, 12, 1)], ids=repr)
def test_peft_computes_the_same_for_layers_of_pytorch(layer):
    peft = pytest.importorskip(
        "peft", reason="peft is not installed; install it with: pip install --no-deps peft accelerate"
    )
    torch.manual_seed(0)
    network = nn.Sequential(layer)
    x = torch.randn(3, 24) if isinstance(layer, nn.Linear) else torch.randn(2, 6, 4, 4, 4)
    update = LowRankUpdate(layer.weight, RANK, ALPHA / RANK)
    nn.init.normal_(update.lora_B)
    weight = update(layer.weight)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["0"])
    theirs = peft.inject_adapter_in_model(config, network)[0]
    with torch.no_grad():
        for factor, own in ((theirs.lora_A.default, update.lora_A), (theirs.lora_B.default, update.lora_B)):
            factor.weight.copy_(own.view_as(factor.weight))
        ours = functional_call(layer, {"weight": weight}, (x,))
        torch.testing.assert_close(network(x), ours, rtol=1e-4, atol=1e-4)
        assert float((ours - layer(x)).std()) > 0.1  # negative control


def test_factors_keep_the_layout_of_a_weight():
    weight = torch.randn(8, 4, 3, 3, 3).to(memory_format=torch.channels_last_3d)
    update = LowRankUpdate(weight, 2, 0.5)
    nn.init.normal_(update.lora_B)
    found = update(weight)
    assert found.is_contiguous(memory_format=torch.channels_last_3d) and not found.is_contiguous()
    torch.testing.assert_close(found, update(weight.contiguous()))


def test_self_attention_calls_layers_with_factors():
    """On a GPU the three weights are stacked, but for other layers than plain ones."""
    attention = SelfAttention(16, 8)
    assert add_factors(attention, 2, 1.0, lambda name: "to_q" in name) == 1
    assert type(attention.to_q) is not nn.Linear and type(attention.to_k) is nn.Linear


def test_without_a_rank_nothing_changes():
    config = settings()
    model = build_model(config)
    before = {name: type(module) for name, module in model.named_modules()}
    select_trained(model, config)
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert all(parameter.requires_grad for parameter in model.parameters())
