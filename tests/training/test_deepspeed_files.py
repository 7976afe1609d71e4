"""The files of configs/deepspeed train three steps each, and do what their comments say."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import deepspeed_files
from training_fixtures import ROOT, environment, losses, run, train_here, write_config

FILES = ROOT / "configs" / "deepspeed"
SHARDED = ["zero1", "zero2", "zero3", "zero3_offload_cpu"]


def test_the_two_lists_are_all_files():
    assert {file.stem for file in FILES.glob("*")} == {*SHARDED, "zero0", "cpu_debug"}


@pytest.fixture(scope="module")
def unsharded(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("unsharded") / "run"
    train_here(folder, data, deepspeed_file=FILES / "zero0.json", batch_size=2, max_train_steps=3)
    return losses(folder)


def test_files_that_shard_train_like_the_one_that_does_not(tmp_path, data, unsharded):
    """Two processes with half the batch each; the losses are those of one process, to the rounding of fp32."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    files = [str(FILES / f"{name}.json") for name in SHARDED]
    command = [*launcher, str(Path(deepspeed_files.__file__)), str(data), str(tmp_path), *files]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    for name in SHARDED:
        found = losses(tmp_path / name / "run")
        assert [step for step, _ in found] == [1, 2, 3]
        assert [loss for _, loss in found] == pytest.approx([loss for _, loss in unsharded], rel=1e-5), name


def test_the_file_for_finding_mistakes_prints_every_step(tmp_path, data):
    config = write_config(tmp_path / "config.json", max_train_steps=3)
    arguments = ["--config", config, "--data", data, "--output_dir", tmp_path / "run"]
    output = run(*arguments, "--deepspeed", FILES / "cpu_debug.json")
    assert re.findall(r"step=(\d), skipped=0, lr=\[[\d.e-]+\]", output) == ["0", "1", "2", "3"]
    assert output.count("fwd_microstep") == 3 and "RunningAvgSamplesPerSec" not in output
    assert len(losses(tmp_path / "run")) == 3
