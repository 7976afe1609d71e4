"""Every command but training ends with the exit code of what happened, as docs/reference/files.md lists them (goal R24)."""

from __future__ import annotations

import errno
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch

from ccella_fast import cli
from ccella_fast.entrypoint import run_command
from ccella_fast.errors import (
    CcellaError,
    CheckpointError,
    ConfigError,
    DataError,
    DiskError,
    NonFiniteError,
    StalledError,
)
from ccella_fast.storage import write_json
from study_fixtures import config, write_studies
from training_fixtures import write_prepared

PREPARE, SAMPLE = "prepare --data {studies} --config {config}", "sample --out {tmp}/new"
#: Command -> its exit code.
COMMANDS = {
    "env --json": 0,
    "phantom --out {tmp}/phantoms --num_studies 1": 0,
    "phantom --out {tmp}/phantoms --num_studies 0": 2,
    "phantom --out {file}/phantoms": 5,
    "check --data {studies} --config {config}": 0,
    "check --data {prepared} --config {config} --allow everything": 2,
    "check --data {defective} --config {config}": 3,
    "check --data {tmp}/absent": 3,
    "check --data {studies} --out {file}/out": 5,
    f"{PREPARE} --out {{tmp}}/prepared": 0,
    f"{PREPARE} --out {{tmp}}/prepared --set data.dim=[16,16,16]": 2,
    f"{PREPARE} --out {{studies}}/out": 2,
    f"{PREPARE} --out {{tmp}}/new --set data.dims=[1]": 2,
    f"{PREPARE} --out {{tmp}}/new --csv {{tmp}}/absent.csv": 3,
    f"{PREPARE} --out {{tmp}}/new --vae {{file}}": 4,
    f"{PREPARE} --out {{file}}/new": 5,
    "prepare --data {defective} --out {tmp}/new --config {config}": 3,
    "prepare --data {empty} --out {tmp}/new --config {config}": 3,
    "import --data {tmp}/absent --out {tmp}/new": 3,
    "import --data {empty} --out {tmp}/new": 3,
    "import --data {empty} --out {tmp}/new --split 1 1": 2,
    f"{SAMPLE} --checkpoint {{tmp}}/absent": 4,
    f"{SAMPLE} --checkpoint {{file}}": 4,
    f"{SAMPLE} --checkpoint {{empty}} --num_samples 0": 2,
    f"{SAMPLE} --checkpoint {{empty}} --report_file {{tmp}}/absent.txt": 3,
    "export --checkpoint {tmp}/absent --out {tmp}/new.pt": 4,
    "push --checkpoint {tmp}/absent --repo a/b --out {tmp}/new": 4,
    "push --checkpoint {tmp}/absent --repo b --out {tmp}/new": 2,
    "push --checkpoint {tmp}/absent --repo a/b --out {file}/new": 5,
    "report {tmp}/absent": 3,
    "zebra": 2,
    "--help": 0,
    "--version": 0,
}


def interrupted() -> NoReturn:
    raise KeyboardInterrupt


def terminated() -> int:
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()
    return 0


def raising(error: Exception) -> Callable[[], NoReturn]:
    def work() -> NoReturn:
        raise error

    return work


#: What happens during a command -> its exit code. Errors of libraries have those of ours that mean the same.
EVENTS: list[tuple[Callable[[], int], int]] = [
    (lambda: 0, 0), (lambda: 3, 3), (interrupted, 130), (terminated, 143), (raising(ZeroDivisionError()), 1),
    (raising(CcellaError("a bug")), 1), (raising(ConfigError("w")), 2), (raising(DataError("w")), 3),
    (raising(CheckpointError("w")), 4), (raising(DiskError("w")), 5), (raising(NonFiniteError("w")), 6),
    (raising(StalledError("w")), 7),
    (raising(MemoryError()), 2), (raising(torch.OutOfMemoryError("CUDA out of memory")), 2),
    (raising(ModuleNotFoundError("No module named 'pydicom'", name="pydicom")), 2),
    (raising(OSError(errno.ENOSPC, "No space left on device")), 5), (raising(OSError(errno.EDQUOT, "Quota", "f")), 5),
    (raising(FileNotFoundError(errno.ENOENT, "No such file", "f")), 3), (raising(OSError(errno.EMFILE, "files")), 2),
    (raising(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid")), 3),
]  # fmt: skip


def exit_code(command: str) -> int:
    try:
        return cli.main(command.split())
    except SystemExit as ended:  # argparse
        return int(ended.code or 0)


def test_every_command_ends_with_the_code_of_what_happened(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], goal: Callable[..., None]
):
    places = {name: tmp_path / name for name in ("studies", "defective", "prepared_before", "empty", "file", "config")}
    for name in ("studies", "defective"):
        write_studies(places[name])
    (places["defective"] / "case1" / "t2w.nii.gz").write_bytes(b"")
    places["prepared"] = write_prepared(places["prepared_before"])
    places["empty"].mkdir()
    places["file"].write_text("neither a folder nor weights")
    write_json(places["config"], config().dump())
    wrong, written = {}, {}
    for command, expected in COMMANDS.items():
        found = exit_code(command.format(tmp=tmp_path, **places))
        written[expected] = capsys.readouterr().err
        wrong |= {} if found == expected else {command: (found, written[expected][-300:])}
        assert not (tmp_path / "new").exists(), command
    for number, (event, expected) in enumerate(EVENTS):
        found = run_command(event, debug=False)
        wrong |= {} if found == expected else {f"event {number}": (found, expected)}
    assert wrong == {}
    goal("R24", value=len(wrong), target=0, n=len(COMMANDS) + len(EVENTS))


def test_the_table_of_the_documentation_has_every_code():
    """The classes of errors and the codes of signals against the page."""
    page = (Path(__file__).resolve().parents[2] / "docs/reference/files.md").read_text()
    rows = re.findall(r"^\| ([\d, ]+) \| .+\|$", page.partition("## Exit codes")[2].partition("\n## ")[0], re.MULTILINE)
    listed = {int(code) for row in rows for code in row.split(",")}
    raised = {error.exit_code for error in (CcellaError, *CcellaError.__subclasses__())}
    assert listed == raised | {0, 129, 130, 138, 141, 143}
    assert {code for _, code in EVENTS} | set(COMMANDS.values()) >= raised | {0, 130, 143}
