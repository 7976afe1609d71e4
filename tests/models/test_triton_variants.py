"""Every variant with every kernel on Triton, in its interpreter: predictions and gradients against float64.

The error may be at most twice that of the plain kernels in the same dtype. CCELLA and a variant without a report are part of
every run, the others in `make slow`.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from ccella_fast.kernels.backend import ENVIRONMENT, KERNELS
from ccella_fast.models import build_model
from ccella_fast.variants import VARIANTS
from kernel_fixtures import repair_interpreter, without_zeros
from op_counter import count

repair_interpreter()
# Two levels, so that there is a convolution down and one up; more channels than those that are left to PyTorch.
SIZES = {
    "num_channels": [32, 64], "attention_levels": [False, True], "num_head_channels": [0, 32], "num_res_blocks": 1,
    "cross_attention_dim": 48, "input_dim": 24, "num_latents": 4, "adapter_blocks": 2, "adapter_heads": 4,
    "adapter_time_dim": 16, "class_head_dim": 8, "norm_num_groups": 8,  # a group has several voxels, also of the small grid
}  # fmt: skip
IN_EVERY_RUN = ("CCELLA", "RADMAISI")


def variant_model(name):
    torch.manual_seed(0)
    return without_zeros(build_model(name, **SIZES).double(), std=0.1)


def results(model, dtype):
    """Noise and gradients, and the class logits where there are any, as float64 vectors."""
    model = copy.deepcopy(model).to(dtype)
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    config = model.config
    x, text = draw(2, 4, 4, 2, 2), draw(2, 5, config.input_dim)
    given = {"spacing": draw(2, 3), "text": text if model.variant.text else None}
    if model.variant.class_input == "given":
        given["pirads"] = draw(2, config.num_classes)
    given = {name: None if value is None else value.float().to(dtype) for name, value in given.items()}
    noise, logits = model(x.float().to(dtype), torch.tensor([300.0, 700.0]), **given)[:2]
    loss = noise.square().mean() + (0 if logits is None else logits.square().mean())
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    found = {"noise": noise, "gradients": torch.cat([g.flatten() for g in gradients if g is not None])}
    return {name: value.detach().double() for name, value in found.items()} | (
        {} if logits is None else {"logits": logits.detach().double()}
    )


def errors(found, truth):
    assert found.keys() == truth.keys()
    return {name: float((found[name] - value).norm() / value.norm()) for name, value in truth.items()}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in IN_EVERY_RUN else pytest.mark.slow) for name in VARIANTS]
)
def test_error_is_at_most_twice_that_of_the_plain_kernels(name, monkeypatch):
    model = variant_model(name)
    monkeypatch.setenv(ENVIRONMENT, "reference")
    truth = results(model, torch.float64)
    plain = errors(results(model, torch.float32), truth)
    monkeypatch.setenv(ENVIRONMENT, "triton")
    found = {}
    counts = count(lambda: found.update(results(model, torch.float32)))
    used = {op.removeprefix("ccella_fast::") for op in counts.by_op if op.startswith("ccella_fast::")}
    report = {"cross_attention", "geglu", "residual_shift"}  # only the transformer of a report has these
    expected = {*KERNELS} - {"upsample_trilinear", "adamw"} - (set() if model.variant.text else report)
    assert expected <= used and not used & ({*KERNELS} - expected)
    allowed = {key: 2 * value + torch.finfo(torch.float32).eps for key, value in plain.items()}
    assert all(error <= allowed[key] for key, error in errors(found, truth).items()), (errors(found, truth), plain)
    assert max(allowed.values()) < 1e-4  # a mistake of a thousandth would be noticed
