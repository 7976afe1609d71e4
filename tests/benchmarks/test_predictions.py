"""The predicted times of the kernels: the page is that of the current code and records, and its figures are right by hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import model_launches
import predictions
from cases.kernels import CASES
from ccella_fast.config import Config
from fixtures import Workbench
from model_launches import OpCall
from op_counter import Counts

ROOT = Path(__file__).resolve().parents[2]
RATES = {"copy_bytes_per_second": 3e12, "matmul_flops": {"bf16": 6e14}}


def test_the_page_is_up_to_date(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "benchmarks/predictions.py", "--out", str(tmp_path / "page.md")]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    written, committed = (path.read_text() for path in (tmp_path / "page.md", predictions.FILE))
    assert written == committed, "benchmarks/PREDICTIONS.md is out of date: run python benchmarks/predictions.py"


def test_bytes_flops_and_programs_of_the_first_level_by_hand():
    voxels, channels = 64 * 64 * 32, 64
    calls = model_launches.model_calls()["denoising step"]
    conv = next(call for call in calls if call.op == "conv3d" and call.arguments[4] is not None)
    assert list(conv.arguments[0].shape) == [1, channels, 64, 64, 32]
    assert conv.counts.bytes == 2 * (3 * voxels * channels + 27 * channels**2 + channels)
    assert conv.counts.flops == 2 * 27 * voxels * channels**2
    assert [launch.grid for launch in conv.launches] == [(voxels // 128, 1)]
    norm = next(call for call in calls if call.op == "group_norm_silu")
    assert [launch.key for launch in norm.launches] == ["statistics last", "apply last"]
    assert [launch.grid for launch in norm.launches] == [(128,), (voxels // 64 // 8,)]  # 8 tiles of 64 voxels each
    block = next(call for call in calls if call.op == "cross_attention")
    heads, output = block.launches
    tokens, width = block.arguments[0].shape[1:]
    assert output.grid == (tokens // 64, width // 64, 1) and heads.grid == (tokens // 64, 8, 1)


def test_ops_inside_another_op_are_recorded_with_it():
    calls = model_launches.model_calls()["training step, batch 8"]
    backward = next(call for call in calls if call.op == "cross_attention_backward")
    assert [launch.key for launch in backward.launches] == ["forward d32", "dq d32", "dkdv d32"]


def test_registers_and_shared_memory_limit_the_programs_that_fit():
    launch = SimpleNamespace(arguments={"num_warps": 8}, grid=(1000, 2))
    cases = {  # registers, shared bytes -> programs of 256 threads on a multiprocessor
        (32, 0): 8, (33, 0): 6, (128, 0): 2, (255, 0): 1, (32, 100 * 1024): 2, (32, 113 * 1024 + 1): 1,
    }  # fmt: skip
    for (registers, shared), resident in cases.items():
        waves = predictions.footprint(launch, registers, shared).waves
        assert waves == pytest.approx(2000 / (132 * resident)), (registers, shared)


def test_predicted_time_by_hand():
    """30 MB are 10 us, 12 GFLOP 20 us; 200 programs leave one of two places on 64 of 132 multiprocessors empty."""
    assert predictions.predict(30_000_000, 0, 264, 1, RATES) == pytest.approx((10e-6, 12e-6))
    assert predictions.predict(30_000_000, 12_000_000_000, 264, 2, RATES) == pytest.approx((20e-6, 24e-6))
    assert predictions.predict(30_000_000, 0, 200, 1, RATES) == pytest.approx((10e-6, 10e-6 * 264 / 200 + 2e-6))


def call_of(op, *shapes):
    return OpCall(op, tuple(torch.empty(shape, device="meta") for shape in shapes), Counts(), [])


def record(date, name, inputs, status="ok", **seconds):
    sides = {side.replace("_", ", "): {"seconds": {"median": value}} for side, value in seconds.items()}
    return {"date": date, "cases": [{"name": name, "status": status, "shapes": {"inputs": inputs}, "sides": sides}]}


def test_the_newest_measurement_of_the_same_shapes_is_found():
    x, weight, bias = [1, 8, 4, 4, 4], [8, 8, 3, 3, 3], [8]
    records = [
        record("2026-01-03", "conv3d", [x, weight, bias, x, weight], ours=5e-6, ours_Triton=3e-6),
        record("2026-01-04", "conv3d_level_1", [x, weight, bias, x, weight], ours=4e-6, ours_Triton=2e-6),
        record("2026-01-05", "conv3d_batch_8", [[8, *x[1:]], weight, bias, x, weight], ours=1e-6),
        record("2026-01-06", "conv3d", [x, weight, bias, x, weight], status="wrong", ours=1e-6),
        record("2026-01-07", "conv3d_backward", [x, weight, bias, x, weight], ours=1e-6),
        record("2026-01-08", "upsample_conv3d", [x, weight, bias], ours=7e-6),
        record("2026-01-09", "attention_backward", [[1, 2, 16, 8]] * 3, ours=9e-6),
        record("2026-01-10", "cross_attention", [[1, 2, 16, 8]] * 3, ours=8e-6),
    ]
    measured = lambda *arguments: predictions.measured(call_of(*arguments), records)  # noqa: E731
    assert measured("conv3d", x, weight, bias, x) == 2e-6
    assert measured("conv3d", x, weight) is None  # without bias and residual
    assert measured("conv3d", [1, 8, 8, 4, 4], weight, bias, [1, 8, 8, 4, 4]) is None
    assert measured("upsample_conv3d", x, weight, bias, [8, 8, 8, 2, 2, 2]) == 7e-6
    heads = [1, 2, 16, 8]
    assert measured("attention_backward", heads, heads, heads, heads, heads, heads[:3]) == 9e-6
    assert measured("attention", heads, heads, heads) is None


def test_measured_cases_of_kernels_have_a_prediction():
    """Except the backward passes of convolutions, which are mostly cuDNN's, and a size that the model does not have."""

    class MetaWorkbench(Workbench):
        def random(self, *shape, seed=0):
            return torch.empty(shape, device="meta")

    bench = MetaWorkbench(torch.device("meta"), Config())
    calls = [call for calls in model_launches.model_calls().values() for call in calls]
    without = set()
    for case in CASES:
        newest = record("2026-01-01", case.name, case.build(bench).shapes["inputs"], ours=1e-6)
        if not any(predictions.measured(call, [newest]) for call in calls):
            without.add(case.name)
    convolutions = {case.name for case in CASES if "conv3d" in case.name and "backward" in case.name}
    assert without == convolutions | {"group_norm_silu_public"}
