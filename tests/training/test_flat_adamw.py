"""The optimizer without ZeRO against torch.optim.AdamW in float64, and what it costs."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from ccella_fast.models.blocks import Conv3d
from ccella_fast.models.wide_linear import WideLinear
from ccella_fast.training.flat_adamw import FlatAdamW
from kernel_fixtures import draw

SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "weight_decay": 0.2, "max_norm": 0.03, "sum_dtype": torch.float32}


class Network(nn.Module):
    """A convolution, two wide layers of which one may be left out of the loss, and a parameter that never enters it."""

    def __init__(self):
        super().__init__()
        self.conv = Conv3d(2, 3, 3, padding=1)
        self.wide = nn.ModuleList(WideLinear(3 * 27, 20) for _ in range(2))
        self.unused = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.conv(x)).flatten(1)
        return sum(layer(h).square().mean() for layer in self.wide)


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def batches(rows: int = 2) -> list[Tensor]:
    """Four micro-batches."""
    return [draw(rows, 2, 3, 3, 3, seed=seed, dtype=torch.float32) for seed in range(4)]


def plain(model: nn.Module, *, accumulation: int = 2, **changed) -> tuple[list[Tensor], list[float]]:
    """Weights and norms of torch.optim.AdamW in float64."""
    s, model = {**SETTINGS, **changed}, copy.deepcopy(model).double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=s["lr"], betas=s["betas"], weight_decay=s["weight_decay"])
    parts, norms = batches(), []
    for first in range(0, len(parts), accumulation):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)  # decay acts on all weights, as with ZeRO
        for part in parts[first : first + accumulation]:
            (model(part.double()) / accumulation).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), s["max_norm"])))
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()], norms


def train(model: nn.Module, optimizer: FlatAdamW, *, accumulation: int = 2) -> list[float]:
    """The norms of the steps."""
    parts, norms = batches(), []
    for number, part in enumerate(parts, start=1):
        optimizer.is_last_micro_step = lambda number=number: number % accumulation == 0
        (model(part) / accumulation).backward()
        if number % accumulation == 0:
            optimizer.step()
            norms.append(optimizer._global_grad_norm)
    return norms


@pytest.mark.parametrize("rows", [4, 100], ids=["factors", "gradients"])
@pytest.mark.parametrize("bucket", [1, 100, 10**6])
def test_steps_equal_those_of_torch(rows, bucket):
    model = network()
    expected, norms = plain(model)
    assert all(norm > SETTINGS["max_norm"] for norm in norms)
    optimizer = FlatAdamW(model, dtype=torch.float32, rows=rows, bucket=bucket, overlap=bucket != 100, **SETTINGS)
    assert train(model, optimizer) == pytest.approx(norms, rel=1e-6)
    assert optimizer.steps == 2 and len(optimizer.gradients) >= 1024
    for found, parameter in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(found.double(), parameter, rtol=1e-5, atol=1e-6)
    # Negative controls: without clipping, without decay, with other samples.
    for changed in ({"max_norm": 1e9}, {"weight_decay": 0.0}, {"accumulation": 1}):
        other, _ = plain(network(), **changed)
        assert max(float((a - b).abs().max()) for a, b in zip(expected, other, strict=True)) > 1e-4, changed


def test_a_parameter_that_leaves_the_loss_has_no_gradient_of_an_earlier_step():
    model = network()
    optimizer = FlatAdamW(model, dtype=torch.float32, rows=4, bucket=1, **SETTINGS)
    train(model, optimizer)
    sum(layer(batches()[0].flatten(1).repeat(1, 2)[:, : 3 * 27]).sum() for layer in model.wide).backward()
    optimizer.step()
    assert not optimizer.view(optimizer.gradients, model.conv.weight).any()
    assert optimizer.view(optimizer.gradients, model.wide[0].bias).any()


def test_factors_are_used_where_they_are_smaller_than_the_gradient():
    """Up to half of the rank of the weight, here 20."""
    for rows, wide in ((10, True), (11, False)):
        model = network()
        FlatAdamW(model, dtype=torch.float32, rows=rows, **SETTINGS)
        model(batches()[0]).backward()
        assert [len(layer.factors or ()) for layer in model.wide] == [int(wide)] * 2


def test_in_bf16_sums_over_micro_steps_are_fp32():
    """The model computes in bf16; its master weights get the gradients of both micro-steps, added in fp32."""
    model = network()
    truth = copy.deepcopy(model).bfloat16()
    optimizer = FlatAdamW(model, dtype=torch.bfloat16, rows=100, **SETTINGS | {"max_norm": 0})
    parts = [part.bfloat16() for part in batches()[:2]]
    gradients: list[Tensor] = []
    for number, part in enumerate(parts, start=1):
        optimizer.is_last_micro_step = lambda number=number: number == 2
        model(part).backward()
        truth.zero_grad(set_to_none=True)
        truth(part).backward()
        gradients.append(truth.conv.weight.grad.float())
    optimizer.finish_sums()
    found = optimizer.view(optimizer.gradients, model.conv.weight)
    assert torch.equal(found, gradients[0] + gradients[1])
    assert not torch.equal(found, (gradients[0].bfloat16() + gradients[1].bfloat16()).float())
    optimizer.step()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for parameter, master in optimizer.views(optimizer.masters).items():
        assert master.dtype == torch.float32 and torch.equal(parameter, master.bfloat16())


def test_the_average_is_updated_with_the_decay_of_the_step():
    model = network()
    optimizer = FlatAdamW(model, dtype=torch.float32, rows=4, **SETTINGS)
    optimizer.average, optimizer.average_decay = optimizer.masters.clone(), lambda: 0.75
    before = optimizer.masters.clone()
    train(model, optimizer, accumulation=4)
    torch.testing.assert_close(optimizer.average, 0.75 * before + 0.25 * optimizer.masters, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("where", ["conv", "wide"])
def test_a_step_that_is_not_finite_changes_nothing(where):
    """Also if the gradient of a wide layer alone is not finite, of which there are only factors."""
    model = network()
    optimizer = FlatAdamW(model, dtype=torch.float32, rows=4, **SETTINGS)
    train(model, optimizer)
    before = {name: getattr(optimizer, name).clone() for name in ("masters", "exp_avg", "exp_avg_sq")}
    loss = model(batches()[0])
    if where == "conv":
        (loss * torch.nan).backward()
    else:
        loss.backward()
        dy, x = model.wide[0].factors[-1]
        model.wide[0].factors[-1] = dy * torch.inf, x
    optimizer.step()
    assert optimizer.overflow and optimizer.steps == 2
    assert all(torch.equal(getattr(optimizer, name), value) for name, value in before.items())
    train(model, optimizer)
    assert not optimizer.overflow and optimizer.masters.isfinite().all()


def test_a_norm_of_zero_is_zero():
    """The products of the factors cancel, and their rounding may be negative."""
    model = network()
    optimizer = FlatAdamW(model, dtype=torch.float32, rows=8, **SETTINGS)
    for layer in model.wide:
        dy, x = draw(1, 20, dtype=torch.float32), draw(1, 81, dtype=torch.float32)
        layer.factors = [(torch.cat([dy, -dy / 3, -dy / 3, -dy / 3]), x.expand(4, -1))]
    optimizer.step()
    assert 0 <= optimizer._global_grad_norm < 0.1 and not optimizer.overflow
    negative = (torch.zeros(2, 1, 1), torch.ones(2, 1, 1))
    optimizer.gradients.fill_(0)
    assert float(optimizer.norm(negative)) == 0
    assert optimizer.norm((torch.full((2, 1, 1), torch.nan), torch.ones(2, 1, 1))).isnan()


def test_gradients_of_few_voxels_are_computed_in_their_buffer():
    model = network()
    optimizer = FlatAdamW(model, dtype=torch.float32, rows=4, **SETTINGS)
    weight, found = model.conv.weight, []
    view = optimizer.view(optimizer.gradients, weight)
    memory = weight.gradient_memory
    weight.gradient_memory = lambda: found.append(memory()) or found[-1]
    for part in batches()[:2]:  # two micro-steps
        model(part).backward()
    assert [given is not None and given.data_ptr() == view.data_ptr() for given in found] == [True, False]


def test_a_weight_that_is_used_twice_in_one_step():
    """Its second gradient must not overwrite the first one."""
    model = network()
    optimizer = FlatAdamW(model, dtype=torch.float32, rows=4, **SETTINGS)
    exact = copy.deepcopy(model.conv).double()
    first, second = batches()[:2]
    (model.conv(first).square().sum() + model.conv(second).square().sum()).backward()
    optimizer.finish_sums()
    (exact(first.double()).square().sum() + exact(second.double()).square().sum()).backward()
    for name, parameter in model.conv.named_parameters():
        truth = exact.get_parameter(name).grad
        assert (optimizer.view(optimizer.gradients, parameter) - truth).abs().max() < 1e-5 * truth.abs().max()


def test_a_gradient_that_comes_after_its_sum_is_an_error():
    """Reentrant checkpointing of a layer that is used twice computes its gradient in two backward passes."""
    model = network()
    FlatAdamW(model, dtype=torch.float32, rows=4, bucket=1, **SETTINGS)
    model(batches()[0]).backward()
    with pytest.raises(RuntimeError, match="twice in one backward pass"):
        model(batches()[0]).backward()


def test_views_keep_the_memory_format():
    model = network()
    model.to(memory_format=torch.channels_last_3d)
    FlatAdamW(model, dtype=torch.bfloat16, rows=4, **SETTINGS)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last_3d)
    start = min(parameter.data_ptr() for parameter in model.parameters())
    assert all((parameter.data_ptr() - start) % 256 == 0 for parameter in model.parameters())
    torch.testing.assert_close(model.conv.weight.float(), network().conv.weight.bfloat16().float())


def test_a_step_reads_one_number_back():
    """Each read makes the host wait for the GPU. The launches are counted in tests/benchmarks/test_op_counts.py."""

    class Reads(TorchDispatchMode):
        names = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names[func.overloadpacket.__name__] += 1
            return func(*args, **(kwargs or {}))

    model = network()
    optimizer = FlatAdamW(model, dtype=torch.float32, rows=4, **SETTINGS)
    model(batches()[0]).backward()
    with Reads() as reads:
        optimizer.step()
    assert reads.names["_local_scalar_dense"] == 1 and reads.names["_fused_adamw_"] == 3
    with Reads():  # negative control
        float(torch.ones(1) + 1)
    assert Reads.names["_local_scalar_dense"] == 2
