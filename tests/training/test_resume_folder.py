"""`--resume FOLDER`: no file of a step folder is used before its hash is checked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ccella_fast.errors import CheckpointError, ConfigError, NonFiniteError
from ccella_fast.storage import read_json, write_json
from ccella_fast.training import loop
from ccella_fast.training.checkpointing import CheckpointWriter
from training_fixtures import losses, rewrite_manifest, train_here, weights

SETTINGS = {"max_train_steps": 3, "checkpointing_steps": 1, "checkpoints_total_limit": 9, "zero_stage": 1}
# The fields of training_state.json. Those that influence the result must be unchanged, and are listed with another value; the
# others say how far the run has come, and are restored.
MUST_MATCH = {
    "total_steps": 4,
    "data_sha256": "0" * 64,
    "variant": "LAST",
    "seed": 1,
    "scale_factor": [0.98],
    "intensity_scale": {"t2w": 713.0},
}
# What else a checkpoint has; test_quarantine.py, test_start_weights.py and test_extend.py have tests of the last three.
RESTORED = {
    "step", "adam_steps", "ema_updates", "bad_in_a_row", "trained_on", "world_size",
    "quarantine", "start_weights", "extensions",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_here(folder, data, **SETTINGS)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "ema.safetensors",
        "config.json",
        "training_state.json",
        "exp_avg.safetensors",
        "exp_avg_sq.safetensors",
    ],
)
def test_a_changed_byte_is_reported_with_its_file(run, data, name):
    folder = run / "checkpoints" / "step-00000002"
    (file,) = folder.rglob(name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged") as caught:
        train_here(run, data, resume=str(folder), **SETTINGS)
    assert caught.value.path == str(file) and caught.value.exit_code == 4
    status = read_json(run / "run_status.json")
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 4, 3)


def test_a_run_is_resumed_from_the_given_folder(run, data, trained):
    """From step 1, although 2 and 3 exist: later lines of metrics.jsonl are written again, with the same numbers."""
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[2])
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().replace(json.dumps(last["loss"]), "9.5"))
    assert losses(run) != losses(trained)
    assert train_here(run, data, resume=str(run / "checkpoints" / "step-00000001"), **SETTINGS) == 0
    assert losses(run) == losses(trained)


def test_newer_checkpoints_than_the_given_one_are_named(run, data, caplog):
    older, newest = (run / "checkpoints" / f"step-0000000{step}" for step in (2, 3))
    train_here(run, data, resume=str(older), **SETTINGS)
    assert "step-00000002 is older than step-00000003" in caplog.text
    caplog.clear()
    train_here(run, data, resume=str(newest), **SETTINGS)
    assert "is older than" not in caplog.text


def test_a_folder_of_another_run_raises(run, trained, data):
    with pytest.raises(ConfigError, match="resumed in its own folder"):
        train_here(run, data, resume=str(trained / "checkpoints" / "step-00000002"), **SETTINGS)


def changed(run, **values):
    """Change values in training_state.json of step 2 and the hashes accordingly. Returns the step folder."""
    folder = run / "checkpoints" / "step-00000002"
    file = folder / "training_state.json"
    write_json(file, read_json(file) | values)
    rewrite_manifest(folder)
    return str(folder)


def test_every_field_of_the_state_is_known(run, data):
    """A new field must be added to MUST_MATCH, or to RESTORED with a test."""
    state = read_json(run / "checkpoints" / "step-00000002" / "training_state.json")
    assert set(state) == MUST_MATCH.keys() | RESTORED
    assert (
        sum(state["trained_on"]["classes"]) > 0
    )  # not restored, but counted in the data that a resumed run must share
    assert all(state[field] != value for field, value in MUST_MATCH.items())
    assert train_here(run, data, resume=changed(run), **SETTINGS) == 0  # control: no value is changed


@pytest.mark.parametrize("field", MUST_MATCH)
def test_a_state_of_another_run_raises_and_names_the_field(run, data, field):
    before = (run / "run_status.json").read_bytes()
    folder = changed(run, **{field: MUST_MATCH[field]})
    with pytest.raises(ConfigError) as caught:
        train_here(run, data, resume=folder, **SETTINGS)
    assert (caught.value.field, caught.value.path) == (field, folder)
    assert (run / "run_status.json").read_bytes() == before


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("step", "two"),
        ("step", -1),
        ("adam_steps", None),
        ("adam_steps", 1.5),
        ("ema_updates", "2"),
        ("bad_in_a_row", [0]),
        ("intensity_scale", {"t2w": 0}),
        ("quarantine", [1]),
        ("quarantine.left_out", {"case1": 1}),
        ("quarantine.strikes", {"1": -1}),
    ],
)
def test_a_value_that_training_does_not_write_is_refused_by_name(run, data, field, value):
    section, _, key = field.partition(".")
    folder = changed(run, **{section: {key: value} if key else value})
    with pytest.raises(CheckpointError, match="this state is not valid") as caught:
        train_here(run, data, resume=folder, **SETTINGS)
    assert caught.value.field.startswith(field) and caught.value.path == f"{folder}/training_state.json"


@pytest.mark.parametrize("studies", [["99"], ["0", "1", "2", "3", "4"]], ids=["unknown", "all"])
def test_a_quarantine_of_other_studies_is_refused(run, data, studies):
    """With all studies left out there would be none to take their place."""
    tables = {"strikes": dict.fromkeys(studies, 3), "left_out": dict.fromkeys(studies, 1)}
    with pytest.raises(CheckpointError, match="not one of these studies"):
        train_here(run, data, resume=changed(run, quarantine=tables), **SETTINGS)


def test_a_link_to_a_step_folder_is_that_folder(run, data, caplog):
    (run / "last").symlink_to(run / "checkpoints" / "step-00000003")
    assert train_here(run, data, resume=str(run / "last"), **SETTINGS) == 0
    assert "is older than" not in caplog.text


@pytest.mark.parametrize("instead", ["a file", "a link to nothing"])
def test_checkpoints_that_cannot_be_listed_are_not_a_new_run(run, data, instead):
    shutil.rmtree(run / "checkpoints")
    if instead == "a file":
        (run / "checkpoints").touch()
    else:
        (run / "checkpoints").symlink_to(run / "unmounted")
    before = (run / "metrics.jsonl").read_bytes()
    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        train_here(run, data, resume="latest", **SETTINGS)
    assert caught.value.path == str(run / "checkpoints")
    assert (run / "metrics.jsonl").read_bytes() == before


def test_the_folder_of_the_checkpoints_is_not_a_run(run, data):
    with pytest.raises(ConfigError, match="the folder of a run's checkpoints"):
        train_here(run / "checkpoints", data, resume="latest", **SETTINGS)


def test_a_damaged_line_of_the_metrics_does_not_end_a_run(run, data, trained):
    """Such as a crashed machine leaves: bytes that are not text."""
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run / "metrics.jsonl").write_bytes(lines[0] + b"\xff\x00\n" + lines[1])
    assert train_here(run, data, resume=str(run / "checkpoints" / "step-00000002"), **SETTINGS) == 0
    assert losses(run) == losses(trained)


def test_the_status_of_a_running_training_has_the_newest_checkpoint(data, tmp_path, monkeypatch):
    """It may be killed at any moment, and then writes nothing."""
    publish, seen = CheckpointWriter._publish, []

    def noted(writer):
        publish(writer)
        status = read_json(tmp_path / "run" / "run_status.json")
        seen.append((status["state"], status["step"], len(list((tmp_path / "run" / "checkpoints").glob("step-*")))))

    monkeypatch.setattr(CheckpointWriter, "_publish", noted)
    assert train_here(tmp_path / "run", data, **SETTINGS) == 0
    assert (
        {("running", step, step) for step in (1, 2, 3)} <= set(seen) <= {("running", step, step) for step in range(4)}
    )


def test_the_step_of_the_state_is_restored(run, data, trained):
    """With step set back to 1, the second batch is used again, with the weights after step 2."""
    assert train_here(run, data, resume=changed(run, step=1), **SETTINGS) == 0
    assert [step for step, _ in losses(run)] == [1, 2, 3]
    assert losses(run)[0] == losses(trained)[0] and losses(run)[1] != losses(trained)[1]


@pytest.mark.parametrize("updates", [2, 5], ids=["after2", "after5"])
def test_the_number_of_ema_updates_is_restored(run, data, updates):
    """In float64: average = d * average + (1 - d) * weights with d = min(0.9, (1 + n) / (10 + n)) at update n."""
    before = weights(run, 2, "ema")
    assert train_here(run, data, resume=changed(run, ema_updates=updates), **SETTINGS) == 0
    found, raw, n = weights(run, 3, "ema"), weights(run, 3), updates + 1
    decay = (1 + n) / (10 + n)
    errors = [
        (decay * before[name].double() + (1 - decay) * raw[name].double() - found[name].double()).abs().max().item()
        for name in found
    ]
    assert max(errors) < 1e-7
    off = (before["unet.conv_in.conv.weight"] - raw["unet.conv_in.conv.weight"]).abs().max().item()
    assert off * abs(decay - (1 + n + 1) / (10 + n + 1)) > 1e-6  # negative control: one more update would be detected


@pytest.mark.parametrize(("bad", "stops"), [(0, False), (8, False), (9, True)], ids=["after0", "after8", "after9"])
def test_consecutive_nonfinite_steps_are_counted_across_a_resume(run, data, monkeypatch, bad, stops):
    joint_loss = loop.joint_loss

    def broken(*arguments):
        found = joint_loss(*arguments)
        return found._replace(total=found.total * float("nan"))

    monkeypatch.setattr(loop, "joint_loss", broken)
    folder = changed(run, bad_in_a_row=bad)
    if stops:
        with pytest.raises(NonFiniteError, match=r"step 3: .*10 in a row"):
            train_here(run, data, resume=folder, **SETTINGS)
    else:
        assert train_here(run, data, resume=folder, **SETTINGS) == 0
        assert read_json(run / "checkpoints" / "step-00000003" / "training_state.json")["bad_in_a_row"] == bad + 1


def test_a_run_that_was_killed_after_its_last_checkpoint_ends_when_it_is_resumed(run, data):
    """Nothing is left to train, but its status says that it is running, and a temporary file is left."""
    finished = read_json(run / "run_status.json")
    assert (finished["state"], finished["step"], finished["exit_code"]) == ("finished", 3, 0)
    write_json(
        run / "run_status.json", {**finished, "state": "running", "step": 1, "exit_code": None, "quarantined": ["a"]}
    )
    (run / ".partial-left.json").write_text("{")
    before = {file: file.stat().st_mtime_ns for file in (run / "checkpoints").rglob("*")}
    assert train_here(run, data, resume="latest", **SETTINGS) == 0
    assert read_json(run / "run_status.json") == {**finished, "quarantined": ["a"]}
    assert not list(run.rglob(".partial*"))
    assert {file: file.stat().st_mtime_ns for file in (run / "checkpoints").rglob("*")} == before
