"""The whole journey through the commands a user types, shrunk: five real patients when they are at hand, and phantoms."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from ccella_fast.cli import _parser
from command_packages import without_unused
from training_fixtures import free_port

ROOT = Path(__file__).resolve().parents[2]
REPORT = "Canary-Quokka prostate 40 cc. 12 mm focus in the left peripheral zone. PI-RADS 4."
SMALL = {
    "data.dim": [48, 48, 16],
    "data.spacing": [3.0, 3.0, 3.0],
    "model.num_channels": [16, 16, 32],
    "model.num_head_channels": [0, 0, 16],
    "vae_training.max_train_steps": 4,
    "vae_training.patch": [32, 32, 16],
    "training.max_train_steps": 3,
    "training.batch_size": 2,
    "sampling.num_inference_steps": 3,
}


def run(name: str, *command: object) -> str:
    """Run a command as a user does, who has no package that the subcommand `name` does not use; everything that it prints."""
    env = {**without_unused(name), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(part) for part in command], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def ccella_fast(name: str, *arguments: object) -> str:
    return run(name, sys.executable, "-m", "ccella_fast.cli", name, *arguments)


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    from ccella_fast import load_config

    path = tmp_path_factory.mktemp("config") / "small.json"
    path.write_text(json.dumps(load_config(ROOT / "configs" / "demo.json", SMALL).dump()))
    return path


def recipe(*arguments: object) -> list[list[str]]:
    """The commands of `make demo`, without the installation."""
    make = ["make", "--dry-run", "--assume-old=.venv/installed", "demo", *map(str, arguments)]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True)
    commands = [shlex.split(line) for line in done.stdout.splitlines()]
    return [words[1:] for words in commands if words[0] == "ccella-fast"]


def test_make_demo_evaluates_what_it_generated_from_phantoms(tmp_path):
    """Each command is one that `ccella-fast` accepts, and a folder that is evaluated has been made before."""
    words = recipe(f"OUT={tmp_path}")
    names, commands = [each[0] for each in words], [_parser().parse_args(each) for each in words]
    assert names[-3:] == ["prepare", "evaluate", "report"]
    evaluation, made = commands[-2], {str(each.out) for each in commands[:-2]}
    assert {evaluation.real, evaluation.synthetic, evaluation.train.removesuffix(":train"), str(evaluation.vae)} <= made
    seeds = [each.seed for name, each in zip(names, commands, strict=True) if name == "phantom"]
    assert len(set(seeds)) == len(seeds) == 2  # those that were trained on are not drawn again
    sampling = commands[names.index("sample")]
    fresh = [str(each.out) for name, each in zip(names, commands, strict=True) if name == "phantom" and each.seed][0]
    tables = {sampling.report_table, evaluation.findings, commands[-1].findings}
    assert tables == {Path(fresh, "studies.csv")} and sampling.distinct_seeds


def test_make_demo_does_not_evaluate_with_real_studies(tmp_path):
    commands = [words[0] for words in recipe(f"OUT={tmp_path}", f"DATA={tmp_path}")]
    assert commands == ["prepare", "train-vae", "prepare", "sample", "report"]


def journey(studies: Path, out: Path, config: Path, *, allow: tuple[str, ...] = ()) -> str:
    launcher = Path(sys.executable).with_name("deepspeed")
    said = ccella_fast("prepare", "--data", studies, "--out", out / "prepared", "--config", config)
    said += ccella_fast("train-vae", "--data", out / "prepared", "--out", out / "vae", "--config", config)
    vae = ["--vae", out / "vae"]
    said += ccella_fast("prepare", "--data", studies, "--out", out / "prepared", "--config", config, *vae)
    train = ["--config", config, "--data", out / "prepared", "--output_dir", out / "model", "--resume"]
    train += [word for name in allow for word in ("--allow", name)]
    said += run("train", launcher, "--master_port", free_port(), ROOT / "ccella_fast" / "train.py", *train)
    sample = ["--report", REPORT, "--num_samples", 2, "--out", out / "samples"]
    said += ccella_fast("sample", "--checkpoint", out / "model", *sample)
    return said + ccella_fast("report", out)


def check(out: Path, ids: set[str]) -> None:
    manifest = json.loads((out / "prepared" / "manifest.json").read_text())
    assert {case["id"] for case in manifest["cases"]} == ids
    volumes = [nibabel.load(path) for path in sorted((out / "samples").glob("*.nii.gz"))]
    assert len(volumes) == 2
    for volume in volumes:
        assert volume.shape == (48, 48, 16) and np.allclose(volume.header.get_zooms(), 3.0)
        assert np.isfinite(volume.get_fdata()).all() and volume.get_fdata().std() > 0
    assert not np.array_equal(volumes[0].get_fdata(), volumes[1].get_fdata())  # seeds 0 and 1
    page = (out / "report.html").read_text()
    assert "<img" in page and "http://" not in page and "https://" not in page
    assert not [case for case in ids if case in page]


def assert_nowhere(word: str, folder: Path, said: str) -> None:
    """Report text reaches no log, no sidecar, no page, no checkpoint."""
    assert word not in said
    for path in folder.rglob("*"):
        if path.is_file():
            assert word.encode() not in path.read_bytes(), path


def test_five_real_patients(real_data, tmp_path, config):
    out = tmp_path / "out"
    said = journey(real_data / "mri", out, config, allow=("no_class", "no_reports"))  # there is no studies.csv
    check(out, {"prostatex-0000", *(f"prostate3t-03-000{number}" for number in (1, 2, 3, 5))})
    assert_nowhere("Canary-Quokka", out, said)
    with pytest.raises(AssertionError):  # the search itself can find something
        assert_nowhere("ccella_fast", out, said)


@pytest.mark.slow
def test_phantoms_twice(tmp_path, config):
    """The second round reuses everything: no file of the first changes."""
    studies, out = tmp_path / "studies", tmp_path / "out"
    ccella_fast("phantom", "--out", studies, "--num_studies", 4)
    journey(studies, out, config)
    check(out, {f"phantom-{number:04d}" for number in range(4)})
    volatile = {"run_record.json", "report.html"}
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name not in volatile}
    journey(studies, out, config)
    assert before == {path: path.stat().st_mtime_ns for path in before}
    shutil.rmtree(out)
