"""`prepare` that is killed, or whose disk is full: the same command ends with the bytes of an unbroken run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from study_fixtures import tree, voxels, write_bert

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


def kill(folder: Path, trials: int, by: str) -> int:
    """The number of runs that were not complete when they were killed; all were finished to the same bytes."""
    path = os.pathsep.join([str(FIXTURES), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "killed_prepare", str(folder), str(write_bert(folder / "bert")), str(trials), by]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


def test_killed_runs_end_with_the_same_bytes(tmp_path: Path):
    assert kill(tmp_path, 6, "operation") >= 4


def test_a_full_disk_leaves_no_partial_file_and_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The disk of a worker is full at an image, that of this process at features, a record, the autoencoder, the manifest."""
    settings = config(variant="CCELLA", encoder=write_bert(tmp_path / "bert"))
    studies, vae = write_studies(tmp_path / "studies", 3), write_vae(tmp_path / "vae", settings)
    prepare(studies, tmp_path / "unbroken", settings, vae=vae)
    expected = tree(tmp_path / "unbroken")
    resource_limit = len((tmp_path / "unbroken/images/case0/t2w.npy").read_bytes()) // 2
    for name in ("text/", "cases/case1", "latents/case2", "vae/", "manifest.json"):
        out, move = tmp_path / name.strip("/").replace("/", "-"), os.replace

        def full(source, target, name=name, move=move, out=out):
            if str(target).startswith(str(out / name)):
                raise OSError(errno.ENOSPC, "No space left on device", str(target))
            return move(source, target)

        with monkeypatch.context() as patch, pytest.raises(DiskError, match="the disk is full") as caught:
            patch.setattr(os, "replace", full)
            prepare(studies, out, settings, vae=vae)
        assert caught.value.exit_code == 5 and str(caught.value.path).startswith(str(out / name))
        assert not list(out.rglob(".partial-*")) and not (out / ".lock").exists()
        assert {path: expected[path] for path in tree(out) if expected.get(path) != tree(out)[path]} == {}
        prepare(studies, out, settings, vae=vae)
        assert tree(out) == expected


@pytest.mark.slow
def test_runs_killed_at_100_instants_end_with_the_same_bytes(tmp_path: Path):
    assert kill(tmp_path, 100, "time") >= 50


def test_comparison_of_trees_detects_one_byte(tmp_path: Path):
    """Negative control of the tests with killed runs."""
    for name in "ab":
        (tmp_path / name).mkdir()
        np.save(tmp_path / name / "x.npy", voxels())
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    with open(tmp_path / "b/x.npy", "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")
    assert tree(tmp_path / "a") != tree(tmp_path / "b")
