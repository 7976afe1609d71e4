"""The commands of the how-to pages about start weights, longer runs and averages, with a tiny model for the full-size one."""

from __future__ import annotations

import os
import re
import shlex
import shutil

import pytest

from ccella_fast import cli
from ccella_fast.checkpoint import export_reference, load_checkpoint
from ccella_fast.data.checking.findings import STOPPING
from maisi_weights import maisi_unet, save_maisi
from training_fixtures import ROOT, losses, train_here, weights, write_config

SHORT = {"max_train_steps": 2, "checkpointing_steps": 2}


def commands(page: str) -> list[list[str]]:
    text = (ROOT / "docs" / "how-to" / page).read_text().replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^    (ccella-fast .*)", text, flags=re.MULTILINE)]


@pytest.fixture
def folder(tmp_path, data, monkeypatch):
    """A working directory with everything that the pages name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prepared").symlink_to(data)
    (tmp_path / "configs").mkdir()
    write_config(tmp_path / "configs" / "ccella.json", **SHORT)
    train_here(tmp_path / "model", data, **SHORT)
    export_reference("model", "CCELLA.pt")
    save_maisi(tmp_path / "maisi.pt", maisi_unet("v1"))
    save_maisi(tmp_path / "rflow.pt", maisi_unet("v2"))
    before = dict(os.environ)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)  # DeepSpeed keeps the first one
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def run(command: list[str]) -> int:
    """`--allow`, because five studies are too few to train on."""
    return cli.main([*command[1:], *(word for name in STOPPING for word in ("--allow", name))])


def test_the_commands_of_fine_tuning_run(folder):
    found = commands("fine-tune.md")
    (export,) = [command for command in found if command[1] == "export"]
    found.remove(export)
    assert len(found) == 7 and all(command[:2] == ["ccella-fast", "train"] for command in found)
    for command in found:
        assert run(command) == 0, command
    assert cli.main(export[1:]) == 0
    merged, loaded = (load_checkpoint(folder / name).model.state_dict() for name in ("tuned-lora.pt", "tuned-lora"))
    assert all(bool((merged[name] == tensor).all()) for name, tensor in loaded.items())
    assert {name for name in weights(folder / "tuned-lora-heads", 2) if ".lora_" not in name} == {
        name for name in weights(folder / "model", 2) if "cascade_blocks" in name or name.startswith("classifier")
    }
    frozen, start = weights(folder / "tuned-adapter", 2), weights(folder / "model", 2, "ema")
    assert all(bool((frozen[name] == start[name]).all()) == name.startswith("unet.") for name in frozen)
    assert "unet.down_blocks.0.downsampler.time_emb_proj.weight" in weights(folder / "from-flow", 2)
    assert len({tuple(losses(folder / command[command.index("--output_dir") + 1])) for command in found}) == 7


def test_the_command_of_a_longer_run_runs(folder):
    (command,) = commands("extend.md")
    steps = command.index("--extend_to") + 1
    assert command[steps] == "20000"
    command[steps] = "4"
    assert run(command) == 0 and [step for step, _ in losses(folder / "model")] == [1, 2, 3, 4]
    shutil.rmtree(folder / "model" / "checkpoints")
    assert run([*command[:steps], "5"]) == 2  # nothing to extend


def test_the_commands_of_averages_run(folder):
    shutil.rmtree(folder / "model")
    train, average, sample, early = commands("average-weights.md")
    early[early.index("--step") + 1] = "2"
    for command in (train, average, early):
        assert run(command) == 0 if command is train else cli.main(command[1:]) == 0, command
    assert sample[:4] == ["ccella-fast", "sample", "--checkpoint", "model-0.08"]
    for name in ("model-0.08", "model-early"):
        loaded = load_checkpoint(name)
        assert loaded.averaged and loaded.step == 2
        assert all(
            bool((tensor == weights(folder / "model", 2)[name].half()).all())  # of a single update
            for name, tensor in loaded.model.state_dict().items()
        )
