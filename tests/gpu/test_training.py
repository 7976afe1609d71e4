"""train.py on a GPU with one rank of NCCL: it finishes, resumes, and gives the losses of a CPU."""

from __future__ import annotations

import math
import shutil

import pytest
import torch

from training_fixtures import losses, run, train_here, weights, write_config

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_losses_are_those_of_a_cpu(data, tmp_path, recompute):
    assert train_here(tmp_path / "gpu", data, activation_checkpointing=recompute) == 0
    config = write_config(tmp_path / "cpu.json")
    run("--config", config, "--data", data, "--output_dir", tmp_path / "cpu", CUDA_VISIBLE_DEVICES="")
    gpu, cpu = losses(tmp_path / "gpu"), losses(tmp_path / "cpu")
    assert [step for step, _ in gpu] == [step for step, _ in cpu] == list(range(1, 7))
    for (_, on_gpu), (_, on_cpu) in zip(gpu, cpu, strict=True):
        assert on_gpu == pytest.approx(on_cpu, rel=0.01)  # TF32 in convolutions


@pytest.mark.parametrize(("precision", "stage"), [("fp32", 0), ("bf16", 0), ("bf16", 2)])
def test_resuming_equals_an_unbroken_run(data, tmp_path, precision, stage):
    settings = {"precision": precision, "zero_stage": stage}
    assert train_here(tmp_path / "run", data, **settings) == 0
    whole, expected = losses(tmp_path / "run"), weights(tmp_path / "run", 6)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000006")
    assert train_here(tmp_path / "run", data, resume="latest", **settings) == 0
    parts = losses(tmp_path / "run")
    assert len(whole) == len(parts) == 6 and all(math.isfinite(loss) for _, loss in whole)
    for name, value in weights(tmp_path / "run", 6).items():
        torch.testing.assert_close(value, expected[name], rtol=0.02, atol=2e-3, msg=name)
