"""What counts as a checkpoint, what is refused, and what survives a failed write."""

from __future__ import annotations

import errno
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import ccella_fast
from ccella_fast import checkpoint
from ccella_fast.checkpoint import (
    export_reference,
    load_checkpoint,
    newest_checkpoint,
    publish_checkpoint,
    step_folders,
    verify_checkpoint,
    write_manifest,
)
from ccella_fast.data.loading.dataset import PreparedDataset
from ccella_fast.errors import CheckpointError, ConfigError, DataError, DiskError
from ccella_fast.storage import read_json, write_json
from soak import trials
from training_fixtures import CONFIG, rewrite_manifest, settings, train_here, weights


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("run") / "model"
    train_here(folder, data, checkpointing_steps=2, zero_stage=1)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "model"))


def step(run, number):
    return run / "checkpoints" / f"step-{number:08d}"


def test_the_newest_are_kept_and_nothing_half_done(run):
    assert [folder.name for folder in step_folders(run)] == ["step-00000006", "step-00000004"]
    assert not list(run.rglob(".partial*"))


def test_a_run_folder_and_a_step_folder_load(run):
    loaded = ccella_fast.load_checkpoint(run)
    assert (loaded.step, loaded.variant, loaded.weights) == (6, "CCELLA", "ema")
    assert loaded.scale_factor == [0.97] and loaded.intensity_scale == {"t2w": 712.0}
    assert not loaded.model.training
    for name, value in load_file(step(run, 6) / "ema.safetensors").items():
        assert torch.equal(loaded.model.state_dict()[name], value)
    raw = load_checkpoint(step(run, 4), weights="raw")
    assert raw.step == 4
    name = "unet.conv_in.conv.weight"
    assert torch.equal(raw.model.state_dict()[name], weights(run, 4)[name])
    assert not torch.equal(raw.model.state_dict()[name], loaded.model.state_dict()[name])


def test_one_flipped_bit_anywhere_is_found_and_named(run):
    source = random.Random(5)
    files = [file for file in step(run, 6).rglob("*") if file.is_file() and file.name != "manifest.json"]
    assert len(files) >= 6
    for number in range(60):
        file = files[number % len(files)]
        content = bytearray(file.read_bytes())
        place, bit = source.randrange(len(content)), 1 << source.randrange(8)
        content[place] ^= bit
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="damaged") as caught:
            verify_checkpoint(step(run, 6))
        assert caught.value.path == str(file)
        content[place] ^= bit
        file.write_bytes(content)
    verify_checkpoint(step(run, 6))


@pytest.mark.soak
def test_a_flipped_bit_in_any_file_is_found_before_use_and_named(run, trained, data, tmp_path, caplog):
    """Goal R6, of a checkpoint and of prepared studies; the run then continues from the checkpoint before."""
    prepared = Path(shutil.copytree(data, tmp_path / "prepared"))
    write_json(prepared / "manifest.json", read_json(prepared / "manifest.json"), sealed=True)  # as `prepare` does
    for trial in trials("R6"):
        caplog.clear()
        with trial:
            place = trial.random.choice(["checkpoint", "latents", "text", "manifest"])
            roots = {"checkpoint": step(run, 6), "manifest": prepared / "manifest.json"}
            root = roots.get(place, prepared / place)
            file = trial.random.choice(sorted(file for file in [root, *root.rglob("*")] if file.is_file()))
            content = bytearray(file.read_bytes())
            content[trial.random.randrange(len(content))] ^= 1 << trial.random.randrange(8)
            before = file.read_bytes()
            file.write_bytes(content)
            trial.counts[place] += 1
            try:
                with pytest.raises((CheckpointError, DataError)) as caught:
                    verify_checkpoint(root) if place == "checkpoint" else PreparedDataset(prepared, settings())
                assert caught.value.path == str(file)
                if place == "checkpoint":
                    assert newest_checkpoint(run) == step(run, 4) and file.name in caplog.text
                if place == "checkpoint" and trial.number % 5 == 0:
                    resumed = Path(shutil.copytree(run, tmp_path / str(trial.number) / "model"))
                    train_here(resumed, data, checkpointing_steps=2, zero_stage=1, resume="latest")
                    assert verify_checkpoint(step(resumed, 6)) == verify_checkpoint(step(trained, 6))
                    trial.counts["resumed"] += 1
            finally:
                file.write_bytes(before)


def test_a_corrupt_newest_checkpoint_is_passed_over_with_a_warning(run, caplog):
    (step(run, 6) / "model.safetensors").write_bytes(b"")
    assert newest_checkpoint(run) == step(run, 4)
    assert "model.safetensors" in caplog.text and "skipped" in caplog.text
    (step(run, 4) / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint of this run is damaged"):
        newest_checkpoint(run)


def test_an_empty_folder_is_refused(run, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="this is an empty folder, not a checkpoint") as caught:
        load_checkpoint(tmp_path / "empty")
    assert caught.value.fix == f"give {run}"


@pytest.mark.parametrize("name", ["../../../outside", "/etc/hostname", "x" * 256, "x/" * 2500, "a\0b", ""])
def test_a_file_that_cannot_be_in_the_checkpoint_is_refused(run, name):
    manifest = read_json(step(run, 6) / "manifest.json")
    manifest["files"][name] = manifest["files"]["model.safetensors"]
    write_json(step(run, 6) / "manifest.json", manifest)
    with pytest.raises(CheckpointError, match="outside the checkpoint") as caught:
        verify_checkpoint(step(run, 6))
    assert len(str(caught.value)) < 500


def test_weights_that_the_manifest_does_not_list_are_not_loaded(run):
    folder = step(run, 6)
    manifest = read_json(folder / "manifest.json")
    del manifest["files"]["ema.safetensors"]
    write_json(folder / "manifest.json", manifest)
    assert load_checkpoint(folder).weights == "raw"
    with pytest.raises(CheckpointError, match="no averaged weights"):
        load_checkpoint(folder, weights="ema")


def test_a_checkpoint_of_another_variant_is_refused(run):
    folder = step(run, 6)
    config = read_json(folder / "config.json")
    config["model"]["variant"] = "LAST"
    write_json(folder / "config.json", config)
    rewrite_manifest(folder)
    with pytest.raises(CheckpointError, match="do not fit the configured LAST"):
        load_checkpoint(folder)


def test_export_to_the_reference_layout_loads_back(run, tmp_path):
    export_reference(run, tmp_path / "CCELLA.pt", weights="raw")
    values = torch.load(tmp_path / "CCELLA.pt", weights_only=True)
    assert float(values["scale_factor"]) == 0.97
    for name, value in weights(run, 6).items():
        assert torch.equal(values["unet_state_dict"][name], value)
    before = (tmp_path / "CCELLA.pt").read_bytes()
    with pytest.raises(ConfigError, match="exists"):
        export_reference(run, tmp_path / "CCELLA.pt")
    assert (tmp_path / "CCELLA.pt").read_bytes() == before


@pytest.mark.parametrize("where", ["write", "publish"])
def test_a_full_disk_leaves_the_previous_checkpoint(run, data, monkeypatch, where):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    shutil.rmtree(step(run, 6))
    hashes = verify_checkpoint(step(run, 4))
    from ccella_fast.training import checkpointing

    monkeypatch.setattr(checkpointing, {"write": "write_hashed", "publish": "publish_checkpoint"}[where], full)
    with pytest.raises(DiskError, match="No space left.*bytes written.*bytes free"):
        train_here(run, data, checkpointing_steps=2, zero_stage=1, resume="latest")
    assert verify_checkpoint(step(run, 4)) == hashes
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000004"]
    status = json.loads((run / "run_status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 5, 4)
    monkeypatch.undo()
    assert train_here(run, data, checkpointing_steps=2, zero_stage=1, resume="latest") == 0


def test_a_folder_that_cannot_be_written_is_named_with_its_reason(run, data, monkeypatch):
    def refused(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(run / "checkpoints" / ".partial-step-00000006"))

    shutil.rmtree(step(run, 6))
    monkeypatch.setattr("ccella_fast.training.checkpointing.write_hashed", refused)
    with pytest.raises(DiskError, match=r"could not be written: Permission denied \(") as caught:
        train_here(run, data, checkpointing_steps=2, zero_stage=1, resume="latest")
    assert "writable" in caught.value.fix


def test_a_file_that_cannot_be_read_is_skipped_like_a_damaged_one(run, monkeypatch):
    hash_of = checkpoint.sha256

    def failing_disk(path):
        if path == step(run, 6) / "ema.safetensors":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return hash_of(path)

    monkeypatch.setattr(checkpoint, "sha256", failing_disk)
    with pytest.raises(CheckpointError, match="Input/output error"):
        verify_checkpoint(step(run, 6))
    assert newest_checkpoint(run) == step(run, 4)


def test_a_checkpoint_that_is_removed_while_it_is_read_gives_way_to_a_newer_one(run, monkeypatch, caplog):
    """A training that goes on keeps only the newest ones."""
    hash_of = checkpoint.sha256

    def meanwhile(path):
        if step(run, 6).exists():
            step(run, 6).rename(step(run, 8))
            shutil.rmtree(step(run, 4))
        return hash_of(path)

    monkeypatch.setattr(checkpoint, "sha256", meanwhile)
    assert newest_checkpoint(run) == step(run, 8)
    assert not caplog.text


def small(folder, content="weights"):
    """A step folder with right hashes and no training behind it."""
    (folder / "deepspeed").mkdir(parents=True)
    (folder / "model.safetensors").write_text(content)
    (folder / "deepspeed" / "shard.pt").write_text("shard")
    write_manifest(folder, step=1)
    return folder


def publish_small(run, number, keep, content="weights"):
    partial = small(run / "checkpoints" / f".partial-step-{number:08d}", content)
    for old in publish_checkpoint(partial, step(run, number), keep=keep):
        shutil.rmtree(old)


@pytest.mark.parametrize(
    ("edit", "words", "file"),
    [
        (lambda m: m | {"format": "ccella_fast.prepared"}, "not a ccella_fast.checkpoint of version 1 or 2", "manifest.json"),
        (lambda m: m | {"version": 3}, "not a ccella_fast.checkpoint of version 1 or 2", "manifest.json"),
        (lambda m: m | {"version": "1"}, "not a ccella_fast.checkpoint of version 1 or 2", "manifest.json"),
        *[(lambda m, key=key: {k: v for k, v in m.items() if k != key}, f"malformed.*{key}", "manifest.json")
          for key in ("format", "version", "files")],
        (lambda m: m | {"files": ["model.safetensors"]}, "malformed", "manifest.json"),
        (lambda m: [m], "malformed", "manifest.json"),
        (lambda m: entry(m, sha256="0" * 64), "damaged", "model.safetensors"),
        (lambda m: entry(m, bytes=8), "damaged", "model.safetensors"),
        (lambda m: entry(m, bytes=6), "damaged", "model.safetensors"),
        (lambda m: m | {"files": m["files"] | {"absent.pt": m["files"]["model.safetensors"]}}, "missing", "absent.pt"),
        *[(lambda m, key=key: m | {"files": {"model.safetensors": {key: m["files"]["model.safetensors"][key]}}},
           "malformed", "manifest.json") for key in ("sha256", "bytes")],
    ],
    ids=[
        "other-format", "version-3", "version-text", "no-format", "no-version", "no-files", "list-of-files", "list",
        "wrong-hash", "too-long", "too-short", "absent-file", "hash-alone", "size-alone",
    ],
)  # fmt: skip
def test_a_wrong_manifest_is_refused_by_name(tmp_path, edit, words, file):
    folder = small(tmp_path / "step")
    manifest = read_json(folder / "manifest.json")
    assert verify_checkpoint(folder) == manifest and set(manifest["files"]) == {
        "model.safetensors",
        "deepspeed/shard.pt",
    }
    assert manifest["files"]["model.safetensors"]["bytes"] == len("weights")
    write_json(folder / "manifest.json", edit(manifest))
    with pytest.raises(CheckpointError, match=words) as caught:
        verify_checkpoint(folder)
    assert caught.value.path == str(folder / file)


def test_a_changed_bit_of_any_byte_of_a_manifest_is_found(tmp_path):
    """Also where it would be a valid value: a hash, the step, a version, the name of a key."""
    path = small(tmp_path / "step") / "manifest.json"
    intact, source = path.read_bytes(), random.Random(5)
    for place, byte in enumerate(intact):
        path.write_bytes(intact[:place] + bytes([byte ^ 1 << source.randrange(8)]) + intact[place + 1 :])
        with pytest.raises(CheckpointError) as caught:
            verify_checkpoint(path.parent)
        assert caught.value.path == str(path)
    path.write_bytes(intact)
    manifest = verify_checkpoint(path.parent)
    write_json(path, manifest)  # without a digest, as earlier versions wrote it
    assert verify_checkpoint(path.parent) == manifest


def entry(manifest, **changed):
    """The manifest with another entry for the weights."""
    files = manifest["files"]
    return manifest | {"files": files | {"model.safetensors": files["model.safetensors"] | changed}}


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_as_many_are_kept_as_asked(tmp_path, keep, monkeypatch):
    intact = []
    set_aside = checkpoint._set_aside

    def watched(folder):
        intact.append(newest_checkpoint(tmp_path))
        return set_aside(folder)

    monkeypatch.setattr(checkpoint, "_set_aside", watched)
    for number in range(1, 6):
        publish_small(tmp_path, number, keep)
    assert step_folders(tmp_path) == [step(tmp_path, number) for number in range(5, 5 - keep, -1)]
    assert all(verify_checkpoint(folder) for folder in step_folders(tmp_path))
    # Each was complete under its final name before an older one went.
    assert intact == [step(tmp_path, number) for number in range(keep + 1, 6)]
    assert not list(tmp_path.rglob(".partial*"))


@pytest.mark.parametrize(("keep", "left"), [(1, [3]), (2, [6, 3]), (3, [6, 4, 3]), (4, [6, 4, 3, 2])])
def test_an_older_step_stays_with_the_newest_others(tmp_path, keep, left):
    for number in (2, 4, 6):
        publish_small(tmp_path, number, keep=9)
    publish_small(tmp_path, 3, keep=keep)
    assert step_folders(tmp_path) == [step(tmp_path, number) for number in left]


def test_the_newest_intact_one_is_found_past_two_corrupt_ones(tmp_path, caplog):
    for number in (1, 2, 3):
        publish_small(tmp_path, number, keep=3)
    assert newest_checkpoint(tmp_path) == step(tmp_path, 3)
    (step(tmp_path, 3) / "deepspeed" / "shard.pt").write_text("shaRd")
    (step(tmp_path, 2) / "manifest.json").write_text("{")
    assert newest_checkpoint(tmp_path) == step(tmp_path, 1)
    warned = [record.getMessage() for record in caplog.records]
    assert len(warned) == 2 and str(step(tmp_path, 3) / "deepspeed" / "shard.pt") in warned[0]
    assert str(step(tmp_path, 2) / "manifest.json") in warned[1]


def test_a_corrupt_checkpoint_of_the_same_step_is_replaced(run, trained, data):
    """The run goes on from step 4 and comes by step 6 again."""
    (step(run, 6) / "model.safetensors").write_bytes(b"half")
    (step(run, 6) / "left.behind").write_text("")
    train_here(run, data, checkpointing_steps=2, zero_stage=1, resume="latest")
    verify_checkpoint(step(run, 6))
    for name in ("model", "ema"):
        file = f"{name}.safetensors"
        assert (step(run, 6) / file).read_bytes() == (step(trained, 6) / file).read_bytes()
    names = {path.name for path in (run / "checkpoints").iterdir()}
    assert names == {"step-00000004", "step-00000006"} and not (step(run, 6) / "left.behind").exists()


def test_config_of_a_checkpoint_is_the_configuration_of_the_run(run):
    from ccella_fast.config import load_config

    config = load_config(step(run, 6) / "config.json")
    assert config.model.num_channels == CONFIG["model"]["num_channels"] and config.training.zero_stage == 1
