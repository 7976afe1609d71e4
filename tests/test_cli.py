"""Bad input through the real command: one message of at most five lines, an exit code, no traceback, nothing written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ccella_fast.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


CASES = {
    "no such studies": (3, ["prepare", "--data", "{tmp}/none", "--out", "{tmp}/out", "--config", "configs/demo.json"]),
    "no such config": (2, ["prepare", "--data", "{tmp}", "--out", "{tmp}/out", "--config", "{tmp}/none.json"]),
    "unknown override": (2, ["prepare", "--data", "{tmp}", "--out", "{tmp}/out", "--set", "data.dims=[1,1,1]"]),
    "grid does not divide": (
        2,
        ["prepare", "--data", "{tmp}", "--out", "{tmp}/out", "--set", "data.dim=[250,256,128]"],
    ),
    "nothing prepared": (3, ["train-vae", "--data", "{tmp}/none", "--out", "{tmp}/out"]),
    "no checkpoint": (4, ["sample", "--checkpoint", "{tmp}/none", "--out", "{tmp}/out"]),
    "report file missing": (
        3,
        ["sample", "--checkpoint", "{tmp}", "--out", "{tmp}/out", "--report_file", "{tmp}/none"],
    ),
    "nothing to report": (3, ["report", "{tmp}/none"]),
    "nothing to export": (4, ["export", "--checkpoint", "{tmp}/none", "--out", "{tmp}/out/x.pt"]),
}


@pytest.mark.parametrize("name", CASES)
def test_mistakes_are_answered_in_five_lines(tmp_path, name):
    code, arguments = CASES[name]
    done = call(*(argument.format(tmp=tmp_path) for argument in arguments))
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done.stderr
    assert len(lines) <= 5 and lines[0].startswith("error: ") and lines[-1].startswith("  fix:"), done.stderr
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path):
    done = call("report", tmp_path / "none", "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr


def test_unknown_command_is_a_usage_error():
    assert call("sampel").returncode == 2
