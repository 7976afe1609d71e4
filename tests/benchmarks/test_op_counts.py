"""Counts of ops, bytes and FLOPs: against graphs counted by hand, and the default model's against the committed table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

import op_counter
import op_counts
from benchmark_fixtures import TINY
from ccella_fast.config import Config, load_config, make_config
from ccella_fast.data.loading.dataset import TrainingSample
from ccella_fast.diffusion.objective import Objective
from ccella_fast.models import build_model
from ccella_fast.models.parts import select_trained
from ccella_fast.training.batches import MicroBatch
from ccella_fast.training.condition_dropout import ConditionDropout
from ccella_fast.training.flat_adamw import FlatAdamW
from ccella_fast.training.loop import joint_loss
from ccella_fast.training.power_ema import PowerEma

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")


# Counting


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counts_of_a_small_graph(device):
    """By hand: x 2x3, w 4x3: addmm, a view, an in-place add, a cast."""
    with torch.device(device):
        x, w, b = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)

    def run():
        y = F.linear(x, w, b)  # addmm reads 24 + 48 + 16, writes 32; 2 * 2 * 3 * 4 flops; w.t() is a view
        y.add_(y.view(2, 4))  # reads 32 + 32, writes 32
        return y.to(torch.bfloat16)  # reads 32, writes 16

    counts = op_counter.count(run)
    assert counts.by_op == {"addmm": 1, "add_": 1, "_to_copy": 1} and counts.ops == 3
    assert counts.bytes_read == 24 + 48 + 16 + 64 + 32 and counts.bytes_written == 32 + 32 + 16
    assert counts.flops == 48 and counts.views >= 2
    assert counts.peak_bytes == 32 + 16


def test_counts_of_expanded_and_freed_tensors():
    with torch.device("meta"):
        x = torch.empty(1, 100)

    def run():
        for _ in range(5):
            (x.expand(50, 100) + 1).sum()  # reads 400 bytes of storage, not 20,000; the sum is freed each time

    counts = op_counter.count(run)
    assert counts.bytes_read == 5 * (400 + 20_000) and counts.peak_bytes == 20_000 + 4


def test_kernels_of_one_op_on_many_tensors():
    """Each has at most 64 tensors, and at most 320 parts of 65,536 elements."""
    small = [torch.empty(8, device="meta") for _ in range(130)]
    large = [torch.empty(65_536 * 700, device="meta")]
    counts = [op_counter.count(lambda: torch._foreach_copy_(x, x)).launches for x in (small, large, small + large)]  # noqa: B023
    assert counts == [3, 3, 5]


def test_our_library_ops_are_one_op_each_with_flops():
    from ccella_fast.kernels.attention import attention

    q = torch.empty(1, 2, 64, 32, device="meta", dtype=torch.bfloat16)
    with op_counter.backend("triton"):
        fused = op_counter.count(lambda: attention(q, q, q))
    with op_counter.backend("reference"):
        plain = op_counter.count(lambda: attention(q, q, q))
    assert fused.ops == 1 < plain.ops and fused.flops == plain.flops == 4 * 2 * 64 * 64 * 32
    assert fused.bytes < plain.bytes


def test_flops_of_our_attention_are_those_of_plain_pytorch():
    """By torch's own formulas on the plain path; our backward pass has one more product, which recomputes the scores."""
    from ccella_fast.kernels.attention import attention
    from ccella_fast.kernels.cross_attention import cross_attention

    def leaf(*shape):
        return torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=True)

    parameters = {"ln_weight": leaf(64), "ln_bias": leaf(64), "w_q": leaf(64, 64), "w_out": leaf(64, 64)}
    cases = {  # the call, and the FLOPs of its scores: 2 x batch x heads x queries x keys x width
        "attention": (
            lambda: attention(leaf(1, 2, 64, 32), leaf(1, 2, 48, 32), leaf(1, 2, 48, 32)), 2 * 1 * 2 * 64 * 48 * 32
        ),
        "cross_attention": (
            lambda: cross_attention(
                leaf(3, 40, 64), leaf(3, 2, 24, 32), leaf(3, 2, 24, 32), **parameters, b_out=leaf(64), num_heads=2
            ),
            2 * 3 * 2 * 40 * 24 * 32,
        ),
    }  # fmt: skip
    for name, (call, scores) in cases.items():
        counts = {}
        for backend in ("triton", "reference"):
            with op_counter.backend(backend):
                loss = call().sum()
                counts[backend] = op_counter.count(call).flops, op_counter.count(loss.backward).flops
        forward, backward = counts["reference"]
        assert counts["triton"] == (forward, backward + scores), (name, counts)
        assert forward > 0 and backward > scores


def test_launches_of_a_convolution_by_hand():
    from torch.nn import functional as F

    with torch.device("meta"):
        x, weight, bias = torch.empty(2, 8, 4, 4, 4), torch.empty(8, 8, 3, 3, 3), torch.empty(8)
    last = lambda t: t.contiguous(memory_format=torch.channels_last_3d)  # noqa: E731

    launches = lambda *args: op_counter.count(lambda: F.conv3d(*args, padding=1)).launches  # noqa: E731
    assert launches(x, weight, None) == 1 and launches(x, weight, bias) == 2
    assert launches(last(x), last(weight), bias) == 2
    assert launches(last(x), weight, bias) == launches(x, last(weight), bias) == 3  # one copy of the other
    with op_counter.counting():
        assert F.conv3d(last(x), weight).is_contiguous(memory_format=torch.channels_last_3d)
        assert not F.conv3d(x, weight).is_contiguous(memory_format=torch.channels_last_3d)
    tokens, pointwise = last(x), torch.empty(8, 8, 1, 1, 1, device="meta")
    assert op_counter.count(lambda: F.conv3d(tokens, pointwise, bias)).launches == 3


def test_launches_of_our_kernels_by_hand():
    from ccella_fast.kernels import conv3d as convolution
    from ccella_fast.kernels.conv3d import conv3d
    from ccella_fast.kernels.group_norm_silu import group_norm_silu
    from ccella_fast.kernels.residual_shift import residual_shift
    from ccella_fast.kernels.upsample_conv3d import kernel_layout, phase_weights, upsample_conv3d

    with torch.device("meta"):
        parameter, small, large = torch.empty(64), torch.empty(1, 64, 16, 16, 8), torch.empty(1, 64, 64, 64, 32)
        weight = torch.empty(64, 64, 3, 3, 3)
    last = lambda t: t.contiguous(memory_format=torch.channels_last_3d)  # noqa: E731
    laid_out, plain = kernel_layout(phase_weights(weight)), phase_weights(weight)
    laid_out_conv = convolution.kernel_layout(weight)
    cases = [
        (1, lambda: group_norm_silu(small, 32, parameter, parameter)),  # a group fits in one program
        (2, lambda: group_norm_silu(large, 32, parameter, parameter)),
        (3, lambda: group_norm_silu(large[..., 1:], 32, parameter, parameter)),  # a copy, since it is not dense
        (1, lambda: residual_shift(last(small), last(small), parameter)),
        (2, lambda: residual_shift(last(small), small, parameter)),
        (1, lambda: upsample_conv3d(last(small), weight, None, phases=laid_out)),
        (2, lambda: upsample_conv3d(last(small), weight, None, phases=plain)),
        (3, lambda: upsample_conv3d(small, weight, None, phases=plain)),
        (1, lambda: conv3d(last(large), laid_out_conv, parameter, residual=last(large))),
        (2, lambda: conv3d(last(large), weight, parameter)),
        (3, lambda: conv3d(large, laid_out_conv, parameter, residual=large)),
        (2, lambda: conv3d(last(small[:, :, :8, :8, :4]), laid_out_conv)),  # the taps are divided among programs
    ]
    with op_counter.backend("triton"):
        for index, (expected, call) in enumerate(cases):
            counts = op_counter.count(call)
            ours = sum(number for name, number in counts.launches_by_op.items() if name.startswith("ccella_fast::"))
            assert ours == expected, (index, counts.launches_by_op)


def test_flops_of_our_upsampling_convolution():
    """By hand: each voxel of the large grid is a sum over 2 x 2 x 2 voxels of the small one, for every pair of channels."""
    from ccella_fast.kernels.upsample_conv3d import upsample_conv3d

    x, weight = (
        torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in ((2, 16, 3, 4, 5), (32, 16, 3, 3, 3))
    )
    with op_counter.backend("triton"):
        flops = op_counter.count(lambda: upsample_conv3d(x, weight, weight[:, 0, 0, 0, 0])).flops
    assert flops == 2 * 8 * (2 * 6 * 8 * 10) * 16 * 32


def test_flops_of_our_convolution():
    """By hand: 27 taps for every voxel and pair of channels, as PyTorch counts its own convolution."""
    from ccella_fast.kernels.conv3d import conv3d

    x, weight = (
        torch.empty(shape, device="meta", dtype=torch.bfloat16) for shape in ((2, 16, 3, 4, 5), (32, 16, 3, 3, 3))
    )
    for backend in ("triton", "reference"):
        flops = op_counter.count(lambda backend=backend: conv3d(x, weight, backend=backend)).flops
        assert flops == 2 * 27 * (2 * 3 * 4 * 5) * 16 * 32


def test_half_autocast_casts_weights_once_and_keeps_norms_in_fp32():
    with torch.device("meta"):
        net = torch.nn.Sequential(torch.nn.Conv3d(4, 4, 3, padding=1), torch.nn.GroupNorm(2, 4), torch.nn.SiLU())
        x = torch.empty(1, 4, 8, 8, 8)
    with torch.no_grad(), op_counter.HalfAutocast():
        first, second = op_counter.count(lambda: net(x)), op_counter.count(lambda: net(x))
        assert net(x).dtype == torch.float32 and net[0](x).dtype == torch.float16
    assert first.by_op["_to_copy"] == 4 and second.by_op["_to_copy"] == 2  # weight, bias, x, norm input; x, norm input


def test_saved_bytes_counts_each_storage_once():
    x = torch.ones(10, requires_grad=True)
    assert op_counter.saved_bytes(lambda: x.exp().sum()) == 40  # exp saves its result
    assert op_counter.saved_bytes(lambda: (x * 2).sum()) == 0  # a leaf and a number
    y = (x * 1).detach().requires_grad_() * 1
    assert op_counter.saved_bytes(lambda: y * y) == 40


# The counts of the default model may fall, but not rise


def test_model_counts_have_not_grown():
    """After a decrease run `python benchmarks/op_counts.py --write`."""
    # In a process of its own, like the command: other tests may leave hooks in this one that add an op to a layer.
    code = "import json, op_counts; print(json.dumps(op_counts.counted()))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts, known = json.loads(done.stdout), json.loads(op_counts.FILE.read_text())["counts"]
    for step, implementations in known.items():
        for name, facts in implementations.items():
            for key, value in facts.items() if name != "reference" else ():
                found = counts[step][name][key]
                assert found <= value, f"{step}: {key} of {name} is {found:,}, was {value:,}"
    step = counts["denoising step"]["ours"]
    assert step["ops"] <= 450 and step["bytes"] <= 4e9  # the goals of the kernels
    assert step["launches"] <= 320 and counts["denoising step"]["ours, PyTorch's attention"]["launches"] <= 380
    assert counts["optimizer"]["ours"]["launches"] <= 50
    assert counts["decode"]["ours"]["ops"] <= 60 and counts["decode"]["ours"]["bytes"] <= 60e9
    # Independent truth: the FLOPs of the reference's forward pass, counted in docs/explanation/method.md, section 0.
    assert abs(counts["denoising step"]["reference"]["flops"] / 1e9 - 1079.9) < 0.1


@pytest.mark.parametrize("overrides", [
    {}, {"scheduler.prediction": "v", "training.min_snr_gamma": 5.0}, {"scheduler.prediction": "x0"},
    {"scheduler.schedule": "rectified_flow"}, {"training.report_dropout": 1.0},
], ids=str)  # fmt: skip
def test_objectives_and_report_dropout_add_at_most_2_percent(overrides):
    """What a step of the default model does besides its network, on the network's stand-in; all reports are dropped."""
    model_ops = json.loads(op_counts.FILE.read_text())["counts"]["training step"]["ours"]
    default, found = (_loss_counts(Config() if not given else make_config(given)) for given in ({}, overrides))
    for key in ("ops", "launches", "bytes"):
        added = found[key] - default[key]
        assert (added == 0) if not overrides else (0 < added <= 0.02 * model_ops[key]), (key, added)


def test_power_function_averages_add_at_most_5_percent_bytes():
    """Both averages of the default settings, of which one is updated every 8 steps, next to the average of every step."""
    training = make_config({"training.power_ema_snapshot_steps": 1000}).training
    with torch.device("meta"):
        model = build_model(Config())
    optimizer = FlatAdamW(
        model, dtype=torch.bfloat16, lr=1.0, betas=(0.9, 0.9), weight_decay=0.0, max_norm=0.0, rows=1,
        sum_dtype=torch.bfloat16,
    )  # fmt: skip
    averages = PowerEma(SimpleNamespace(optimizer=optimizer), training, total_steps=1000)
    known = json.loads(op_counts.FILE.read_text())["counts"]
    for key, bound in (("bytes", 0.05), ("ops", 0.01)):
        steps = [op_counter.count(lambda step=step: averages.update(step)).summary()[key] for step in range(1, 17)]
        assert [step for step, done in enumerate(steps, 1) if done] == [8, 16]
        default = known["training step"]["ours"][key] + known["optimizer"]["ours"][key]
        assert 0 < sum(steps) / 16 <= bound * default, (key, sum(steps) / 16 / default)
    # By hand: each of two averages is read and written, and the weights are read.
    assert op_counter.count(lambda: averages.update(8)).bytes == 2 * 3 * 4 * optimizer.masters.numel()


def _loss_counts(config: Config) -> dict[str, int]:
    """Ops and bytes of the forward and backward passes of `joint_loss` on a stand-in that outputs its input, batch 1."""
    x, timesteps, conditions = op_counts._inputs(config, torch.bfloat16, 1)
    objective, dropout = Objective.from_config(config), None
    with torch.device("meta"):
        latents = x.float()
        timesteps = timesteps if config.scheduler.is_flow else timesteps.long()
        known = torch.zeros(1, dtype=torch.bool)
        batch = TrainingSample(
            ["a"], latents, latents, conditions["text"], torch.zeros(1, 2), conditions["spacing"], known
        )
        network = torch.nn.Conv3d(4, 4, 1, dtype=torch.bfloat16)
    if config.training.report_dropout:
        dropout = ConditionDropout(0, report=1.0, pirads=0.0, null=torch.empty_like(batch.text[0]))
    model = StandIn(network, config.model.traits)

    def step():
        if dropout is not None:
            dropout.apply(batch, [0])
        joint_loss(model, MicroBatch(batch, latents, latents, timesteps, 1.0), objective, 1e-4).total.backward()

    step()  # tables of the objective, which are made once
    return op_counter.count(step).summary()


def test_the_costs_of_low_rank_adapters_are_those_of_the_page():
    """Of forward and backward pass, on a CPU. Which operations a CPU has differs a little."""
    page = (ROOT / "docs" / "how-to" / "fine-tune.md").read_text().replace("\n", " ")
    said = re.search(r"([\d.]+) times the FLOPs, ([\d.]+) times the operations and ([\d.]+) times the bytes", page)
    memory = re.search(r"(\d+) MB of activations instead of (\d+)", page)
    assert said and memory
    found = []
    for rank in (8, 0):
        config = make_config({"training.low_rank.rank": rank}, base=load_config(ROOT / "configs" / "demo.json"))
        model = build_model(config)
        select_trained(model, config)
        x, text = (
            torch.zeros(4, 8, *config.check_grid()),
            torch.zeros(4, config.text.max_length, config.model.input_dim),
        )

        def forward():
            noise, logits = model(x, torch.zeros(4), spacing=torch.zeros(4, 3), text=text)  # noqa: B023
            return F.l1_loss(noise, x) + logits.sum()  # noqa: B023

        kept = op_counter.saved_bytes(forward, without=model.parameters())
        found.append({**op_counter.count(lambda: forward().backward()).summary(), "kept": kept})
    for number, key in zip(said.groups(), ("flops", "ops", "bytes"), strict=True):
        assert found[0][key] / found[1][key] == pytest.approx(float(number), abs=0.03), key
    assert [counts["kept"] / 1e6 for counts in found] == pytest.approx(list(map(float, memory.groups())), rel=0.05)


class StandIn(torch.nn.Module):
    def __init__(self, network, variant):
        super().__init__()
        self.network, self.variant = network, variant

    def forward(self, x, timesteps, **inputs):
        return self.network(x), None


def test_an_additional_op_is_counted():
    small = Config.model_validate({"model": TINY, "data": {"dim": [32, 32, 16]}, "text": {"max_length": 8}})
    before = op_counts.counted(small)["denoising step"]["ours"]["ops"]
    from ccella_fast.models import unet3d

    plain = unet3d.torch.cat
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unet3d.torch, "cat", lambda tensors, dim=0: plain(tensors, dim=dim) + 0)
        assert op_counts.counted(small)["denoising step"]["ours"]["ops"] > before
