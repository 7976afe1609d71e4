"""However a run ends, its exit code is in run_status.json too; a start that fails leaves nothing (goals R23, R24)."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from ccella_fast import train as train_script
from ccella_fast.entrypoint import run_command
from ccella_fast.errors import ConfigError, DataError, DiskError
from ccella_fast.storage import read_json, write_json
from ccella_fast.training import checkpointing, distributed, engine, loop, resume, telemetry
from ccella_fast.training.telemetry import Telemetry
from training_fixtures import losses, train_here

SETTINGS = {"max_train_steps": 3, "checkpointing_steps": 1}


def raising(error: Exception) -> Callable[..., NoReturn]:
    def work(*_: object, **__: object) -> NoReturn:
        raise error

    return work


def signalled(number: int) -> Callable[..., NoReturn]:
    def work(*_: object, **__: object) -> NoReturn:
        os.kill(os.getpid(), number)
        time.sleep(10)
        raise AssertionError("the signal had no effect")

    return work


# Where it happens, what happens -> the exit code. Signals during a step are in test_resume.py.
PLACES = {
    "choose": (resume, "newest_checkpoint"), "build": (engine, "build_engine"),
    "restore": (checkpointing, "restore_checkpoint"), "step": (loop, "joint_loss"), "log": (Telemetry, "log"),
    "save": (checkpointing.CheckpointWriter, "save"),
}  # fmt: skip
ENDINGS = [
    ("choose", "Ctrl-C", signalled(signal.SIGINT), 130), ("choose", "memory", raising(MemoryError()), 2),
    ("build", "Ctrl-C", signalled(signal.SIGINT), 130), ("build", "SIGTERM", signalled(signal.SIGTERM), 143),
    ("build", "SIGUSR1", signalled(signal.SIGUSR1), 138), ("build", "bug", raising(ZeroDivisionError()), 1),
    ("build", "setting", raising(ConfigError("w")), 2),
    ("build", "file", raising(FileNotFoundError(errno.ENOENT, "No such file", "f")), 3),
    ("restore", "SIGTERM", signalled(signal.SIGTERM), 143), ("restore", "disk", raising(DiskError("w")), 5),
    ("restore", "memory", raising(torch.OutOfMemoryError("CUDA out of memory")), 2),
    ("step", "data", raising(DataError("w")), 3), ("step", "bug", raising(IndexError()), 1),
    ("step", "file", raising(PermissionError(errno.EACCES, "Permission denied", "f")), 3),
    ("log", "pipe", raising(BrokenPipeError()), 141), ("save", "disk", raising(OSError(errno.ENOSPC, "full", "f")), 5),
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    """A run that has ended after the first of three steps."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patched:
        joint_loss, calls = loop.joint_loss, []

        def signalled_once(*arguments):
            calls.append(os.kill(os.getpid(), signal.SIGUSR1))
            return joint_loss(*arguments)

        patched.setattr(loop, "joint_loss", signalled_once)
        assert run_command(lambda: train_here(folder, data, **SETTINGS), debug=False) == 138
    status = read_json(folder / "run_status.json")
    assert (status["state"], status["exit_code"], status["step"]) == ("terminated", 138, 1)
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.mark.parametrize(
    ("place", "event", "code"),
    [pytest.param(place, event, code, id=f"{place}-{name}") for place, name, event, code in ENDINGS],
)
def test_the_exit_code_is_that_of_run_status(run, data, monkeypatch, place, event, code):
    monkeypatch.setattr(*PLACES[place], event)
    found = run_command(lambda: train_here(run, data, resume="latest", **SETTINGS), debug=False)
    status = read_json(run / "run_status.json")
    assert found == status["exit_code"] == code
    assert status["state"] == ("terminated" if code in (130, 138, 143) else "failed")
    assert (status["step"], status["total_steps"]) == (1, 3) and (status["why"] is None) == (code in (130, 138, 143))
    if (place, code) == ("build", 143):  # one goes on for all, which have the same checkpoint
        monkeypatch.undo()
        assert run_command(lambda: train_here(run, data, resume="latest", **SETTINGS), debug=False) == 0
        status = read_json(run / "run_status.json")
        assert (status["state"], status["exit_code"], status["step"]) == ("finished", 0, 3) and len(losses(run)) == 3


def test_a_refused_command_does_not_change_the_status(run, data):
    before = (run / "run_status.json").read_bytes()
    for given in ({}, {"resume": "latest", "lr": 1.0}, {"resume": str(run)}):
        code = run_command(lambda given=given: train_here(run, data, **{**SETTINGS, **given}), debug=False)
        assert code in (2, 4)
        assert code == 4 or (run / "run_status.json").read_bytes() == before


@pytest.mark.parametrize(("launched", "code"), [(True, 143), (False, 141)])
def test_output_that_nobody_reads_is_the_end_of_the_launcher(tmp_path, data, monkeypatch, launched, code):
    """Over ssh, the connection ends before SIGTERM arrives: the step is saved, as after SIGTERM."""
    if launched:
        monkeypatch.setenv("LOCAL_SIZE", "1")  # as DeepSpeed's launcher sets it
    closed = dict.fromkeys(("update", "close"), raising(BrokenPipeError()))
    monkeypatch.setattr(telemetry, "tqdm", type("Bar", (telemetry.tqdm,), {**closed, "__del__": lambda bar: None}))
    settings = {**SETTINGS, "checkpointing_steps": 3}
    assert run_command(lambda: train_here(tmp_path / "run", data, **settings), debug=False) == code
    status = read_json(tmp_path / "run" / "run_status.json")
    assert (status["exit_code"], status["step"]) == (code, 1 if launched else 0)


@pytest.mark.parametrize("event", [signalled(signal.SIGTERM), raising(RuntimeError("w"))], ids=["SIGTERM", "bug"])
def test_a_new_run_that_fails_before_it_begins_leaves_nothing(tmp_path, data, monkeypatch, event):
    monkeypatch.setattr(engine, "build_engine", event)
    assert run_command(lambda: train_here(tmp_path / "run", data, **SETTINGS), debug=False) in (143, 1)
    assert not (tmp_path / "run").exists()


def test_a_run_that_fails_before_its_first_checkpoint_starts_again_without_resume(tmp_path, data, monkeypatch):
    monkeypatch.setattr(loop, "joint_loss", raising(MemoryError()))
    assert run_command(lambda: train_here(tmp_path / "run", data, **SETTINGS), debug=False) == 2
    assert read_json(tmp_path / "run" / "run_status.json")["exit_code"] == 2
    monkeypatch.undo()
    assert train_here(tmp_path / "run", data, **SETTINGS, batch_size=1) == 0
    with pytest.raises(ConfigError, match="already contains a run"):
        train_here(tmp_path / "run", data, **SETTINGS, batch_size=1)


# What DeepSpeed raises only when it builds its engine.
REFUSED = {
    "gradient_predivide": {"gradient_predivide_factor": 2.0, "zero_optimization": {"stage": 2}},
    "accumulation": {"data_types": {"grad_accum_dtype": "float99"}},
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_deepspeed_file_that_is_refused_can_be_corrected(tmp_path, data, name):
    """The same command runs with a corrected file, without --resume."""
    file = tmp_path / "deepspeed.json"
    write_json(file, REFUSED[name])
    with pytest.raises(ConfigError) as caught:
        train_here(tmp_path / "run", data, **SETTINGS, deepspeed_file=file)
    assert caught.value.path == str(file)
    assert not (tmp_path / "run").exists()
    write_json(file, {})
    assert train_here(tmp_path / "run", data, **SETTINGS, deepspeed_file=file) == 0


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("not supported"), NotImplementedError("not yet"), ValueError("no such type"),
        ModuleNotFoundError("No module named 'wandb'", name="wandb"), RuntimeError("ZeRO cannot"),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_what_deepspeed_raises_names_its_file(tmp_path, data, monkeypatch, error):
    import deepspeed.runtime.engine as inner

    file = tmp_path / "deepspeed.json"
    write_json(file, {})
    # A function whose code is in DeepSpeed's folder, as far as the traceback says.
    namespace = {"error": error}
    exec(compile("def fail(*_, **__):\n    raise error\n", inner.__file__, "exec"), namespace)
    monkeypatch.setattr(inner.DeepSpeedEngine, "__init__", namespace["fail"])
    with pytest.raises(ConfigError) as caught:
        train_here(tmp_path / "run", data, **SETTINGS, deepspeed_file=file)
    assert caught.value.path == str(file) and str(error) in caught.value.why
    assert not (tmp_path / "run").exists()


def test_a_bug_of_ours_is_not_blamed_on_deepspeed(tmp_path, data, monkeypatch):
    monkeypatch.setattr(engine, "build_model", raising(AssertionError("ours")))
    with pytest.raises(AssertionError, match="ours"):
        train_here(tmp_path / "run", data, **SETTINGS)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 7.45 GiB. GPU 0 has a total capacity of 79.11 GiB of which "
            "3.10 GiB is free. Process 4711 has 76 GiB memory in use."
        ),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
            "allocate 8000000000 bytes. Error code 12 (Cannot allocate memory)"
        ),
        MemoryError(),
    ],
    ids=["gpu", "cpu", "python"],
)
def test_without_memory_a_step_ends_with_three_remedies(tmp_path, data, monkeypatch, capsys, error):
    monkeypatch.setattr(loop, "joint_loss", raising(error))
    work = lambda: train_here(tmp_path / "run", data, **SETTINGS)  # noqa: E731
    assert run_command(work, debug=False, if_out_of_memory=train_script.IF_OUT_OF_MEMORY) == 2
    message = capsys.readouterr().err
    assert message.count("error:") == 1 and "the memory does not suffice" in message and "Traceback" not in message
    remedies = ["training.batch_size", "training.activation_checkpointing=true", "ZeRO 2 or 3"]
    assert all(remedy in message for remedy in remedies)
    status = json.loads((tmp_path / "run" / "run_status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2) and "memory" in status["why"]


def test_an_address_that_is_left_over_in_a_shell_is_not_used_alone_and_named_with_others(tmp_path, data, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    monkeypatch.setenv("MASTER_PORT", "99999999")
    monkeypatch.setenv("LOCAL_RANK", "7")
    with pytest.raises(ConfigError, match="MASTER_PORT"):
        train_here(tmp_path / "run", data, max_train_steps=1)
    monkeypatch.setenv("MASTER_PORT", "29500")
    assert train_here(tmp_path / "run", data, max_train_steps=1) == 0
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    with pytest.raises(ConfigError, match="no.such.host.invalid cannot be found"):
        distributed._check_address()
