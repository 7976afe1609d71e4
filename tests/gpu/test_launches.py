"""The launches of a denoising step on a GPU, by PyTorch's profiler, are those that `benchmarks/launch_model.py` counts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import op_counts
from ccella_fast.config import Config
from ccella_fast.kernels.backend import ENVIRONMENT
from ccella_fast.kernels.layout import multiprocessor_count
from ccella_fast.models import build_model
from op_counter import count

pytestmark = pytest.mark.gpu
KERNELS = {  # library op: the beginning of the names of its kernels
    "group_norm_silu": "_group_norm_silu_fwd", "attention": "_attention_fwd", "cross_attention": "_cross_attention_fwd",
    "geglu": "_geglu_fwd", "residual_shift": "_residual_shift_fwd", "upsample_conv3d": "_upsample_conv3d_fwd",
    "conv3d": "_conv3d_",
}  # fmt: skip


def launched(model, config):
    """The names of the kernels that a denoising step launches, without copies of memory."""
    x = torch.randn(1, sum(config.model.latent_channels), *config.check_grid(), device="cuda", dtype=torch.bfloat16)
    text = torch.randn(1, config.text.max_length, config.model.input_dim, device="cuda", dtype=torch.bfloat16)
    conditions = {"spacing": torch.ones(1, 3, device="cuda"), "text": text}
    model, x = copy.deepcopy(model).to(memory_format=torch.channels_last_3d), x.to(memory_format=torch.channels_last_3d)
    with torch.no_grad():
        conditioning = model.condition(torch.zeros(1, device="cuda"), **conditions)
        for _ in range(2):  # compiles, and stacks weights
            model.denoise(x, conditioning)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            model.denoise(x, conditioning)
            torch.cuda.synchronize()
    events = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    return [event.name for event in events if not event.name.startswith(("Memcpy", "Memset"))]


def test_launches_are_those_of_the_model(monkeypatch):
    if multiprocessor_count(torch.device("cuda", 0)) != multiprocessor_count(torch.device("meta")):
        pytest.skip("the model counts for 132 multiprocessors, on which the division of taps depends")
    monkeypatch.setenv(ENVIRONMENT, "triton")
    config = Config()
    with torch.device("cuda"):
        names = launched(build_model(config).bfloat16(), config)
    if not names:
        pytest.skip("the profiler sees no kernels here")
    with torch.device("meta"):
        meta = build_model(config).bfloat16()
    counts = count(op_counts.denoising_step(config, meta, op_counts.FlashAttention(), torch.bfloat16))
    print(f"{len(names)} kernels, {counts.launches} counted")
    found = {op: sum(name.startswith(start) for name in names) for op, start in KERNELS.items()}
    assert found == {op: counts.launches_by_op[f"ccella_fast::{op}"] for op in KERNELS}
    # Libraries may add a bias within a product, or divide a product and sum its parts.
    assert 0.9 * counts.launches <= len(names) <= 1.25 * counts.launches
