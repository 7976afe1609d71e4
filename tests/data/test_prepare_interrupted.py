"""`prepare` that is killed, or whose disk is full: the same command ends with the bytes of an unbroken run."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.errors import DiskError
from study_fixtures import config, tree, voxels, write_bert, write_studies, write_vae

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


def kill(folder: Path, *arguments: object) -> int:
    """The number of runs that were not complete when they were killed; all were finished to the same bytes."""
    path = os.pathsep.join([str(FIXTURES), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "killed_prepare", str(folder), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


def test_killed_runs_end_with_the_same_bytes(tmp_path: Path):
    assert kill(tmp_path, 6, "operation") >= 4


def test_a_full_disk_leaves_no_partial_file_and_is_repaired(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """At features, a record, latents, the autoencoder and the manifest, which this process writes."""
    settings = config(variant="CCELLA", encoder=write_bert(tmp_path / "bert"))
    studies, vae = write_studies(tmp_path / "studies", 3), write_vae(tmp_path / "vae", settings)
    prepare(studies, tmp_path / "unbroken", settings, vae=vae)
    expected = tree(tmp_path / "unbroken")
    for name in ("text/", "cases/case1", "latents/case2", "vae/", "manifest.json"):
        out, move = tmp_path / f"full-{name.split('/')[0]}", os.replace

        def full(source, target, name=name, move=move, out=out):
            if str(target).startswith(str(out / name)):
                raise OSError(errno.ENOSPC, "No space left on device", str(target))
            return move(source, target)

        with monkeypatch.context() as patch, pytest.raises(DiskError, match="the disk is full") as caught:
            patch.setattr(os, "replace", full)
            prepare(studies, out, settings, vae=vae)
        assert caught.value.exit_code == 5 and str(caught.value.path).startswith(str(out / name))
        assert not list(out.rglob(".partial-*")) and not (out / ".lock").exists()
        left = {path: digest for path, digest in tree(out).items() if not path.startswith("cases/")}
        assert left.items() <= expected.items()
        prepare(studies, out, settings, vae=vae)
        assert tree(out) == expected


def test_a_disk_that_is_full_for_a_worker(tmp_path: Path):
    """RLIMIT_FSIZE stands in for a full disk: images do not fit, records do."""
    studies, out = write_studies(tmp_path / "studies", 3), tmp_path / "out"
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n"
        "from ccella_fast.data.preparation.prepare import prepare\n"
        "from ccella_fast.entrypoint import run_command\n"
        "from study_fixtures import config\n"
        f"sys.exit(run_command(lambda: prepare({str(studies)!r}, {str(out)!r}, config()) or 0, debug=False))\n"
    )
    path = os.pathsep.join([str(FIXTURES), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}
    )
    error = done.stderr[done.stderr.rindex("error: ") :]
    assert done.returncode == 5 and "the disk is full" in error and "t2w.npy" in error, done.stderr[-2000:]
    assert len(error.splitlines()) <= 5 and not list(out.rglob("*.npy")) and not list(out.rglob(".*"))
    prepare(studies, out, config())
    prepare(studies, tmp_path / "unbroken", config())
    assert tree(out) == tree(tmp_path / "unbroken")


@pytest.mark.slow
def test_runs_killed_at_100_instants_end_with_the_same_bytes(tmp_path: Path):
    assert kill(tmp_path, 100, "time", write_bert(tmp_path / "bert")) >= 25


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
