"""Trainings of one process that are killed at random instants (goal R1), or whose disk is full (goal R4)."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from training_fixtures import ROOT, environment


def run_script(name: str, *arguments: object, before: tuple[str, ...] = ()) -> None:
    command = [*before, sys.executable, ROOT / "tests" / "fixtures" / name, *arguments]
    done = subprocess.run([*map(str, command)], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.soak
def test_killed_trainings_equal_one_that_was_not_interrupted(tmp_path, data):
    run_script("killed_training.py", data, tmp_path)


@pytest.mark.soak
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems, which only root may")
def test_trainings_on_a_full_disk_continue_where_there_is_room(tmp_path, data):
    """Exit code 5, earlier checkpoints intact, no partial file, and the same numbers after --resume."""
    run_script("full_disk_training.py", data, tmp_path, before=("unshare", "--mount"))
