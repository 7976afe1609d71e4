"""However a run ends, its exit code is in run_status.json too; a start that fails leaves nothing (goals R23, R24)."""

from __future__ import annotations

import errno
import itertools
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
from ccella_fast.checkpoint import step_folders, verify_checkpoint
from ccella_fast.entrypoint import run_command
from ccella_fast.errors import ConfigError, DataError, DiskError
from ccella_fast.storage import read_json, write_json
from ccella_fast.training import checkpointing, distributed, engine, loop, resume, telemetry
from ccella_fast.training.batches import BatchStream
from ccella_fast.training.ema import Ema
from ccella_fast.training.telemetry import Telemetry
from soak import trials
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
    ("build", "SIGHUP", signalled(signal.SIGHUP), 129), ("build", "setting", raising(ConfigError("w")), 2),
    ("build", "file", raising(FileNotFoundError(errno.ENOENT, "No such file", "f")), 3),
    ("restore", "SIGTERM", signalled(signal.SIGTERM), 143), ("restore", "disk", raising(DiskError("w")), 5),
    ("restore", "memory", raising(torch.OutOfMemoryError("CUDA out of memory")), 2),
    ("step", "data", raising(DataError("w")), 3), ("step", "bug", raising(IndexError()), 1),
    ("step", "file", raising(PermissionError(errno.EACCES, "Permission denied", "f")), 3),
    ("log", "pipe", raising(BrokenPipeError()), 141), ("save", "disk", raising(OSError(errno.ENOSPC, "full", "f")), 5),
]  # fmt: skip
STOPPED = (129, 130, 138, 143)


@pytest.fixture(scope="module", autouse=True)
def hangup():
    """SIGHUP has an effect, also if the tests were started with nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


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
    assert status["state"] == ("terminated" if code in STOPPED else "failed")
    assert (status["step"], status["total_steps"]) == (1, 3) and (status["why"] is None) == (code in STOPPED)
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


OUT_OF_MEMORY = [
    torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 7.45 GiB. GPU 0 has a total capacity of 79.11 GiB of which "
        "3.10 GiB is free. Process 4711 has 76 GiB memory in use."
    ),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8000000000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["gpu", "cpu", "python"])
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


# Random endings in the middle of a run. "share": one of the files of a checkpoint, which a thread writes.
LONG = {"max_train_steps": 8, "checkpointing_steps": 2, "checkpoints_total_limit": 9}
MIDDLE = {
    "step": (loop, "joint_loss"), "log": (Telemetry, "log"), "data": (BatchStream, "_draw"), "average": (Ema, "update"),
    "save": (checkpointing.CheckpointWriter, "_fill_copies"), "share": (checkpointing, "write_hashed"),
    "publish": (checkpointing, "publish_checkpoint"),
}  # fmt: skip
CALLS = {"save": 4, "publish": 4, "share": 16}  # more than come before the last step
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


def at_call(number: int, function: Callable, event: Callable) -> Callable:
    """The function, with the event instead of the call of this number."""
    calls = itertools.count(1)
    return lambda *given, **named: (event if next(calls) == number else function)(*given, **named)


def signalled_before(number: int, function: Callable) -> Callable:
    """The function, after a signal, which is recorded there."""
    return lambda *given, **named: (os.kill(os.getpid(), number), function(*given, **named))[1]


def interrupt(run: Path, data: Path, patched: pytest.MonkeyPatch, place: str, call: int, event: Callable) -> int:
    """Train with an event at a call; check what is left. Returns the exit code."""
    patched.setattr(*MIDDLE[place], at_call(call, getattr(*MIDDLE[place]), event))
    work = lambda: train_here(run, data, **LONG)  # noqa: E731
    found = run_command(work, debug=False, if_out_of_memory=train_script.IF_OUT_OF_MEMORY)
    patched.undo()
    assert not list(run.rglob(".partial*")) and all(map(verify_checkpoint, step_folders(run)))
    assert read_json(run / "run_status.json")["exit_code"] == found
    return found


def is_continued(run: Path, data: Path, unbroken: Path) -> bool:
    assert train_here(run, data, resume="latest", **LONG) == 0
    last, expected = (verify_checkpoint(step_folders(folder)[0])["files"] for folder in (run, unbroken))
    return last == expected and losses(run) == losses(unbroken) and read_json(run / "run_status.json")["exit_code"] == 0


@pytest.fixture
def unbroken(tmp_path, data):
    train_here(tmp_path / "unbroken" / "run", data, **LONG)
    return tmp_path / "unbroken" / "run"


@pytest.mark.soak
def test_random_endings_are_recorded_and_the_run_continues(tmp_path, data, unbroken):
    """Goal R24: signals, and errors of all kinds, at a random call of a random place."""
    errors = [
        (event, code) for place, _, event, code in ENDINGS if place in ("build", "step", "restore") and code < 128
    ]
    for trial in trials("R24"):
        with trial, pytest.MonkeyPatch.context() as patched:
            run, place = tmp_path / str(trial.number) / "run", trial.random.choice([*MIDDLE])
            call, number = trial.random.randrange(1, CALLS.get(place, 8)), trial.random.choice(SIGNALS)
            (event, code), function = trial.random.choice(errors), getattr(*MIDDLE[place])
            if place in ("share", "publish"):
                event, code = raising(OSError(errno.ENOSPC, "full", "f")), 5
            if is_signal := trial.random.random() < 0.4:
                event, code = signalled_before(number, function), 128 + number
            trial.counts[place] += 1
            found = interrupt(run, data, patched, place, call, event)
            is_late = is_signal and place in ("share", "publish") and found == 0  # it came after the last step
            assert found == code or is_late, (place, call)
            assert is_continued(run, data, unbroken)


@pytest.mark.soak
def test_without_memory_at_any_place_nothing_is_lost(tmp_path, data, unbroken, capfd):
    """Goal R23."""
    for trial in trials("R23"):
        with trial, pytest.MonkeyPatch.context() as patched:
            run, place = tmp_path / str(trial.number) / "run", trial.random.choice([*MIDDLE])
            error = trial.random.choice(OUT_OF_MEMORY)
            call = trial.random.randrange(1, CALLS.get(place, 8))
            trial.counts[place] += 1
            capfd.readouterr()
            assert interrupt(run, data, patched, place, call, raising(error)) == 2, (place, error, call)
            message = capfd.readouterr().err
            assert message.count("error:") == 1 and "the memory does not suffice" in message
            assert "training.batch_size" in message and "Traceback" not in message
            assert is_continued(run, data, unbroken)


def test_an_address_that_is_left_over_in_a_shell_is_not_used_alone_and_named_with_others(tmp_path, data, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)  # of a training of another test in this process
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
