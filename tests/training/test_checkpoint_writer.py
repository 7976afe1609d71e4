"""Checkpoints that a thread writes: their bytes, when they are published, and what happens when a write fails or takes long."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from ccella_fast.checkpoint import step_folders, verify_checkpoint
from ccella_fast.entrypoint import run_command
from ccella_fast.errors import DiskError, NonFiniteError
from ccella_fast.storage import read_json, write_hashed
from ccella_fast.training import checkpointing, loop, tensor_files
from ccella_fast.training.tensor_files import HostCopy, header, raw_tensors
from training_fixtures import losses, train_here

SETTINGS = {"max_train_steps": 6, "checkpointing_steps": 2, "checkpoints_total_limit": 9, "batch_size": 1}
TENSORS = {
    "a.weight": torch.arange(35, dtype=torch.float32).reshape(5, 7),
    "a.β": torch.tensor(-2.5),
    "b": torch.randn(3, 1, 11),
    "empty": torch.zeros(0, 4),
    "z": torch.randn(17),
}


@pytest.mark.parametrize("chunk", [1, 4, 16, 1024])
def test_files_equal_those_of_safetensors_and_are_hashed(tmp_path, monkeypatch, chunk):
    """Through copies of few elements, over whose borders tensors reach, filled twice; and without copies."""
    monkeypatch.setattr(tensor_files, "_CHUNK", chunk)
    expected = save(TENSORS, metadata={"format": "pt"})
    begin = header({name: tensor.shape for name, tensor in TENSORS.items()})
    copy = HostCopy(sum(tensor.numel() for tensor in TENSORS.values()), pinned=False)
    copy.fill(torch.full_like(tensor, torch.nan) for tensor in TENSORS.values())
    copy.fill(TENSORS.values())
    digests = [
        write_hashed(tmp_path / "copied", [begin, *copy.chunks()]),
        write_hashed(tmp_path / "direct", [begin, *raw_tensors(TENSORS.values())]),
    ]
    assert [(tmp_path / name).read_bytes() for name in ("copied", "direct")] == [expected, expected]
    assert digests == [hashlib.sha256(expected).hexdigest()] * 2


def wait_for_steps(run: Path, steps: int) -> bool:
    """Wait until the run has made this many steps. Returns False if it does not in half a minute."""
    for _ in range(3000):
        if (run / "metrics.jsonl").exists() and len(losses(run)) >= steps:
            return True
        threading.Event().wait(0.01)
    return False


class Slow:
    """Stands in for `write_hashed`, and waits before the first file until the run has come to step `until`."""

    def __init__(self, run: Path, until: int):
        self.run, self.until, self.first, self.waited = run, until, True, threading.Event()

    def __call__(self, path, chunks):
        if self.first:
            self.first = False
            if wait_for_steps(self.run, self.until):
                self.waited.set()
        return write_hashed(path, chunks)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, data):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train_here(run, data, **SETTINGS)
    return run


def saved_steps(log: str) -> list[int]:
    """The steps whose checkpoints are said to be saved."""
    return [int(step) for step in re.findall(r"step (\d+): checkpoint saved in \d+\.\d s", log)]


def contents(run: Path, step: int) -> dict[str, bytes]:
    """The files of a checkpoint with tensors, and its state."""
    folder = run / "checkpoints" / f"step-{step:08d}"
    verify_checkpoint(folder)
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "manifest.json"}


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, data, monkeypatch, undisturbed, caplog):
    """The file of step 2 is begun only after step 4 and has the values of step 2; the save of step 4 waits for it."""
    caplog.set_level("INFO", logger="ccella_fast")
    slow = Slow(tmp_path / "run", until=4)
    monkeypatch.setattr(checkpointing, "write_hashed", slow)
    published = []
    publish = checkpointing.publish_checkpoint

    def watched(partial, final, **options):
        published.append((final.name, len(losses(tmp_path / "run"))))
        return publish(partial, final, **options)

    monkeypatch.setattr(checkpointing, "publish_checkpoint", watched)
    assert train_here(tmp_path / "run", data, **SETTINGS) == 0
    assert slow.waited.is_set()
    assert [name for name, _ in published] == [f"step-{step:08d}" for step in (2, 4, 6)] and published[0][1] == 4
    assert saved_steps(caplog.text) == [2, 4, 6]
    for step in (2, 4, 6):
        assert contents(tmp_path / "run", step) == contents(undisturbed, step)


def test_training_goes_on_while_an_old_checkpoint_is_removed(tmp_path, data, monkeypatch):
    """The removal of step 2 begins when step 6 is published, at the latest after step 8, and ends only after another step."""
    run, remove, removed = tmp_path / "run", checkpointing._remove, []

    def slow(folders):
        removed.append([folder.name for folder in folders])
        if removed[-1] == [".partial-old-step-00000002"]:
            assert wait_for_steps(run, len(losses(run)) + 1)
        remove(folders)

    monkeypatch.setattr(checkpointing, "_remove", slow)
    assert train_here(run, data, **SETTINGS | {"checkpoints_total_limit": 2, "max_train_steps": 10}) == 0
    assert removed == [[], [], *([f".partial-old-step-{step:08d}"] for step in (2, 4, 6))]
    assert sorted(folder.name for folder in (run / "checkpoints").iterdir()) == ["step-00000008", "step-00000010"]


def test_without_memory_for_a_copy_training_waits(tmp_path, data, monkeypatch, undisturbed, caplog):
    caplog.set_level("INFO", logger="ccella_fast")
    monkeypatch.setattr(checkpointing, "free_memory", lambda: 8 * 2**20)
    seen = []

    def watched(path, chunks):
        seen.append(threading.current_thread() is threading.main_thread())
        return write_hashed(path, chunks)

    monkeypatch.setattr(checkpointing, "write_hashed", watched)
    assert train_here(tmp_path / "run", data, **SETTINGS) == 0
    assert all(seen) and len(seen) == 3 * 6
    assert caplog.text.count("a copy of it needs 4.32 MiB of memory, but only 8.00 MiB are free") == 1
    for step in (2, 4, 6):
        assert contents(tmp_path / "run", step) == contents(undisturbed, step)


@pytest.mark.parametrize("free", ["much", "little"])
def test_a_failed_write_is_raised_at_a_step_and_leaves_the_earlier_checkpoints(tmp_path, data, monkeypatch, free):
    """The disk is full from the second file of the second checkpoint on."""
    written = []

    def full(path, chunks):
        written.append(path.name)
        if len(written) > 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_hashed(path, chunks)

    monkeypatch.setattr(checkpointing, "write_hashed", full)
    if free == "little":
        monkeypatch.setattr(checkpointing, "free_memory", lambda: 0)
    with pytest.raises(DiskError, match=r"No space left.*bytes written.*earlier checkpoints are intact"):
        train_here(tmp_path / "run", data, **SETTINGS)
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    verify_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000002")
    status = read_json(tmp_path / "run" / "run_status.json")
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 5, 2)


@pytest.mark.parametrize("free", ["much", "little"])
@pytest.mark.parametrize("kind", ["weight", "moment"])
def test_a_state_that_is_not_finite_is_not_saved(tmp_path, data, monkeypatch, undisturbed, kind, free):
    """Also where no loss depends on it: a class that no study of the batch has, a moment that is not used yet."""
    joint_loss, calls = loop.joint_loss, []

    def spoiling(engine, *others):
        calls.append(0)
        found = joint_loss(engine, *others)
        if len(calls) == 4:
            (engine.optimizer.masters if kind == "weight" else engine.optimizer.exp_avg_sq)[0] = torch.inf
        return found

    monkeypatch.setattr(loop, "joint_loss", spoiling)
    if free == "little":
        monkeypatch.setattr(checkpointing, "free_memory", lambda: 0)
    with pytest.raises(NonFiniteError, match="after step 4 a weight or a moment"):
        train_here(tmp_path / "run", data, **SETTINGS)
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    status = read_json(tmp_path / "run" / "run_status.json")
    assert (status["state"], status["exit_code"], status["step"]) == ("failed", 6, 2)
    monkeypatch.undo()
    train_here(tmp_path / "run", data, resume="latest", **SETTINGS)
    assert contents(tmp_path / "run", 6) == contents(undisturbed, 6)


@pytest.mark.parametrize(("error", "code"), [(MemoryError(), 2), (IndexError("w"), 1), (OSError("w"), 5)], ids=repr)
def test_a_failure_of_the_thread_is_not_called_a_full_disk(tmp_path, data, monkeypatch, error, code):
    """An error without a text is one, too."""
    written = []

    def fails(path, chunks):
        written.append(path.name)
        if len(written) > 7:
            raise error
        return write_hashed(path, chunks)

    monkeypatch.setattr(checkpointing, "write_hashed", fails)
    assert run_command(lambda: train_here(tmp_path / "run", data, **SETTINGS), debug=False) == code
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert read_json(tmp_path / "run" / "run_status.json")["exit_code"] == code


def test_what_is_being_written_is_published_when_an_error_ends_the_training(tmp_path, data, monkeypatch):
    joint_loss, calls = loop.joint_loss, []

    def fails(*arguments):
        calls.append(0)
        return joint_loss(*arguments) if len(calls) < 4 else calls[9]

    monkeypatch.setattr(loop, "joint_loss", fails)
    monkeypatch.setattr(checkpointing.CheckpointWriter, "publish_if_written", lambda self: None)  # as if written slowly
    with pytest.raises(IndexError):
        train_here(tmp_path / "run", data, **SETTINGS)
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]
    assert read_json(tmp_path / "run" / "run_status.json")["step"] == 2


def signalled(monkeypatch, step: int, number: int) -> None:
    """Let this process receive a signal in the given step."""
    calls, joint_loss = [], loop.joint_loss

    def counted(*arguments):
        calls.append(0)
        if len(calls) == step:
            os.kill(os.getpid(), number)
        return joint_loss(*arguments)

    monkeypatch.setattr(loop, "joint_loss", counted)


@pytest.mark.parametrize(("bound", "saved"), [(20, 3), (-1, 2)], ids=["in-time", "too-long"])
def test_a_signal_saves_if_there_is_time_and_else_says_where_the_run_goes_back_to(
    tmp_path, data, monkeypatch, caplog, bound, saved
):
    """A checkpoint takes more than -1 seconds."""
    caplog.set_level("INFO", logger="ccella_fast")
    monkeypatch.setattr(checkpointing, "SECONDS_AFTER_A_SIGNAL", bound)
    signalled(monkeypatch, 3, signal.SIGTERM)
    assert train_here(tmp_path / "run", data, **SETTINGS) == 143
    assert step_folders(tmp_path / "run")[0].name == f"step-{saved:08d}"
    status = json.loads((tmp_path / "run" / "run_status.json").read_text())
    assert (status["state"], status["step"], status["exit_code"]) == ("terminated", saved, 143)
    if saved == 3:
        assert "saving step 3; until this is done, --resume goes back to step 2" in caplog.text
    else:
        assert "step 3 is not saved, and --resume goes back to step 2" in caplog.text
    assert train_here(tmp_path / "run", data, resume="latest", **SETTINGS) == 0
    assert [step for step, _ in losses(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_pending_checkpoint_is_published_when_training_stops_at_nonfinite_steps(tmp_path, data, monkeypatch):
    joint_loss, calls = loop.joint_loss, []

    def broken(*arguments):
        calls.append(0)
        found = joint_loss(*arguments)
        return found._replace(total=found.total * float("nan")) if len(calls) > 1 else found

    monkeypatch.setattr(loop, "joint_loss", broken)
    monkeypatch.setattr(checkpointing.CheckpointWriter, "publish_if_written", lambda self: None)  # as if written slowly
    with pytest.raises(NonFiniteError):
        train_here(tmp_path / "run", data, **{**SETTINGS, "max_train_steps": 20, "checkpointing_steps": 8})
    (folder,) = step_folders(tmp_path / "run")
    state = read_json(folder / "training_state.json")
    assert (state["step"], state["adam_steps"], state["bad_in_a_row"]) == (8, 1, 7)
    assert verify_checkpoint(folder)["step"] == read_json(tmp_path / "run" / "run_status.json")["step"] == 8


def test_a_checkpoint_before_the_first_finite_step_has_zero_moments(tmp_path, data, monkeypatch):
    joint_loss = loop.joint_loss

    def broken(*arguments):
        found = joint_loss(*arguments)
        return found._replace(total=found.total * float("nan"))

    for stage in (0, 2):
        run = tmp_path / str(stage) / "run"
        monkeypatch.setattr(loop, "joint_loss", broken)
        train_here(run, data, **{**SETTINGS, "max_train_steps": 2, "zero_stage": stage})
        folder = run / "checkpoints" / "step-00000002"
        assert read_json(folder / "training_state.json")["adam_steps"] == 0
        for name in ("exp_avg", "exp_avg_sq"):
            assert all(not value.any() for value in load_file(folder / f"{name}.safetensors").values())
