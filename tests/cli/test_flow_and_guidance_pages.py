"""The commands of docs/how-to/flow.md and guidance.md, in the order of the pages, with a small model on small studies."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import nibabel
import pytest

from ccella_fast import cli
from ccella_fast.data.checking.findings import STOPPING
from ccella_fast.storage import read_json
from study_fixtures import config, write_bert, write_studies, write_vae
from training_fixtures import environment

PAGES = Path(__file__).resolve().parents[2] / "docs" / "how-to"


def commands(page: str) -> list[list[str]]:
    """The lines of the page that are indented by four spaces, joined where they are continued."""
    text = (PAGES / page).read_text().replace("\\\n", " ")
    return [shlex.split(line)[1:] for line in re.findall(r"^    (ccella-fast \S.*)", text, flags=re.MULTILINE)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with studies that all have a report, an autoencoder, and the configurations of the pages."""
    monkeypatch.chdir(tmp_path)
    studies = write_studies(tmp_path / "studies")
    table = (studies / "studies.csv").read_text().splitlines()
    (studies / "studies.csv").write_text(
        "\n".join([*table[:-1], "case2,train,4,lesion of 6 mm in the left zone"]) + "\n"
    )
    small = config(
        variant="CCELLA", encoder=write_bert(tmp_path / "bert"), training__max_train_steps=2, training__batch_size=2,
        training__precision="fp32", model__num_latents=4, model__adapter_blocks=2, model__adapter_heads=2,
        model__class_head_dim=16,
    )  # fmt: skip
    values = small.dump()
    del values["scheduler"], values["sampling"]  # as in configs/ccella.json, which states neither
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "ccella.json").write_text(json.dumps(values))
    (blocks,) = re.findall(r"^```json\n(.*?)^```", (PAGES / "guidance.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    values["training"] |= json.loads("{" + blocks + "}")["training"]
    values["training"] |= {"power_ema_snapshot_steps": 1, "power_ema_every": 1, "checkpointing_steps": 1}
    (tmp_path / "guided.json").write_text(json.dumps(values | {"sampling": {"num_inference_steps": 3}}))
    write_vae(tmp_path / "vae", small)
    return tmp_path


def run(words: list[str]) -> None:
    if words[0] != "train":
        assert cli.main(words) == 0
        return
    # In a process of its own: DeepSpeed trains only once in a process that has closed its group.
    allowed = [part for name in STOPPING for part in ("--allow", name)]
    command = [sys.executable, "-m", "ccella_fast.cli", *words, *allowed]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def sidecars(folder: Path) -> dict:
    sidecar = read_json(folder / "sample-000_seed0.json")
    assert nibabel.load(folder / "sample-000_seed0.nii.gz").shape == (32, 32, 16)
    return sidecar


def test_the_commands_about_flows_run(place):
    run(["prepare", "--data", "studies", "--out", "prepared", "--config", "configs/ccella.json", "--vae", "vae"])
    each = commands("flow.md")
    assert [words[0] for words in each] == ["train", "sample", "sample"]
    for words in each:
        run(words)
    found = [sidecars(place / name) for name in ("samples", "samples_heun")]
    assert [(each["solver"], each["num_inference_steps"], each["prediction"]) for each in found] == [
        ("euler_flow", 30, "velocity"), ("heun_flow", 10, "velocity")
    ]  # fmt: skip
    assert read_json(place / "model" / "config.json")["scheduler"]["schedule"] == "rectified_flow"


def test_the_commands_about_guidance_run(place):
    run(["prepare", "--data", "studies", "--out", "prepared", "--config", "configs/ccella.json", "--vae", "vae"])
    assert "null_text" not in read_json(place / "prepared" / "manifest.json")
    each = commands("guidance.md")
    assert [words[0] for words in each] == ["prepare", "train", "sample", "sample", "average", "sample"]
    each[4][each[4].index("--step") + 1] = "1"
    for words in each:
        run(words)
    assert "null_text" in read_json(place / "prepared" / "manifest.json")
    assert read_json(place / "model" / "config.json")["training"]["report_dropout"] == 0.1
    found = [sidecars(place / name) for name in ("samples", "samples_interval", "samples_auto")]
    settings = [(each["guidance_scale"], each["guidance_interval"]) for each in found]
    assert settings == [(2, [0, 1]), (2, [0.2, 0.8]), (2, [0, 1])]
    assert ["autoguidance" in each for each in found] == [False, False, True] and found[2]["autoguidance"]["step"] == 1
