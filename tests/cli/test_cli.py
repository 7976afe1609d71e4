"""Bad input through the real command: one message of at most five lines, an exit code, no traceback, nothing written."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from ccella_fast import entrypoint

ROOT = Path(__file__).resolve().parents[2]


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ccella_fast.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})


CASES = {
    "no such studies": (3, ["prepare", "--data", "{tmp}/none", "--out", "{tmp}/out", "--config", "configs/demo.json"]),
    "no such config": (2, ["prepare", "--data", "{tmp}", "--out", "{tmp}/out", "--config", "{tmp}/none.json"]),
    "unknown override": (2, ["prepare", "--data", "{tmp}", "--out", "{tmp}/out", "--set", "data.dims=[1,1,1]"]),
    "grid does not divide": (
        2,
        ["prepare", "--data", "{tmp}", "--out", "{tmp}/out", "--set", "data.dim=[250,256,128]"],
    ),
    "nothing prepared": (3, ["train-vae", "--data", "{tmp}/none", "--out", "{tmp}/out"]),
    "no checkpoint": (4, ["sample", "--checkpoint", "{tmp}/none", "--out", "{tmp}/out"]),
    "report file missing": (
        3,
        ["sample", "--checkpoint", "{tmp}", "--out", "{tmp}/out", "--report_file", "{tmp}/none"],
    ),
    "nothing to report": (3, ["report", "{tmp}/none"]),
    "nothing to export": (4, ["export", "--checkpoint", "{tmp}/none", "--out", "{tmp}/out/x.pt"]),
}


@pytest.mark.parametrize("name", CASES)
def test_mistakes_are_answered_in_five_lines(tmp_path, name):
    code, arguments = CASES[name]
    done = call(*(argument.format(tmp=tmp_path) for argument in arguments))
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done.stderr
    assert len(lines) <= 5 and lines[0].startswith("error: ") and lines[-1].startswith("  fix:"), done.stderr
    assert not (tmp_path / "out").exists()


def test_debug_shows_the_traceback(tmp_path):
    done = call("report", tmp_path / "none", "--debug")
    assert done.returncode != 0 and "Traceback" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["sampel"],
        ["sample"],
        ["prepare", "--dat", "x", "--out", "y"],
        ["phantom", "--out", "{tmp}/out", "--num_studies", "-1"],
        ["sample", "--checkpoint", "x", "--out", "{tmp}/out", "--num_samples", "0"],
    ],
)
def test_a_usage_mistake_is_one_message(tmp_path, arguments):
    done = call(*(argument.format(tmp=tmp_path) for argument in arguments))
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 2, done.stderr
    assert lines[0].startswith("error: ") and lines[1].startswith("  fix:   see ccella-fast") and "--help" in lines[1]
    assert not (tmp_path / "out").exists()


def ends(work, debug=False):
    """`entrypoint.run_command` in a process of its own: (exit code, stdout, stderr)."""
    imports = "import sys, logging\nfrom ccella_fast import entrypoint, errors"
    code = f"{imports}\n{work}\nsys.exit(entrypoint.run_command(work, debug={debug}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_an_unexpected_error_is_one_message_and_asks_for_a_report():
    code, _, said = ends("def work(): raise RuntimeError('first\\nsecond')")
    assert code == 1
    assert (
        said == "error: internal: RuntimeError\n  fix:   run the command again with --debug and report the traceback\n"
    )
    code, _, said = ends("def work(): raise RuntimeError('first\\nsecond')", debug=True)
    assert code == 1 and said.startswith("Traceback") and "second" in said


def test_only_our_own_messages_are_shown():
    others = "logging.getLogger('other').info('theirs'); logging.getLogger('ccella_fast.part').info('ours'); return 3"
    assert ends(f"def work(): {others}") == (3, "", "ours\n")


def test_an_interrupt_and_a_closed_pipe_end_quietly(tmp_path):
    code, _, said = ends("def work(): raise KeyboardInterrupt")
    assert code == 130 and "to continue" in said and "Traceback" not in said
    command = f"{sys.executable} -m ccella_fast.cli env 2>{tmp_path}/said | true; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "141" and (tmp_path / "said").read_text() == ""


def test_processes_beside_the_first_let_it_speak_and_then_tell_what_it_may_not_know():
    second = "import os, time; os.environ['LOCAL_RANK'] = '1'; time.sleep = lambda seconds: print(f'{seconds:g} s')\n"
    assert ends(second + "def work(): raise errors.DataError('only here')") == (3, "2 s\n", "error: only here\n")
    code, _, said = ends(second + "def work(): raise RuntimeError('only here')")
    assert code == 1 and "internal: RuntimeError" in said and "only here" not in said
    killed = second + "time.sleep = lambda seconds: os._exit(9)\n"  # by the launcher, because the first has failed too
    assert ends(killed + "def work(): raise errors.DataError('why')") == (9, "", "")


@pytest.mark.parametrize("with_bar", [True, False])
def test_a_message_has_a_line_of_its_own_beside_a_progress_bar(capsys, with_bar):
    logger = logging.getLogger("ccella_fast")
    before = logger.handlers, logger.level
    try:
        entrypoint.log_to_stderr()
        with tqdm(total=2, desc="train", disable=not with_bar) as bar:
            bar.update()
            logger.info("step 1: a message")
    finally:
        logger.handlers, logger.level = before
    written = capsys.readouterr().err
    assert ("train: " in written) == with_bar
    (line,) = [line for line in written.split("\n") if "a message" in line]
    assert line.rpartition("\r")[2] == "step 1: a message"  # what a terminal shows


def test_a_command_may_write_to_the_working_folder(tmp_path, monkeypatch, capsys):
    """Then the next command's folder is next to it."""
    from ccella_fast import cli

    (tmp_path / "studies").mkdir()
    monkeypatch.chdir(tmp_path / "studies")
    assert cli.main(["phantom", "--out", ".", "--num_studies", "1"]) == 0
    assert f"--out {tmp_path / 'prepared'} " in capsys.readouterr().err
