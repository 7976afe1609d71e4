"""The differences that `benchmarks/sampler_optimizations.py` reports for a tiny checkpoint. Times are not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from sampling_fixtures import write_checkpoint

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "sampler_optimizations.py"


def test_exact_optimizations_change_only_rounding_and_reuse_changes_more(tmp_path):
    folder = write_checkpoint(tmp_path / "step", **{"model.num_res_blocks": 2})
    command = [
        sys.executable,
        SCRIPT,
        "--checkpoint",
        folder,
        "--out",
        tmp_path,
        "--num_inference_steps",
        "6",
        "--minutes",
        "0",
    ]
    completed = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert completed.returncode == 0, completed.stderr[-3000:]
    record = json.loads((tmp_path / "sampler_optimizations.json").read_text())
    distance = {row["name"]: row["distance"] for row in record["rows"]}
    assert distance["all off, fp32"] == 0 and distance["fp32 weights"] < 1e-4
    reused = [name for name in distance if name.startswith("reuse")]
    assert len(reused) == 6
    assert all(distance[name] > 1e-3 for name in reused)
    assert {"precompute_conditioning off", "packed_weights off", "phase_upsampler off", "channels_last off"} <= set(
        distance
    )
