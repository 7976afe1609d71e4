"""Ways to start a training, and its messages and exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ccella_fast.checkpoint import step_folders, verify_checkpoint
from ccella_fast.storage import read_json, write_json
from ccella_fast.training.signals import SignalHandler
from training_fixtures import (
    ROOT,
    TOKENS,
    TRAIN_SCRIPT,
    WIDTH,
    environment,
    free_port,
    losses,
    run,
    write_config,
)

BIN = Path(sys.executable).parent


def deepspeed(processes: int) -> tuple[str, ...]:
    return (str(BIN / "deepspeed"), "--master_port", free_port(), "--num_gpus", str(processes))


def test_help_shows_an_example_and_does_not_import_torch():
    output = subprocess.run(
        [sys.executable, "-X", "importtime", str(TRAIN_SCRIPT), "--help"],
        env=environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert "deepspeed ccella_fast/train.py --config configs/demo.json" in output.stdout
    modules = {line.rsplit("|", 1)[-1].strip() for line in output.stderr.splitlines()}
    assert "argparse" in modules and not modules & {"torch", "deepspeed", "pydantic"}


def test_dry_run_reports_sizes_and_writes_nothing(tmp_path, data):
    config = write_config(tmp_path / "config.json")
    before = sorted(tmp_path.rglob("*"))
    output = run("--config", config, "--data", data, "--output_dir", tmp_path / "run", "--dry-run")
    import torch

    from ccella_fast.config import load_config
    from ccella_fast.models import build_model

    with torch.device("meta"):
        parameters = sum(p.numel() for p in build_model(load_config(config)).parameters())
    assert f"{parameters:,} parameters" in output
    assert re.search(r"weights +[\d.]+ [KM]iB", output)  # of a tiny model
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--set", "training.lrr=1"], 2, "did you mean 'lr'?"),
        (["--deepspeed", "absent.json"], 2, "does not exist"),
        (["--resume", "absent"], 4, "give a step folder of "),
        (["--max_train_stepss", "3"], 2, "did you mean --max_train_steps?"),
        (["--data", "absent"], 3, "not prepared"),
    ],
    ids=["misspelled-setting", "no-deepspeed-file", "no-checkpoint", "misspelled-option", "no-data"],
)
def test_a_mistake_gives_one_message_and_an_exit_code(tmp_path, data, arguments, code, words):
    config = write_config(tmp_path / "config.json")
    output = run("--config", config, "--data", data, "--output_dir", tmp_path / "run", *arguments, code=code)
    assert words in output and "Traceback" not in output
    assert not (tmp_path / "run").exists()


def test_the_three_files_of_the_reference(tmp_path, data):
    """The run reads the data that they name, and writes to a folder of its own in their folder of models."""
    values = read_json(ROOT / "configs" / "CCELLA_env.json")
    values |= {"embedding_base_dir": str(tmp_path / "absent"), "model_dir": str(tmp_path / "models")}
    names = {"--env_config": tmp_path / "env.json"}
    names |= {f"--model_{part}": ROOT / "configs" / f"CCELLA_{part}.json" for part in ("config", "def")}
    arguments = [word for pair in names.items() for word in pair]
    write_json(tmp_path / "env.json", values)
    output = run(*arguments, code=3)
    assert "not prepared" in output and str(tmp_path / "absent") in output and not (tmp_path / "models").exists()
    (tmp_path / "models" / "CCELLA").mkdir(parents=True)
    write_json(tmp_path / "models" / "CCELLA" / "config.json", {})
    fits = ["--set", f"model.input_dim={WIDTH}", "--set", f"text.max_length={TOKENS}", "--data", data]
    assert str(tmp_path / "models" / "CCELLA") in run(*arguments, *fits, code=2)
    write_json(tmp_path / "env.json", {**values, "existing_ckpt_filepath": "other.pt"})
    output = run(*arguments, *fits, "--output_dir", tmp_path / "new", code=4)  # its weights are where a run starts
    assert "other.pt" in output and "does not exist" in output and not (tmp_path / "new").exists()
    assert "one file, or the reference's three files" in run(*arguments[:2], "--config", "configs/demo.json", code=2)


def test_the_deepspeed_command_with_its_usual_flags(tmp_path, data):
    config = write_config(tmp_path / "config.json", max_train_steps=2, batch_size=1)
    file = ROOT / "configs" / "deepspeed" / "zero2.json"
    arguments = [
        "--config",
        config,
        "--data",
        data,
        "--output_dir",
        tmp_path / "run",
        "--deepspeed",
        "--deepspeed_config",
        file,
    ]
    output = run(*arguments, launcher=deepspeed(2))
    assert "training.zero_stage is 2" in output and "built successfully" not in output
    assert json.loads((tmp_path / "run" / "run_status.json").read_text())["state"] == "finished"


def test_two_processes_print_one_message(tmp_path, data):
    config = write_config(tmp_path / "config.json")
    arguments = ["--config", config, "--data", data, "--output_dir", tmp_path / "run", "--set", "training.seed=-1"]
    output = run(*arguments, launcher=deepspeed(2), code=2)
    assert output.count("error:") == 1


def test_a_closed_terminal_saves_the_last_step(tmp_path, data):
    """It sends SIGHUP, after which every output fails."""
    config = write_config(tmp_path / "config.json", max_train_steps=100_000, checkpointing_steps=100_000)
    variables = {name: value for name, value in environment().items() if name != "PYTHONUNBUFFERED"}
    process, terminal = pty.fork()
    if process == 0:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may have been started with nohup
        words = ["--config", config, "--data", data, "--output_dir", tmp_path / "run"]
        os.execve(sys.executable, [sys.executable, str(TRAIN_SCRIPT), *map(str, words)], variables)
    os.set_blocking(terminal, False)
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < end:
        with suppress(OSError):
            os.read(terminal, 65536)  # a full terminal stops the process
        time.sleep(0.1)
    os.close(terminal)
    killer = threading.Timer(60, os.kill, (process, signal.SIGKILL))
    killer.start()
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    killer.cancel()
    assert code == 129
    status, (saved,) = read_json(tmp_path / "run" / "run_status.json"), step_folders(tmp_path / "run")
    assert (status["state"], status["exit_code"]) == ("terminated", 129)
    assert verify_checkpoint(saved)["step"] == status["step"] == len(losses(tmp_path / "run")) > 0


def test_nohup_is_respected():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    found = []
    try:
        for handler in (signal.SIG_IGN, signal.SIG_DFL):
            signal.signal(signal.SIGHUP, handler)
            with SignalHandler() as signals:
                signals.record()
                os.kill(os.getpid(), signal.SIGHUP)
                found.append(signals.signal)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert found == [0, signal.SIGHUP]
