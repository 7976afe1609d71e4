"""Checkpoints of version 1, whose optimizer state DeepSpeed wrote, are still loaded and resumed, without executing code."""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path

import pytest
import torch

from ccella_fast.checkpoint import load_checkpoint, verify_checkpoint
from ccella_fast.errors import CheckpointError, ConfigError
from ccella_fast.storage import read_json, write_json
from ccella_fast.training import checkpointing
from old_checkpoints import OldWriter, make_old, write_old_manifest
from training_fixtures import losses, stage_id, train_here, weights

SETTINGS = {"max_train_steps": 4, "checkpointing_steps": 2, "checkpoints_total_limit": 9}
LAYOUTS = [(0, "fp32"), (0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "bf16")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """Creates, for a stage and a precision, an unbroken run and a copy of it that ends after an old checkpoint of step 2."""
    folder, made = tmp_path_factory.mktemp("old"), {}

    def create(stage: int, precision: str) -> tuple[Path, Path]:
        if (stage, precision) not in made:
            name = f"{precision}-{stage}"
            settings = {**SETTINGS, "zero_stage": stage, "precision": precision}
            with pytest.MonkeyPatch.context() as patched:
                if stage:
                    patched.setattr(checkpointing, "CheckpointWriter", OldWriter)
                train_here(folder / name / "run", data, **settings)
            old = Path(shutil.copytree(folder / name / "run", folder / name / "old"))
            shutil.rmtree(old / "checkpoints" / "step-00000004")
            if not stage:
                make_old(old / "checkpoints" / "step-00000002")
            made[stage, precision] = folder / name / "run", old
        return made[stage, precision]

    return create


@pytest.fixture
def old(runs, tmp_path, request):
    return Path(shutil.copytree(runs(*request.param)[1], tmp_path / "run"))


@pytest.mark.parametrize(("stage", "precision"), LAYOUTS, ids=stage_id)
def test_an_old_run_goes_on_as_if_it_had_not_been_interrupted(runs, data, tmp_path, stage, precision):
    """Equal in every bit; the next checkpoint has today's format."""
    unbroken, old = runs(stage, precision)
    run = Path(shutil.copytree(old, tmp_path / "run"))
    before = verify_checkpoint(run / "checkpoints" / "step-00000002")
    assert before["version"] == 1 and "exp_avg.safetensors" not in before["files"]
    train_here(run, data, resume="latest", **SETTINGS, zero_stage=stage, precision=precision)
    assert losses(run) == losses(unbroken) and len(losses(run)) == 4
    for name in ("model", "ema"):
        found, expected = weights(run, 4, name), weights(unbroken, 4, name)
        assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    assert verify_checkpoint(run / "checkpoints" / "step-00000004")["version"] == 2


@pytest.mark.parametrize("old", [(0, "fp32"), (2, "fp32")], indirect=True, ids=["whole", "shards"])
def test_an_old_checkpoint_is_loaded_for_sampling(old):
    loaded = load_checkpoint(old)
    assert loaded.step == 2 and loaded.weights == "ema"
    for name, value in weights(old, 2, "ema").items():
        assert torch.equal(loaded.model.state_dict()[name], value)


@pytest.mark.parametrize("old", [(0, "fp32")], indirect=True, ids=["whole"])
def test_an_old_checkpoint_of_stage_0_is_resumed_at_another_stage(old, runs, data):
    train_here(old, data, resume="latest", **SETTINGS, zero_stage=2)
    unbroken, _ = runs(0, "fp32")
    for (_, found), (_, expected) in zip(losses(old), losses(unbroken), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("old", [(2, "fp32")], indirect=True, ids=["shards"])
@pytest.mark.parametrize("changed", [{"zero_stage": 0}, {"precision": "bf16"}], ids=str)
def test_old_shards_are_refused_for_another_layout(old, data, changed):
    ((key, value),) = changed.items()
    with pytest.raises(ConfigError, match=f"training.{key} is {value!r}, but .* an earlier version") as caught:
        train_here(old, data, resume="latest", **{**SETTINGS, "zero_stage": 2, **changed})
    assert caught.value.field == f"training.{key}"


class Hostile:
    """An object whose pickle creates a file."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self):
        return Path.touch, (self.canary,)


@pytest.mark.parametrize("old", [(0, "fp32"), (2, "fp32")], indirect=True, ids=["whole", "shards"])
def test_a_hostile_shard_is_refused_and_not_run(old, data, tmp_path):
    folder, canary = old / "checkpoints" / "step-00000002", tmp_path / "executed"
    stage = read_json(folder / "config.json")["training"]["zero_stage"]
    shard = next((folder / "deepspeed").rglob("*optim_states.pt" if stage else "*model_states.pt"))
    torch.save({"optimizer_state_dict": Hostile(canary)}, shard)
    write_old_manifest(folder)
    with pytest.raises(CheckpointError, match="read safely") as caught:
        train_here(old, data, resume="latest", **SETTINGS, zero_stage=stage)
    assert caught.value.path == str(shard) and not canary.exists()
    pickle.loads(pickle.dumps(Hostile(canary)))  # noqa: S301  the control: unsafe loading does run it
    assert canary.exists()


@pytest.mark.parametrize("old", [(0, "fp32")], indirect=True, ids=["whole"])
def test_moments_of_another_model_are_refused(old, data):
    folder = old / "checkpoints" / "step-00000002"
    path = folder / "deepspeed" / "shards" / "mp_rank_00_model_states.pt"
    values = torch.load(path, weights_only=True)
    values["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    torch.save(values, path)
    write_old_manifest(folder)
    with pytest.raises(CheckpointError, match="does not fit the model"):
        train_here(old, data, resume="latest", **SETTINGS)


def test_a_file_of_todays_checkpoint_that_does_not_fit_is_named(runs, data, tmp_path):
    run = Path(shutil.copytree(runs(0, "fp32")[0], tmp_path / "run"))
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    folder = run / "checkpoints" / "step-00000002"
    (folder / "exp_avg.safetensors").write_bytes((folder / "config.json").read_bytes())
    manifest = read_json(folder / "manifest.json")
    write_old_manifest(folder)
    write_json(folder / "manifest.json", read_json(folder / "manifest.json") | {"version": manifest["version"]})
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        train_here(run, data, resume="latest", **SETTINGS)
    assert caught.value.path == str(folder / "exp_avg.safetensors")
