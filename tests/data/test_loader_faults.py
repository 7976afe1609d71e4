"""Killed workers, files that are damaged while they are in use, and little shared memory (goal R16)."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from random import Random
from typing import Any

import pytest

from ccella_fast.config import Config
from ccella_fast.data.checking.findings import STOPPING
from ccella_fast.data.loading import resident_latents
from ccella_fast.data.preparation import worker_pool
from ccella_fast.data.preparation.prepare import prepare
from ccella_fast.errors import DataError
from ccella_fast.storage import read_json, write_json
from ccella_fast.training import loop
from ccella_fast.training.run import train
from launched_training import launcher
from soak import Trial, trials
from study_fixtures import config, tree, write_studies, write_vae
from training_fixtures import TRAIN_SCRIPT, environment, losses

STUDIES = 6
EPOCH = STUDIES - 1  # steps: one study is in the test split
SMALL = ("unshare", "--mount", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh")


def kill_a_worker(patched: pytest.MonkeyPatch, random: Random) -> None:
    """Let a worker be killed a random time after it has got a random task."""
    begin, begun, at = worker_pool._Worker.begin, [], random.randrange(1, STUDIES + 1)

    def watched(worker, *given):
        begin(worker, *given)
        begun.append(None)
        if len(begun) == at:
            threading.Timer(random.random() * 0.1, worker.process.kill).start()

    patched.setattr(worker_pool._Worker, "begin", watched)


def damage(file: Path, random: Random) -> None:
    """Cut the file, change its header, or remove it."""
    content = file.read_bytes()
    kind = random.choice(["cut", "header", "removed"])
    file.unlink()  # as a program that replaces it; what is mapped stays
    if kind != "removed":
        file.write_bytes(content[: random.randrange(len(content))] if kind == "cut" else b"\0" + content[1:])


class Folders:
    """Studies, and what becomes of them: images, latents, and the runs that nothing disturbs."""

    def __init__(self, folder: Path):
        self.studies, self.images, self.latents = (
            write_studies(folder / "studies", STUDIES),
            folder / "images",
            folder / "latents",
        )
        prepare(self.studies, self.images, config())
        prepare(self.studies, self.latents, config(), vae=write_vae(folder / "vae", config()))
        self.runs = {}
        for name, changes in SOURCES.items():
            self.runs[name] = folder / name
            assert train(settings(**changes), data=self.latents, run=folder / name, allow=STOPPING) == 0


SOURCES: dict[str, dict[str, Any]] = {
    "mapped": {},
    "online-torch": {"training__latents": "online", "data__engine": "torch"},
    "online-dali": {"training__latents": "online", "data__engine": "dali"},
}


def settings(**changes: Any) -> Config:
    """Four epochs, one study at a time."""
    steps = {"max_train_steps": 4 * EPOCH, "checkpointing_steps": 4, "batch_size": 1, "precision": "fp32"}
    return config(**{f"training__{key}": value for key, value in steps.items()}, **changes)


@pytest.mark.soak
@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system, which only root may")
def test_faults_of_what_loads_data_are_named_and_nothing_hangs(tmp_path, monkeypatch, require):
    """Training loads data in its own process: worker processes are those of `prepare`."""
    require("nvidia.dali")
    monkeypatch.setattr(resident_latents, "_MEMORY_SHARE", 0)  # else latents are read once
    folders = Folders(tmp_path / "folders")
    for trial in trials("R16"):
        with trial:
            kind = (*["worker"] * 7, "damaged", "damaged", "shm")[trial.number % 10]
            trial.counts[kind] += 1
            {"worker": check_killed_worker, "damaged": check_damaged_file, "shm": check_little_shared_memory}[kind](
                folders, tmp_path / str(trial.number), trial
            )


def check_killed_worker(folders: Folders, out: Path, trial: Trial) -> None:
    """The study is named, or is read again by another worker; the command then gives the same bytes."""
    with pytest.MonkeyPatch.context() as patched:
        kill_a_worker(patched, trial.random)
        try:
            prepare(folders.studies, out, config(), workers=2)
        except DataError as error:
            assert "was killed (out of memory?)" in str(error)
            trial.counts["blamed"] += 1
    prepare(folders.studies, out, config(), workers=2)
    assert tree(out) == tree(folders.images)


def check_damaged_file(folders: Folders, out: Path, trial: Trial) -> None:
    """A file that is damaged after two epochs is named, and once it is back, the run continues."""
    data, source = Path(shutil.copytree(folders.latents, out / "data")), trial.random.choice([*SOURCES])
    used = [case["files"] for case in read_json(data / "manifest.json")["cases"] if case["split"] == "train"]
    key = "latent_mean/t2w" if source == "mapped" else "image/t2w"
    file, joint_loss, calls = data / trial.random.choice(used)[key]["path"], loop.joint_loss, []
    content = file.read_bytes()

    def damaging(*given):
        calls.append(None)
        if len(calls) == 2 * EPOCH:
            damage(file, trial.random)
        return joint_loss(*given)

    given = {"data": data, "run": out / "run", "allow": STOPPING}
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loop, "joint_loss", damaging)
        with pytest.raises(DataError) as caught:
            train(settings(**SOURCES[source]), **given)
    assert caught.value.path == str(file)
    assert read_json(out / "run" / "run_status.json")["exit_code"] == 3
    file.write_bytes(content)
    assert train(settings(**SOURCES[source]), **given, resume="latest") == 0
    assert losses(out / "run") == losses(folders.runs[source])


def check_little_shared_memory(folders: Folders, out: Path, trial: Trial) -> None:
    """With 64 MB in /dev/shm, `prepare` in two workers and a training of two processes do what they do otherwise."""
    write_json(out / "config.json", settings().dump())
    given = ["--config", out / "config.json"]
    prepared = [
        "ccella_fast.cli",
        "prepare",
        "--data",
        folders.studies,
        "--out",
        out / "images",
        "--workers",
        2,
        *given,
    ]
    run = [*launcher("torchrun"), TRAIN_SCRIPT, "--data", folders.latents, "--output_dir", out / "run", *given]
    run += [word for name in STOPPING for word in ("--allow", name)]
    for command in ([sys.executable, "-m", *prepared], run):
        done = subprocess.run([*SMALL, *map(str, command)], env=environment(), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    assert tree(out / "images") == tree(folders.images)
    assert len(losses(out / "run")) == 4 * EPOCH
