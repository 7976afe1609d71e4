"""Kills at random instants (goal R1): `SEED=3 KILLS=200 pytest -m slow tests/training/test_killed.py` for more of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from training_fixtures import ROOT, environment


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_trainings_equal_one_that_was_not_interrupted(tmp_path, data):
    """At least 40 % of the kills come while a checkpoint is written. At most two intervals are lost: one is being written."""
    seed, kills = int(os.environ.get("SEED", time.strftime("%Y%m%d"))), int(os.environ.get("KILLS", "40"))
    script = ROOT / "tests" / "fixtures" / "killed_training.py"
    command = [sys.executable, str(script), str(data), str(tmp_path), str(kills), str(seed)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-3000:]}"
    found = json.loads((tmp_path / "killed.json").read_text())
    print(found)
    assert found["kills"] == kills and found["while_saving"] >= 0.4 * kills
    assert (
        found["bad_checkpoints"] == found["unequal_runs"] == 0 and found["steps_lost_at_most"] <= 2 * found["interval"]
    )


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems, which only root may")
def test_trainings_on_a_full_disk_continue_where_there_is_room(tmp_path, data):
    """Goal R4: exit code 5, earlier checkpoints intact, no partial file, and the same numbers after --resume."""
    seed, levels = int(os.environ.get("SEED", time.strftime("%Y%m%d"))), 20
    script = ROOT / "tests" / "fixtures" / "full_disk_training.py"
    command = ["unshare", "--mount", sys.executable, str(script), str(data), str(tmp_path), str(levels), str(seed)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, f"seed {seed}: {done.stderr[-3000:]}"
    found = json.loads((tmp_path / "full_disk.json").read_text())
    print(found)
    assert found["full"] == levels and not any(
        found[key] for key in ("other_codes", "bad_checkpoints", "left_files", "unequal_runs")
    )
